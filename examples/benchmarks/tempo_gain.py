"""Compare the gain of the pyramid with the variance of visual tempo, class by class, over the folds of a dataset.

    python examples/benchmarks/tempo_gain.py fights --output runs/tempo-gain
    python examples/benchmarks/tempo_gain.py --output runs/tempo-gain --table      # only print the table

DATA is a folder with the lists fold0_train.txt and fold0_test.txt, fold1_train.txt, ... For each fold, two models start from the
backbone of the bundled model and train on the same videos: one with a new pyramid, one without. The model without measures the
tempo of each test video: how long the probability of its class stays at or above half of its maximum. The same command resumes.
`tempo_gain.jsonl` has the results.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from settings import fold_lists, save_start

import tpn
from tpn import tempo
from tpn.cli.script import positive_int, run_cli
from tpn.video import decode
from tpn.video.datasets import VideoList
from tpn.video.encode import write_video

SHORT_SIDE, STRIDE = 80, 4
MODELS = {"without": None, "with": "auto"}
"""The neck of each model."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, help="folder with fold lists")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=positive_int, default=100, help="training steps of each model")
    parser.add_argument("--batch-size", type=positive_int, default=16)
    parser.add_argument("--table", action="store_true", help="print the results so far, and stop")
    return parser.parse_args()


def scale_down(data: Path, lists: Iterable[Path], output: Path) -> None:
    """Copy the lists, and their videos with a short side of `SHORT_SIDE`, which are faster to decode. Existing files are kept."""
    for path in lists:
        text = path.read_text(encoding="utf-8")
        for line in text.splitlines():
            name = line.rpartition(" ")[0]
            if not (output / name).exists():
                frames = torch.stack(list(decode.iter_frames(data / name, short_side=SHORT_SIDE))).permute(0, 2, 3, 1)
                height, width = (size // 2 * 2 for size in frames.shape[1:3])
                fps, _ = decode.header(data / name)
                write_video(output / name, frames[:, :height, :width].numpy(), fps=round(fps or 25))
        (output / path.name).write_text(text, encoding="utf-8")


def measure(train: Path, test: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train both models; return the accuracy of each class with both, and the variance of its tempo."""
    begin, result = time.perf_counter(), {}
    for name, neck in MODELS.items():
        torch.manual_seed(0)
        start = save_start(args.output / "start" / name, neck)
        options = {"steps": args.steps, "batch_size": args.batch_size, "val_fraction": 0, "threads": 1, "workers": 0}
        folder = args.output / f"{train.stem} {name}"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
        trained = tpn.train(train, model=start, output=folder, verbose=False, **options).model
        evaluation = tpn.evaluate(trained, test, workers=1)
        result[name] = (100 * evaluation.class_accuracy).round(2).tolist()
        if neck is None:
            classifier = tpn.VideoClassifier(trained, device="cpu")
            dataset = VideoList(test, trained.input_spec, train=False, classes=trained.labels)
            tempos = list(tempo.dataset_tempos(classifier, dataset, stride=STRIDE))
            result["classes"] = list(dataset.classes)
            result["variance"] = tempo.tempo_variance(tempos, len(dataset.classes)).round(4).tolist()
            result["videos"] = [sum(each.item.labels[0] == label for each in tempos) for label in range(len(dataset.classes))]
    return {
        "fold": train.stem.removesuffix("_train"),
        **settings(args),
        **result,
        "minutes": round((time.perf_counter() - begin) / 60, 1),
    }


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"steps": args.steps, "batch_size": args.batch_size}


def read_rows(output: Path) -> list[dict[str, Any]]:
    with suppress(FileNotFoundError):
        return [json.loads(line) for line in (output / "tempo_gain.jsonl").read_text(encoding="utf-8").splitlines()]
    return []


def table(rows: list[dict[str, Any]]) -> str:
    """Return one line for each fold and class, and the correlation over all of them."""
    lines = [
        "| fold | class | videos | without, % | with, % | gain | variance of tempo, s² |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    before, after, variance = (np.concatenate([row[key] for row in rows]) for key in ("without", "with", "variance"))
    for row in sorted(rows, key=lambda row: row["fold"]):
        for name, videos, one, two, each in zip(
            *(row[key] for key in ("classes", "videos", "without", "with", "variance")), strict=True
        ):
            lines.append(f"| {row['fold']} | {name} | {videos} | {one:.1f} | {two:.1f} | {two - one:+.1f} | {each:.3f} |")
    both = tempo.gain_against_variance(before, after, variance)
    folds = [np.nanmean(row["with"]) - np.nanmean(row["without"]) for row in rows]
    error = f" ± {np.std(folds, ddof=1) / len(folds) ** 0.5:.1f}" if len(folds) > 1 else ""
    lines += ["", f"gain, mean over folds: {np.mean(folds):+.1f}{error} points"]
    lines += [f"gain and variance, {both.num_classes} pairs: Pearson {both.pearson:+.2f}, Spearman {both.spearman:+.2f}"]
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.table:
        if args.data is None:
            raise ValueError("DATA is missing: a folder with the lists fold0_train.txt, fold0_test.txt, ...; --table needs none")
        for row in read_rows(args.output):
            if not settings(args).items() <= row.items():
                raise ValueError(f"{args.output} has results of other settings: {row}. Choose another --output")
        small = args.output / "videos"
        scale_down(args.data, [path for fold in fold_lists(args.data) for path in fold], small)
        for train, test in fold_lists(small):
            if train.stem.removesuffix("_train") not in {row["fold"] for row in read_rows(args.output)}:
                row = measure(train, test, args)
                with (args.output / "tempo_gain.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    if not (rows := read_rows(args.output)):
        raise ValueError(f"{args.output} has no results yet")
    print(table(rows))


if __name__ == "__main__":
    run_cli(main)
