"""Accuracy, average precision, and what else probabilities and labels tell; and the files with these results."""

import csv
import json
import pickle
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tpn.files import atomic_write
from tpn.models.heads import change_temperature, class_probs, to_logits
from tpn.validation import MAX_TEMPERATURE, MIN_TEMPERATURE
from tpn.video.datasets import Item

NUM_BINS = 15
"""Bins of the expected calibration error, as in Guo et al."""
MIN_CALIBRATION_VIDEOS = 20
PROBS_SUFFIXES = (".json", ".pkl", ".npz")


@dataclass(frozen=True)
class Evaluation:
    """The predictions for a dataset, each video once, and the metrics that follow from them.

    Attributes:
        classes: the K class names.
        items: the N videos that could be read.
        probs: (N, K) float32.
        targets: (N, K) float32, 1 for the classes of a video.
        views: views of each video.
        frame_interval: index step between the frames of a clip; None for segments.
        multi_label: whether a video may have several classes.
        failed: unreadable videos with the reason, by name. They are not counted.
        temperature: of the model, at which `probs` were computed.
        calibrated: the result of `calibrate`, with `tpn.evaluate(..., calibrate=True)`; otherwise None.
    """

    classes: tuple[str, ...]
    items: tuple[Item, ...]
    probs: NDArray[np.float32]
    targets: NDArray[np.float32]
    views: int
    frame_interval: int | None = None
    multi_label: bool = False
    failed: dict[str, str] = field(default_factory=dict)
    temperature: float = 1.0
    calibrated: "Evaluation | None" = None

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Return loss, and in percent top1, top5 and mean_class, or mAP for multi-label data, and ece.

        "ece" is the expected calibration error; see `calibration_error`.
        """
        ece = 100 * calibration_error(self.probs, self.targets, multi_label=self.multi_label)
        probs = self.probs.astype(np.float64).clip(1e-12, 1)
        if self.multi_label:
            rest = (1 - self.probs.astype(np.float64)).clip(1e-12, 1)
            loss = -(self.targets * np.log(probs) + (1 - self.targets) * np.log(rest)).mean()
            known = self.average_precision[~np.isnan(self.average_precision)]
            return {"mAP": 100 * float(known.mean()) if len(known) else float("nan"), "loss": float(loss), "ece": ece}
        labels = self.targets.argmax(axis=1)
        order = (-self.probs).argsort(axis=1, kind="stable")
        hits = order[:, : min(5, len(self.classes))] == labels[:, None]
        loss = -np.log(np.take_along_axis(probs, labels[:, None], axis=1)).mean()
        shares = {"top1": hits[:, 0].mean(), "top5": hits.any(axis=1).mean(), "mean_class": np.nanmean(self.class_accuracy)}
        return {name: 100 * float(value) for name, value in shares.items()} | {"loss": float(loss), "ece": ece}

    @property
    def unreadable_share(self) -> float:
        """The share, 0..1, of the files that could not be read."""
        return len(self.failed) / len({item.name for item in self.items} | self.failed.keys())

    @property
    def main_metric(self) -> str:
        """The metric that chooses the best model."""
        return "mAP" if self.multi_label else "top1"

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """Return counts (K, K) of (true, predicted) classes; single-label data only."""
        counts = np.zeros((len(self.classes), len(self.classes)), dtype=np.int64)
        np.add.at(counts, (self.targets.argmax(axis=1), self.probs.argmax(axis=1)), 1)
        return counts

    @property
    def class_accuracy(self) -> NDArray[np.float64]:
        """Return the accuracy of each class, (K,), NaN for classes without a video; single-label data only."""
        counts = self.confusion.sum(axis=1)
        return self.confusion.diagonal() / np.where(counts > 0, counts, np.nan)

    @property
    def frequent_errors(self) -> list[tuple[str, int]]:
        """Return for each class the class that it is most often taken for, and how often; single-label data only."""
        errors = self.confusion.copy()
        np.fill_diagonal(errors, 0)
        return [
            (self.classes[most] if row[most] else "", int(row[most])) for row, most in zip(errors, errors.argmax(1), strict=True)
        ]

    @cached_property
    def average_precision(self) -> NDArray[np.float64]:
        """Return the average precision of each class, (K,), NaN for classes without a video.

        It is the sum of precision times the growth of recall over all distinct thresholds, without interpolation, as in
        scikit-learn's `average_precision_score`.
        """
        return np.array([average_precision(self.targets[:, k], self.probs[:, k]) for k in range(len(self.classes))])

    def at_temperature(self, temperature: float) -> "Evaluation":
        """Return the evaluation of the same model with another temperature. The order of the classes is the same."""
        change = temperature / self.temperature
        probs = change_temperature(torch.from_numpy(self.probs).double(), change, multi_label=self.multi_label).float()
        return replace(self, probs=probs.numpy(), temperature=temperature, calibrated=None)

    def calibrate(self) -> "Evaluation":
        """Return the evaluation at the temperature with the smallest loss on these videos.

        Its loss and calibration error are optimistic, because the temperature was fitted to the same videos. On others:
        `other.at_temperature(evaluation.calibrate().temperature).metrics["ece"]`.

        Raises:
            ValueError: there are fewer than 20 videos, or all of them have the same class; or no temperature fits, as for a
                model that is always right.
        """
        check_calibration(self.targets)
        change = _fit_temperature(self.probs, self.targets, multi_label=self.multi_label)
        temperature = self.temperature * change
        if not MIN_TEMPERATURE < temperature < MAX_TEMPERATURE:
            main = self.main_metric
            raise ValueError(
                f"no temperature fits {len(self.items)} videos with {main} {self.metrics[main]:.2f}%: it needs some that the "
                "model gets wrong, and more that it gets right. Calibrate on other videos"
            )
        return self.at_temperature(temperature)


def check_calibration(targets: NDArray[np.float32]) -> None:
    """Raise ValueError if a temperature cannot be fitted to videos with these targets (N, K)."""
    if len(targets) < MIN_CALIBRATION_VIDEOS:
        raise ValueError(f"calibration needs at least {MIN_CALIBRATION_VIDEOS} videos, got {len(targets)}")
    if (targets == targets[0]).all():
        raise ValueError("calibration needs videos of two or more classes, got one")


def calibration_error(probs: NDArray[np.floating], targets: NDArray[np.floating], *, multi_label: bool) -> float:
    """Return the expected calibration error of probabilities (N, K) for targets (N, K), 0..1 (Guo et al., ICML 2017).

    It is the mean difference, over 15 equally wide bins and weighted by their videos, between the accuracy and the mean
    probability of the most probable class. Multi-label: over all classes of all videos, between the share that is present and
    the mean probability.
    """
    if multi_label:
        confidence, right = probs.ravel(), targets.ravel()
    else:
        best = probs.argmax(axis=1)[:, None]
        confidence, right = (np.take_along_axis(values, best, axis=1)[:, 0] for values in (probs, targets))
    bins = np.ceil(confidence.astype(np.float64) * NUM_BINS).astype(int).clip(1)  # as in the paper, with its upper limit
    difference = np.bincount(bins, weights=confidence.astype(np.float64) - right)
    return float(np.abs(difference).sum() / len(bins))


def _fit_temperature(probs: NDArray[np.float32], targets: NDArray[np.float32], *, multi_label: bool) -> float:
    """Return the change of temperature with the smallest loss, between 1e-4 and 1e4.

    The loss is convex in 1 / T, so its slope has one zero, which bisection finds.
    """
    logits = to_logits(torch.from_numpy(probs).double().clamp(min=1e-38), multi_label=multi_label)
    wanted = torch.from_numpy(targets)
    low, high = np.log(1e-4), np.log(1e4)
    for _ in range(60):
        middle = (low + high) / 2
        got = class_probs(logits, multi_label=multi_label, temperature=np.exp(middle))
        slope = ((got - wanted) * logits).sum()  # along 1 / T
        low, high = (middle, high) if slope > 0 else (low, middle)
    return float(np.exp((low + high) / 2))


def average_precision(targets: NDArray[np.floating], scores: NDArray[np.floating]) -> float:
    """Return the average precision of scores (N,) for targets (N,), 0 or 1; NaN if no target is 1."""
    order = (-scores).argsort(kind="stable")
    last_of_ties = np.append(np.diff(scores[order]) != 0, True)
    hits = np.cumsum(targets[order])[last_of_ties]
    precision = hits / np.arange(1, len(scores) + 1)[last_of_ties]
    growth = np.diff(hits, prepend=0)
    return float((precision * growth).sum() / hits[-1]) if hits[-1] else float("nan")


def summary_of(evaluation: Evaluation, *, model: str, data: str) -> dict[str, Any]:
    """Return the metrics and what they were measured with, in types that JSON has."""
    metrics = {name: round(value, 4) if np.isfinite(value) else None for name, value in evaluation.metrics.items()}
    about: dict[str, Any] = {
        "views": evaluation.views,
        "frame_interval": evaluation.frame_interval,
        "temperature": round(evaluation.temperature, 4),
        "model": model,
        "data": data,
        "failed": evaluation.failed,
    }
    if (after := evaluation.calibrated) is not None:
        about["calibrated"] = {
            "temperature": round(after.temperature, 4),
            **{name: round(after.metrics[name], 4) for name in ("loss", "ece")},
        }
    return {"videos": len(evaluation.items)} | metrics | about


def per_class_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Return the header and one row per class: videos, and accuracy and most frequent error, or average precision."""
    scores = evaluation.average_precision if evaluation.multi_label else evaluation.class_accuracy
    texts = ["" if np.isnan(score) else f"{100 * score:.2f}" for score in scores]
    counts = map(str, evaluation.targets.sum(axis=0).astype(int))
    rows = [list(row) for row in zip(evaluation.classes, counts, texts, strict=True)]
    if evaluation.multi_label:
        return ["class", "videos", "average precision"], rows
    rows = [[*row, error] for row, (error, _) in zip(rows, evaluation.frequent_errors, strict=True)]
    return ["class", "videos", "top1", "most frequent error"], rows


def write_results(evaluation: Evaluation, folder: Path, *, model: str, data: str) -> None:
    """Write `summary.json` and `per_class.csv`."""
    with atomic_write(folder / "summary.json") as unfinished:
        unfinished.write_text(json.dumps(summary_of(evaluation, model=model, data=data), indent=2) + "\n")
    header, rows = per_class_rows(evaluation)
    with (
        atomic_write(folder / "per_class.csv") as unfinished,
        open(unfinished, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def write_probs(evaluation: Evaluation, path: Path) -> None:
    """Write the arrays path (N,), label (N,) or (N, K) for multi-label data, probs (N, K), and class (K,).

    The path of a segment is followed by its limits.

    Args:
        evaluation: of N videos.
        path: of a `.json`, `.pkl` or `.npz` file.
    """
    labels = evaluation.targets.astype(np.int64)
    content = {
        "path": np.array([item.name for item in evaluation.items]),
        "label": labels if evaluation.multi_label else labels.argmax(axis=1),
        "probs": evaluation.probs,
        "class": np.array(evaluation.classes),
    }
    with atomic_write(path) as unfinished:
        if path.suffix == ".npz":
            np.savez_compressed(unfinished, **content)  # type: ignore[arg-type]
        elif path.suffix == ".pkl":
            unfinished.write_bytes(pickle.dumps(content))
        else:
            unfinished.write_text(json.dumps({key: value.tolist() for key, value in content.items()}))
