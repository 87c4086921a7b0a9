"""The commands demo, predict, and check."""

import errno
import os
import shlex
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tpn.cli.app import (
    DEFAULT_MODEL,
    TRAIN,
    USE,
    CheckpointOption,
    DeviceOption,
    FirstFrameOption,
    FramesOption,
    ModelOption,
    PrecisionOption,
    RootOption,
    ViewsOption,
    WorkersOption,
    app,
    examples,
    find_videos,
    parse_views_option,
    require_exists,
    require_model,
)
from tpn.cli.console import err, print_result, progress_bars
from tpn.cli.drawing import require_picture
from tpn.cli.follow import follow, open_source
from tpn.cli.results import PredictionPrinter
from tpn.cli.tracks import FACTS, AnnotateOption, TracksOption, open_tracks, predict_tracks
from tpn.errors import BUNDLED_MODEL, plural
from tpn.files import require_writable

MAX_SHOWN_BAD_FILES = 10


@app.command(rich_help_panel=USE, epilog=examples("tpn demo", "tpn demo video.mp4 --model tpn_slowonly_r50_k400"))
def demo(
    video: Annotated[Path | None, typer.Argument(help="Video file. Default: render one.", metavar="[VIDEO]")] = None,
    model: ModelOption = BUNDLED_MODEL,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Plot to write. Default: tpn-demo.png.")] = None,
) -> None:
    """Report the actions in a video and draw them along time.

    The default model recognizes 14 rendered motions. It ships with tpn and needs no network.
    """
    from tpn import tempo
    from tpn.demo import render_video
    from tpn.predict import VideoClassifier

    if video is not None:
        require_exists(video)
        if model == BUNDLED_MODEL:
            err.print(f"{model} recognizes rendered motion only; for real footage: tpn timeline {shlex.quote(str(video))}")
    picture = require_picture(output, "tpn-demo.png")
    rendered = (output.parent if output else Path()) / "tpn-demo.mp4"
    if video is None:
        require_writable(rendered)
    if published := require_model(model):
        tempo.sliding_spec(published)
    classifier = VideoClassifier(model)
    if video is None:
        video = rendered
        render_video(video)
        err.print(f"rendered {video}")
    follow(classifier, open_source(str(video)), picture=picture)


@app.command(
    rich_help_panel=USE,
    epilog=examples(
        "tpn predict video.mp4 --top 3",
        "tpn predict videos --views 1x1 --csv > predictions.csv",
        "tpn predict video.mp4 --tracks tracks.txt --annotate annotated.mp4",
    ),
)
def predict(
    videos: Annotated[list[Path], typer.Argument(help="Video files, or folders to search for them.", metavar="VIDEO...")],
    model: ModelOption = DEFAULT_MODEL,
    checkpoint: CheckpointOption = None,
    views: ViewsOption = None,
    top: Annotated[
        int,
        typer.Option(min=1, help="Number of classes to print. With a multi-label model, those above 50% are in the video."),
    ] = 5,
    min_probability: Annotated[
        float, typer.Option(min=0, max=1, help="Print only classes of this probability or more, and - if there are none.")
    ] = 0.0,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the model first. Pays off for many videos.")] = False,
    tracks: TracksOption = None,
    annotate: AnnotateOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per video, or per track.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a CSV table with a row per class.")] = False,
) -> None:
    """Classify videos, or with --tracks each person or object in a video. Unreadable files are reported and skipped."""
    num_clips, num_crops = parse_views_option(views)
    if as_json and as_csv:
        raise typer.BadParameter("is not valid with --json", param_hint="--csv")
    form: Literal["text", "json", "csv"] = "json" if as_json else "csv" if as_csv else "text"
    printer = PredictionPrinter(form, top, min_probability, FACTS if tracks else ())
    found_files, failures = find_videos(videos)
    files = [file for file, _ in found_files]
    if not any(file.exists() for file in files):  # before the model is downloaded
        failures += [(file, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))) for file in files]
        files = []
    for path, error in failures:
        printer.failure(path, error)
    if not files:
        raise typer.Exit(1)
    found = open_tracks(files, tracks, annotate)
    require_model(model, checkpoint)
    from tpn.predict import Prediction, VideoClassifier  # takes seconds; wrong arguments are reported at once

    classifier = VideoClassifier(
        model,
        checkpoint_path=checkpoint,
        device=device,
        precision=precision,
        compile=compile,
    )
    if found is not None:
        views_of_track: dict[str, Any] = {"num_clips": num_clips, "num_crops": num_crops}
        if not predict_tracks(classifier, files[0], found, printer, annotate=annotate, **views_of_track):
            raise typer.Exit(1)
        return
    failed = bool(failures)
    with progress_bars() as progress:
        files_task = progress.add_task("files", total=len(files), visible=len(files) > 1)
        views_task = progress.add_task("views", total=None)

        def show_views(done: int, total: int) -> None:
            progress.update(views_task, completed=done, total=total)

        results = classifier.predict_each(files, num_clips=num_clips, num_crops=num_crops, progress=show_views)
        for video, result in zip(files, results, strict=True):
            progress.advance(files_task)
            if isinstance(result, Prediction):
                printer.prediction(video, result)
            else:
                failed = True
                printer.failure(video, result)
    if failed:
        raise typer.Exit(1)


@app.command(rich_help_panel=TRAIN, epilog=examples("tpn check videos", "tpn check list.csv --root videos --report bad.txt"))
def check(
    data: Annotated[
        Path, typer.Argument(help="Folder with one folder per class, or with train and val; or a table or list of videos.")
    ],
    root: RootOption = None,
    frames: FramesOption = None,
    first_frame: FirstFrameOption = 1,
    workers: WorkersOption = 2,
    report: Annotated[Path, typer.Option(help="Text file to write, one unreadable file per line with its error.")] = Path(
        "bad_files.txt"
    ),
) -> None:
    """Read every frame of a dataset and report unreadable files.

    If you interrupt it, the report lists the unreadable files found so far.
    """
    from tpn.config import InputSpec
    from tpn.video import datasets, lists

    require_exists(data)
    require_writable(report)
    spec = InputSpec(num_frames=1)  # required by datasets, but no clip is taken
    options: dict[str, Any] = {"root": root, "template": frames, "first": first_frame}
    folders = list(lists.split_folders(data).values()) or [data]
    parts = [datasets.open_dataset(folder, spec, train=False, **options) for folder in folders]
    num_items, num_bad = sum(len(part) for part in parts), 0
    with progress_bars() as progress:
        report.unlink(missing_ok=True)
        checks = chain.from_iterable(part.check(workers) for part in parts)
        for item, reason in progress.track(checks, total=num_items, description="files"):
            if reason:
                num_bad += 1
                if num_bad <= MAX_SHOWN_BAD_FILES:
                    err.print(f"{item.name}: {reason}")
                with report.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(f"{item.name}\t{reason}\n")
    classes = {name for part in parts for name in part.classes}
    print_result(f"{plural(num_items, 'video')} in {plural(len(classes), 'class')}, {num_bad} unreadable")
    if num_bad:
        err.print(f"error: {report} lists the unreadable files")
        raise typer.Exit(1)
