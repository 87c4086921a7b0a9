"""Measure what calibration does: fit the temperature on all folds of labelled videos except one, and measure on that one.

    python examples/benchmarks/calibration.py motion
    python examples/benchmarks/calibration.py videos/val --model runs/doors

The model must not have been trained on the videos. They are divided at random, class by class. "motion" is rendered with noise if
there is no such folder. `tpn evaluate --calibrate` fits the temperature to all of the videos.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import tpn
from tpn.cli.script import run_cli
from tpn.training.metrics import Evaluation
from tpn.video import motion
from tpn.video.encode import write_video

CLIPS, NOISE = 25, 40
"""Rendered videos of each class, and the standard deviation of their noise, of 255 levels."""


def render(folder: Path) -> None:
    for label, name in enumerate(motion.CLASSES):
        for i in range(CLIPS):
            rng = np.random.default_rng((2000, label, i))
            frames = motion.render(label, tempo=float(np.exp(rng.uniform(0, np.log(8)))), seed=(2000, label, i))
            noisy = frames + rng.normal(0, NOISE, frames.shape)
            write_video(folder / name / f"{i:03d}.mp4", noisy.clip(0, 255).astype(np.uint8), fps=motion.FPS)


def part(evaluation: Evaluation, chosen: NDArray[np.bool_]) -> Evaluation:
    items = tuple(item for item, each in zip(evaluation.items, chosen, strict=True) if each)
    return replace(evaluation, items=items, probs=evaluation.probs[chosen], targets=evaluation.targets[chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="tpn_slowonly_tiny_motion")
    parser.add_argument("--views", help="such as 1x1; default: those of the model")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the division into folds")
    args = parser.parse_args()

    if args.data.name == "motion" and not args.data.exists():
        render(args.data)
    evaluation = tpn.evaluate(args.model, args.data, views=args.views)
    order = np.random.default_rng(args.seed).permutation(len(evaluation.items))
    order = order[evaluation.targets[order].argmax(axis=1).argsort(kind="stable")]  # every class is spread over the folds
    folds, rows = np.empty_like(order), []
    folds[order] = np.arange(len(order)) % args.folds
    for fold in range(args.folds):
        before = part(evaluation, folds == fold)
        after = before.at_temperature(part(evaluation, folds != fold).calibrate().temperature)
        same = (before.probs.argmax(axis=1) == after.probs.argmax(axis=1)).mean()
        values = [each.metrics[name] for name in ("ece", "loss", evaluation.main_metric) for each in (before, after)]
        rows.append([after.temperature, *values, 100 * same])
    table = Table(box=None)
    names = (f"{name} {when}" for name in ("ece", "loss", evaluation.main_metric) for when in ("before", "after"))
    for column in ("fold", "temperature", *names, "same top-1, %"):
        table.add_column(column, justify="right")
    numbers = np.array(rows)
    for name, row in [*enumerate(numbers), ("mean", numbers.mean(axis=0)), ("std", numbers.std(axis=0, ddof=1))]:
        table.add_row(str(name), *(f"{value:.2f}" for value in row))
    Console(width=130).print(table, highlight=False)
    print(f"{len(evaluation.items)} videos")


if __name__ == "__main__":
    run_cli(main)
