"""The command timeline."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from tpn.cli.app import (
    DEFAULT_MODEL,
    USE,
    CheckpointOption,
    DeviceOption,
    ModelOption,
    PrecisionOption,
    app,
    examples,
    require_exists,
    require_model,
)
from tpn.cli.console import err
from tpn.cli.drawing import require_picture
from tpn.cli.follow import follow, open_source
from tpn.cli.tracks import AnnotateOption, TracksOption, open_tracks, timeline_tracks
from tpn.files import require_writable


@app.command(
    rich_help_panel=USE,
    epilog=examples(
        "tpn timeline video.mp4 --json timeline.json",
        "tpn timeline --camera 0 --model local-dir:my-tpn",
        "ffmpeg -i rtsp://... -f rawvideo -pix_fmt rgb24 - | tpn timeline - --size 640x360 --fps 25",
    ),
)
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
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Plot to write. Default: tpn-timeline.png.")] = None,
) -> None:
    """Report the actions in a long or live video with their start and end times.

    Each action is printed when it ends. Ctrl-C ends a camera or standard input, and the files are still written.
    """
    from tpn import tempo
    from tpn.predict import VideoClassifier

    width_height = _parse_size(size)
    _check_options(video, camera, size, fps)
    if video not in (None, "-"):
        require_exists(video)
    if json_output is not None:
        require_writable(json_output)
    found = open_tracks([video], tracks, annotate)
    picture = require_picture(output, "tpn-timeline.png")
    if published := require_model(model, checkpoint):
        tempo.sliding_spec(published, frame_interval)
    classifier = VideoClassifier(
        model,
        checkpoint_path=checkpoint,
        device=device,
        precision=precision,
        batch_size=1 if video in (None, "-") else None,  # live frames must not wait for a full batch
    )
    spec = tempo.sliding_spec(classifier.spec, frame_interval)
    stride = stride or tempo.default_stride(spec)
    if stride > spec.clip_span:
        err.print(f"--stride {stride} is longer than a clip of {spec.clip_span} frames: frames between the clips are skipped")
    source = open_source(video, camera, width_height, fps)
    metadata = {
        "model": model,
        "source": source.name,
        "fps": source.fps,
        "stride": stride,
        "clip_span": spec.clip_span,
        "labels": classifier.labels,
    }
    options: dict[str, Any] = {
        "stride": stride,
        "frame_interval": frame_interval,
        "min_probability": min_probability,
        "top": top,
        "metadata": metadata,
        "json_output": json_output,
        "picture": picture,
    }
    if found is None:
        follow(classifier, source, **options)
    elif not timeline_tracks(classifier, source.name, found, fps=source.fps, annotate=annotate, **options):
        raise typer.Exit(1)


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
