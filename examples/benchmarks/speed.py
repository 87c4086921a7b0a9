"""Compare the speed and memory of models: medians of interleaved repeats, as ratios to the first.

    python examples/benchmarks/speed.py                                         # tpn.optimize against the plain model
    python examples/benchmarks/speed.py --against mmaction2 --compile           # the reference implementation, same weights
    python examples/benchmarks/speed.py --against torchvision --only inference  # torchvision's video models
    python examples/benchmarks/speed.py --against openvino --only latency loading end-to-end --threads 1  # exported, also in int8
    python examples/benchmarks/speed.py --only memory --model tpn_slowonly_r101_32x2_k400   # activation checkpointing

docs/pages/performance.md has results. `--against mmaction2` requires the packages that mmaction2.py lists, and checks that both
implementations give the same logits before it times them.
"""

import argparse
import copy
import multiprocessing
import platform
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from numpy.typing import NDArray
from timing import Bench, Run, fast_half, layer_work, peak_memory
from torch import Tensor, nn

import tpn
from tpn import export
from tpn.cli.script import positive_int, run_cli
from tpn.devices import resolve_device
from tpn.models.layers import channels_last
from tpn.video import containers, decode
from tpn.video.encode import write_video

Files = dict[str, tuple[Path, str | None]]
"""Exported files and precisions by name."""
PARTS = ["inference", "latency", "views", "training", "memory", "decode", "end-to-end"]
PARTS_AGAINST = {
    "itself": PARTS,
    "mmaction2": PARTS,
    "torchvision": ["inference"],
    "openvino": ["inference", "latency", "end-to-end", "loading"],
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="tpn_slowonly_r50_k400")
    add("--against", choices=list(PARTS_AGAINST), default="itself")
    add("--only", nargs="+", metavar="PART", help="; ".join(f"{key}: {', '.join(parts)}" for key, parts in PARTS_AGAINST.items()))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch-size", type=positive_int, help="for inference and training; default: 32 on a GPU, 2 on a CPU")
    add("--threads", type=positive_int, help="on a CPU; default: PyTorch's")
    add("--compile", action="store_true", help="also time compiled models")
    add("--repeats", type=positive_int, default=7)
    add("--video", type=Path, help="for decode and end-to-end; default: a rendered one, 10 s of 340x256 pixels")
    add("--output", type=Path, help="JSON file for the results, updated after each part")
    args = parser.parse_args()
    parts = PARTS_AGAINST[args.against]
    args.only = args.only or parts
    if not set(args.only) <= set(parts):
        parser.error(f"--against {args.against} takes --only {', '.join(parts)}, got {', '.join(args.only)}")
    if args.against == "openvino" and args.device != "cpu":
        parser.error(f"--against openvino needs --device cpu, got {args.device}")
    return args


def autocast(model: nn.Module, dtype: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.autocast(device.type, getattr(torch, dtype)):
            result: Tensor = model(x)
        return result

    return run


def inference_variants(
    args: argparse.Namespace, model: tpn.TPNClassifier, reference: nn.Module | None, files: Files
) -> dict[str, Any]:
    """Return the compared models by name, as functions of clips."""
    half = fast_half(args.device)
    variants: dict[str, Any] = {}
    if reference is not None:
        variants["mmaction2 float32"] = reference
        variants |= {f"mmaction2 autocast {half}": autocast(reference, half, args.device)} if half else {}
    variants["tpn float32"] = model
    for dtype in ("float32", *([half] if half else [])):
        variants[f"tpn.optimize {dtype}"] = tpn.optimize(model, dtype)
        if args.compile:
            variants[f"tpn.optimize {dtype} compiled"] = tpn.optimize(model, dtype, compile=True)
    variants |= {name: export.load(path, precision=precision) for name, (path, precision) in files.items()}
    return variants


def time_inference(bench: Bench, args: argparse.Namespace, variants: dict[str, Any], model: tpn.TPNClassifier) -> None:
    spec = model.input_spec
    views = spec.with_views(10, 3)
    shapes = {"inference": (args.batch_size, spec.crop_size), "latency": (1, spec.crop_size), "views": (30, views.view_size)}
    for part, (batch, size) in shapes.items():
        if part not in args.only:
            continue
        clips = torch.randn(batch, 3, spec.num_frames, size, size, device=args.device)
        runs = {name: in_batches(variant, clips, args.batch_size) for name, variant in variants.items()}
        title = f"{part}: {batch} x {spec.num_frames} x {size} x {size}"
        bench.compare(title, runs, clips=batch, work=layer_work(model, clips))


def in_batches(variant: Callable[[Tensor], Tensor], clips: Tensor, batch_size: int) -> Run:
    @torch.inference_mode()
    def run() -> None:
        for batch in clips.split(batch_size if clips.device.type == "cpu" else len(clips)):
            variant(batch)

    return run


def step_of(network: Any, clips: Tensor, labels: Tensor, dtype: str, compile: bool = False) -> Run:
    """Return a training step: forward, loss with auxiliary loss, backward, SGD."""
    ours = isinstance(network, tpn.TPNClassifier)
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9, nesterov=True, fused=ours)
    forward = torch.compile(network.forward_with_aux) if compile else network.forward_with_aux

    def step() -> None:
        with torch.autocast(clips.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            logits, aux_logits = forward(clips)
        loss = F.cross_entropy(logits.float(), labels) + 0.5 * F.cross_entropy(aux_logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_training(bench: Bench, args: argparse.Namespace, model: tpn.TPNClassifier, reference: nn.Module | None) -> None:
    spec, half = model.input_spec, fast_half(args.device)
    shape = (args.batch_size, 3, spec.num_frames, spec.crop_size, spec.crop_size)
    clips = torch.randn(shape, device=args.device)
    labels = torch.randint(model.num_classes, (args.batch_size,), device=args.device)

    def run(network: nn.Module, dtype: str, compile: bool = False) -> Run:
        return step_of(copy.deepcopy(network).train(), clips, labels, dtype, compile)

    ours = copy.deepcopy(model)
    channels_last(ours)
    precisions = ["float32", *([half] if half else [])]
    runs = {f"mmaction2 {dtype}": run(reference, dtype) for dtype in precisions} if reference is not None else {}
    runs |= {} if reference is not None else {"tpn float32": run(model, "float32")}
    runs |= {f"tpn channels-last {dtype}": run(ours, dtype) for dtype in precisions}
    if args.compile:
        runs |= {f"tpn channels-last {dtype} compiled": run(ours, dtype, True) for dtype in precisions}
    bench.compare(f"training step: {' x '.join(map(str, shape[:1] + shape[2:]))}", runs, clips=args.batch_size)


def measure_step(name: str, device: torch.device, batch_size: int, dtype: str, checkpointing: bool) -> tuple[int, float]:
    """Return the peak memory of training in bytes, without the model, and the seconds of the second step.

    The peak never decreases, so each measurement needs a new process.
    """
    model = tpn.create_model(name).to(device).train()
    channels_last(model)
    model.set_grad_checkpointing(checkpointing)
    spec = model.input_spec
    clips = torch.randn(batch_size, 3, spec.num_frames, spec.crop_size, spec.crop_size, device=device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    step = step_of(model, clips, labels, dtype)
    before = peak_memory(device)
    step()
    seconds = Bench(device, 1).seconds(step)
    return peak_memory(device) - before, seconds


def measure_memory(bench: Bench, args: argparse.Namespace, spec: tpn.InputSpec) -> None:
    batch_size = 8 if args.device.type == "cuda" else 1
    rows: list[dict[str, Any]] = []
    for dtype in ("float32", *filter(None, [fast_half(args.device)])):
        for checkpointing in (False, True):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory, seconds = pool.apply(measure_step, (args.model, args.device, batch_size, dtype, checkpointing))
            row = {"what": f"tpn {dtype}{', checkpointing' if checkpointing else ''}", "ms": 1e3 * seconds}
            first = rows[0] if rows else row
            rows.append(row | {"ratio": first["ms"] / row["ms"], "memory_gib": memory / 2**30})
    size = f"{batch_size} x {spec.num_frames} x {spec.crop_size} x {spec.crop_size}"
    bench.record(f"memory of a training step: {args.model}, {size}, without the model", rows)


def sample_video(folder: Path, seconds: int = 10) -> Path:
    """Render a video of 340x256 pixels at 30 frames per second: a textured background that moves diagonally."""
    rng = np.random.default_rng(0)
    background = rng.integers(0, 256, (32, 42, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    images = [np.roll(background, (i // 2, i), (0, 1)) for i in range(30 * seconds)]
    frames = np.stack([np.pad(image, ((0, 0), (0, 4), (0, 0)), mode="wrap") for image in images])
    path = folder / "video.mp4"
    write_video(path, frames, fps=30)
    return path


def time_reading(bench: Bench, args: argparse.Namespace, video: Path, spec: tpn.InputSpec) -> None:
    """Time decoding, resizing and cropping all views, uint8; the file is in the cache of the operating system."""
    info = decode.probe(video)
    last = int(spec.indices(info.num_frames).max())

    def decode_only() -> None:
        with av.open(str(video)) as container:
            container.streams.video[0].thread_type = "AUTO"
            for number, _ in enumerate(container.decode(video=0)):
                if number == last:
                    break

    def read(views: tpn.InputSpec = spec) -> tuple[list[Tensor], NDArray[np.int64]]:
        frames, clips = decode.sample_frames(video, views.indices, short_side=views.short_side)
        return views.crop_views(frames), clips

    # predict_each decodes each video in one thread, several videos at a time.
    one_thread = ThreadPoolExecutor(1, initializer=containers.decode_in_one_thread)
    single = replace(spec, num_clips=1, num_crops=1, flip=False)
    what = f"{spec.num_clips} clips x {spec.num_crops} crops"
    runs: dict[str, Run] = {"decoding alone": decode_only, f"tpn {what}": read}
    runs[f"tpn {what}, one thread"] = lambda: one_thread.submit(read).result()
    runs["tpn 1 clip x 1 crop, one thread"] = lambda: one_thread.submit(read, single).result()
    if args.against == "mmaction2":
        from mmaction2 import reader

        reference = reader(spec)
        crops, clips = read()
        ours = torch.stack([crop[torch.from_numpy(clip)] for crop in crops for clip in clips]).transpose(1, 2)
        difference = (ours.int() - torch.from_numpy(reference(video)).int()).abs().max()
        print(f"largest difference between pixels of mmaction2 and tpn: {difference} of 255")
        runs[f"mmaction2 {what}"] = lambda: reference(video)
    with one_thread:
        bench.compare(f"reading: {video.name}, {info.num_frames} frames of {info.width} x {info.height}", runs)


def time_end_to_end(bench: Bench, args: argparse.Namespace, video: Path, model: tpn.TPNClassifier, files: Files) -> None:
    """Time the way from files to probabilities, with one view per video, so that reading takes a visible share."""
    videos = [video] * 8
    plain = tpn.VideoClassifier(model, device=args.device)
    fast = tpn.VideoClassifier(model, device=args.device, precision="auto")
    views = {"num_clips": 1, "num_crops": 1}
    precision = fast_half(args.device) or "float32"
    runs = {
        "one by one, float32": lambda: [plain(path, **views) for path in videos],
        f"predict_each, {precision}": lambda: list(fast.predict_each(videos, **views)),
    }
    for name, (path, precision) in files.items():
        exported = tpn.VideoClassifier(path, precision=precision)
        runs[f"predict_each, {name}"] = partial(lambda classifier: list(classifier.predict_each(videos, **views)), exported)
    bench.compare(f"end to end: {len(videos)} videos, 1 view each", runs, clips=len(videos))


TORCHVISION = {  # number of frames and crop size with which torchvision reports the accuracy
    "r3d_18": (16, 112),
    "mc3_18": (16, 112),
    "r2plus1d_18": (16, 112),
    "s3d": (128, 224),
    "mvit_v2_s": (16, 224),
    "swin3d_t": (32, 224),
}


def time_torchvision(bench: Bench, args: argparse.Namespace, model: tpn.TPNClassifier) -> None:
    """Compare with torchvision's video models in the same precision, next to their reported accuracies."""
    # Not in bfloat16 on a CPU, which some of them do not support.
    dtype = torch.float16 if args.device.type == "cuda" else torch.float32
    optimized = tpn.optimize(model, dtype, compile=args.compile)
    spec = model.input_spec
    clips = torch.randn(args.batch_size, 3, spec.num_frames, spec.crop_size, spec.crop_size, device=args.device)
    name = str(dtype).removeprefix("torch.")
    about = tpn.model_info(args.model)
    reported = about.checkpoint.reported_top1
    label = f"{about.checkpoint.model} {'–' if reported is None else f'{reported:.1f}%'}, {spec.num_frames} frames, {name}"
    runs: dict[str, Run] = {label: in_batches(optimized, clips, args.batch_size)}
    for other, (frames, size) in TORCHVISION.items():
        weights = torchvision.models.get_model_weights(other).DEFAULT
        network = torchvision.models.get_model(other).eval().to(args.device, dtype)
        shape = (args.batch_size, 3, frames, size, size)
        x = torch.randn(shape, device=args.device, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
        top1 = weights.meta["_metrics"]["Kinetics-400"]["acc@1"]
        label = f"{other} {top1:.1f}%, {frames} frames, {name}"
        runs[label] = in_batches(torch.compile(network) if args.compile else network, x, args.batch_size)
    bench.compare(
        f"torchvision, batch {args.batch_size}; top-1 on Kinetics-400 as reported upstream", runs, clips=args.batch_size
    )


def main() -> None:
    args = parse_args()
    args.device = resolve_device(args.device)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    args.batch_size = args.batch_size or (32 if args.device.type == "cuda" else 2)
    name = (
        torch.cuda.get_device_name()
        if args.device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    about = {"tpn": tpn.__version__, "torch": torch.__version__, "device": name, "model": args.model, "repeats": args.repeats}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if args.device.type == "cuda" and torch.__version__.startswith("2.9."):
        print(
            "warning: 3D convolutions in half precision are slow in PyTorch 2.9: https://github.com/pytorch/pytorch/issues/166122"
        )
    bench = Bench(args.device, args.repeats, about, args.output)
    model = tpn.create_model(args.model).eval()
    reference = None
    if args.against == "mmaction2":
        if args.model != "tpn_slowonly_r50_k400":
            raise ValueError(f"--against mmaction2 supports only --model tpn_slowonly_r50_k400, got {args.model}")
        from mmaction2 import build_reference

        reference = build_reference(model).to(args.device)
    model.to(args.device)
    if args.against == "torchvision":
        time_torchvision(bench, args, model)
        return
    with tempfile.TemporaryDirectory() as folder:
        run_parts(bench, args, model, reference, Path(folder))


def run_parts(
    bench: Bench, args: argparse.Namespace, model: tpn.TPNClassifier, reference: nn.Module | None, folder: Path
) -> None:
    """Run the parts of the benchmark; `folder` is for exported files and the video."""
    files: Files = {}
    if args.against == "openvino":
        from exported import measure_loading, write_files

        files = write_files(model, folder)
    if {"inference", "latency", "views"} & set(args.only):
        time_inference(bench, args, inference_variants(args, model, reference, files), model)
    if "training" in args.only:
        time_training(bench, args, model, reference)
    if "memory" in args.only:
        measure_memory(bench, args, model.input_spec)
    if "loading" in args.only:
        tpn.save_pretrained(model, folder / "saved")
        measure_loading(bench, {"tpn float32": (folder / "saved", "float32")} | files)
    if {"decode", "end-to-end"} & set(args.only):
        video = args.video or sample_video(folder)
        if "decode" in args.only:
            time_reading(bench, args, video, model.input_spec)
        if "end-to-end" in args.only:
            time_end_to_end(bench, args, video, model, files)


if __name__ == "__main__":
    run_cli(main)
