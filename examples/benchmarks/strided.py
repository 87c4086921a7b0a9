"""Time features of sliding windows against clips that are cut by hand.

    python examples/benchmarks/strided.py VIDEO
    python examples/benchmarks/strided.py VIDEO --models tiny resnet18 --repeats 7

read each clip: reads the frames of each window from the file, and runs the model on them.
decode once: reads all frames of the video into memory, and runs the model on each window.
tpn: `window_features`, one pass over the file.

All three give the same features; the largest difference is printed, and the multiplications for one window, which do not depend
on the machine. The weights are random, except those of the tiny model.
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from timing import Bench
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tpn
from tpn.cli.script import positive_int, run_cli
from tpn.features import FeatureModel
from tpn.strided import window_features, window_spec
from tpn.video import decode
from tpn.video.transforms import center_crop

MODELS: dict[str, Callable[[], tpn.TPNClassifier]] = {
    "slowonly": lambda: tpn.create_model("tpn_slowonly_r50_k400"),
    "tsm": lambda: tpn.create_model("tpn_tsm_r50_sthv2"),
    "resnet18": lambda: tpn.create_model("tpn", backbone="timm/resnet18", num_frames=8, num_classes=10),
    "efficientnet_lite0": lambda: tpn.create_model("tpn", backbone="timm/efficientnet_lite0", num_frames=8, num_classes=10),
    "tiny": lambda: tpn.create_model("tpn_slowonly_tiny_motion", pretrained=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--stride", type=positive_int, default=16)
    parser.add_argument("--window", type=positive_int, default=64)
    parser.add_argument("--repeats", type=positive_int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    bench = Bench(torch.device(args.device), args.repeats, vars(args) | {"output": str(args.output)}, args.output)
    for name in args.models:
        torch.manual_seed(0)
        classifier = tpn.VideoClassifier(FeatureModel(MODELS[name]()), device=args.device)
        compare(bench, name, classifier, args.video, args.stride, args.window)


def compare(bench: Bench, name: str, classifier: tpn.VideoClassifier, path: str, stride: int, window: int) -> None:
    spec, model = window_spec(classifier.spec, window), classifier.model
    starts = range(0, decode.probe(path).num_frames - spec.clip_span + 1, stride)

    def features(clips: Iterator[Tensor]) -> Tensor:
        """Run the model on clips, uint8 (T, 3, H, W), in batches."""
        results = []
        with torch.inference_mode():
            while batch := list(islice(clips, classifier.batch_size)):
                x = spec.normalize(center_crop(torch.stack(batch).to(classifier.device), spec.crop_size))
                results.append(model(x).cpu())
        return torch.cat(results)

    def indices(start: int) -> range:
        return range(start, start + spec.clip_span, spec.frame_interval)

    def read_each_clip() -> Tensor:
        return features(decode.read_frames(path, indices(start), short_side=spec.short_side) for start in starts)

    def decode_once() -> Tensor:
        frames = torch.stack(list(decode.iter_frames(path, short_side=spec.short_side)))
        return features(frames[indices(start)] for start in starts)

    def one_pass() -> Tensor:
        return torch.stack([each.features for each in window_features(classifier, path, stride=stride, window=window)])

    (expected, by_hand), (found, ours) = (count_macs(run) for run in (read_each_clip, one_pass))
    print(f"{name}: {by_hand / len(starts) / 1e9:.2f} GMAC per window by hand, {ours / len(starts) / 1e9:.2f} by tpn")
    print(f"largest difference, relative to the largest feature: {(found - expected).abs().max() / expected.abs().max():.0e}")
    title = f"{name}: {len(starts)} windows of {window} frames, stride {stride}"
    bench.compare(title, {"read each clip": read_each_clip, "decode once": decode_once, "tpn": one_pass}, clips=len(starts))


def count_macs(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Return the result of a function, and the multiplications of its convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    return result, counter.get_total_flops() // 2


if __name__ == "__main__":
    run_cli(main)
