"""The command line: `tpn demo | list | info | predict | convert | check | publish`, also as `python -m tpn`.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 something failed (one line says
what), 2 wrong usage.
"""

import io
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import tpn
from tpn.zoo import publish as publishing
from tpn.zoo import sources
from tpn.zoo.weights import WEIGHTS, get_weights

app = typer.Typer(
    name="tpn",
    help="Temporal Pyramid Networks for action recognition.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


@app.callback(invoke_without_command=True)
def _app(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        typer.echo(f"tpn {tpn.__version__}")
        raise typer.Exit


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


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="Wildcard, such as 'tpn_*r101*'.")] = "*",
    weights: Annotated[bool, typer.Option("--weights", help="Every checkpoint, not only each model's default.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List the models with the accuracy that the publisher of their default weights reports."""
    names = tpn.list_models(pattern, pretrained=weights)
    if not names:
        raise ValueError(f"no model matches {pattern!r}; tpn list shows all")
    rows = [_facts(name) for name in names]
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ["model", "params", "GMACs", "frames x interval", "dataset", "top-1", "top-5", "source"]
    if weights:
        columns.append("weights")
    for column in columns:
        table.add_column(column, no_wrap=True, justify="left" if column in ("model", "dataset", "source", "weights") else "right")
    for row in rows:
        table.add_row(row["model" if weights else "architecture"], *(row["shown"][c] for c in columns[1:]))
    console = Console()
    console.width = max(console.width, 140)  # a row is a line, also in a pipe
    console.print(table)
    legend = "\ntop-1, top-5: percent, reported upstream (* measured by this project). GMACs: one clip at the training size."
    console.print(legend, highlight=False)


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="A model, with or without a tag: tpn_slowonly_r50_k400.scratch")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what is known of a model and its weights."""
    facts = _facts(name)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for key, value in {"model": facts["model"], **facts["shown"], **facts["details"]}.items():
        typer.echo(f"{key:<18} {value}")


@app.command()
def predict(
    videos: Annotated[list[Path], typer.Argument(help="Video files.", metavar="VIDEO...")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A name from tpn list, local-dir:FOLDER or hf-hub:OWNER/NAME.")
    ] = "tpn_slowonly_r50_k400",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights file, .safetensors or .pth, ours, MMAction2's or the original TPN's.")
    ] = None,
    views: Annotated[str | None, typer.Option(help="CLIPSxCROPS, such as 1x1. Default: as published.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to print.")] = 5,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")] = None,
    precision: Annotated[
        str, typer.Option(help="float32, float16, bfloat16, or auto: the fastest that the device has.")
    ] = "float32",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the model first: worth it for many videos.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, a line a file.")] = False,
) -> None:
    """Say what happens in videos. A file that cannot be read is reported, and the rest go on."""
    from tpn.predict import VideoClassifier, parse_views

    try:
        num_clips, num_crops = (None, None) if views is None else parse_views(views)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--views") from error
    classifier = VideoClassifier(
        model,
        pretrained=checkpoint is None,
        checkpoint_path=checkpoint,
        device=_check_device(device),
        precision=precision,
        compile=compile,
    )
    failed = 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # above the bars on a terminal, untouched in a file or pipe
    ) as progress:
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
            if as_json:
                typer.echo(json.dumps({"file": str(video), "error": _one_line(result)}))
            err.print(f"error: {_one_line(result)}")
    if failed:
        raise typer.Exit(1)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A .pth of MMAction2 or of the original TPN, or a .safetensors.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The model it holds, with a tag if it has several.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder. Default: the cache, so that pretrained=True finds it.")
    ] = None,
) -> None:
    """Write a checkpoint as safetensors with its configuration, for local-dir:FOLDER or pretrained=True."""
    weights = get_weights(model)
    path = sources.store(weights, checkpoint, output) if output else sources.convert(weights, checkpoint)
    how = f'"local-dir:{path.parent}"' if output else f'"{weights.name}", pretrained=True'
    err.print(f"wrote {path.parent}; load it with tpn.create_model({how})")


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
    with Progress(
        TextColumn("files"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=err, disable=not err.is_terminal
    ) as progress:
        report.unlink(missing_ok=True)
        for item, reason in progress.track(dataset.check(workers), total=len(dataset)):
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


@app.command()
def publish(
    namespace: Annotated[str, typer.Option(help="Your account or organisation on the Hugging Face Hub.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make new repositories private.")] = False,
) -> None:
    """Upload the published checkpoints to the Hub, converted: all that are in the cache or have a direct link.

    The others have to be fetched by hand, and are listed with the way to do it. Needs HF_TOKEN, or `hf auth login`.
    """
    failed = False
    for done in publishing.publish(namespace, dry_run=dry_run, private=private):
        typer.echo(f"{done.state:<20} {done.repo_id}" + (f"  {done.detail}" if done.detail else ""))
        failed |= done.state == "failed"
    if failed:
        raise typer.Exit(1)


def main() -> None:
    """Run the program; every failure is one line on standard error."""
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold what the terminal's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get("TPN_DEBUG"):
            raise
        expected = isinstance(error, ValueError | TypeError | OSError | tpn.WeightsUnavailableError)
        kind = "" if expected else f"{type(error).__name__}: "
        err.print(f"error: {kind}{_one_line(error)}" + ("" if expected else " (TPN_DEBUG=1 shows where)"))
        sys.exit(1)


def _facts(name: str) -> dict[str, Any]:
    """Return what `list` and `info` print of "model" or "model.tag"."""
    about = tpn.model_info(name)
    w, spec = about.weights, about.weights.input
    here = (sources.cache_folder(w) / "model.safetensors").is_file()
    interval = f"x{spec.frame_interval}" if spec.sampling == "dense" else " segments"
    measured = "not yet" if w.measured_top1 is None else f"{w.measured_top1:.2f}"
    top1 = f"{measured}*" if w.reported_top1 is None else f"{w.reported_top1:.2f}"
    place = "in the package" if w.embedded else "in the cache" if here else "by hand" if w.manual else "direct link"
    return {
        "architecture": w.model,
        "model": w.name,
        "params": about.params,
        "gmacs": round(about.gmacs, 2),
        "num_frames": spec.num_frames,
        "frame_interval": spec.frame_interval,
        "dataset": w.dataset.title,
        "reported_top1": w.reported_top1,
        "reported_top5": w.reported_top5,
        "measured_top1": w.measured_top1,
        "measured_top5": w.measured_top5,
        "protocol": w.protocol,
        "source": w.source,
        "url": w.url,
        "sha256": w.sha256,
        "repo_id": w.repo_id,
        "license": w.license,
        "cached": here,
        "shown": {
            "params": f"{about.params / 1e6:.1f} M",
            "GMACs": f"{about.gmacs:.1f}",
            "frames x interval": f"{spec.num_frames}{interval}",
            "dataset": w.dataset.title,
            "top-1": top1,
            "top-5": "" if w.reported_top5 is None else f"{w.reported_top5:.2f}",
            "source": w.source,
            "weights": place,
        },
        "details": {
            "accuracy": f"{'reported upstream; ' if w.reported_top1 else ''}measured by this project: {measured}",
            "protocol": w.protocol,
            "classes": str(w.dataset.num_classes),
            "initialised from": w.initialised_from or "random",
            "note": w.note,
            "license": w.license,
            "link": w.url or "none, it comes with tpn",
            "other tags": ", ".join(e.tag for e in WEIGHTS.values() if e.model == w.model and e is not w) or "none",
        },
    }


def _print_prediction(video: Path, result: Any, top: int, as_json: bool) -> None:
    best = result.top(top)
    if as_json:
        scores = [{"label": label, "probability": probability} for label, probability in best]
        typer.echo(json.dumps({"file": str(video), "views": len(result.view_logits), "top": scores}, ensure_ascii=False))
        return
    typer.echo(f"{video}  ({len(result.view_logits)} views)")
    for label, probability in best:
        typer.echo(f"  {probability:7.2%}  {label}")


def _check_device(device: str | None) -> str | None:
    import torch

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"cannot use device {device!r}: {_one_line(error)}") from error
    return device


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return next(iter(str(error).splitlines()), type(error).__name__)


if __name__ == "__main__":
    main()
