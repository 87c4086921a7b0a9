"""Lists of videos: text files with "path label" or "folder num_frames label" lines, and the official Kinetics CSVs."""

import csv
import logging
import os
from collections.abc import Sequence
from pathlib import Path

PathLike = str | os.PathLike[str]

_logger = logging.getLogger(__name__)


def read_lines(file: PathLike) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: neither a folder nor a list of videos, which is a text file in UTF-8") from error


def split_lines(file: PathLike, lines: Sequence[str], fields_behind: int) -> list[tuple[str, ...]]:
    """Split "path field ..." lines from the right: paths may hold spaces. Empty lines are passed over."""
    rows = []
    for number, line in enumerate(lines, 1):
        row = line.rsplit(maxsplit=fields_behind)
        if row and len(row) != fields_behind + 1:
            raise ValueError(f"{file}: line {number}: expected {fields_behind + 1} fields, got {line!r}")
        if row:
            rows.append(tuple(row))
    return rows


def kinetics(file: PathLike, lines: Sequence[str], root: Path) -> list[tuple[str, str]]:
    """(path, class name) of the videos of an official Kinetics CSV that are there."""
    reader = csv.DictReader(lines)
    missing = {"label", "youtube_id", "time_start", "time_end"} - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"{file}: this looks like a CSV of Kinetics, but has no {', '.join(sorted(missing))} column")
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
        _logger.warning("%s of %s videos of the list are not in %s", len(rows) - len(found), len(rows), root)
    return found


def labelled(
    file: PathLike, named: Sequence[tuple[str, str]], classes: Sequence[str] | None
) -> tuple[list[tuple[str, int]], list[str]]:
    """Turn labels, numbers or class names, into numbers; return them with the class names."""
    if all(label.isdecimal() for _, label in named):
        labels = [int(label) for _, label in named]
        names = list(classes) if classes is not None else [f"class {i}" for i in range(max(labels, default=-1) + 1)]
        if labels and max(labels) >= len(names):
            raise ValueError(f"{file}: label {max(labels)}, but there are {len(names)} classes, numbered from 0")
    else:
        names = list(classes) if classes is not None else sorted({label for _, label in named})
        unknown = sorted({label for _, label in named} - set(names))
        if unknown:
            raise ValueError(unknown_classes(file, unknown, names))
        labels = [names.index(label) for _, label in named]
    return [(path, label) for (path, _), label in zip(named, labels, strict=True)], names


def unknown_classes(source: PathLike, unknown: Sequence[str], expected: Sequence[str]) -> str:
    def few(names: Sequence[str]) -> str:
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    return f"{source}: classes that are not among the given ones: {few(unknown)}; expected some of {few(expected)}"
