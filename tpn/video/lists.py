"""Find labeled videos: in folders, in lists with "path label" or "folder num_frames label", and in Kinetics' CSV files."""

import csv
import logging
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from tpn.files import StrPath
from tpn.validation import brief
from tpn.video.tables import MAX_DIGITS, SEPARATOR, SPLITS, Row, parse_count

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts", ".ogv"]
)

_FORMATS = {
    2: "Expected 'path label' on each line, or a CSV table with a header: path,label or path,label,start,end. "
    "Lines with 'folder num_frames label' need the template of the file names (--frames)",
    3: "Expected 'folder num_frames label' on each line, or a CSV table with the header path,num_frames,label",
}
MAX_CLASSES = 100_000
"""Largest number of numbered classes: each takes memory for its name, even if no video has it."""

_COMMA_AFTER_VIDEO = re.compile(rf"({'|'.join(sorted(VIDEO_SUFFIXES))})\"?\s*[,;]".replace(".", r"\."), re.IGNORECASE)
_ENDS_IN_NUMBER = re.compile(r"\s[\d.]+$")

_logger = logging.getLogger(__name__)


def class_folders(root: StrPath) -> list[str]:
    """Return the sorted names of the folders in a folder, except hidden ones."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def split_folders(data: StrPath) -> dict[str, Path]:
    """Return the folders train, val, and test in a folder of datasets, as far as they exist, by these names.

    Other spellings are those of `tables.SPLITS`. The result is empty if `data` is a file, or if it has no folder train beside one
    of the others: its folders are then classes.
    """
    if not os.path.isdir(data):
        return {}
    folders = {name.lower(): name for name in class_folders(data)}
    found: dict[str, Path] = {}
    for spelling, split in SPLITS.items():
        if spelling in folders:
            found.setdefault(split, Path(data, folders[spelling]))
    return found if "train" in found and len(found) > 1 else {}


def videos_below(folder: Path) -> list[Path]:
    """Return the sorted video files in a folder and its subfolders, except hidden ones. No folder is read twice."""
    seen: set[str] = set()
    found = []
    for path, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(path, name) for name in files if Path(name).suffix.lower() in VIDEO_SUFFIXES and not name.startswith(".")]
    return sorted(found)


def read_list(file: StrPath, root: Path, *, num_fields: int = 2) -> list[Row]:
    """Return the videos of a text file with 2 fields on each line, "path label", or 3, or of a Kinetics CSV file.

    Only the path may contain spaces. Empty lines are skipped. `root` is the folder of relative paths.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a list of videos. Pass a folder or a text file in UTF-8") from error
    if lines and "youtube_id" in lines[0].split(","):
        return _find_kinetics_videos(file, lines, root)
    rows = []
    for number, line in enumerate(lines, 1):
        fields = line.rsplit(maxsplit=num_fields - 1)
        if not fields:
            continue
        path, *counts, label = fields if len(fields) > 1 else ("", line)
        if len(fields) != num_fields or _COMMA_AFTER_VIDEO.search(line) or _has_more_fields(path, root):
            raise ValueError(f"{file}: line {number}: got {brief(line)}. {_FORMATS[num_fields]}")
        num_frames = parse_count(f"{file}: line {number}: {brief(path)}", counts[0]) if counts else None
        rows.append(Row(number, path, (label,), num_frames=num_frames))
    return rows


def _has_more_fields(path: str, root: Path) -> bool:
    return _ENDS_IN_NUMBER.search(path) is not None and not os.path.exists(root / path)


def _find_kinetics_videos(file: StrPath, lines: Sequence[str], root: Path) -> list[Row]:
    """Return the videos of an official Kinetics CSV file. Missing ones are skipped with a warning."""
    reader = csv.DictReader(lines)
    missing = {"label", "youtube_id", "time_start", "time_end"} - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"{file}: not a Kinetics CSV file, the column {', '.join(sorted(missing))} is missing")
    rows = list(reader)
    found = []
    for number, row in enumerate(rows, 2):
        try:
            name = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}.mp4"
        except (TypeError, ValueError):
            raise ValueError(f"{file}: line {number}: time_start and time_end must be whole seconds") from None
        path = next((p for p in (root / row["label"] / name, root / name) if os.path.isfile(p)), None)
        if path is not None:
            split = SPLITS.get((row.get("split") or "").strip().lower(), "")
            found.append(Row(number, str(path.relative_to(root)), (row["label"],), split=split))
    if len(found) < len(rows):
        _logger.warning("%s of the %s listed videos are missing in %s", len(rows) - len(found), len(rows), root)
    return found


def are_numbers(labels: Collection[str]) -> bool:
    """Return whether all labels are numbers."""
    return all(label.isdecimal() for label in labels)


def encode_labels(file: StrPath, labels: Sequence[str], classes: Sequence[str] | None) -> tuple[list[int], list[str], bool]:
    """Convert labels to numbers. Return them, the class names, and whether the labels are numbers themselves.

    They are if all of them look like numbers, unless `classes` has them as names. The default class names are "class 0",
    "class 1", ... for numbers, otherwise the sorted labels.
    """
    if are_numbers(labels) and not (classes is not None and set(labels) <= set(classes)):
        too_large = next((label for label in labels if len(label) > MAX_DIGITS or int(label) >= MAX_CLASSES), None)
        if too_large is not None:
            raise ValueError(f"{file}: label {brief(too_large)} is too large; expected numbers from 0, below {MAX_CLASSES}")
        numbers = [int(label) for label in labels]
        largest = max(numbers, default=-1)
        names = list(classes) if classes is not None else [f"class {i}" for i in range(largest + 1)]
        if largest >= len(names):
            raise ValueError(f"{file}: label {largest} is out of range, there are {len(names)} classes, numbered from 0")
        return numbers, names, True
    names = list(classes) if classes is not None else sorted(set(labels))
    _refuse_joined_labels(file, labels, names if classes is not None else ())
    check_classes(file, labels, names)
    index = {name: i for i, name in reversed(list(enumerate(names)))}
    return [index[label] for label in labels], names, False


def _refuse_joined_labels(file: StrPath, labels: Sequence[str], classes: Sequence[str]) -> None:
    known = {*labels, *classes}
    for label in sorted(set(labels) - set(classes)):
        parts = re.split(r"\s*[,;|]\s*", label)
        if len(parts) > 1 and all(part.isdecimal() or part in known for part in parts):
            problem = f"{file}: the label {brief(label)} looks like several labels. "
            raise ValueError(problem + f"Separate labels by {SEPARATOR!r}, in a CSV table with the header path,label")


def check_classes(source: StrPath, found: Collection[str], expected: Sequence[str]) -> None:
    def shorten(names: Sequence[str]) -> str:
        return ", ".join(brief(name)[1:-1] for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    unknown = sorted(set(found) - set(expected))
    if unknown:
        raise ValueError(f"{source}: unknown classes: {shorten(unknown)}. Expected: {shorten(expected)}")
