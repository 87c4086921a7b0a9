"""The commands demo, predict, and check."""

import errno
import os
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from tpn.cli.app import (
    DEFAULT_MODEL,
    CheckpointOption,
    DeviceOption,
    ModelOption,
    PrecisionOption,
    ViewsOption,
    app,
    err,
    parse_views_option,
    print_result,
    progress_bars,
    require_exists,
    require_parent_folder,
    require_picture_path,
)
from tpn.cli.results import print_failure, print_prediction
from tpn.cli.tracks import AnnotateOption, TracksOption, open_tracks, predict_tracks

MAX_SHOWN_BAD_FILES = 10


@app.command()
def demo(
    video: Annotated[Path | None, typer.Argument(help="Video file. Default: render one.", metavar="[VIDEO]")] = None,
    model: ModelOption = "tpn_slowonly_tiny_motion",
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write.")] = Path("tpn-demo.png"),
) -> None:
    """Classify a video and draw the predictions along time.

    The default model recognizes 14 rendered motions. It ships with tpn and needs no network.
    """
    from tpn import demo as drawing
    from tpn.predict import VideoClassifier

    if video is not None:
        require_exists(video)
    if drawing.has_matplotlib():
        require_picture_path(output)
    else:
        require_parent_folder(output)
    classifier = VideoClassifier(model, pretrained=True)
    if video is None:
        video = output.with_name("tpn-demo.mp4")
        drawing.render_video(video)
        err.print(f"rendered {video}")
    analysis = drawing.analyze(classifier, video)
    print_prediction(video, analysis.prediction, 5, as_json=False)
    if not drawing.has_matplotlib():
        err.print('no picture without matplotlib: pip install "tpn[viz]"')
        return
    drawing.draw(analysis, output)
    err.print(f"wrote {output}")


@app.command()
def predict(
    videos: Annotated[list[Path], typer.Argument(help="Video files.", metavar="VIDEO...")],
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
) -> None:
    """Classify videos, or with --tracks each person or object in a video. Unreadable files are reported and skipped."""
    from tpn.predict import Prediction, VideoClassifier

    num_clips, num_crops = parse_views_option(views)
    if not any(video.exists() for video in videos):  # before the model is downloaded
        for video in videos:
            print_failure(video, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(video)), as_json)
        raise typer.Exit(1)
    found = open_tracks(videos, tracks, annotate)
    classifier = VideoClassifier(
        model,
        pretrained=checkpoint is None,
        checkpoint_path=checkpoint,
        device=device,
        precision=precision,
        compile=compile,
    )
    if not classifier.model.num_classes:
        raise ValueError("the model has no classes (num_classes=0); use tpn features for its features")
    if found is not None:
        options: dict[str, Any] = {"num_clips": num_clips, "num_crops": num_crops, "top": top, "as_json": as_json}
        if not predict_tracks(classifier, videos[0], found, min_probability=min_probability, annotate=annotate, **options):
            raise typer.Exit(1)
        return
    failed = False
    with progress_bars() as progress:
        files_task = progress.add_task("files", total=len(videos), visible=len(videos) > 1)
        views_task = progress.add_task("views", total=None)

        def show_views(done: int, total: int) -> None:
            progress.update(views_task, completed=done, total=total)

        results = classifier.predict_each(videos, num_clips=num_clips, num_crops=num_crops, progress=show_views)
        for video, result in zip(videos, results, strict=True):
            progress.advance(files_task)
            if isinstance(result, Prediction):
                print_prediction(video, result, top, as_json, min_probability=min_probability)
            else:
                failed = True
                print_failure(video, result, as_json)
    if failed:
        raise typer.Exit(1)


@app.command()
def check(
    data: Annotated[
        Path, typer.Argument(help="Folder with one folder per class, or with train and val; or a table or list of videos.")
    ],
    root: Annotated[Path | None, typer.Option(help="Base folder of the paths in a list. Default: the list's folder.")] = None,
    frames: Annotated[
        str | None, typer.Option(help="File names of extracted frames, such as img_{:05d}.jpg, for a list of frame folders.")
    ] = None,
    first_frame: Annotated[int, typer.Option(min=0, help="Number of the first extracted frame.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Number of videos to read in parallel.")] = 2,
    report: Annotated[Path, typer.Option(help="Text file to write, one unreadable file per line with its error.")] = Path(
        "bad_files.txt"
    ),
) -> None:
    """Read every frame of a dataset and report unreadable files.

    If you interrupt it, the report lists the unreadable files found so far.
    """
    from tpn.config import InputSpec
    from tpn.training.wording import plural
    from tpn.video import datasets, lists

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
