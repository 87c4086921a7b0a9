"""The command timeline."""

import json
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, TaskProgressColumn, TextColumn

from tpn.cli.app import (
    DEFAULT_MODEL,
    CheckpointOption,
    DeviceOption,
    ModelOption,
    PrecisionOption,
    app,
    err,
    progress_bars,
    require_exists,
    require_parent_folder,
    require_picture_path,
)
from tpn.cli.results import Curves, clip_entry, draw, print_segment, segment_entry
from tpn.cli.script import one_line_message
from tpn.cli.tracks import AnnotateOption, TracksOption, open_tracks, timeline_tracks
from tpn.files import atomic_write

if TYPE_CHECKING:
    from tpn.tempo import Clip, Segment


@dataclass(frozen=True)
class _Source:
    """Frames of a video in order.

    Attributes:
        num_frames: None if unknown.
        live: whether Ctrl-C ends the video instead of the command.
    """

    name: str
    frames: Iterable[Any]
    fps: float
    num_frames: int | None = None
    live: bool = False


@app.command()
def timeline(
    video: Annotated[
        str | None, typer.Argument(help="Video file, or - for raw rgb24 frames from standard input.", metavar="[VIDEO]")
    ] = None,
    camera: Annotated[str | None, typer.Option(help="Camera to read instead of VIDEO, by number, path, or name.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT of raw frames, or to request from the camera.")] = None,
    fps: Annotated[
        float | None,
        typer.Option(help="Frame rate of raw frames, to request from the camera, or to use instead of the file's."),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    checkpoint: CheckpointOption = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Step from clip to clip, in frames. Default: a quarter of a clip.")
    ] = None,
    frame_interval: Annotated[
        int | None, typer.Option(min=1, help="Step between the frames of a clip. Default: as published.")
    ] = None,
    min_probability: Annotated[float, typer.Option(min=0, max=1, help="Print - where no class reaches this probability.")] = 0.5,
    top: Annotated[int, typer.Option(min=1, help="Number of classes to draw.")] = 5,
    tracks: TracksOption = None,
    annotate: AnnotateOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    json_output: Annotated[Path | None, typer.Option("--json", help="Also write every clip and segment to this file.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write.")] = Path("tpn-timeline.png"),
) -> None:
    """Report the actions in a long or live video with their start and end times.

    Each action is printed when it ends. Ctrl-C ends a camera or standard input, and the files are still written.
    """
    from tpn import demo, tempo
    from tpn.predict import VideoClassifier

    width_height = _parse_size(size)
    _check_options(video, camera, size, fps)
    if video not in (None, "-"):
        require_exists(video)
    if json_output is not None:
        require_parent_folder(json_output)
    found = open_tracks([video], tracks, annotate)
    if demo.has_matplotlib():
        require_picture_path(output)
    else:
        err.print('no picture without matplotlib: pip install "tpn[viz]"')
    classifier = VideoClassifier(
        model,
        pretrained=checkpoint is None,
        checkpoint_path=checkpoint,
        device=device,
        precision=precision,
        batch_size=1 if video in (None, "-") else None,  # live frames must not wait for a full batch
    )
    spec = tempo.sliding_spec(classifier.spec, frame_interval)
    stride = stride or tempo.default_stride(spec)
    source = _open(video, camera, width_height, fps)
    metadata = {
        "model": model,
        "source": source.name,
        "fps": source.fps,
        "stride": stride,
        "clip_span": spec.clip_span,
        "labels": classifier.labels,
    }
    if found is not None:
        assert video is not None
        done = timeline_tracks(
            classifier,
            video,
            found,
            fps=source.fps,
            min_probability=min_probability,
            top=top,
            metadata=metadata,
            json_output=json_output,
            picture=output if demo.has_matplotlib() else None,
            annotate=annotate,
            stride=stride,
            frame_interval=frame_interval,
        )
        raise typer.Exit(0 if done else 1)
    clips = tempo.slide(classifier, source.frames, stride=stride, frame_interval=frame_interval, live=camera is not None)
    curves = Curves(classifier.labels)
    failure = _write(source, clips, min_probability, json_output, metadata, curves)
    if curves.num_clips and demo.has_matplotlib():
        draw([("", curves)], top, output)
    if failure is not None:
        raise failure
    if not curves.num_clips:
        err.print(f"stopped before the first clip of {spec.clip_span} frames was complete")


def _check_options(video: str | None, camera: str | None, size: str | None, fps: float | None) -> None:
    if (video is None) == (camera is None):
        raise typer.BadParameter("pass either VIDEO, - for standard input, or --camera")
    if video == "-" and (size is None or fps is None):
        raise typer.BadParameter("raw frames from standard input need --size WIDTHxHEIGHT and --fps")
    if video not in (None, "-") and size is not None:
        raise typer.BadParameter("is only valid for raw frames and cameras", param_hint="--size")
    if fps is not None and not 0 < fps < math.inf:
        raise typer.BadParameter(f"must be positive and finite, got {fps}", param_hint="--fps")


def _parse_size(size: str | None) -> tuple[int, int] | None:
    """Parse "640x480" to (width, height)."""
    if size is None:
        return None
    width, _, height = size.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise typer.BadParameter(f"must be WIDTHxHEIGHT, such as 640x480, got {size!r}", param_hint="--size")
    return int(width), int(height)


def _open(video: str | None, camera: str | None, size: tuple[int, int] | None, fps: float | None) -> _Source:
    from tpn.video import decode
    from tpn.video.live import Camera, raw_frames

    if camera is not None:
        opened = Camera(camera, size=size, fps=fps)
        return _Source(camera, opened, opened.fps, live=True)
    assert video is not None
    if video == "-":
        assert size is not None
        assert fps is not None
        return _Source("standard input", raw_frames(sys.stdin.buffer, size=size), fps, live=True)
    header_fps, num_frames = decode.header(video)
    fps = fps or header_fps
    if fps is None:
        raise ValueError(f"{video}: the file does not state its frame rate; pass --fps")
    return _Source(video, decode.iter_frames(video), fps, num_frames)


def _write(
    source: _Source,
    clips: Generator["Clip"],
    min_probability: float,
    json_output: Path | None,
    metadata: dict[str, Any],
    curves: Curves,
) -> Exception | None:
    """Print the segments of a video, write the JSON file, and fill `curves`.

    Returns:
        The error that ended the video early, or None.

    Raises:
        VideoError, OSError: the same error, if there was no clip before it. The JSON file is not written.
    """
    with (
        atomic_write(json_output) if json_output else nullcontext(Path(os.devnull)) as path,
        path.open("w", encoding="utf-8") as file,
        tempfile.TemporaryFile("w+", encoding="utf-8") as segments_file,
    ):
        document = _JsonWriter(file, segments_file, metadata)
        failure = _follow(source, clips, min_probability, document, curves)
        if failure is not None and not curves.num_clips:
            raise failure
        document.finish(None if failure is None else one_line_message(failure))
    if json_output:
        err.print(f"wrote {json_output}")
    return failure


def _follow(
    source: _Source, clips: Generator["Clip"], min_probability: float, document: "_JsonWriter", curves: Curves
) -> Exception | None:
    """Classify a video to its end. Return the error that ended it early, or None."""
    from tpn import tempo

    failures: list[Exception] = []
    with (
        progress_bars(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()) as progress,
        closing(clips),
    ):
        task = progress.add_task("0.0 s", total=source.num_frames)

        def recorded_clips() -> Iterator["Clip"]:
            for clip in _until_failure(_until_interrupt(clips) if source.live else clips, failures):
                document.add_clip(clip, source.fps)
                curves.add(clip, source.fps)
                progress.update(task, completed=clip.last + 1, description=f"{curves.duration:.1f} s")
                yield clip

        for segment in tempo.segments(recorded_clips(), fps=source.fps, min_probability=min_probability):
            label = None if segment.label is None else curves.labels[segment.label]
            document.add_segment(segment, label)
            print_segment(segment, label)
    return failures[0] if failures else None


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
