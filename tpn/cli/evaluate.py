"""The command evaluate."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tpn.cli.app import (
    TRAIN,
    CheckpointOption,
    DeviceOption,
    FirstFrameOption,
    FramesOption,
    ModelArgument,
    PrecisionOption,
    RootOption,
    ViewsOption,
    WorkersOption,
    app,
    examples,
    parse_views_option,
    require_exists,
    require_model,
)
from tpn.cli.console import err, print_result, progress_bars
from tpn.cli.script import is_first_process
from tpn.errors import plural
from tpn.files import require_writable

if TYPE_CHECKING:
    from tpn.training.metrics import Evaluation

MAX_PRINTED_CLASSES = 30


@app.command(
    rich_help_panel=TRAIN,
    epilog=examples(
        "tpn evaluate local-dir:my-tpn videos/val --output report",
        "tpn evaluate tpn_slowonly_r50_k400 val.csv --root videos --views 1x1",
    ),
)
def evaluate(
    model: ModelArgument,
    data: Annotated[Path, typer.Argument(help="Folder with one folder per class, or a list of videos or frame folders.")],
    checkpoint: CheckpointOption = None,
    views: ViewsOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for report.html, summary.json, and per_class.csv. Default: only print."),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Fit the temperature of a saved model to these videos, and save it in its folder.")
    ] = False,
    dump: Annotated[Path | None, typer.Option(help="File for the probabilities of all videos: .json, .pkl, or .npz.")] = None,
    root: RootOption = None,
    frames: FramesOption = None,
    first_frame: FirstFrameOption = 1,
    target_fps: Annotated[
        float | None, typer.Option(help="Sample as if every video had this frame rate. Default: as in training.")
    ] = None,
    frame_interval: Annotated[
        int | None,
        typer.Option(min=1, help="Step between the frames of a clip; twice the model's shows videos at twice the speed."),
    ] = None,
    max_bad: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of unreadable videos; with more, the exit code is 1.")
    ] = 0.0,
    device: DeviceOption = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Views per forward pass. Default: 30 on a GPU, 1 on a CPU.")
    ] = None,
    precision: PrecisionOption = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the model, which takes up to a minute.")] = False,
    workers: WorkersOption = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the accuracy of a model on labeled videos, each counted once.

    The weights of the model are loaded. With --output, the same command resumes an interrupted run. Unreadable videos are listed
    and not counted; the same command reads only them again. On 8 GPUs: torchrun --nproc-per-node 8 -m tpn evaluate ...
    """
    from tpn.training import evaluation, metrics

    parse_views_option(views)
    require_exists(data)
    require_model(model, checkpoint)
    if dump is not None:
        if dump.suffix not in metrics.PROBS_SUFFIXES:
            formats = ", ".join(metrics.PROBS_SUFFIXES)
            raise typer.BadParameter(f"must end in one of {formats}, got {str(dump)!r}", param_hint="--dump")
        require_writable(dump)
    with _video_bar() as show_progress:
        result = evaluation.evaluate(
            model,
            data,
            output=output,
            views=views,
            calibrate=calibrate,
            checkpoint=checkpoint,
            root=root,
            frames=frames,
            first_frame=first_frame,
            target_fps=target_fps,
            frame_interval=frame_interval,
            device=device,
            batch_size=batch_size,
            precision=precision,
            compile=compile,
            workers=workers,
            progress=show_progress,
        )
    if is_first_process():
        if dump is not None:
            metrics.write_probs(result, dump)
        _print_result(result, model, data, as_json)
        for written in filter(None, (dump, output)):
            err.print(f"wrote {written}")
        if result.unreadable_share > max_bad:
            err.print(f"error: {plural(len(result.failed), 'unreadable video')} not counted. Repair them, or raise --max-bad")
    if result.unreadable_share > max_bad:
        raise typer.Exit(1)


@contextmanager
def _video_bar() -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function that shows how many videos are done, in the first process."""
    if not is_first_process():
        yield None
        return
    with progress_bars() as bars:
        task = bars.add_task("videos", total=None)

        def show(done: int, total: int) -> None:
            if done and bars.tasks[0].total is None:
                err.print(f"resuming: {done} of {total} videos are finished")
            bars.update(task, completed=done, total=total)

        yield show


def _print_result(result: "Evaluation", model: str, data: Path, as_json: bool) -> None:
    from tpn.training import metrics
    from tpn.training.wording import METRIC_NAMES, calibration_line

    for path, reason in result.failed.items():
        err.print(f"not counted: {path}: {reason}")
    if as_json:
        print_result(json.dumps(metrics.summary_of(result, model=model, data=str(data))))
        return
    values = ", ".join(f"{METRIC_NAMES[name]} {value:.2f}" for name, value in result.metrics.items())
    print_result(f"{plural(len(result.items), 'video')}, {plural(result.views, 'view')} each: {values}")
    if result.calibrated is not None:
        print_result(f"saved: {calibration_line(result)}")
    header, rows = metrics.per_class_rows(result)
    if len(rows) <= MAX_PRINTED_CLASSES:
        table = Table(*header, box=None, pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*map(escape, row))
        Console(width=1000).print(table, highlight=False)  # wider than any row: nothing is cut off
