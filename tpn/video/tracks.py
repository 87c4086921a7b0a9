"""Read tracks of people and objects, as trackers write them.

Three forms are read; all coordinates are pixels of the displayed picture, and may lie outside it:

    MOT text   lines "frame,id,x,y,w,h,..." without a header; frames are numbered from 1; x, y is the left upper corner
    CSV        a header with the columns frame, id, and x, y, w, h or x1, y1, x2, y2; frames are numbered from 0
    arrays     {id: (frames (N,), boxes (N, 4))} with boxes x1, y1, x2, y2, or rows (N, 6+) in the order of MOT; from 0

Other columns, such as confidence or class, are ignored.
"""

import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tpn.files import StrPath
from tpn.validation import brief, check_int
from tpn.video.tables import csv_lines

Boxes = NDArray[np.float64]

MAX_GAP = 30
"""Frames that a track may miss. An id that is absent for longer starts another track. Trackers forget a person about as fast."""

MAX_BYTES = 2**27
MAX_FRAME = 10**7
MAX_ID = 10**9 - 1
MAX_COORDINATE = 10**6

COLUMNS = ("frame", "id", "x", "y", "w", "h")
CORNERS = ("frame", "id", "x1", "y1", "x2", "y2")


@dataclass(frozen=True, eq=False)
class Track:
    """The boxes of one person or object over time.

    Attributes:
        id: number that the tracker gave it.
        frames: (N,) int64, increasing indices of frames, 0 is the first frame of the video. Frames may be missing.
        boxes: (N, 4) float64, left, top, right, bottom in pixels; they may reach beyond the picture.

    Raises:
        TypeError: `id` is not an integer.
        ValueError: the arrays have other shapes, a number is not finite or out of range, or a box has no area.
    """

    id: int
    frames: NDArray[np.int64]
    boxes: Boxes

    def __post_init__(self) -> None:
        if isinstance(self.id, bool) or not isinstance(self.id, int | np.integer):
            raise TypeError(f"id must be an integer, got {brief(self.id)}")
        frames, boxes = np.asarray(self.frames, np.float64), np.asarray(self.boxes, np.float64)
        if frames.ndim != 1 or not len(frames) or boxes.shape != (len(frames), 4):
            raise ValueError(
                f"track {self.id}: expected frames (N,) and boxes (N, 4) with N >= 1, got {frames.shape} and {boxes.shape}"
            )
        rows = np.column_stack([frames, np.full(len(frames), self.id), boxes])
        _check(rows, lambda i: f"track {self.id}: box {i}")
        if (np.diff(frames) <= 0).any():
            raise ValueError(f"track {self.id}: frames must increase, one box for each")
        object.__setattr__(self, "frames", frames.astype(np.int64))
        object.__setattr__(self, "boxes", boxes)

    def __len__(self) -> int:
        """Return the number of frames from the first to the last one, missing ones included."""
        return int(self.frames[-1] - self.frames[0]) + 1

    @property
    def first(self) -> int:
        return int(self.frames[0])

    @property
    def last(self) -> int:
        return int(self.frames[-1])

    def filled(self) -> Boxes:
        """Return a box for each frame from the first to the last one, (len(self), 4): linear between those that are known."""
        every = np.arange(self.first, self.last + 1)
        return np.stack([np.interp(every, self.frames, column) for column in self.boxes.T], axis=1)

    def between(self, first: int, last: int) -> "Track | None":
        """Return the part in the frames `first` to `last`, including both, with a box for each frame; None if there is none."""
        first, last = max(first, self.first), min(last, self.last)
        if first > last:
            return None
        return Track(self.id, np.arange(first, last + 1), self.filled()[first - self.first : last - self.first + 1])


TrackSource = StrPath | Mapping[int, tuple[ArrayLike, ArrayLike]] | NDArray[Any] | Sequence[Track]
"""Tracks in one of the forms that `read_tracks` reads."""


@np.errstate(over="ignore", invalid="ignore")  # such numbers are refused
def read_tracks(source: TrackSource, *, max_gap: int = MAX_GAP) -> list[Track]:
    """Read the tracks of a video.

    Args:
        source: a file or arrays as described above, or a list of `Track`, which is returned as it is.
        max_gap: frames that a track may miss; an id that is absent for longer comes back as another `Track` of the same id.

    Returns:
        Tracks ordered by id, those of a mapping in its order; parts of one id by time.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the file cannot be read.
        ValueError: the file or the array is not as described; the message has the number of the line.
        TypeError: `source` is something else.
    """
    check_int("max_gap", max_gap, minimum=0)
    if isinstance(source, Mapping):
        tracks = [_sorted(id, arrays) for id, arrays in source.items()]
    elif isinstance(source, str | os.PathLike):
        tracks = _group(*_read_file(source))
    elif isinstance(source, np.ndarray):
        if source.ndim != 2 or source.shape[1] < len(COLUMNS) or not np.issubdtype(source.dtype, np.number):
            raise ValueError(f"tracks must be rows of {', '.join(COLUMNS)}, (N, 6), got {source.dtype} {source.shape}")
        rows = source[:, :6].astype(np.float64)
        rows[:, 4:] += rows[:, 2:4]
        tracks = _group(rows, lambda i: f"tracks: row {i}")
    elif isinstance(source, list | tuple) and all(isinstance(each, Track) for each in source):
        return list(source)
    else:
        raise TypeError(f"tracks must be a file, a mapping, an array, or a list of Track, got {type(source).__name__}")
    if tracks and max(np.abs(track.boxes).max() for track in tracks) <= 1:
        name = source if isinstance(source, str | os.PathLike) else "tracks"
        raise ValueError(f"{name}: coordinates must be pixels; all of these are at most 1, as fractions of the picture are")
    return [part for track in tracks for part in _split(track, max_gap)]


def _read_file(path: StrPath) -> tuple[Boxes, Callable[[int], str]]:
    """Return rows of frame, id, and corners, and a function from the number of a row to its place in the file."""
    if (size := os.stat(path).st_size) > MAX_BYTES:
        raise ValueError(f"{path}: the file has {size:,} bytes, the limit is {MAX_BYTES:,}; divide it by track")
    lines = csv_lines(path)
    head = next(lines, None)
    if head is None:
        raise ValueError(f"{path}: the file is empty; expected lines of {','.join(COLUMNS)}")
    names = [cell.strip().lower() for cell in head[1]]
    has_header = names[0].isidentifier() or "frame" in names  # pandas writes a first column without a name
    expected = CORNERS if has_header and "w" not in names else COLUMNS
    if has_header and not set(expected) <= set(names):
        found = brief(", ".join(head[1]))
        raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)} or {', '.join(CORNERS)}, got {found}")
    places = [names.index(name) for name in expected] if has_header else list(range(len(COLUMNS)))
    numbers, values = array("q"), array("d")  # a list would take ten times the memory
    for number, cells in lines if has_header else chain([head], lines):
        try:
            values.extend([float(cells[place]) for place in places])
        except (ValueError, IndexError):
            wanted, found = ", ".join(expected), brief(",".join(cells))
            raise ValueError(f"{path}: line {number}: expected numbers {wanted}, separated by commas, got {found}") from None
        numbers.append(number)
    table = np.array(values).reshape(-1, len(COLUMNS))
    if expected is COLUMNS:
        table[:, 4:] += table[:, 2:4]
    if not has_header:
        table[:, 0] -= 1
    return table, lambda i: f"{path}: line {numbers[i]}"


@np.errstate(invalid="ignore")
def _check(rows: Boxes, place: Callable[[int], str]) -> None:
    """Raise ValueError for a row (frame from 0, id, left, top, right, bottom) that is not valid."""
    numbers, corners = rows[:, :2], rows[:, 2:]
    sizes = corners[:, 2:] - corners[:, :2]
    for is_bad, problem in (
        (~np.isfinite(rows).all(axis=1), "all numbers must be finite"),
        (numbers[:, 0] < 0, "frames start at 0, in MOT text at 1: add 1 to all frames of such a file"),
        (numbers[:, 0] > MAX_FRAME, f"frame must be at most {MAX_FRAME:,}"),
        (numbers[:, 1] < 0, "id must be at least 0; detections without a track have -1, and need a tracker first"),
        (numbers[:, 1] > MAX_ID, f"id must be at most {MAX_ID:,}"),
        ((numbers != np.floor(numbers)).any(axis=1), "frame and id must be whole numbers"),
        ((sizes <= 0).any(axis=1), "a box must have a positive width and height"),
        ((np.abs(corners) > MAX_COORDINATE).any(axis=1), f"coordinates must be pixels, at most {MAX_COORDINATE:,}"),
    ):
        if is_bad.any():
            i = int(is_bad.argmax())
            found = ", ".join(f"{value:g}" for value in rows[i].tolist())
            raise ValueError(f"{place(i)}: {problem}; got frame (from 0), id, left, top, right, bottom: {found}")


def _group(rows: Boxes, place: Callable[[int], str]) -> list[Track]:
    """Return a track for each id, ordered by id."""
    _check(rows, place)
    order = np.lexsort((rows[:, 0], rows[:, 1]))
    ordered = rows[order]
    repeated = (np.diff(ordered[:, :2], axis=0) == 0).all(axis=1)
    if repeated.any():
        i = int(repeated.argmax())
        frame, id = ordered[i, :2].astype(int).tolist()
        raise ValueError(f"{place(int(order[i + 1]))}: another box of id {id} in the frame with index {frame}; expected one")
    starts = np.flatnonzero(np.diff(ordered[:, 1], prepend=-1))
    parts = np.split(ordered, starts[1:]) if len(ordered) else []
    return [Track(int(part[0, 1]), part[:, 0].astype(np.int64), part[:, 2:]) for part in parts]


def _sorted(id: int, arrays: tuple[ArrayLike, ArrayLike]) -> Track:
    if not isinstance(arrays, list | tuple) or len(arrays) != 2:
        raise ValueError(f"track {id}: expected a pair of frames (N,) and boxes (N, 4), got {brief(arrays)}")
    frames, boxes = (np.asarray(each) for each in arrays)
    if frames.ndim == 1 and frames.shape == boxes.shape[:1]:  # `Track` refuses other shapes
        order = np.argsort(frames, kind="stable")
        frames, boxes = frames[order], boxes[order]
    return Track(id, frames, boxes)


def _split(track: Track, max_gap: int) -> list[Track]:
    """Divide a track where more than `max_gap` frames are missing."""
    ends = np.flatnonzero(np.diff(track.frames) > max_gap + 1) + 1
    frames, boxes = np.split(track.frames, ends), np.split(track.boxes, ends)
    return [Track(track.id, *part) for part in zip(frames, boxes, strict=True)]
