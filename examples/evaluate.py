"""Measure a model's accuracy on a list or folder of videos, by the protocol that its weights were published with.

    python examples/evaluate.py --model tpn_slowonly_r50_k400 --pretrained --data k400/val.csv --output runs/k400
    torchrun --nproc_per_node 8 examples/evaluate.py ...              # the same on eight GPUs

Every video counts exactly once. A run that was interrupted is continued by the same command; so is one that could not read some
of the videos, once these are mended. `--output`, which all processes must see, receives `summary.json`, `per_class.csv` and
`confusion.png`; `--dump` the probabilities of every video. The exit code is 1 if more videos than `--max-bad` cannot be read.
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
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

import tpn
from tpn.predict import Clips, Prediction, Unreadable, VideoClassifier, parse_views
from tpn.training import command, gathered, join_processes, positive_int, shared, weights_hash, whole_file
from tpn.video.ahead import read_ahead
from tpn.video.datasets import VideoDataset, bad_reason, open_dataset
from tpn.video.decode import VideoError

Row = dict[str, Any]
"""One video: "index" in the list, and "probs" (base64 of K float32) or "error"."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="a name from tpn list, local-dir:FOLDER or hf-hub:OWNER/NAME")
    add("--pretrained", action="store_true", help="load its published weights")
    add("--checkpoint", help="or those in this file")
    add("--data", required=True, help="folder of class folders, or list")
    add("--root", help="what paths in a list are relative to; default: the list's folder")
    add("--frames", metavar="TEMPLATE", help="the list names folders of images, such as img_{:05d}.jpg")
    add("--first-frame", type=int, default=1, help="number of the first image")
    add("--target-fps", type=float, help="sample as if every video had this frame rate")
    add("--views", metavar="CLIPSxCROPS", help="such as 1x1; default: as published")
    add("--output", required=True, type=Path, help="folder for the results")
    add("--dump", type=Path, help=".json, .pkl or .npz file for the probabilities of every video")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch-size", type=positive_int, help="views at once")
    add("--precision", choices=["float32", "bfloat16", "float16", "auto"], default="float32", help="see tpn.optimize")
    add("--compile", action="store_true")
    add("--workers", type=positive_int, default=2, help="videos to read at once, while the model is at work")
    add("--max-bad", type=float, default=0.0, help="share of the videos that may be unreadable; they are not counted")
    args = parser.parse_args(argv)
    if args.dump is not None and args.dump.suffix not in DUMPS:
        parser.error(f"--dump must end in one of {', '.join(DUMPS)}, got {args.dump}")
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
        raise ValueError(f"{args.data} has {len(data.classes)} classes, the model {model.num_classes}")
    return model, data


def identity(args: argparse.Namespace, model: tpn.TPNClassifier, data: VideoDataset) -> dict[str, Any]:
    """What results must have in common to be put together."""
    videos = hashlib.sha256(repr([data.items, data.target_fps, args.frames, args.first_frame]).encode(errors="backslashreplace"))
    about = {"weights": weights_hash(model), "videos": videos.hexdigest(), "input": model.input_spec.to_dict()}
    return about | {"precision": args.precision, "architecture": repr(model.model_args)}


class Journal:
    """The videos that are done, one file per process in `folder`, so that a killed run can be continued."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        self.file = folder / f"{uuid.uuid4().hex}.jsonl"

    def open(self) -> list[Row]:
        """Return what earlier runs have done; ValueError if they were about something else."""
        about = self.folder / "about.json"
        if about.exists() and json.loads(about.read_text()) != self.identity:
            raise ValueError(f"{self.folder} holds unfinished results of other weights, videos or views; remove it first")
        if not about.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(about, "w") as file:
                json.dump(self.identity, file)
        lines = [line for path in self.folder.glob("*.jsonl") for line in path.read_text().splitlines()]
        rows = {row["index"]: row for row in (json.loads(line) for line in lines if line.endswith("}"))}  # others were cut off
        return list(rows.values())

    def add(self, row: Row) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)  # on another machine
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def remove(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()


def classify(classifier: VideoClassifier, data: VideoDataset, indices: Sequence[int], workers: int) -> Iterator[Row]:
    """Classify videos in the order given; some are read while the model looks at others."""

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
    """Return accuracies in percent and the confusion matrix, (true, predicted) counts (K, K)."""
    order = (-probs).argsort(axis=1, kind="stable")
    hits = order[:, : min(5, num_classes)] == labels[:, None]
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (labels, order[:, 0]), 1)
    present = confusion.sum(axis=1) > 0
    per_class = confusion.diagonal()[present] / confusion.sum(axis=1)[present]
    accuracy = {"top1": hits[:, 0].mean(), "top5": hits.any(axis=1).mean(), "mean_class": per_class.mean()}
    return {name: round(100 * float(value), 4) for name, value in accuracy.items()}, confusion


def write_per_class(path: Path, confusion: np.ndarray, classes: tuple[str, ...]) -> None:
    with whole_file(path, "w") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["class", "videos", "top1", "most often taken for"])
        for label, row in enumerate(confusion):
            others = np.where(np.arange(len(row)) == label, 0, row)
            accuracy = f"{100 * row[label] / row.sum():.2f}" if row.sum() else ""
            out.writerow([classes[label], row.sum(), accuracy, classes[others.argmax()] if others.any() else ""])


def draw_confusion(path: Path, confusion: np.ndarray, classes: tuple[str, ...]) -> None:
    import matplotlib.figure

    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    named = len(classes) <= 60
    side = max(4.0, 0.28 * len(classes) + 2) if named else 10.0
    figure = matplotlib.figure.Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="predicted", ylabel="true", title="share of each class's videos")
    if named:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    figure.colorbar(image, shrink=0.6)
    figure.savefig(path, dpi=150)


def dump_json(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path, "w") as file:
        json.dump({key: value.tolist() for key, value in content.items()}, file)


def dump_pickle(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path) as file:
        pickle.dump(content, file)


def dump_npz(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path) as file:
        np.savez_compressed(file, **content)


DUMPS = {".json": dump_json, ".pkl": dump_pickle, ".npz": dump_npz}


def report(args: argparse.Namespace, classifier: VideoClassifier, data: VideoDataset, rows: list[Row]) -> int:
    """Write and print the results; `rows` in any order. Return how many videos could not be read."""
    done = sorted((row for row in rows if "probs" in row), key=lambda row: row["index"])
    failed = {data.items[row["index"]].path: row["error"] for row in rows if "error" in row}
    if not done:
        raise ValueError(f"none of the {len(data)} videos can be read, the first because: {next(iter(failed.values()))}")
    probs = np.stack([np.frombuffer(base64.b64decode(row["probs"]), np.float32) for row in done])
    items = [data.items[row["index"]] for row in done]
    labels = np.array([item.label for item in items])
    accuracy, confusion = measure(probs, labels, len(data.classes))
    summary = {"videos": len(done)} | accuracy | {"views": classifier.spec.num_views, "model": args.model, "failed": failed}
    with whole_file(args.output / "summary.json", "w") as file:
        json.dump(summary, file, indent=2)
    write_per_class(args.output / "per_class.csv", confusion, data.classes)
    if importlib.util.find_spec("matplotlib"):
        draw_confusion(args.output / "confusion.png", confusion, data.classes)
    else:
        print('no confusion.png without matplotlib: pip install "tpn[viz]"')
    if args.dump is not None:
        paths, classes = np.array([item.path for item in items]), np.array(data.classes)
        DUMPS[args.dump.suffix](args.dump, {"path": paths, "label": labels, "probs": probs, "class": classes})
    print(
        f"{len(done)} videos, {classifier.spec.num_views} views each: " + ", ".join(f"{k} {v:.2f}" for k, v in accuracy.items())
    )
    for path, reason in failed.items():
        print(f"not counted: {path}: {reason}")
    print(f"more in {args.output}")
    return len(failed)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rank, world, device = join_processes(args.device, "gloo")  # only results travel
    model, data = build(args)
    journal = Journal(args.output / "unfinished", identity(args, model, data))
    options = {"precision": args.precision, "compile": args.compile, "batch_size": args.batch_size}
    classifier = VideoClassifier(model, device=device, **options)
    before = shared(journal.open)
    done = {row["index"] for row in before}
    left = [index for index in range(len(data)) if index not in done][rank::world]
    if rank == 0 and before:
        print(f"continuing: {len(before)} of {len(data)} videos are done")
    rows: list[Row] = []
    console = Console(stderr=True)
    hidden = rank > 0 or not console.is_terminal
    results = classify(classifier, data, left, args.workers)
    for row in track(results, "videos", len(left), console=console, disable=hidden, transient=True):
        rows.append(row)
        if "probs" in row:
            journal.add(row)
    rows = before + [row for part in gathered(rows) for row in part]
    if rank > 0:
        return
    failed = report(args, classifier, data, rows)
    if not failed:
        journal.remove()
    if failed > args.max_bad * len(data):
        raise ValueError(
            f"{failed} of {len(data)} videos cannot be read, and were not counted; the same command reads only them, once they "
            "are mended; --max-bad allows for some"
        )


if __name__ == "__main__":
    command(main)
