"""Measure what calibration does: fit the temperature on all folds of labeled videos except one, and measure on that one.

    python examples/benchmarks/calibration.py motion
    python examples/benchmarks/calibration.py videos/val --model runs/doors
    python examples/benchmarks/calibration.py fights --model "runs/tempo-gain/{fold}_train with"

The model must not have been trained on the videos. They are divided at random, class by class. "motion" is rendered with noise if
there is no such folder. With {fold} in its name, each has a list: fold0_test.txt, fold1_test.txt, ... in DATA.
`tpn evaluate --calibrate` fits the temperature to all of the videos.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from settings import fold_lists

import tpn
from tpn.cli.script import positive_int, run_cli
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


def divide(evaluation: Evaluation, number: int, seed: int) -> list[Evaluation]:
    """Return folds that have a share of every class."""
    order = np.random.default_rng(seed).permutation(len(evaluation.items))
    order = order[evaluation.targets[order].argmax(axis=1).argsort(kind="stable")]
    folds = np.empty_like(order)
    folds[order] = np.arange(len(order)) % number
    return [part(evaluation, folds == fold) for fold in range(number)]


def join(parts: Sequence[Evaluation]) -> Evaluation:
    probs, targets = (np.concatenate([getattr(each, name) for each in parts]) for name in ("probs", "targets"))
    return replace(parts[0], items=tuple(chain(*(each.items for each in parts))), probs=probs, targets=targets)


def row_of(before: Evaluation, after: Evaluation, temperature: float) -> list[float]:
    same = (before.probs.argmax(axis=1) == after.probs.argmax(axis=1)).mean()
    values = [each.metrics[name] for name in ("ece", "loss", before.main_metric) for each in (before, after)]
    return [temperature, *values, 100 * same]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="tpn_slowonly_tiny_motion")
    parser.add_argument("--views", help="such as 1x1; default: those of the model")
    parser.add_argument("--folds", type=positive_int, default=5, help="without {fold}; default: 5")
    parser.add_argument("--seed", type=int, default=0, help="of the division into folds, without {fold}")
    args = parser.parse_args()

    if args.data.name == "motion" and not args.data.exists():
        render(args.data)
    if "{fold}" in args.model:
        lists = [(train.stem.removesuffix("_train"), test) for train, test in fold_lists(args.data)]
        parts = [tpn.evaluate(args.model.replace("{fold}", fold), test, views=args.views) for fold, test in lists]
    else:
        parts = divide(tpn.evaluate(args.model, args.data, views=args.views), args.folds, args.seed)
    if len(parts) < 2:
        raise ValueError(f"calibration needs at least two folds, got {len(parts)}")
    temperatures = [join([*parts[:fold], *parts[fold + 1 :]]).calibrate().temperature for fold in range(len(parts))]
    after = [each.at_temperature(temperature) for each, temperature in zip(parts, temperatures, strict=True)]
    rows = np.array([row_of(*each) for each in zip(parts, after, temperatures, strict=True)])
    together = row_of(join(parts), join(after), float(np.mean(temperatures)))
    table = Table(box=None)
    names = (f"{name} {when}" for name in ("ece", "loss", parts[0].main_metric) for when in ("before", "after"))
    for column in ("fold", "temperature", *names, "same top-1, %"):
        table.add_column(column, justify="right")
    for name, row in [*enumerate(rows), ("mean", rows.mean(axis=0)), ("std", rows.std(axis=0, ddof=1)), ("together", together)]:
        table.add_row(str(name), *(f"{value:.2f}" for value in row))
    Console(width=130).print(table, highlight=False)
    print(f"{sum(len(each.items) for each in parts)} videos")


if __name__ == "__main__":
    run_cli(main)
