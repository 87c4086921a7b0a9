"""Measure speed and memory, as ratios within one run: medians of repeats that take turns.

    python examples/benchmark.py                                        # this library against its own plain float32
    python examples/benchmark.py --against mmaction2 --compile          # against the reference implementation, same weights
    python examples/benchmark.py --against torchvision --only inference  # against torchvision's video models

For `--against mmaction2`: pip install mmaction2 "mmcv-lite<2.2" mmengine importlib_metadata, and no transformers, which its
old code cannot import. Both sides are checked to give the same logits before either is timed.
"""

import argparse
import copy
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tpn
from tpn.models.layers import channels_last
from tpn.optimize import DTYPES, fastest_dtype
from tpn.training import command, positive_int, whole_file
from tpn.video import decode
from tpn.video.encode import write_video

PARTS = ["inference", "latency", "views", "training", "decode", "end-to-end"]
Run = Callable[[], Any]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="tpn_slowonly_r50_k400")
    add("--against", choices=["itself", "mmaction2", "torchvision"], default="itself")
    add("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch-size", type=positive_int, help="of inference and training; default: 32 on a GPU, 2 on a CPU")
    add("--compile", action="store_true", help="also time compiled models")
    add("--repeats", type=positive_int, default=7)
    add("--video", type=Path, help="for decode and end-to-end; default: 10 s of 340 x 256 are rendered")
    add("--output", type=Path, help="write the results as JSON")
    return parser.parse_args()


class Bench:
    """Times callables by turns, and collects what came out."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.results: dict[str, list[dict[str, Any]]] = {}
        self._limits: dict[torch.dtype, tuple[float, float]] = {}

    def compare(self, title: str, runs: dict[str, Run], *, clips: int = 0, work: "list[Work] | None" = None) -> None:
        """Time the runs, the first of which is 1x. clips: of a run. work: its layers, for the floor."""
        memory = {name: self._warm_up(run) for name, run in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.repeats):
            for name, run in runs.items():
                seconds[name].append(self.seconds(run))
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        first = next(iter(medians.values()))
        rows = []
        for name, median in medians.items():
            row = {"what": name, "ms": 1e3 * median, "ratio": first / median, "spread": max(seconds[name]) / min(seconds[name])}
            row |= {"clips_per_s": clips / median} if clips else {}
            row |= {"percent_of_floor": 100 * self.floor(work, dtype_of(name)) / median} if work else {}
            row |= {"memory_gib": memory[name] / 2**30} if self.device.type == "cuda" else {}
            rows.append(row)
        self.results[title] = rows
        self._show(title, rows)

    def floor(self, work: "list[Work]", dtype: torch.dtype) -> float:
        """Seconds that the layers must take: each by its arithmetic or by what it reads and writes, whichever is more."""
        per_s, bytes_per_s = self.limits(dtype)
        return sum(max(layer.operations / per_s, layer.numbers * dtype.itemsize / bytes_per_s) for layer in work)

    def limits(self, dtype: torch.dtype) -> tuple[float, float]:
        """Operations a second, of a large matrix product or convolution, and bytes a second, of a copy: what the device does."""
        if dtype not in self._limits:
            size, images = (8192, 64) if self.device.type == "cuda" else (2048, 4)
            like: dict[str, Any] = {"device": self.device, "dtype": dtype, "memory_format": torch.channels_last}
            matrix = torch.randn(size, size).to(self.device, dtype)
            x, weight = torch.randn(images, 512, 28, 28).to(**like), torch.randn(512, 512, 3, 3).to(**like)
            data = torch.zeros(2**28, dtype=torch.uint8, device=self.device)
            copy = torch.empty_like(data)
            product = min(self.seconds(lambda: matrix @ matrix) for _ in range(10))
            conv = min(self.seconds(lambda: F.conv2d(x, weight, padding=1)) for _ in range(10))
            seconds = min(self.seconds(lambda: copy.copy_(data)) for _ in range(10))
            self._limits[dtype] = max(2 * size**3 / product, 2 * x.numel() * 512 * 9 / conv), 2 * len(data) / seconds
        return self._limits[dtype]

    def seconds(self, run: Run) -> float:
        self._sync()
        start = time.perf_counter()
        run()
        self._sync()
        return time.perf_counter() - start

    def _warm_up(self, run: Run) -> int:
        """Run twice; return the peak of the device's memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        run()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run()
        self._sync()
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _show(self, title: str, rows: list[dict[str, Any]]) -> None:
        table = Table(title=title, title_justify="left", box=None)
        heads = {"what": "", "ms": "ms", "ratio": "ratio", "spread": "max/min", "clips_per_s": "clips/s"}
        heads |= {"percent_of_floor": "floor %", "memory_gib": "GiB"}
        shown = [key for key in heads if key in rows[0]]
        for key in shown:
            table.add_column(heads[key], justify="left" if key == "what" else "right", no_wrap=True)
        for row in rows:
            cells = [row["what"], f"{row['ms']:.1f}", f"{row['ratio']:.2f}x", f"{row['spread']:.2f}"]
            table.add_row(*cells, *(f"{row[key]:.1f}" for key in shown[4:]))
        Console(width=110).print(table)


@dataclass
class Work:
    """What a layer cannot do without: multiplications and additions; numbers read and written, weights included."""

    operations: int
    numbers: int


def work_of(model: nn.Module, clips: Tensor) -> list[Work]:
    """Return the work of each convolution and linear layer; all else could be done on the way."""
    layers: list[Work] = []

    def after(layer: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        weight: Any = layer.weight
        operations = 2 * result.numel() * weight[0].numel()
        layers.append(Work(operations, args[0].numel() + weight.numel() + result.numel()))

    shapes = copy.deepcopy(model).to("meta")  # computes nothing
    for module in shapes.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            module.register_forward_hook(after)
    with torch.inference_mode():
        shapes(clips.to("meta"))
    return layers


def dtype_of(name: str) -> torch.dtype:
    """What a run computes in: the word in its name that is a precision."""
    return next(DTYPES[word] for word in name.replace(",", " ").split() if word in DTYPES)


def half_of(device: torch.device) -> str | None:
    """The half precision that the device is fast in, if any."""
    dtype = fastest_dtype(device)
    return None if dtype == torch.float32 else str(dtype).removeprefix("torch.")


def autocast(model: nn.Module, dtype: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.autocast(device.type, getattr(torch, dtype)):
            result: Tensor = model(x)
        return result

    return run


def inference_variants(args: argparse.Namespace, model: tpn.TPNClassifier, reference: nn.Module | None) -> dict[str, Any]:
    """What is compared: name → function of clips."""
    half = half_of(args.device)
    variants: dict[str, Any] = {}
    if reference is not None:
        variants["mmaction2 float32"] = reference
        variants |= {f"mmaction2 autocast {half}": autocast(reference, half, args.device)} if half else {}
    variants["tpn float32, as it is"] = model
    for dtype in ("float32", *([half] if half else [])):
        variants[f"tpn.optimize {dtype}"] = tpn.optimize(model, dtype)
        if args.compile:
            variants[f"tpn.optimize {dtype} compiled"] = tpn.optimize(model, dtype, compile=True)
    return variants


def time_inference(bench: Bench, args: argparse.Namespace, variants: dict[str, Any], model: tpn.TPNClassifier) -> None:
    spec = model.input_spec
    shapes = {"inference": (args.batch_size, spec.crop_size), "latency": (1, spec.crop_size), "views": (30, spec.three_crop_size)}
    for part, (batch, size) in shapes.items():
        if part not in args.only:
            continue
        clips = torch.randn(batch, 3, spec.num_frames, size, size, device=args.device)
        runs = {name: in_batches(variant, clips, args.batch_size) for name, variant in variants.items()}
        title = f"{part}: {batch} x {spec.num_frames} x {size} x {size}"
        bench.compare(title, runs, clips=batch, work=work_of(model, clips))


def in_batches(variant: Callable[[Tensor], Tensor], clips: Tensor, batch_size: int) -> Run:
    @torch.inference_mode()
    def run() -> None:
        for batch in clips.split(batch_size if clips.device.type == "cpu" else len(clips)):
            variant(batch)

    return run


def time_training(bench: Bench, args: argparse.Namespace, model: tpn.TPNClassifier, reference: nn.Module | None) -> None:
    """A step: forward with both losses, backward, SGD."""
    spec, half = model.input_spec, half_of(args.device)
    shape = (args.batch_size, 3, spec.num_frames, spec.crop_size, spec.crop_size)
    clips = torch.randn(shape, device=args.device)
    labels = torch.randint(model.num_classes, (args.batch_size,), device=args.device)

    def step_of(network: Any, dtype: str = "float32", compile: bool = False) -> Run:
        network = copy.deepcopy(network).train()
        optimizer = torch.optim.SGD(
            network.parameters(), 1e-3, momentum=0.9, nesterov=True, fused=isinstance(network, tpn.TPNClassifier)
        )
        forward = torch.compile(network.forward_with_aux) if compile else network.forward_with_aux

        def step() -> None:
            with torch.autocast(args.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
                logits, aux_logits = forward(clips)
            loss = F.cross_entropy(logits.float(), labels) + 0.5 * F.cross_entropy(aux_logits.float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    ours = copy.deepcopy(model)
    channels_last(ours)
    precisions = ["float32", *([half] if half else [])]
    runs = {f"mmaction2 {dtype}": step_of(reference, dtype) for dtype in precisions} if reference is not None else {}
    runs |= {} if reference is not None else {"tpn float32, as it is": step_of(model)}
    runs |= {f"tpn channels-last {dtype}": step_of(ours, dtype) for dtype in precisions}
    if args.compile:
        runs |= {f"tpn channels-last {dtype} compiled": step_of(ours, dtype, True) for dtype in precisions}
    bench.compare(f"training step: {' x '.join(map(str, shape[:1] + shape[2:]))}", runs, clips=args.batch_size)


def sample_video(folder: Path, seconds: int = 10) -> Path:
    """Render a video of 340 x 256, 30 frames a second, with something of everything in it."""
    rng = np.random.default_rng(0)
    background = rng.integers(0, 256, (32, 42, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    shown = [np.roll(background, (i // 2, i), (0, 1)) for i in range(30 * seconds)]
    frames = np.stack([np.pad(image, ((0, 0), (0, 4), (0, 0)), mode="wrap") for image in shown])
    path = folder / "video.mp4"
    write_video(path, frames, fps=30)
    return path


def time_reading(bench: Bench, args: argparse.Namespace, video: Path, spec: tpn.InputSpec) -> None:
    info = decode.probe(video)
    last = int(spec.indices(info.num_frames).max())

    def decode_only() -> None:
        with av.open(str(video)) as container:
            container.streams.video[0].thread_type = "AUTO"
            for number, _ in enumerate(container.decode(video=0)):
                if number == last:
                    break

    def read() -> None:
        frames, _ = decode.sample_frames(video, spec.indices, short_side=spec.short_side)
        spec.crop_views(frames)

    runs = {"decoding alone": decode_only, f"frames of {spec.num_clips} clips, resized, {spec.num_crops} crops": read}
    bench.compare(f"reading: {video.name}, {info.num_frames} frames of {info.width} x {info.height}", runs)


def time_end_to_end(bench: Bench, args: argparse.Namespace, video: Path, model: tpn.TPNClassifier) -> None:
    """Videos to probabilities, one clip each, so that reading and computing are both seen."""
    videos = [video] * 8
    plain = tpn.VideoClassifier(model, device=args.device)
    fast = tpn.VideoClassifier(model, device=args.device, precision="auto")
    views = {"num_clips": 1, "num_crops": 1}
    half = half_of(args.device) or "float32"
    runs = {
        "one by one, float32 as it is": lambda: [plain(path, **views) for path in videos],
        f"predict_each, {half}": lambda: list(fast.predict_each(videos, **views)),
    }
    bench.compare(f"end to end: {len(videos)} videos, 1 view each", runs, clips=len(videos))


TORCHVISION = {  # frames and side of a clip, as its documentation says the accuracy was measured with
    "r3d_18": (16, 112),
    "mc3_18": (16, 112),
    "r2plus1d_18": (16, 112),
    "s3d": (128, 224),
    "mvit_v2_s": (16, 224),
    "swin3d_t": (32, 224),
}


def time_torchvision(bench: Bench, args: argparse.Namespace, model: tpn.TPNClassifier) -> None:
    """torchvision's video models, in the same precision, with the accuracies that their publishers report."""
    half = fastest_dtype(args.device)
    optimized = tpn.optimize(model, half, compile=args.compile)
    spec = model.input_spec
    clips = torch.randn(args.batch_size, 3, spec.num_frames, spec.crop_size, spec.crop_size, device=args.device)
    name = str(half).removeprefix("torch.")
    about = tpn.model_info(args.model)
    label = f"{about.weights.model} {about.weights.reported_top1:.1f} %, {spec.num_frames} frames, {name}"
    runs: dict[str, Run] = {label: in_batches(optimized, clips, args.batch_size)}
    for other, (frames, size) in TORCHVISION.items():
        weights = torchvision.models.get_model_weights(other).DEFAULT
        network = torchvision.models.get_model(other).eval().to(args.device, half)
        shape = (args.batch_size, 3, frames, size, size)
        x = torch.randn(shape, device=args.device, dtype=half).contiguous(memory_format=torch.channels_last_3d)
        top1 = weights.meta["_metrics"]["Kinetics-400"]["acc@1"]
        label = f"{other} {top1:.1f} %, {frames} frames, {name}"
        runs[label] = in_batches(torch.compile(network) if args.compile else network, x, args.batch_size)
    bench.compare(
        f"torchvision, batch {args.batch_size}; top-1 on Kinetics-400 as reported upstream", runs, clips=args.batch_size
    )


def main() -> None:
    args = parse_args()
    args.device = torch.device(args.device)
    args.batch_size = args.batch_size or (32 if args.device.type == "cuda" else 2)
    name = (
        torch.cuda.get_device_name()
        if args.device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    about = {"tpn": tpn.__version__, "torch": torch.__version__, "device": name, "model": args.model, "repeats": args.repeats}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    bench = Bench(args.device, args.repeats)
    model = tpn.create_model(args.model).eval()
    reference = None
    if args.against == "mmaction2":
        if args.model != "tpn_slowonly_r50_k400":
            raise ValueError(f"the reference is built for tpn_slowonly_r50_k400 only, got {args.model}")
        from mmaction2 import with_reference  # the file beside this one

        reference = with_reference(model).to(args.device)
    model.to(args.device)
    if args.against == "torchvision":
        time_torchvision(bench, args, model)
    elif {"inference", "latency", "views"} & set(args.only):
        time_inference(bench, args, inference_variants(args, model, reference), model)
    if args.against != "torchvision" and "training" in args.only:
        time_training(bench, args, model, reference)
    with tempfile.TemporaryDirectory() as folder:
        if {"decode", "end-to-end"} & set(args.only) and args.against != "torchvision":
            video = args.video or sample_video(Path(folder))
            if "decode" in args.only:
                time_reading(bench, args, video, model.input_spec)
            if "end-to-end" in args.only:
                time_end_to_end(bench, args, video, model)
    if args.output:
        with whole_file(args.output, "w") as file:
            json.dump({"about": about, "results": bench.results}, file, indent=1)


if __name__ == "__main__":
    command(main)
