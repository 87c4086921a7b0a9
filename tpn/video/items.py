"""The items of a dataset: videos, or segments of them, with their labels."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from tpn.errors import printable
from tpn.files import StrPath
from tpn.video import lists, tables
from tpn.video.decode import VideoError


@dataclass(frozen=True)
class Item:
    """A video, or a segment of one, and its label.

    Attributes:
        path: video file, or folder of extracted frames.
        label: class index; in a multi-label dataset, a tuple of them.
        num_frames: number of extracted frames; None for a video file.
        start: of the segment, in seconds after the first frame. None for the first frame.
        end: of the segment, in seconds after the first frame. None for the end of the video.
        group: source of the video; videos of one source stay on one side of a split.
        split: train, val, test, or empty.
        tracks: file with tracks of the video; empty for the whole picture.
        track: id of the track in that file whose square crops are the frames.
        row: number of the row in the table, or of the line in the list.
    """

    path: str
    label: int | tuple[int, ...]
    num_frames: int | None = None
    start: float | None = None
    end: float | None = None
    group: str = ""
    split: str = ""
    tracks: str = ""
    track: int | None = None
    row: int | None = field(default=None, compare=False)

    @property
    def labels(self) -> tuple[int, ...]:
        """The classes of the video."""
        return (self.label,) if isinstance(self.label, int) else self.label

    @property
    def is_segment(self) -> bool:
        """Whether only a part of the video is used."""
        return self.start is not None or self.end is not None

    @property
    def is_part(self) -> bool:
        """Whether other items may be of the same video: it is a segment or a track."""
        return self.is_segment or self.track is not None

    @property
    def name(self) -> str:
        """The path, followed by the limits of a segment and the track."""
        parts = []
        if self.is_segment:
            parts.append(f"{self.start or 0:.10g} s to {'the end' if self.end is None else f'{self.end:.10g} s'}")
        if self.track is not None:
            parts.append(f"track {self.track} of {self.tracks}")
        return f"{self.path} ({', '.join(parts)})" if parts else self.path


def read_items(
    file: StrPath, root: StrPath | None, classes: Sequence[str] | None, *, num_fields: int = 2
) -> tuple[list[Item], list[str], bool]:
    """Return the items of a table or list, the class names, and whether the file has numbers for them."""
    folder = Path(file).parent if root is None else Path(root)
    if tables.is_table(file):
        rows, multi_label = tables.read_table(file)
    else:
        rows, multi_label = lists.read_list(file, folder, num_fields=num_fields), False
    labels = [label for row in rows for label in row.labels]
    numbers, names, numbered = lists.encode_labels(file, labels, classes)
    if not rows:
        raise ValueError(f"{file}: the dataset has no videos: the file lists none, or all of them are missing")
    if not names:
        raise ValueError(f"{file}: no row has a label")
    each = iter(numbers)
    items = []
    for row in rows:
        label = tuple(sorted({*islice(each, len(row.labels))}))
        item = Item(str(folder / row.path), label if multi_label else label[0], row.num_frames, row.start, row.end)
        tracks = str(folder / row.tracks) if row.tracks else ""
        items.append(replace(item, group=row.group, split=row.split, tracks=tracks, track=row.track, row=row.number))
    return items, names, numbered


def bad_reason(item: Item, error: Exception) -> str:
    """Return the reason why a video cannot be read, without its path."""
    if isinstance(error, OSError) and error.strerror:
        is_other_file = error.filename and os.fspath(error.filename) != item.path
        return f"{error.strerror}: {error.filename}" if is_other_file else error.strerror
    return str(error).removeprefix(f"{printable(item.path)}: ")


@contextmanager
def naming_row(item: Item) -> Iterator[None]:
    """Add the number of the row to errors of a segment or a track, whose file has many."""
    try:
        yield
    except VideoError as error:
        if item.row is None or not item.is_part:
            raise
        raise VideoError(f"{item.path}: row {item.row}: {bad_reason(item, error)}") from error
