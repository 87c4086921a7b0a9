"""Read and write tables of labeled videos, CSV or Parquet, with these columns in any order:

    path         video file, or folder of extracted frames
    label        class name, or number from 0; several classes of a video are separated by "|"
    labels       instead of label: a video may have no class, which is an empty cell
    start, end   segment of the video in seconds; empty: from the first frame, to the last one
    split        train, or val for validation; see `SPLITS` for other spellings
    group        source of the video; videos of one source stay on one side of a split
    num_frames   number of extracted frames
    tracks       file with tracks of the video, see `tpn.video.tracks`
    track        id of one of them: the row is this person or object

Only the path and the label are required. Other columns are ignored. CSV files are UTF-8, with commas and quotes as the module csv
writes them.
"""

import csv
import difflib
import io
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpn.files import StrPath, atomic_write
from tpn.validation import brief

_logger = logging.getLogger(__name__)

SEPARATOR = "|"
"""Between the labels in one cell."""

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "validate": "val",
    "test": "test",
}
"""Names of splits, of rows and of folders, in lower case. Test rows are for validation only if there are no validation rows."""

MAX_DIGITS = 9
"""Largest number of digits of a number of frames or of a class."""


COLUMNS = ("path", "label", "labels", "start", "end", "split", "group", "num_frames", "tracks", "track")


@dataclass(frozen=True)
class Row:
    """A video, or a segment of one, with its labels as text.

    Attributes:
        number: of the line in a file, from 1; None if it comes from no file.
        path: relative to the folder of the dataset, or absolute.
        labels: class names or numbers; more than one, or none, only in a multi-label dataset.
        start: in seconds.
        end: in seconds.
        split: train, val, test, or empty.
        group: source of the video, empty if unknown.
        num_frames: number of extracted frames.
        tracks: file with tracks, relative like `path`; empty for the whole picture.
        track: id of a track in that file.
    """

    number: int | None
    path: str
    labels: tuple[str, ...]
    start: float | None = None
    end: float | None = None
    split: str = ""
    group: str = ""
    num_frames: int | None = None
    tracks: str = ""
    track: int | None = None


def is_table(file: StrPath) -> bool:
    """Return whether a file is a Parquet file, by its suffix, or has a header with a column path."""
    if _is_parquet(file):
        return True
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        header = lines.readline(10_000).strip().replace('"', "")
    if "path" in _column_names(header.split(",")):
        return True
    if any("path" in _column_names(header.split(separator)) for separator in ";\t"):
        raise ValueError(f"{file}: the columns of a table must be separated by commas, got the header {brief(header)}")
    return False


def read_table(file: StrPath) -> tuple[list[Row], bool]:
    """Return the rows of a table, and whether it is multi-label: a cell has several labels, or the column is named labels.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the file cannot be read.
        ImportError: it is a Parquet file, and pyarrow is missing.
        ValueError: it is not a table, or a cell is not valid; the message has the number of the row.
    """
    header, cells = _read_parquet(file) if _is_parquet(file) else _read_csv(file)
    names = _column_names(header)
    columns = [name for name in names if name in COLUMNS]
    if len(set(columns)) < len(columns) or "path" not in columns or ("label" in columns) == ("labels" in columns):
        raise ValueError(f"{file}: expected one column path and one column label (or labels), got {brief(', '.join(header))}")
    for name in sorted({*names}.difference(COLUMNS)):
        if near := difflib.get_close_matches(name, {*COLUMNS}.difference(columns), n=1, cutoff=0.75):
            _logger.warning("%s: the column %r is ignored; rename it if it is %r", file, name, near[0])
    rows = [_parse_row(f"{file}: row {number}", number, row) for number, row in cells]
    return rows, "labels" in columns or any(len(row.labels) > 1 for row in rows)


def write_table(file: StrPath, rows: Iterable[Row], *, multi_label: bool = False) -> None:
    """Write a table, CSV or, if the file name ends in .parquet, Parquet. `multi_label` names the column labels."""
    rows = list(rows)
    for row in rows:
        if any(SEPARATOR in label for label in row.labels):
            raise ValueError(
                f"a table separates labels by {SEPARATOR!r}, so the class {' '.join(row.labels)!r} needs another name"
            )
    columns: dict[str, list[Any]] = {
        "path": [row.path for row in rows],
        "labels" if multi_label else "label": [SEPARATOR.join(row.labels) for row in rows],
        **{name: [getattr(row, name) for row in rows] for name in ("start", "end", "split", "group")},
    }
    for name in ("num_frames", "tracks", "track"):
        if any(getattr(row, name) not in (None, "") for row in rows):
            columns[name] = [getattr(row, name) for row in rows]
    with atomic_write(file) as unfinished:
        if _is_parquet(file):
            arrow, parquet = import_pyarrow()
            parquet.write_table(arrow.table(columns), unfinished)
            return
        with open(unfinished, "w", encoding="utf-8", errors="surrogateescape", newline="") as text:
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))


def _is_parquet(file: StrPath) -> bool:
    return Path(file).suffix.lower() in (".parquet", ".pq")


def _column_names(header: Sequence[str]) -> list[str]:
    return [name.strip().lower() for name in header]


Cells = list[tuple[int, dict[str, str]]]
"""The number and the cells of each row, by the name of the column."""


def csv_lines(file: StrPath) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each line of a CSV file that is not empty. Raises ValueError if it is not valid."""
    try:
        text = Path(file).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a CSV file in UTF-8 ({error.reason} at byte {error.start})") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        yield from ((reader.line_num, line) for line in reader if line)
    except csv.Error as error:
        raise ValueError(f"{file}: row {reader.line_num}: not valid CSV ({error})") from error


def _read_csv(file: StrPath) -> tuple[list[str], Cells]:
    lines = list(csv_lines(file))
    if not lines:
        raise ValueError(f"{file}: the file is empty; expected a header, such as path,label")
    (_, header), *rest = lines
    for number, line in rest:
        if len(line) > len(header):
            raise ValueError(f"{file}: row {number}: {len(line)} cells for {len(header)} columns; cells with commas need quotes")
    names = _column_names(header)
    return header, [(number, dict.fromkeys(names, "") | dict(zip(names, line, strict=False))) for number, line in rest]


def _read_parquet(file: StrPath) -> tuple[list[str], Cells]:
    arrow, parquet = import_pyarrow()
    with open(file, "rb") as opened:  # Python's own errors for missing files
        try:
            header = list(parquet.read_schema(opened).names)
            table = parquet.read_table(opened, columns=[name for name in header if name.strip().lower() in COLUMNS])
            listed = table.to_pylist()
        except (arrow.ArrowException, OSError, UnicodeError) as error:
            raise ValueError(f"{file}: not a Parquet file, or damaged ({str(error)[:200]})") from error
    rows = []
    for number, row in enumerate(listed, 1):
        for name, value in row.items():
            if value is not None and not isinstance(value, str | int | float):
                raise ValueError(f"{file}: row {number}: {name} must be a number or text, got {brief(value)}")
        rows.append((number, {name.strip().lower(): _as_text(value) for name, value in row.items()}))
    return header, rows


def _as_text(value: str | float | None) -> str:
    if value is None or value != value:  # pandas writes missing numbers as NaN, and integers beside them as floats
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _parse_row(place: str, number: int, cells: Mapping[str, str]) -> Row:
    path, split = cells["path"], cells.get("split", "").strip()
    if not path.strip():
        raise ValueError(f"{place}: path is empty")
    if split and split.lower() not in SPLITS:
        raise ValueError(f"{place}: split must be {', '.join(SPLITS)}, or empty, got {brief(split)}")
    start, end = (_parse_seconds(place, name, cells.get(name, "")) for name in ("start", "end"))
    if end is not None and end <= (start or 0):
        raise ValueError(f"{place}: end must be later than start, got start={start or 0:g} and end={end:g}")
    num_frames, tracks, track = (cells.get(name, "").strip() for name in ("num_frames", "tracks", "track"))
    if bool(tracks) != bool(track) or not (track or "0").isdecimal() or len(track) > MAX_DIGITS:
        raise ValueError(f"{place}: tracks must be a file and track an id in it, got {brief(tracks)} and {brief(track)}")
    return Row(
        number,
        path,
        _parse_labels(place, cells),
        start,
        end,
        SPLITS.get(split.lower(), ""),
        cells.get("group", "").strip(),
        parse_count(place, num_frames) if num_frames else None,
        tracks,
        int(track) if track else None,
    )


def parse_count(place: str, cell: str) -> int:
    """Return a number of frames. Raises ValueError that starts with `place`."""
    if not cell.isdecimal() or len(cell) > MAX_DIGITS or not int(cell):
        raise ValueError(f"{place}: num_frames must be a positive integer of at most {MAX_DIGITS} digits, got {brief(cell)}")
    return int(cell)


def _parse_labels(place: str, cells: Mapping[str, str]) -> tuple[str, ...]:
    cell = cells.get("labels", cells.get("label", ""))
    if not cell.strip():
        if "labels" in cells:
            return ()
        raise ValueError(f"{place}: label is empty; a column named labels may have empty cells, for videos without a class")
    labels = tuple(label.strip() for label in cell.split(SEPARATOR))
    if "" in labels or len(set(labels)) < len(labels):
        raise ValueError(f"{place}: expected different labels, separated by {SEPARATOR!r}, got {brief(cell)}")
    return labels


def _parse_seconds(place: str, name: str, cell: str) -> float | None:
    if not cell.strip():
        return None
    try:
        seconds = float(cell)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{place}: {name} must be a number of seconds, at least 0, got {brief(cell)}")
    return seconds


def import_pyarrow() -> tuple[Any, Any]:
    """Return pyarrow and pyarrow.parquet."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        message = 'Parquet files need pyarrow: pip install "tpn[parquet]", or use .csv for tables and .npz for features'
        raise ImportError(message) from error
    return pyarrow, pyarrow.parquet
