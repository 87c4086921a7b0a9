"""Read how many samples (pictures, pieces of sound) an MP4 or MOV file declares, before FFmpeg allocates memory for them."""

from collections.abc import Iterator
from io import FileIO

PARENTS = frozenset((b"moov", b"trak", b"edts", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"free", b"hoov"))
"""Boxes that contain boxes. FFmpeg finds a movie also in a box that is marked as free."""

SOUND_SAMPLES = 16
"""Number of samples of compressed sound in a byte: old movies count those of the sound that is played."""


def declared_samples(file: FileIO) -> int:
    """Return the number of samples of all tracks and fragments, times the edits of a track; 0 for a file without boxes.

    A sample of sound counts as a part of one.
    """
    return _count(file, 0, file.seek(0, 2))[0]


def _count(file: FileIO, start: int, end: int) -> tuple[int, int]:
    """Return the number of samples and of edits in a part of the file."""
    samples = edits = 0
    is_sound = False
    for kind, content, after in _boxes(file, start, end):
        if kind in PARENTS:
            more_samples, more_edits = _count(file, content, after)
            if kind == b"trak":  # FFmpeg lists the samples of a track again for each edit that shows them
                more_samples, more_edits = more_samples * max(more_edits, 1), 0
            samples, edits = samples + more_samples, edits + more_edits
        elif kind in (b"stsz", b"stz2"):  # version and flags, the size of all samples or 0, their number
            samples += _number(file, content + 8)
        elif kind == b"trun":  # version and flags, number of samples
            samples += _number(file, content + 4)
        elif kind == b"elst":  # version and flags, number of edits
            edits += _number(file, content + 4)
        elif kind == b"hdlr":  # version and flags, zero or a class, the type of the track
            is_sound = _number(file, content + 8) == int.from_bytes(b"soun", "big")
    return samples // SOUND_SAMPLES if is_sound else samples, edits


def _boxes(file: FileIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the type of each box, the position of its content, and the position after it."""
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        length, content = int.from_bytes(head[:4], "big"), start + 8
        if length == 1:
            length, content = int.from_bytes(head[8:], "big"), start + 16
        elif length == 0:  # to the end of the file
            length = end - start
        if start + length < content:
            return
        yield head[4:8], content, min(start + length, end)
        start += length


def _number(file: FileIO, position: int) -> int:
    file.seek(position)
    return int.from_bytes(file.read(4), "big")
