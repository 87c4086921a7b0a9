"""Study whether the pyramid helps to recognize actions at tempos that are absent from the training data.

    python examples/tempo.py --output runs/tempo

Trains a narrow SlowOnly ResNet-18 on rendered motion at 0.5x to 2x a nominal tempo, without a pyramid and with each flow order,
and tests it at 0.25x to 4x, with several seeds each. Two more models are trained on clips without motion: one repeated frame, and
shuffled frames. Writes `tempo.json`, `tempo.png` and `tempo.md`. The same command resumes an interrupted study.
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

import tpn
from tpn.cli.script import run_cli
from tpn.files import atomic_write
from tpn.video import motion
from tpn.video.datasets import VideoFolder

NOMINAL = 3.0
"""Tempo 1x: a cycle of the motion takes 21 frames."""
NUM_FRAMES = 34
"""Frames per video. A clip spans 31 frames; longer videos would take longer to decode."""
TRAINED = (0.5, 2.0)
TESTED = (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "no pyramid": {"neck": None},
    "top-down": {"flow_order": "top_down"},
    "bottom-up": {"flow_order": "bottom_up"},
    "parallel": {"flow_order": "parallel"},
    "cascade": {"flow_order": "cascade"},
}
WITHOUT_TIME: tuple[motion.Order, ...] = ("one frame", "shuffled")
REVERSED = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
"""Pairs of classes that time reversal exchanges."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True)
    add("--seeds", type=int, default=3)
    add("--clips", type=int, default=240, help="training clips per class")
    add("--test-clips", type=int, default=20, help="test clips per class and tempo")
    add("--epochs", type=int, default=5)
    add("--jobs", type=int, default=1, help="concurrent trainings")
    add("--workers", type=int, default=2, help="loader processes per training")
    return parser.parse_args()


def check_settings(args: argparse.Namespace) -> None:
    """Refuse to mix results of different settings."""
    path = args.output / "settings.json"
    settings = {"clips": args.clips, "test_clips": args.test_clips, "epochs": args.epochs}
    if path.exists() and json.loads(path.read_text()) != settings:
        raise ValueError(f"{args.output} has results of other settings: {path.read_text()}. Choose another --output")
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(settings))


def render(args: argparse.Namespace) -> None:
    """Write all datasets, except clips that exist."""

    def write(name: str, clips: int, seed: int, tempos: tuple[float, float], order: motion.Order = "as rendered") -> None:
        low, high = (NOMINAL * tempo for tempo in tempos)
        motion.write_dataset(args.output / name, clips, seed=seed, tempos=(low, high), num_frames=NUM_FRAMES, order=order)

    write("train", args.clips, 1, TRAINED)
    for factor in TESTED:
        write(f"test {factor}", args.test_clips, 2, (factor, factor))
    for order in WITHOUT_TIME:
        write(f"train {order}", args.clips, 1, TRAINED, order)
        write(f"test {order}", args.test_clips, 2, TRAINED, order)


def train(args: argparse.Namespace, name: str, seed: int, model_args: dict[str, Any], data: str = "train") -> tpn.TPNClassifier:
    folder = args.output / f"{name} {seed}"
    if not (folder / "model.safetensors").exists():
        options = {"recipe": "motion", "model_args": model_args, "seed": seed, "epochs": args.epochs, "workers": args.workers}
        options |= {"crop_area": (0.5, 1.0), "color_jitter": False, "label_smoothing": 0.0, "ema": 0.99}
        tpn.train(args.output / data, output=folder, val_fraction=0, resume=True, **options)
    return tpn.create_model(f"local-dir:{folder}")


@torch.no_grad()
def test(args: argparse.Namespace, model: tpn.TPNClassifier, data: str) -> dict[str, float]:
    """Return percentages of center clips: top1, and direction, where the class has a higher logit than its time reversal."""
    dataset = VideoFolder(args.output / data, model.input_spec, train=False, classes=motion.CLASSES)
    loader = DataLoader(dataset, batch_size=32, num_workers=args.workers)
    model.eval()
    batches = [(model(model.input_spec.normalize(frames)), labels) for frames, labels in loader]
    logits, labels = torch.cat([logits for logits, _ in batches]), torch.cat([labels for _, labels in batches])
    reversal = torch.arange(len(motion.CLASSES))
    for a, b in REVERSED:
        reversal[[a, b]] = torch.tensor([b, a])
    reversed_labels = reversal[labels]
    higher = logits.gather(1, labels[:, None]) > logits.gather(1, reversed_labels[:, None])
    top1 = (logits.argmax(dim=1) == labels).double().mean()
    return {"top1": 100 * float(top1), "direction": 100 * float(higher[reversed_labels != labels].double().mean())}


def measure(args: argparse.Namespace, name: str, seed: int) -> dict[str, dict[str, float]]:
    """Train and test a variant; return the metrics of each test set."""
    path = args.output / f"{name} {seed}.json"
    if not path.exists():
        if name in WITHOUT_TIME:
            model, tests = train(args, name, seed, {}, f"train {name}"), [f"test {name}"]
        else:
            model = train(args, name, seed, VARIANTS[name])
            tests = [f"test {key}" for key in (*TESTED, *WITHOUT_TIME)]
        with atomic_write(path) as unfinished:
            unfinished.write_text(json.dumps({key: test(args, model, key) for key in tests}))
    return json.loads(path.read_text())


def draw(path: Path, curves: dict[str, np.ndarray]) -> None:
    """Draw accuracy over tempo. curves: accuracy (seeds, tempos) of each variant."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(*TRAINED, color="0.93", label="training tempos")
    for name, values in curves.items():
        mean, spread = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(TESTED))
        style = {"color": "0.35", "linestyle": "--"} if name == "no pyramid" else {}
        (line,) = axes.plot(TESTED, mean, marker="o", markersize=4, label=name, **style)
        axes.fill_between(TESTED, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axhline(100 / len(motion.CLASSES), color="0.6", linestyle=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(TESTED, [f"{factor:g}x" for factor in TESTED])
    axes.set(xlabel="tempo of the test clips", ylabel="top-1 accuracy, %", ylim=(0, 101))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)


def tempo_table(curves: dict[str, np.ndarray]) -> str:
    head = ["variant", *(f"{factor:g}x" for factor in TESTED), "within", "outside"]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    within = np.array([TRAINED[0] <= factor <= TRAINED[1] for factor in TESTED])
    for name, values in curves.items():
        columns = [*values.T, values[:, within].mean(axis=1), values[:, ~within].mean(axis=1)]
        cells = [f"{c.mean():.1f} ± {c.std(ddof=1) if len(c) > 1 else 0:.1f}" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def order_table(args: argparse.Namespace, results: dict[tuple[str, int], dict[str, dict[str, float]]]) -> str:
    """Return a table of the accuracies on clips without motion."""
    lines = ["| clips | trained on | top-1 | direction |", "|---|---|---:|---:|"]
    for order in WITHOUT_TIME:
        same = results[order, 0][f"test {order}"]
        lines.append(f"| {order} | the same | {same['top1']:.1f} | {same['direction']:.1f} |")
        tests = [results["cascade", seed][f"test {order}"] for seed in range(args.seeds)]
        top1, direction = (np.mean([test[key] for test in tests]) for key in ("top1", "direction"))
        lines.append(f"| {order} | motion | {top1:.1f} | {direction:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    check_settings(args)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # leaves cores to the loader processes
    render(args)
    runs = [(name, seed) for seed in range(args.seeds) for name in VARIANTS] + [(order, 0) for order in WITHOUT_TIME]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(runs, pool.map(lambda run: measure(args, *run), runs), strict=True))
    curves = {}
    for name in VARIANTS:
        rows = [[results[name, seed][f"test {factor}"]["top1"] for factor in TESTED] for seed in range(args.seeds)]
        curves[name] = np.array(rows)
    with atomic_write(args.output / "tempo.json") as unfinished:
        content = {f"{name} {seed}": result for (name, seed), result in results.items()}
        unfinished.write_text(json.dumps(content, indent=1))
    draw(args.output / "tempo.png", curves)
    tables = tempo_table(curves) + "\n" + order_table(args, results)
    with atomic_write(args.output / "tempo.md") as unfinished:
        unfinished.write_text(tables, encoding="utf-8")
    print(tables)


if __name__ == "__main__":
    run_cli(main)
