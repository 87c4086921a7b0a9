"""Follow a video from its first to its last clip: print the segments, write the JSON file and the picture."""

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.progress import BarColumn, TaskProgressColumn, TextColumn

from tpn.cli.console import err, progress_bars
from tpn.cli.drawing import Curves, Strip, draw
from tpn.cli.results import clip_entry, print_segment, segment_entry
from tpn.cli.script import one_line_message
from tpn.files import atomic_write

if TYPE_CHECKING:
    from tpn.predict import VideoClassifier
    from tpn.tempo import Clip, Segment


@dataclass(frozen=True)
class Source:
    """Frames of a video in order.

    Attributes:
        num_frames: None if unknown.
        live: whether Ctrl-C ends the video instead of the command.
        skips: whether clips are skipped that come faster than the model runs.
    """

    name: str
    frames: Iterable[Any]
    fps: float
    num_frames: int | None = None
    live: bool = False
    skips: bool = False


def open_source(
    video: str | None, camera: str | None = None, size: tuple[int, int] | None = None, fps: float | None = None
) -> Source:
    """Open a file, a camera, or for "-" standard input with raw frames."""
    from tpn.video import decode
    from tpn.video.live import Camera, raw_frames

    if camera is not None:
        opened = Camera(camera, size=size, fps=fps)
        return Source(camera, opened, opened.fps, live=True, skips=True)
    assert video is not None
    if video == "-":
        assert size is not None
        assert fps is not None
        return Source("standard input", raw_frames(sys.stdin.buffer, size=size), fps, live=True)
    header_fps, num_frames = decode.header(video)
    fps = fps or header_fps
    if fps is None:
        raise ValueError(f"{video}: the file does not state its frame rate; pass it to tpn timeline --fps")
    return Source(video, decode.iter_frames(video), fps, num_frames)


def follow(
    classifier: "VideoClassifier",
    source: Source,
    *,
    stride: int | None = None,
    frame_interval: int | None = None,
    min_probability: float = 0.5,
    top: int = 5,
    metadata: dict[str, Any] | None = None,
    json_output: Path | None = None,
    picture: Path | None = None,
) -> None:
    """Print the segments of a video, each when it ends, and write the files.

    Args:
        stride, frame_interval: as in `tempo.slide`.
        top: number of curves in the picture.
        metadata: first entries of the JSON object.

    Raises:
        VideoError, OSError: the video ends with an error. The clips before it are written first, if there are any.
    """
    from tpn import tempo

    strip, curves = Strip(), Curves(classifier.labels, source.fps)
    frames = source.frames if picture is None else strip.watch(source.frames)
    failures: list[Exception] = []
    with (
        atomic_write(json_output) if json_output else nullcontext(Path(os.devnull)) as path,
        path.open("w", encoding="utf-8") as file,
        tempfile.TemporaryFile("w+", encoding="utf-8") as segments_file,
        closing(tempo.slide(classifier, frames, stride=stride, frame_interval=frame_interval, live=source.skips)) as clips,
    ):
        document = _JsonWriter(file, segments_file, metadata or {})
        with progress_bars(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()) as progress:
            task = progress.add_task("0.0 s", total=source.num_frames)

            def recorded_clips() -> Iterator["Clip"]:
                for clip in _until_failure(_until_interrupt(clips) if source.live else clips, failures):
                    document.add_clip(clip, source.fps)
                    curves.add(clip)
                    progress.update(task, completed=clip.last + 1, description=f"{curves.duration:.1f} s")
                    yield clip

            for segment in tempo.segments(recorded_clips(), fps=source.fps, min_probability=min_probability):
                label = None if segment.label is None else curves.labels[segment.label]
                document.add_segment(segment, label)
                print_segment(segment, label)
        if failures and not curves.num_clips:
            raise failures[0]
        document.finish(one_line_message(failures[0]) if failures else None)
    if json_output:
        err.print(f"wrote {json_output}")
    if curves.num_clips and picture is not None:
        draw([("", curves)], top, picture, min_probability=min_probability, strip=strip)
    if failures:
        raise failures[0]
    if not curves.num_clips:
        span = tempo.sliding_spec(classifier.spec, frame_interval).clip_span
        err.print(f"stopped before the first clip of {span} frames was complete")


def _until_failure(clips: Iterable["Clip"], failures: list[Exception]) -> Iterator["Clip"]:
    """Yield clips until one cannot be read. Append that error to `failures`, so that the clips before it can be written."""
    from tpn.video.decode import VideoError

    try:
        yield from clips
    except (VideoError, OSError) as error:
        failures.append(error)


def _until_interrupt(clips: Iterator["Clip"]) -> Iterator["Clip"]:
    """Yield clips until Ctrl-C.

    Ctrl-C while waiting for a clip stops at once. Ctrl-C while the last clip is being written stops after that.
    """
    waiting = interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        if waiting:
            raise KeyboardInterrupt

    previous_handler = signal.signal(signal.SIGINT, interrupt)
    try:
        while not interrupted:
            try:
                waiting = True
                clip = next(clips, None)
                waiting = False
            except KeyboardInterrupt:
                waiting = False
                break
            if clip is None:
                break
            yield clip
    finally:
        signal.signal(signal.SIGINT, previous_handler)


class _JsonWriter:
    """Write one JSON object, clips before segments, in constant memory: `segments_file` keeps the segments until `finish`."""

    def __init__(self, file: IO[str], segments_file: IO[str], metadata: dict[str, Any]) -> None:
        self._file, self._segments_file = file, segments_file
        self._clip_separator = self._segment_separator = "\n"
        file.write(json.dumps(metadata)[:-1] + ', "clips": [')

    def add_clip(self, clip: "Clip", fps: float) -> None:
        self._file.write(self._clip_separator + json.dumps(clip_entry(clip, fps)))
        self._clip_separator = ",\n"

    def add_segment(self, segment: "Segment", label: str | None) -> None:
        self._segments_file.write(self._segment_separator + json.dumps(segment_entry(segment, label)))
        self._segment_separator = ",\n"

    def finish(self, error: str | None) -> None:
        """Write the segments, and the error that ended the video early or None."""
        self._file.write('\n], "segments": [')
        self._segments_file.seek(0)
        shutil.copyfileobj(self._segments_file, self._file)
        self._file.write(f'\n], "error": {json.dumps(error)}}}\n')
