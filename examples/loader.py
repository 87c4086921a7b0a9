"""Measure what the training loader costs beyond decoding.

    python examples/loader.py videos/train --model tpn_slowonly_r50_k400 --workers 2

In turn, over the same draws: decoding alone (one thread, no transform), the data set (decoding, crop, flip, colours), and a
DataLoader whose workers run that data set. Prints clips per second of a worker, and the time in terms of decoding alone; medians.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

import tpn
from tpn.video.datasets import VideoDataset, open_dataset


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of class folders, or list")
    parser.add_argument("--model", default="tpn_slowonly_r50_k400", help="whose clips to read")
    parser.add_argument("--clips", type=int, default=64, help="clips of one measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="of the DataLoader")
    return parser.parse_args()


def decode_only(data: VideoDataset, indices: list[int]) -> None:
    """Read the frames that the data set reads, and nothing more."""
    for index in indices:
        rng = np.random.default_rng([data.seed, 0, index])
        data.read(data.items[index], lambda total, rng=rng: data.spec.random_indices(total, rng))


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    data = open_dataset(args.data, tpn.input_spec(args.model), train=True)
    plain = open_dataset(args.data, tpn.input_spec(args.model), train=True)
    plain.transform = plain.spec.train_transform(color_jitter=False, normalize=False)
    indices = [i % len(data) for i in range(args.clips)]

    def through_workers() -> None:
        for _ in DataLoader(Subset(data, indices), batch_size=8, num_workers=args.workers):
            pass

    ways: dict[str, tuple[Callable[[], object], int]] = {
        "decoding alone": (lambda: decode_only(data, indices), 1),
        "data set without colour jitter": (lambda: [plain[i] for i in indices], 1),
        "data set": (lambda: [data[i] for i in indices], 1),
        f"DataLoader, workers: {args.workers}": (through_workers, args.workers),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(args.repeats + 1):
        for name, (work, processes) in ways.items():
            began = time.perf_counter()
            work()
            if repeat:  # the first is to warm up
                seconds[name].append((time.perf_counter() - began) * processes)
    base = seconds["decoding alone"]
    print(f"{data.spec.num_frames} frames to {data.spec.crop_size} pixels, {os.cpu_count()} cores, torch {torch.__version__}")
    for name, values in seconds.items():
        ratio = statistics.median(value / reference for value, reference in zip(values, base, strict=True))
        print(f"{name:<32} {args.clips / statistics.median(values):7.1f} clips/s per worker  {ratio:5.2f} x decoding")


if __name__ == "__main__":
    main()
