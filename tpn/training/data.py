"""The data of a run: a folder, table, or list, divided into training and validation, and the facts from which defaults follow."""

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from tpn.config import InputSpec
from tpn.files import StrPath
from tpn.models.classifier import TPNClassifier
from tpn.training.config import TrainConfig
from tpn.validation import brief
from tpn.video import decode, lists, tables
from tpn.video.crops import track_of
from tpn.video.datasets import Item, VideoDataset, open_dataset, open_validation, validation_items
from tpn.video.decode import VideoError
from tpn.video.tables import Row

PROBED = 100
"""Videos whose headers are read for the medians."""
TRIES = 100
"""Random orders of the groups from which the best split is chosen; fewer if there are more than 10,000 videos."""


@dataclass(frozen=True)
class TrainData:
    """The datasets of a run.

    Attributes:
        train: for training.
        val: for validation, with the same classes.
        split: where the division comes from, in words.
    """

    train: VideoDataset
    val: VideoDataset | None
    split: str

    def write(self, path: StrPath) -> None:
        """Write the division as a table, CSV or Parquet. Training on this table gives the same division.

        Class names that are numbers would be read as numbers of classes; they are written as "class 1".
        """
        names = [str(i) for i in range(len(self.train.classes))] if self.train.numbered else list(self.train.classes)
        if not self.train.numbered and lists.are_numbers(names):
            names = [f"class {name}" for name in names]
        rows = []
        for split, part in {"train": self.train, "val": self.val}.items():
            for item in part.items if part is not None else ():
                labels, path_ = tuple(names[label] for label in item.labels), os.path.abspath(item.path)
                row = Row(None, path_, labels, item.start, item.end, split, item.group, item.num_frames)
                rows.append(replace(row, tracks=item.tracks and os.path.abspath(item.tracks), track=item.track))
        tables.write_table(path, rows, multi_label=self.train.multi_label)


@dataclass(frozen=True)
class DataFacts:
    """Statistics of the training data that the plan uses.

    Attributes:
        videos: number of training videos.
        class_counts: of each class.
        frames: median number of frames of a video, or of a labeled segment. None if no header states it.
        fps: median frame rate, None if unknown.
    """

    videos: int
    class_counts: tuple[int, ...]
    frames: float | None
    fps: float | None


def open_data(data: str, config: TrainConfig, model: TPNClassifier) -> TrainData:
    """Open the data of a run, and divide it if it has no validation part.

    The classes are in the order of the model's if they are the same, or if the labels are numbers and `config.keep_classes`.

    The validation part is the first of these that exists: `config.val`; a folder val, or test, beside a folder train; the rows of
    a table whose split is val, or test; a share `config.val_fraction` of each class. Rows for validation are never trained on.

    Args:
        data: a folder of class folders; a folder with such folders named train and val; or a table or list of videos.
        model: with the classes of its weights.
    """
    options: dict[str, Any] = {
        "root": config.root,
        "template": config.frames,
        "first": config.first_frame,
        "max_bad": config.max_bad,
        "seed": config.seed,
    }
    val, how = config.val, f"val={config.val}"
    if folders := lists.split_folders(data):
        if val is None:
            val, how = data, f"the folders {folders['train'].name} and {(folders.get('val') or folders['test']).name}"
        data = str(folders["train"])
    spec: InputSpec = model.input_spec
    whole = open_dataset(data, spec, train=True, **options)
    keep = whole.multi_label == model.multi_label and whole.numbered and config.keep_classes
    if model.labels and whole.classes != model.labels and (keep or set(whole.classes) == set(model.labels)):
        whole = open_dataset(data, spec, train=True, classes=model.labels, **options)
    if config.group is not None and (val is not None or any(item.split for item in whole.items)):
        raise ValueError(
            f"group={config.group!r} is not valid here: the data is divided already, by {how if val else 'the column split'}"
        )
    if val is not None:
        given = open_validation(val, spec, classes=whole.classes, **options)
        train = whole.part(_train_items(data, whole), train=True)
        return TrainData(train, given.part(_as_labeled(val, given.items, whole), train=False), how)
    if any(item.split for item in whole.items):
        return _divide_by_column(data, whole)
    return _divide_by_class(whole, config)


def _train_items(source: str, data: VideoDataset) -> list[Item]:
    chosen = [item for item in data.items if item.split in ("", "train")]
    if not chosen:
        raise ValueError(f"{source}: no row is for training; expected rows whose split is train")
    trained = {label for item in chosen for label in item.labels}
    if absent := {label for item in data.items for label in item.labels} - trained:
        raise ValueError(
            f"{source}: no row for training has the class {brief(data.classes[min(absent)])}; expected one for each class"
        )
    return chosen


def _as_labeled(source: str, items: Sequence[Item], like: VideoDataset) -> list[Item]:
    """Return items whose labels have the form of another dataset: tuples in a multi-label one."""
    if like.multi_label:
        return [replace(item, label=item.labels) for item in items]
    if not all(isinstance(item.label, int) for item in items):
        raise ValueError(f"{source} has several labels for a video, but the training data has one for each video")
    return list(items)


def _divide_by_column(source: str, data: VideoDataset) -> TrainData:
    """Divide a table by its column split."""
    unmarked = next((item for item in data.items if not item.split), None)
    if unmarked is not None:
        raise ValueError(f"{source}: row {unmarked.row}: expected the split train or val, as in other rows, got none")
    train = data.part(_train_items(source, data), train=True)
    if len(train) == len(data):
        return TrainData(train, None, "no validation: the column split has only train")
    val = data.part(validation_items(data), train=False)
    unused = len(data) - len(train) - len(val)
    return TrainData(train, val, "the column split" + (f" ({unused} test videos are not used)" if unused else ""))


def _divide_by_class(data: VideoDataset, config: TrainConfig) -> TrainData:
    """Take a share of each class for validation. Parts of one video stay together if there are enough videos."""
    if not config.val_fraction:
        return TrainData(data, None, "no validation (val_fraction=0)")
    groups = groups_of(data.items, config.group)
    how = f"{config.val_fraction:.0%} of each class"
    sources = [group or (item.path if item.is_part else "") for group, item in zip(groups, data.items, strict=True)]
    chosen = stratified_split(data.items, sources, config.val_fraction, seed=config.seed)
    if any(chosen):
        how += ", whole groups" if any(groups) else ", whole videos" if any(sources) else ""
    elif any(sources) and not any(groups):
        chosen = stratified_split(data.items, groups, config.val_fraction, seed=config.seed)
        how += ", segments of one video on both sides"
    if not any(chosen):
        what = "no group is small enough" if any(groups) else "too few videos"
        return TrainData(data, None, f"no validation: {what} for a share of {config.val_fraction:g}")
    items = [replace(item, group=group) for item, group in zip(data.items, groups, strict=True)]
    parts = [[item for item, in_val in zip(items, chosen, strict=True) if in_val == side] for side in (False, True)]
    return TrainData(data.part(parts[0], train=True), data.part(parts[1], train=False), how)


def groups_of(items: Sequence[Item], pattern: str | None) -> list[str]:
    """Return the source of each video: its group, or what the pattern finds in its path; "" for none."""
    if pattern is None:
        return [item.group for item in items]
    found = [re.search(pattern, item.path) for item in items]
    groups = [match[match.lastindex or 0] if match else "" for match in found]
    missing = [item.path for item, group in zip(items, groups, strict=True) if not group]
    if missing:
        raise ValueError(f"group {pattern!r} finds nothing in {len(missing)} paths, the first is {missing[0]}")
    return groups


def stratified_split(items: Sequence[Item], groups: Sequence[str], fraction: float, *, seed: int = 0) -> list[bool]:
    """Choose a share of each class for validation; return for each item whether it is chosen.

    Items of one group stay together; without groups (""), each item is its own. Every class keeps an item for training. In a
    multi-label dataset, items without a class count as one more class. Groups are added in random order while they bring the
    shares of their classes closer to `fraction`; of several orders, the one with the closest shares is used.
    """
    rng = np.random.default_rng(seed)
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group or f"\0{index}"].append(index)
    names = sorted(members)
    counts = [Counter(label for index in members[name] for label in items[index].labels or (-1,)) for name in names]
    totals = Counter(label for item in items for label in item.labels or (-1,))
    targets = {label: fraction * total for label, total in totals.items()}
    best, smallest = list[int](), math.inf
    for _ in range(max(min(TRIES, TRIES * 10_000 // len(items)), 1)):
        chosen, taken = _choose_groups(counts, rng.permutation(len(names)).tolist(), totals, targets)
        distance = sum(abs(taken[label] - target) for label, target in targets.items())
        if distance < smallest:
            best, smallest = chosen, distance
    in_val = {index for place in best for index in members[names[place]]}
    return [index in in_val for index in range(len(items))]


def _choose_groups(
    counts: Sequence[Counter[int]], order: Sequence[int], totals: Mapping[int, int], targets: Mapping[int, float]
) -> tuple[list[int], Counter[int]]:
    """Return the chosen groups and their number of items of each class."""
    taken: Counter[int] = Counter()
    chosen = []
    for place in order:
        added = counts[place]
        gain = sum(
            abs(taken[label] - targets[label]) - abs(taken[label] + count - targets[label]) for label, count in added.items()
        )
        if gain > 1e-9 and all(taken[label] + count < totals[label] for label, count in added.items()):
            taken.update(added)
            chosen.append(place)
    return chosen, taken


def facts_of(data: VideoDataset, target_fps: float | None = None) -> DataFacts:
    """Return the facts of a training set; headers of up to 100 videos are read, evenly spread over it."""
    frames, rates = [], []
    for index in np.unique(np.linspace(0, len(data) - 1, PROBED).round().astype(int)):
        item = data.items[index]
        if item.num_frames is not None:
            frames.append(item.num_frames)
            continue
        try:
            fps, count = decode.header(item.path)
            count = len(track_of(item)) if item.track is not None else count
        except (VideoError, OSError):
            continue  # reported when it is drawn
        if item.track is None and item.is_segment:
            length = count / fps if fps and count else math.inf
            seconds = max(min(item.end or math.inf, length) - (item.start or 0), 0)
            count = round(seconds * fps) if fps and seconds < math.inf else None
        if fps and count and target_fps:
            count, fps = round(count * target_fps / fps), target_fps
        if count:
            frames.append(count)
        if fps:
            rates.append(fps)
    return DataFacts(len(data), data.class_counts, median(frames) if frames else None, median(rates) if rates else None)
