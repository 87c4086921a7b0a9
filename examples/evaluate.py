"""Measure the accuracy of a model on a folder or list of videos, with the views of the published protocol.

    python examples/evaluate.py --model tpn_slowonly_r50_k400 --pretrained --data k400/val.csv --output runs/k400
    torchrun --nproc_per_node 8 examples/evaluate.py ...              # on eight GPUs

Writes `summary.json`, `per_class.csv` and `confusion.png` to `--output`, a folder that all processes must share. `--dump` also
writes the probabilities of all videos. Every video counts exactly once. Unreadable videos are listed and not counted; if their
share exceeds `--max-bad`, the exit code is 1. The same command resumes an interrupted run, and reads unreadable videos again.
"""

import argparse
import base64
import csv
import hashlib
import importlib.util
import json
import pickle
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

import tpn
from tpn.files import atomic_write
from tpn.predict import Clips, Prediction, Unreadable, VideoClassifier, parse_views
from tpn.training import all_gather_object, join_processes, positive_int, run_cli, run_on_rank0, weights_hash
from tpn.video.ahead import read_ahead
from tpn.video.datasets import VideoDataset, bad_reason, open_dataset
from tpn.video.decode import VideoError

DUMP_SUFFIXES = (".json", ".pkl", ".npz")
Row = dict[str, Any]
"""Result of a video: "index" in the dataset, and "probs" (base64 of K float32 values) or "error"."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="name from tpn list, local-dir:FOLDER or hf-hub:OWNER/NAME")
    add("--pretrained", action="store_true", help="load the published weights")
    add("--checkpoint", help="load the weights in this file")
    add("--data", required=True, help="folder of class folders, or list of videos")
    add("--root", help="base folder of relative paths in a list; default: the list's folder")
    add("--frames", metavar="TEMPLATE", help="file names of extracted frames, such as img_{:05d}.jpg")
    add("--first-frame", type=int, default=1, help="number of the first frame")
    add("--target-fps", type=float, help="sample as if every video had this frame rate")
    add("--views", metavar="CLIPSxCROPS", help="such as 1x1; default: as published")
    add("--output", required=True, type=Path, help="folder for the results")
    add("--dump", type=Path, help=".json, .pkl or .npz file for the probabilities")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch-size", type=positive_int, help="views per forward pass")
    add("--precision", choices=["float32", "bfloat16", "float16", "auto"], default="float32", help="see tpn.optimize")
    add("--compile", action="store_true")
    add("--workers", type=positive_int, default=2, help="threads that read videos ahead")
    add("--max-bad", type=float, default=0.0, help="largest share of unreadable videos")
    args = parser.parse_args(argv)
    if args.dump is not None and args.dump.suffix not in DUMP_SUFFIXES:
        parser.error(f"--dump must end in one of {', '.join(DUMP_SUFFIXES)}, got {args.dump}")
    return args


def build(args: argparse.Namespace) -> tuple[tpn.TPNClassifier, VideoDataset]:
    num_clips, num_crops = parse_views(args.views) if args.views else (None, None)
    model = tpn.create_model(args.model, args.pretrained, checkpoint_path=args.checkpoint)
    if num_clips and num_crops:
        model.input_spec = replace(model.input_spec, num_clips=num_clips, num_crops=num_crops, flip=False)
    options: dict[str, Any] = {"root": args.root, "template": args.frames, "first": args.first_frame}
    options |= {"target_fps": args.target_fps} if args.target_fps else {}
    data = open_dataset(args.data, model.input_spec, train=False, classes=model.labels, **options)
    if len(data.classes) != model.num_classes:
        raise ValueError(f"{args.data} has {len(data.classes)} classes, but the model has {model.num_classes}")
    return model, data


def identity(args: argparse.Namespace, model: tpn.TPNClassifier, data: VideoDataset) -> dict[str, Any]:
    """Return the settings that results of several runs must share to be merged."""
    videos = hashlib.sha256(repr([data.items, data.target_fps, args.frames, args.first_frame]).encode(errors="backslashreplace"))
    about = {"weights": weights_hash(model), "videos": videos.hexdigest(), "input": model.input_spec.to_dict()}
    return about | {"precision": args.precision, "model": repr(model.config)}


class Journal:
    """Results of finished videos on disk, from which a killed run resumes: one file per process in `folder`."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        self.file = folder / f"{uuid.uuid4().hex}.jsonl"

    def open(self) -> list[Row]:
        """Return the results of earlier runs. Raises ValueError if their identity differs."""
        about = self.folder / "about.json"
        if about.exists() and json.loads(about.read_text()) != self.identity:
            raise ValueError(f"{self.folder} has results of other weights, videos or views; remove it or choose another --output")
        if not about.exists():
            with atomic_write(about) as unfinished:
                unfinished.write_text(json.dumps(self.identity))
        lines = [line for path in self.folder.glob("*.jsonl") for line in path.read_text().splitlines()]
        rows = {row["index"]: row for row in (json.loads(line) for line in lines if line.endswith("}"))}  # others are cut off
        return list(rows.values())

    def add(self, row: Row) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)  # rank 0 may be on another machine
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def classify(classifier: VideoClassifier, data: VideoDataset, indices: Sequence[int], workers: int) -> Iterator[Row]:
    """Classify videos, given by their index, and yield results in the same order. Threads read videos ahead."""

    def read(index: int) -> Clips | Unreadable:
        spec = classifier.spec
        try:
            return data.read(data.items[index], spec.indices, short_side=spec.short_side)
        except (VideoError, OSError) as error:
            return error

    with closing(read_ahead(read, indices, workers=workers)) as videos:
        for index, result in zip(indices, classifier.classify_each(videos), strict=True):
            if isinstance(result, Prediction):
                yield {"index": index, "probs": base64.b64encode(result.probs.numpy().tobytes()).decode()}
            else:
                yield {"index": index, "error": bad_reason(data.items[index], result)}


def measure(probs: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[dict[str, float], np.ndarray]:
    """Return top1, top5 and mean_class in percent, and the confusion matrix (K, K): counts of (true, predicted).

    Args:
        probs: (N, K).
        labels: (N,).
        num_classes: K.
    """
    order = (-probs).argsort(axis=1, kind="stable")
    hits = order[:, : min(5, num_classes)] == labels[:, None]
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (labels, order[:, 0]), 1)
    present = confusion.sum(axis=1) > 0
    per_class = confusion.diagonal()[present] / confusion.sum(axis=1)[present]
    accuracy = {"top1": hits[:, 0].mean(), "top5": hits.any(axis=1).mean(), "mean_class": per_class.mean()}
    return {name: round(100 * float(value), 4) for name, value in accuracy.items()}, confusion


def write_per_class(path: Path, confusion: np.ndarray, classes: tuple[str, ...]) -> None:
    with atomic_write(path) as unfinished, open(unfinished, "w", encoding="utf-8", errors="backslashreplace") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["class", "videos", "top1", "most frequent error"])
        for label, row in enumerate(confusion):
            others = np.where(np.arange(len(row)) == label, 0, row)
            accuracy = f"{100 * row[label] / row.sum():.2f}" if row.sum() else ""
            out.writerow([classes[label], row.sum(), accuracy, classes[others.argmax()] if others.any() else ""])


def draw_confusion(path: Path, confusion: np.ndarray, classes: tuple[str, ...]) -> None:
    import matplotlib.figure

    rates = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    show_names = len(classes) <= 60
    side = max(4.0, 0.28 * len(classes) + 2) if show_names else 10.0
    figure = matplotlib.figure.Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(rates, vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="predicted", ylabel="true", title="share of each class's videos")
    if show_names:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    figure.colorbar(image, shrink=0.6)
    figure.savefig(path, dpi=150)


def dump(path: Path, content: dict[str, np.ndarray]) -> None:
    with atomic_write(path) as unfinished:
        if path.suffix == ".npz":
            np.savez_compressed(unfinished, **content)
        elif path.suffix == ".pkl":
            unfinished.write_bytes(pickle.dumps(content))
        else:
            unfinished.write_text(json.dumps({key: value.tolist() for key, value in content.items()}))


def report(args: argparse.Namespace, classifier: VideoClassifier, data: VideoDataset, rows: list[Row]) -> int:
    """Write and print the results; return the number of unreadable videos."""
    done = sorted((row for row in rows if "probs" in row), key=lambda row: row["index"])
    failed = {data.items[row["index"]].path: row["error"] for row in rows if "error" in row}
    if not done:
        raise ValueError(f"all {len(data)} videos are unreadable. The first error: {next(iter(failed.values()))}")
    probs = np.stack([np.frombuffer(base64.b64decode(row["probs"]), np.float32) for row in done])
    items = [data.items[row["index"]] for row in done]
    labels = np.array([item.label for item in items])
    accuracy, confusion = measure(probs, labels, len(data.classes))
    summary = {"videos": len(done)} | accuracy | {"views": classifier.spec.num_views, "model": args.model, "failed": failed}
    with atomic_write(args.output / "summary.json") as unfinished:
        unfinished.write_text(json.dumps(summary, indent=2))
    write_per_class(args.output / "per_class.csv", confusion, data.classes)
    if importlib.util.find_spec("matplotlib"):
        draw_confusion(args.output / "confusion.png", confusion, data.classes)
    else:
        print('confusion.png was not written: it requires matplotlib. Run pip install "tpn[viz]"')
    if args.dump is not None:
        paths, classes = np.array([item.path for item in items]), np.array(data.classes)
        dump(args.dump, {"path": paths, "label": labels, "probs": probs, "class": classes})
    metrics = ", ".join(f"{name} {value:.2f}" for name, value in accuracy.items())
    print(f"{len(done)} videos, {classifier.spec.num_views} views each: {metrics}")
    for path, reason in failed.items():
        print(f"not counted: {path}: {reason}")
    print(f"results in {args.output}")
    return len(failed)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rank, world, device = join_processes(args.device, "gloo")  # processes exchange only results
    model, data = build(args)
    journal = Journal(args.output / "unfinished", identity(args, model, data))
    options = {"precision": args.precision, "compile": args.compile, "batch_size": args.batch_size}
    classifier = VideoClassifier(model, device=device, **options)
    before = run_on_rank0(journal.open)
    finished = {row["index"] for row in before}
    left = [index for index in range(len(data)) if index not in finished][rank::world]
    if rank == 0 and before:
        print(f"resuming: {len(before)} of {len(data)} videos are finished")
    rows: list[Row] = []
    console = Console(stderr=True)
    hidden = rank > 0 or not console.is_terminal
    results = classify(classifier, data, left, args.workers)
    for row in track(results, "videos", len(left), console=console, disable=hidden, transient=True):
        rows.append(row)
        if "probs" in row:
            journal.add(row)
    rows = before + [row for part in all_gather_object(rows) for row in part]
    if rank > 0:
        return
    failed = report(args, classifier, data, rows)
    if not failed:
        rmtree(journal.folder)
    if failed > args.max_bad * len(data):
        raise ValueError(
            f"{failed} of {len(data)} videos are unreadable and were not counted. Repair them and run the same command again, or "
            "increase --max-bad"
        )


if __name__ == "__main__":
    run_cli(main)
