"""Compare the time for decoding training clips with the time for cropping, flipping and color jitter.

    python examples/benchmarks/loader.py videos/train --model tpn_slowonly_r50_k400 --workers 2

Reads the same clips in turns: only decoded, also cropped and flipped, also with color jitter. Prints medians: clips per second
and loader process, and the ratio to decoding alone.
"""

import argparse
import os
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

import tpn
from tpn.cli.script import positive_int, run_cli
from tpn.video.datasets import VideoDataset, open_dataset


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of class folders, or list")
    parser.add_argument("--model", default="tpn_slowonly_r50_k400", help="determines the length and size of the clips")
    parser.add_argument("--clips", type=int, default=64, help="clips per repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=positive_int, default=1, help="loader processes")
    return parser.parse_args()


class Decoded(Dataset[int]):
    """Decode the frames of a dataset's clips without transforming them."""

    def __init__(self, data: VideoDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> int:
        rng = np.random.default_rng([self.data.seed, 0, index])
        self.data.read(self.data.items[index], lambda total: self.data.spec.random_indices(total, rng))
        return 0


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    data = open_dataset(args.data, tpn.input_spec(args.model), train=True)
    plain = open_dataset(args.data, tpn.input_spec(args.model), train=True)
    plain.use_spec(plain.spec, color_jitter=False)
    indices = [i % len(data) for i in range(args.clips)]

    def load(dataset: Dataset[Any]) -> None:
        for _ in DataLoader(Subset(dataset, indices), batch_size=8, num_workers=args.workers):
            pass

    datasets = {"decode": Decoded(data), "decode, crop, flip": plain, "decode, crop, flip, color jitter": data}
    seconds: dict[str, list[float]] = {name: [] for name in datasets}
    for repeat in range(args.repeats + 1):
        for name, dataset in datasets.items():
            start = time.perf_counter()
            load(dataset)
            if repeat:  # the first one warms up
                seconds[name].append((time.perf_counter() - start) * args.workers)
    base = seconds["decode"]
    print(f"{data.spec.num_frames} frames, {data.spec.crop_size} pixels, {os.cpu_count()} cores, torch {torch.__version__}")
    for name, values in seconds.items():
        ratio = statistics.median(value / reference for value, reference in zip(values, base, strict=True))
        print(f"{name:<32} {args.clips / statistics.median(values):7.1f} clips/s per process  {ratio:5.2f}x")


if __name__ == "__main__":
    run_cli(main)
