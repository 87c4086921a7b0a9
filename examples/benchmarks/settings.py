"""Compare settings of `tpn train` on the folds of a dataset, with several seeds.

    python examples/benchmarks/settings.py fights motion --output study --settings plan,random,lr-3e-4 --seeds 3
    python examples/benchmarks/settings.py --output study --table      # only print the table

A dataset is a folder with the lists fold0_train.txt and fold0_test.txt, fold1_train.txt, ... Each run trains on all videos of a
training list, without validation, and is evaluated once on the test list. The same command resumes, also while another process
works on the same output. `results.jsonl` has the results.
"""

import argparse
import json
import re
import shutil
import statistics
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import tpn
from tpn.cli.script import positive_int, run_cli

TINY: dict[str, Any] = {"model": "tpn_slowonly_tiny_motion"}
HALF: dict[str, Any] = {**TINY, "steps": 450}

SETTINGS: dict[str, dict[str, Any]] = {
    # What the plan chooses, with three starts
    "plan": TINY,
    "random": {**TINY, "weights": "random"},
    # A fifth of the videos is kept for validation, as without options
    "validation": {**TINY, "val_fraction": 0.2},
    "imagenet": {"model": "tpn", "model_args": {"backbone": "timm/tf_efficientnet_lite0"}},
    # Half the steps, and one change each
    "half": HALF,
    "lr-3e-4": {**HALF, "lr": 3e-4},
    "lr-3e-3": {**HALF, "lr": 3e-3},
    "sgd": {**HALF, "optimizer": "sgd"},
    "backbone-lr-0.1": {**HALF, "backbone_lr": 0.1},
    "frozen": {**HALF, "freeze": "backbone"},
    "larger": {**HALF, "crop_size": 96, "short_side": 112},
    "small-crops": {**HALF, "crop_area": (0.08, 1.0)},
    "large-crops": {**HALF, "crop_area": (0.6, 1.0)},
    "no-smoothing": {**HALF, "label_smoothing": 0.0},
    "ema": {**HALF, "ema": 0.99},
    "no-jitter": {**HALF, "color_jitter": False},
    "rand-augment": {**HALF, "rand_augment": 9},
    "erasing": {**HALF, "random_erasing": 0.25},
    "mixup": {**HALF, "mixup": 0.8},
    "cutmix": {**HALF, "cutmix": 1.0},
    # The same with a new pyramid on the bundled backbone, and without one; `save_start` makes their start
    "new-pyramid": {**HALF, "model": "auto"},
    "no-pyramid": {**HALF, "model": None},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="*", type=Path, help="folders with fold lists")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--settings", default="plan", help=f"names, separated by commas, of {', '.join(SETTINGS)}")
    parser.add_argument("--seeds", type=positive_int, default=1)
    parser.add_argument("--threads", type=positive_int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the results so far, and stop")
    parser.add_argument("--reference", default="plan", help="settings that the table compares the others with, fold by fold")
    return parser.parse_args()


def save_start(folder: Path, neck: str | None) -> str:
    """Save a model with the embedded backbone, and a new neck or none; return its folder."""
    model = tpn.create_model(TINY["model"], neck=neck)
    model.backbone.load_state_dict(tpn.create_model(TINY["model"], pretrained=True).backbone.state_dict())
    return str(tpn.save_pretrained(model, folder))


def fold_lists(data: Path) -> list[tuple[Path, Path]]:
    """Return the training list and the test list of each fold."""
    found = sorted(path for path in data.iterdir() if re.fullmatch(r"fold\d+_train\.\w+", path.name))
    if not found:
        raise ValueError(f"{data}: no lists named fold0_train.txt, fold0_test.txt, ...")
    return [(path, path.with_name(path.name.replace("_train", "_test"))) for path in found]


def run(train: Path, test: Path, name: str, seed: int, args: argparse.Namespace) -> None:
    """Train and test once, unless the result is there or another process is at it."""
    run_name = f"{train.parent.name}-{train.stem.removesuffix('_train')}-{name}-{seed}"
    folder = args.output / run_name
    with suppress(Timeout), FileLock(args.output / f"{run_name}.lock", timeout=0):
        if (seed, train.stem) in read_results(args.output)[train.parent.name, name]:
            return
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        options = {"val_fraction": 0} | SETTINGS[name] | {"threads": args.threads, "workers": args.workers, "seed": seed}
        if options["model"] in ("auto", None):
            torch.manual_seed(seed)
            options["model"] = save_start(args.output / "starts" / f"{name}-{seed}", options["model"])
        result = tpn.train(train, output=folder, verbose=False, **options)
        seconds = time.perf_counter() - start
        metrics = tpn.evaluate(result.model, test).metrics
        row = {
            "data": train.parent.name,
            "fold": train.stem,
            "settings": name,
            "seed": seed,
            "seconds": round(seconds),
            **metrics,
        }
        with (args.output / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        shutil.rmtree(folder)


def read_results(output: Path) -> dict[tuple[str, str], dict[tuple[int, str], dict[str, Any]]]:
    """Return the rows of `results.jsonl`: for each (data, settings), by (seed, fold)."""
    runs: dict[tuple[str, str], dict[tuple[int, str], dict[str, Any]]] = defaultdict(dict)
    with suppress(FileNotFoundError):
        for line in (output / "results.jsonl").read_text().splitlines():
            row = json.loads(line)
            runs[row["data"], row["settings"]][row["seed"], row["fold"]] = row
    return runs


def print_table(output: Path, reference: str) -> None:
    """Print mean accuracy, its standard deviation over seeds (of means over folds), and the difference to another setting."""
    runs = read_results(output)
    print(f"| data | settings | top-1, % | spread over seeds | to {reference} | folds x seeds | minutes |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for (data, name), rows in runs.items():
        by_seed = defaultdict(list)
        for (seed, _), row in rows.items():
            by_seed[seed].append(row["top1"])
        folds = max(map(len, by_seed.values()))
        means = [statistics.mean(values) for values in by_seed.values() if len(values) == folds]
        spread = f"{statistics.stdev(means):.1f}" if len(means) > 1 else ""
        others = runs.get((data, reference), {})
        gains = [row["top1"] - others[run]["top1"] for run, row in rows.items() if run in others]
        gain = f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains) / len(gains) ** 0.5:.1f}" if len(gains) > 1 else ""
        minutes = statistics.median(row["seconds"] for row in rows.values()) / 60
        print(f"| {data} | {name} | {statistics.mean(means):.1f} | {spread} | {gain} | {folds} x {len(means)} | {minutes:.1f} |")


def main() -> None:
    args = parse_args()
    names = args.settings.split(",")
    if unknown := set(names) - SETTINGS.keys():
        raise ValueError(f"settings must be of {', '.join(SETTINGS)}, got {', '.join(sorted(unknown))}")
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in range(0 if args.table else args.seeds):
        for name in names:
            for data in args.data:
                for train, test in fold_lists(data):
                    run(train, test, name, seed, args)
    print_table(args.output, args.reference)


if __name__ == "__main__":
    run_cli(main)
