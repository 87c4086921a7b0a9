"""Commands about videos: demo, predict, check."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import tpn
from tpn.cli.app import app, check_folder, check_picture, check_there, err, not_there, one_line, progress_bars, read_views

DEFAULT = "tpn_slowonly_r50_k400"


@app.command()
def demo(
    video: Annotated[Path | None, typer.Argument(help="A video. Default: one that is rendered.", metavar="[VIDEO]")] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Another model; by default a small one that knows 14 motions and comes with tpn.")
    ] = "tpn_slowonly_tiny_motion",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the picture.")] = Path("tpn-demo.png"),
) -> None:
    """Classify a video and draw what was seen when. Needs no network."""
    from tpn import demo as drawing
    from tpn.predict import VideoClassifier

    if video is not None:
        check_there(video)
    if drawing.can_draw():
        check_picture(output)
    else:
        check_folder(output)
    classifier = VideoClassifier(model, pretrained=True)
    if video is None:
        video = output.with_name("tpn-demo.mp4")
        drawing.render_video(video)
        err.print(f"rendered {video}")
    seen = drawing.look(classifier, video)
    _print_prediction(video, seen.prediction, 5, as_json=False)
    if not drawing.can_draw():
        err.print('no picture without matplotlib: pip install "tpn[viz]"')
        return
    drawing.draw(seen, output)
    err.print(f"drew {output}")


@app.command()
def predict(
    videos: Annotated[list[Path], typer.Argument(help="Video files.", metavar="VIDEO...")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A name from tpn list, local-dir:FOLDER or hf-hub:OWNER/NAME.")
    ] = DEFAULT,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights file, .safetensors or .pth, ours, MMAction2's or the original TPN's.")
    ] = None,
    views: Annotated[str | None, typer.Option(help="CLIPSxCROPS, such as 1x1. Default: as published.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to print.")] = 5,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")] = None,
    onnx: Annotated[
        Path | None, typer.Option("--onnx", "--exported", help="Run this file of tpn export, .onnx or .pt2, instead of --model.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="float32, float16, bfloat16, or auto: the fastest that the device has.")
    ] = "float32",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the model first: worth it for many videos.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, a line a file.")] = False,
) -> None:
    """Say what happens in videos. A file that cannot be read is reported, and the rest go on."""
    from tpn.export import load as load_exported
    from tpn.predict import VideoClassifier

    num_clips, num_crops = read_views(views)
    if not any(video.exists() for video in videos):  # before a model is fetched
        for video in videos:
            _print_failure(video, not_there(video), as_json)
        raise typer.Exit(1)
    if onnx is not None:
        if checkpoint is not None or precision != "float32" or compile:
            raise typer.BadParameter("a file runs as it is, without --checkpoint, --precision and --compile", param_hint="--onnx")
        if model != DEFAULT:
            err.print(f"{onnx} is run, not {model}")
        classifier = VideoClassifier(load_exported(onnx), device=device)
    else:
        classifier = VideoClassifier(
            model,
            pretrained=checkpoint is None,
            checkpoint_path=checkpoint,
            device=device,
            precision=precision,
            compile=compile,
        )
    if not classifier.model.num_classes:
        raise ValueError("the model has no classes, num_classes is 0; tpn features writes what it gives")
    failed = 0
    with progress_bars() as progress:
        files_task = progress.add_task("files", total=len(videos), visible=len(videos) > 1)
        views_task = progress.add_task("views", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(views_task, completed=done, total=total)

        results = classifier.predict_each(videos, num_clips=num_clips, num_crops=num_crops, progress=advance)
        for video, result in zip(videos, results, strict=True):
            progress.advance(files_task)
            if isinstance(result, tpn.Prediction):
                _print_prediction(video, result, top, as_json)
                continue
            failed += 1
            _print_failure(video, result, as_json)
    if failed:
        raise typer.Exit(1)


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="A folder of class folders, or a list as VideoList and RawFrames read it.")],
    root: Annotated[Path | None, typer.Option(help="What paths in a list are relative to. Default: its folder.")] = None,
    frames: Annotated[
        str | None, typer.Option(help="For lists of extracted frames: their file names, such as img_{:05d}.jpg.")
    ] = None,
    first_frame: Annotated[int, typer.Option(min=0, help="Number of their first frame.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Videos to read at once.")] = 2,
    report: Annotated[Path, typer.Option(help="Where to write the bad files, each with its reason.")] = Path("bad_files.txt"),
) -> None:
    """Read every frame of a data set, and report the files that cannot be read: those so far, if it is interrupted."""
    from tpn.video import datasets

    spec = tpn.InputSpec(num_frames=1)  # what a clip is does not matter here
    dataset = datasets.open_dataset(data, spec, train=False, root=root, template=frames, first=first_frame)
    num_bad = 0
    with progress_bars() as progress:
        report.unlink(missing_ok=True)
        for item, reason in progress.track(dataset.check(workers), total=len(dataset), description="files"):
            if reason:
                num_bad += 1
                if num_bad <= 10:
                    progress.console.print(f"{item.path}: {reason}", soft_wrap=True, markup=False, highlight=False)
                with report.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(f"{item.path}\t{reason}\n")
    typer.echo(f"{len(dataset)} videos in {len(dataset.classes)} classes, {num_bad} of them cannot be read")
    if num_bad:
        err.print(f"error: all of them, with their reasons, are in {report}")
        raise typer.Exit(1)


def _print_failure(video: Path, error: Exception, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"file": str(video), "error": one_line(error)}))
    err.print(f"error: {one_line(error)}")


def _print_prediction(video: Path, result: Any, top: int, as_json: bool) -> None:
    best = result.top(top)
    if as_json:
        scores = [{"label": label, "probability": probability} for label, probability in best]
        typer.echo(json.dumps({"file": str(video), "views": len(result.view_logits), "top": scores}, ensure_ascii=False))
        return
    typer.echo(f"{video}  ({len(result.view_logits)} views)")
    for label, probability in best:
        typer.echo(f"  {probability:7.2%}  {label}")
