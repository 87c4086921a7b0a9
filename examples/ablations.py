"""Repeat the ablations of the TPN paper (its section 4) at a small size: rendered motion, narrow networks, several seeds.

    python examples/ablations.py --output runs/ablations
    python examples/ablations.py --output runs/ablations --table      # only print the tables

The frames of all clips go through the first two stages of the bundled model once; these stages see single frames only, and stay
frozen. Each variant trains the rest from random weights: two stages that see time, the pyramid, and the classifier. The same
command resumes, also while another process works on the same output. `ablations.jsonl` has the results.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tpn
from tpn.cli.script import positive_int, run_cli
from tpn.files import atomic_write
from tpn.training.loss import TrainingLoss
from tpn.video import motion

TEMPOS = (2.0, 8.0)
"""Slowest and fastest tempo, 0.5x to 2x of one in the middle: a cycle of the motion takes 32 to 8 frames."""
SIZE, BATCH_SIZE, LR = 48, 16, 2e-3
CHANNELS, WIDTH = 32, 8  # of the frame maps, and of the trained network's stem
SPLITS = {"train": (1, 20), "test": (2, 32)}
"""Seed and frames of the videos."""
SPAN = 16
"""Frames from which training takes a clip: 8 frames, every 2nd; 4, every 4th; or all 16."""
INTERVALS = (1, 2, 3, 4)

SLOWONLY: dict[str, Any] = {"backbone": "slowonly", "depth": 18, "base_channels": WIDTH}
FOLDED: dict[str, Any] = {"backbone": "timm/resnet18", "backbone_args": {"channels": [WIDTH * 2**i for i in range(4)]}}
TSM: dict[str, Any] = {**FOLDED, "temporal_shift": True}
NONE: dict[str, Any] = {"neck": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "no pyramid": SLOWONLY | NONE,
    "pyramid": SLOWONLY,
    "stages 4, 4": SLOWONLY | {"out_indices": (3, 3), "temporal_scales": (4, 8)},
    "stages 2, 3, 4": SLOWONLY | {"out_indices": (1, 2, 3)},
    "isolation": SLOWONLY | {"flow_order": "isolation"},
    "top-down": SLOWONLY | {"flow_order": "top_down"},
    "bottom-up": SLOWONLY | {"flow_order": "bottom_up"},
    "parallel": SLOWONLY | {"flow_order": "parallel"},
    "no spatial modulation": SLOWONLY | {"spatial_modulation": False},
    "no temporal modulation": SLOWONLY | {"temporal_modulation": False},
    "neither modulation": SLOWONLY | {"spatial_modulation": False, "temporal_modulation": False},
    "rates 4, 8": SLOWONLY | {"temporal_scales": (4, 8)},
    "rates 2, 8": SLOWONLY | {"temporal_scales": (2, 8)},
    "rates 1, 8": SLOWONLY | {"temporal_scales": (1, 8)},
    "no auxiliary loss": SLOWONLY | {"aux_head": False},
    "2D, no pyramid": FOLDED | NONE,
    "2D, pyramid": FOLDED,
    "TSM, no pyramid": TSM | NONE,
    "TSM, pyramid": TSM,
    "4 frames, no pyramid": SLOWONLY | NONE | {"num_frames": 4},
    "4 frames, pyramid": SLOWONLY | {"num_frames": 4},
    "16 frames, no pyramid": SLOWONLY | NONE | {"num_frames": 16},
    "16 frames, pyramid": SLOWONLY | {"num_frames": 16},
}
TABLES: dict[str, tuple[str, ...]] = {
    "Sources": ("pyramid", "no pyramid", "stages 4, 4", "stages 2, 3, 4"),
    "Flows": ("pyramid", "isolation", "top-down", "bottom-up", "parallel"),
    "Modulation": ("pyramid", "no spatial modulation", "no temporal modulation", "neither modulation"),
    "Rates": ("pyramid", "rates 4, 8", "rates 2, 8", "rates 1, 8"),
    "Auxiliary loss": ("pyramid", "no auxiliary loss"),
    "Backbones": ("no pyramid", "pyramid", "2D, no pyramid", "2D, pyramid", "TSM, no pyramid", "TSM, pyramid"),
    "Frames": (
        "no pyramid", "pyramid", "4 frames, no pyramid", "4 frames, pyramid", "16 frames, no pyramid", "16 frames, pyramid",
    ),
}  # fmt: skip
"""Variants of each table; the others are compared with the first one."""
SPEEDS = ("no pyramid", "pyramid", "rates 4, 8", "rates 1, 8")
"""Variants that are tested at all `INTERVALS`, although they were trained at 2."""

Rows = dict[str, dict[int, dict[str, Any]]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=positive_int, default=3)
    parser.add_argument("--clips", type=positive_int, default=200, help="training clips per class")
    parser.add_argument("--test-clips", type=positive_int, default=40, help="test clips per class")
    parser.add_argument("--steps", type=positive_int, default=1500, help="training steps of each run")
    parser.add_argument("--table", action="store_true", help="print the results so far, and stop")
    return parser.parse_args()


@torch.no_grad()
def frame_maps(args: argparse.Namespace, split: str) -> NDArray[np.float16]:
    """Return what the frozen stages make of each frame, (videos, T, C, H, W), class by class. It is computed once."""
    count = args.clips if split == "train" else args.test_clips
    path = args.output / f"{split}-{count}.npy"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            model = tpn.create_model("tpn_slowonly_tiny_motion", pretrained=True).eval()
            net: Any = model.backbone
            frozen = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2)
            (seed, frames), maps = SPLITS[split], []
            for label in range(len(motion.CLASSES)):
                for i in range(count):
                    tempo = float(np.exp(np.random.default_rng([seed, label, i]).uniform(*np.log(TEMPOS))))
                    video = torch.from_numpy(motion.render(label, tempo=tempo, seed=(seed, i), num_frames=frames))
                    small = F.interpolate(video.permute(0, 3, 1, 2).float(), (SIZE, SIZE), mode="area").round().byte()
                    maps.append(frozen(model.input_spec.normalize(small[None]))[0].transpose(0, 1).half().numpy())
            with atomic_write(path) as unfinished, unfinished.open("wb") as file:
                np.save(file, np.stack(maps))
    return np.load(path, mmap_mode="r")


def build(name: str) -> tpn.TPNClassifier:
    """Return the model of a variant, whose clips are frame maps: a 1x1 convolution replaces its stem and first two stages."""
    options = {"num_frames": 8, "in_chans": CHANNELS, "num_classes": len(motion.CLASSES), "drop_rate": 0.0} | VARIANTS[name]
    model = tpn.create_model("tpn", **options)
    net: Any = getattr(model.backbone, "net", model.backbone)
    net.conv1, net.bn1 = type(net.conv1)(CHANNELS, 2 * WIDTH, 1, bias=False), type(net.bn1)(2 * WIDTH)
    net.maxpool, net.layer1, net.layer2 = nn.Sequential(), nn.Sequential(), nn.Sequential()
    return model


def clip(maps: NDArray[np.float16], start: int, model: tpn.TPNClassifier, interval: int) -> torch.Tensor:
    """Return a clip of one video, (C, T, H, W)."""
    frames = start + interval * np.arange(model.input_spec.num_frames)
    return torch.from_numpy(maps[frames].astype(np.float32)).transpose(0, 1)


def train(model: tpn.TPNClassifier, maps: NDArray[np.float16], steps: int, seed: int) -> None:
    rng, loss_of = np.random.default_rng(seed), TrainingLoss(model.train())
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.2)
    epochs = -(-steps * BATCH_SIZE // len(maps))
    order = np.concatenate([rng.permutation(len(maps)) for _ in range(epochs)])
    targets = torch.eye(len(motion.CLASSES)).repeat_interleave(len(maps) // len(motion.CLASSES), dim=0)
    for step in range(steps):
        batch = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        starts, interval = rng.integers(0, maps.shape[1] - SPAN + 1, len(batch)), SPAN // model.input_spec.num_frames
        clips = torch.stack([clip(maps[i], start, model, interval) for i, start in zip(batch, starts, strict=True)])
        loss, aux_loss, _ = loss_of.losses(clips, targets[batch])
        optimizer.zero_grad()
        (loss + aux_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def test(model: tpn.TPNClassifier, maps: NDArray[np.float16], interval: int) -> list[float]:
    """Return the accuracy of each class on center clips, in percent."""
    model.eval()
    start = (maps.shape[1] - interval * (model.input_spec.num_frames - 1) - 1) // 2
    right = []
    for label, videos in enumerate(np.split(maps, len(motion.CLASSES))):
        logits = model(torch.stack([clip(video, start, model, interval) for video in videos]))
        right.append(round(100 * (logits.argmax(dim=1) == label).double().mean().item(), 2))
    return right


def run(args: argparse.Namespace, name: str, seed: int) -> None:
    """Train and test once, unless the result is there or another process is at it."""
    with suppress(Timeout), FileLock(args.output / f"{name} {seed}.lock", timeout=0):
        if seed in read_rows(args.output)[name]:
            return
        begin = time.process_time()
        torch.manual_seed(seed)
        model, maps = build(name), frame_maps(args, "test")
        train(model, frame_maps(args, "train"), args.steps, seed)
        trained_at = SPAN // model.input_spec.num_frames
        accuracy = {k: test(model, maps, k) for k in (INTERVALS if name in SPEEDS else (trained_at,))}
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, CHANNELS, model.input_spec.num_frames, *maps.shape[-2:]))
        row = {"variant": name, "seed": seed, "settings": settings(args), "top1": round(np.mean(accuracy[trained_at]), 2)}
        row |= {"intervals": {k: round(np.mean(values), 2) for k, values in accuracy.items()}, "per_class": accuracy[trained_at]}
        row |= {"parameters": sum(p.numel() for p in model.parameters()), "mmacs": round(counter.get_total_flops() / 2e6, 1)}
        row |= {"minutes": round((time.process_time() - begin) / 60, 2)}
        with (args.output / "ablations.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def settings(args: argparse.Namespace) -> dict[str, float]:
    return {"clips": args.clips, "test_clips": args.test_clips, "steps": args.steps, "lr": LR}


def check_settings(args: argparse.Namespace) -> None:
    """Refuse to mix results of different settings."""
    for runs in read_rows(args.output).values():
        for row in runs.values():
            if row["settings"] != settings(args):
                raise ValueError(f"{args.output} has results of other settings: {row['settings']}. Choose another --output")


def read_rows(output: Path) -> Rows:
    """Return the rows of `ablations.jsonl`: for each variant, by seed."""
    rows: Rows = defaultdict(dict)
    with suppress(FileNotFoundError):
        for line in (output / "ablations.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows[row["variant"]][row["seed"]] = row
    return rows


def spread(values: Sequence[float], sign: str = "-", *, of_mean: bool = False) -> str:
    """Format a mean and the standard deviation over seeds, or the standard error of the mean."""
    error = f" ± {np.std(values, ddof=1) / (len(values) ** 0.5 if of_mean else 1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.1f}{error}"


def tables(rows: Rows) -> str:
    """Return all tables in Markdown."""
    lines = []
    for title, names in TABLES.items():
        lines += [f"| {title} | top-1, % | difference to {names[0]} |", "|---|---:|---:|"]
        for name in filter(rows.get, names):
            runs, reference = list(rows[name].values()), rows[names[0]]
            gains = [run["top1"] - reference[run["seed"]]["top1"] for run in runs if run["seed"] in reference]
            gain = spread(gains, "+", of_mean=True) if gains and name != names[0] else ""
            lines.append(f"| {name} | {spread([r['top1'] for r in runs])} | {gain} |")
        lines.append("")
    lines += [f"| Frame interval | {' | '.join(map(str, INTERVALS))} |", "|---" + "|---:" * len(INTERVALS) + "|"]
    for name in filter(rows.get, SPEEDS):
        cells = [spread([row["intervals"][str(k)] for row in rows[name].values()]) for k in INTERVALS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| Cost | parameters | MMACs | seeds | minutes |", "|---" + "|---:" * 4 + "|"]
    for name in filter(rows.get, VARIANTS):
        runs = list(rows[name].values())
        minutes = np.mean([run["minutes"] for run in runs])
        lines.append(f"| {name} | {runs[0]['parameters']:,} | {runs[0]['mmacs']:.1f} | {len(runs)} | {minutes:.1f} |")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # start the command twice to use two cores
    if not args.table:
        check_settings(args)
        for seed in range(args.seeds):
            for name in VARIANTS:
                run(args, name, seed)
    print(tables(read_rows(args.output)))


if __name__ == "__main__":
    run_cli(main)
