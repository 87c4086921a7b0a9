"""The command `timeline`: what happens when, in a file or live."""

import json
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.progress import BarColumn, TaskProgressColumn, TextColumn

from tpn.cli.app import app, check_folder, check_picture, check_there, err, one_line, progress_bars

if TYPE_CHECKING:
    from tpn.tempo import Clip, Segment

COLUMNS = 2000
"""Of the picture, at most: where there are more clips, neighbours share one."""


@dataclass(frozen=True)
class _Source:
    """Frames in order; how many, if that is known; whether Ctrl-C is their end."""

    name: str
    frames: Iterable[Any]
    fps: float
    total: int | None = None
    live: bool = False


@app.command()
def timeline(
    video: Annotated[
        str | None, typer.Argument(help="A video, or - for raw rgb24 frames on standard input.", metavar="[VIDEO]")
    ] = None,
    camera: Annotated[str | None, typer.Option(help="A camera in place of a video: its number, path or name.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT of raw frames, or to ask a camera for.")] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames a second of raw frames, to ask a camera for, or in place of what a file says.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A name from tpn list, local-dir:FOLDER or hf-hub:OWNER/NAME.")
    ] = "tpn_slowonly_r50_k400",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights file, .safetensors or .pth, ours, MMAction2's or the original TPN's.")
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Frames from clip to clip. Default: a quarter of a clip.")] = None,
    frame_interval: Annotated[
        int | None, typer.Option(min=1, help="Frames from one frame of a clip to the next. Default: the model's own.")
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Probability from which on a class is named.")] = 0.5,
    top: Annotated[int, typer.Option(min=1, help="Classes to draw.")] = 5,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")] = None,
    precision: Annotated[
        str, typer.Option(help="float32, float16, bfloat16, or auto: the fastest that the device has.")
    ] = "float32",
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Where to write every clip and segment. Default: nowhere.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the picture.")] = Path("tpn-timeline.png"),
) -> None:
    """Say what happens when in a video, however long, or live: each action when it ends.

    Ctrl-C is the end of a camera or of standard input; what came until then is written.
    """
    from tpn import demo, tempo
    from tpn.predict import VideoClassifier
    from tpn.video.decode import VideoError

    width_height = _check_usage(video, camera, size, fps)
    if video not in (None, "-"):
        check_there(video)
    for file in filter(None, (as_json, output if demo.can_draw() else None)):
        check_folder(file)
    if demo.can_draw():
        check_picture(output)
    else:
        err.print('no picture without matplotlib: pip install "tpn[viz]"')
    classifier = VideoClassifier(
        model,
        pretrained=checkpoint is None,
        checkpoint_path=checkpoint,
        device=device,
        precision=precision,
        batch_size=1 if video in (None, "-") else None,  # what is live is wanted at once
    )
    spec = tempo.sliding_spec(classifier.spec, frame_interval)
    stride = stride or tempo.default_stride(spec)
    try:
        source = _open(video, camera, width_height, fps)
        clips = tempo.slide(classifier, source.frames, stride=stride, frame_interval=frame_interval, live=camera is not None)
        about = {"model": model, "source": source.name, "fps": source.fps, "stride": stride, "clip_span": spec.clip_span}
        columns = _Columns(classifier.labels)
        failure = _write(source, clips, threshold, as_json, about, columns)
        if failure is None and not columns.clips:
            err.print(f"stopped before a first clip was complete, which takes {spec.clip_span} frames")
        elif demo.can_draw():
            _draw(columns, top, output)
        if failure is not None:
            raise failure
    except VideoError as error:
        err.print(f"error: {one_line(error)}")
        raise typer.Exit(1) from error


def _check_usage(video: str | None, camera: str | None, size: str | None, fps: float | None) -> tuple[int, int] | None:
    """Return the size, if it is given."""
    if (video is None) == (camera is None):
        raise typer.BadParameter("give a VIDEO, - for standard input, or --camera")
    if video == "-" and (size is None or fps is None):
        raise typer.BadParameter("raw frames on standard input need --size WIDTHxHEIGHT and --fps")
    if video not in (None, "-") and size is not None:
        raise typer.BadParameter("a file has its own size", param_hint="--size")
    if fps is not None and not 0 < fps < math.inf:
        raise typer.BadParameter(f"must be positive, got {fps}", param_hint="--fps")
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
    stated, frames = decode.header(video)
    fps = fps or stated
    if fps is None:
        raise ValueError(f"{video}: the file does not state its frame rate; pass --fps")
    return _Source(video, decode.iter_frames(video), fps, frames)


def _write(
    source: _Source, clips: "Generator[Clip]", threshold: float, as_json: Path | None, about: dict[str, Any], columns: "_Columns"
) -> Exception | None:
    """Follow a video to its end, writing what is seen. Return the reason why it ended early, unless it began with that."""
    from tpn.training import whole_file

    with (
        whole_file(as_json, "w") if as_json else open(os.devnull, "w") as file,
        tempfile.TemporaryFile("w+") as segments,
    ):
        document = _Document(file, segments, {**about, "labels": columns.labels})
        failure = _follow(source, clips, threshold, document, columns)
        if failure is not None and not columns.clips:
            raise failure
        document.finish(None if failure is None else one_line(failure))
    if as_json:
        err.print(f"wrote {as_json}")
    return failure


def _follow(
    source: _Source, clips: "Generator[Clip]", threshold: float, document: "_Document", columns: "_Columns"
) -> Exception | None:
    from tpn import tempo

    failures: list[Exception] = []
    with (
        progress_bars(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()) as progress,
        closing(clips),
    ):
        task = progress.add_task("0.0 s", total=source.total)

        def kept() -> Iterator["Clip"]:
            for clip in _until_failure(_until_interrupt(clips) if source.live else clips, failures):
                end = (clip.last + 1) / source.fps
                document.add_clip(clip, clip.time(source.fps))
                columns.add(clip.time(source.fps), clip.probs.numpy(), end)
                progress.update(task, completed=clip.last + 1, description=f"{end:.1f} s")
                yield clip

        for segment in tempo.segments(kept(), fps=source.fps, threshold=threshold):
            label = columns.labels[segment.label]
            document.add_segment(segment, label)
            typer.echo(f"{segment.start:.1f} s – {segment.end:.1f} s  {label}  {segment.probability:.1%}")
    return failures[0] if failures else None


def _until_failure(clips: Iterable["Clip"], failures: list[Exception]) -> Iterator["Clip"]:
    """What cannot be read any further is put aside: an hour that was seen is not lost."""
    from tpn.video.decode import VideoError

    try:
        yield from clips
    except (VideoError, OSError) as error:
        failures.append(error)


def _until_interrupt(clips: Iterator["Clip"]) -> Iterator["Clip"]:
    """Let Ctrl-C be the end: at once while a clip is waited for, else when what is being written has been."""
    waiting = stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        if waiting:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        while not stopped:
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
        signal.signal(signal.SIGINT, before)


class _Document:
    """One JSON object, written as clips and segments come; the segments wait in a file of their own."""

    def __init__(self, file: IO[str], segments: IO[str], head: dict[str, Any]) -> None:
        self._file, self._segments = file, segments
        self._between_clips = self._between_segments = "\n"
        file.write(json.dumps(head)[:-1] + ', "clips": [')

    def add_clip(self, clip: "Clip", time: float) -> None:
        probs = [round(p, 6) for p in clip.probs.tolist()]
        entry = {"first": clip.first, "last": clip.last, "time": round(time, 4), "probs": probs}
        self._file.write(self._between_clips + json.dumps(entry))
        self._between_clips = ",\n"

    def add_segment(self, segment: "Segment", label: str) -> None:
        start, end, probability = round(segment.start, 4), round(segment.end, 4), round(segment.probability, 6)
        entry = {"start": start, "end": end, "label": label, "probability": probability}
        self._segments.write(self._between_segments + json.dumps(entry))
        self._between_segments = ",\n"

    def finish(self, error: str | None) -> None:
        """error: why the video ended early."""
        self._file.write('\n], "segments": [')
        self._segments.seek(0)
        shutil.copyfileobj(self._segments, self._file)
        self._file.write(f'\n], "error": {json.dumps(error)}}}\n')


class _Columns:
    """Probabilities along time, the means of clips that are neighbours: however many there are, in at most `COLUMNS` columns.

    clips: how many there are. end: of the last one, in seconds.
    """

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.labels = labels
        self.clips, self.end = 0, 0.0
        self._probs, self._times, self._counts = np.zeros((COLUMNS, len(labels))), np.zeros(COLUMNS), np.zeros(COLUMNS)
        self._share = 1

    def add(self, time: float, probs: NDArray[np.float32], end: float) -> None:
        if self.clips == COLUMNS * self._share:
            for sums in (self._probs, self._times, self._counts):
                sums[: COLUMNS // 2] = sums[::2] + sums[1::2]
                sums[COLUMNS // 2 :] = 0
            self._share *= 2
        column = self.clips // self._share
        self._probs[column] += probs
        self._times[column] += time
        self._counts[column] += 1
        self.clips += 1
        self.end = end

    def curves(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return times (N,) and probabilities (N, K)."""
        used = np.count_nonzero(self._counts)
        return self._times[:used] / self._counts[:used], self._probs[:used] / self._counts[:used, None]


def _draw(columns: _Columns, top: int, path: Path) -> None:
    """The curves of the classes that are the most probable on the whole."""
    from matplotlib.figure import Figure

    from tpn.training import whole_file

    times, probs = columns.curves()
    figure = Figure(figsize=(14, 4), layout="constrained")
    axes = figure.add_subplot()
    for k in np.argsort(-probs.mean(axis=0), kind="stable")[:top].tolist():
        axes.plot(times, probs[:, k], marker="o" if len(times) == 1 else None, label=columns.labels[k])
    axes.set(xlim=(0, columns.end), ylim=(0, 1.02), yticks=(0, 0.5, 1), ylabel="probability", xlabel="time, s")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=top, frameon=False)
    with whole_file(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".").lower(), dpi=130)
    err.print(f"drew {path}")
