"""Read lists of videos: text files with "path label" or "folder num_frames label" lines, and the official Kinetics CSV files."""

import csv
import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path

PathLike = str | os.PathLike[str]

_logger = logging.getLogger(__name__)


def read_lines(file: PathLike) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a list of videos. Pass a folder or a text file in UTF-8") from error


def split_lines(file: PathLike, lines: Sequence[str], num_fields: int) -> list[tuple[str, ...]]:
    """Split each line into fields. Only the first field, the path, may contain spaces. Empty lines are skipped."""
    rows = []
    for number, line in enumerate(lines, 1):
        row = line.rsplit(maxsplit=num_fields - 1)
        if row and len(row) != num_fields:
            raise ValueError(f"{file}: line {number}: expected {num_fields} fields, got {line!r}")
        if row:
            rows.append(tuple(row))
    return rows


def find_kinetics_videos(file: PathLike, lines: Sequence[str], root: Path) -> list[tuple[str, str]]:
    """Return (path, class name) of each video in an official Kinetics CSV file. Missing videos are skipped with a warning."""
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
        path = next((p for p in (root / row["label"] / name, root / name) if p.is_file()), None)
        if path is not None:
            found.append((str(path), row["label"]))
    if len(found) < len(rows):
        _logger.warning("%s of the %s listed videos are missing in %s", len(rows) - len(found), len(rows), root)
    return found


def encode_labels(file: PathLike, labels: Sequence[str], classes: Sequence[str] | None) -> tuple[list[int], list[str]]:
    """Convert labels, which are all numbers or all class names, to numbers. Return them with the class names.

    The default class names are "class 0", "class 1", ... for numbers, otherwise the sorted labels.
    """
    if all(label.isdecimal() for label in labels):
        numbers = [int(label) for label in labels]
        largest = max(numbers, default=-1)
        names = list(classes) if classes is not None else [f"class {i}" for i in range(largest + 1)]
        if largest >= len(names):
            raise ValueError(f"{file}: label {largest} is out of range, there are {len(names)} classes, numbered from 0")
        return numbers, names
    names = list(classes) if classes is not None else sorted(set(labels))
    check_classes(file, labels, names)
    return [names.index(label) for label in labels], names


def check_classes(source: PathLike, found: Collection[str], expected: Sequence[str]) -> None:
    def shorten(names: Sequence[str]) -> str:
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    unknown = sorted(set(found) - set(expected))
    if unknown:
        raise ValueError(f"{source}: unknown classes: {shorten(unknown)}. Expected: {shorten(expected)}")
