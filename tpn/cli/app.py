"""What all commands share: the application, common options, results, and progress bars."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from tpn.version import __version__

app = typer.Typer(
    name="tpn",
    help="Temporal Pyramid Networks for action recognition.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)

DEFAULT_MODEL = "tpn_slowonly_r50_k400"


def complete_model(incomplete: str) -> list[str]:
    """Return the published models whose names begin with a text, with their tags once it has a dot, for shells to complete."""
    from tpn.zoo.names import list_models

    return [name for name in list_models(pretrained="." in incomplete) if name.startswith(incomplete)]


_MODEL_HELP = (
    "Model name (see tpn list), folder of a saved model, or hf-hub:OWNER/NAME. "
    "predict, timeline, demo, and evaluate also take a file of tpn export."
)
ModelArgument = Annotated[str, typer.Argument(help=_MODEL_HELP, autocompletion=complete_model)]
ModelOption = Annotated[str, typer.Option("--model", "-m", help=_MODEL_HELP, autocompletion=complete_model)]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(help="Weights file, .safetensors or .pth, saved by tpn, MMAction2, or the original TPN code."),
]
ViewsOption = Annotated[str | None, typer.Option(help="CLIPSxCROPS, such as 1x1. Default: as published.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda if available, otherwise cpu; cpu for exported files.")
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        help="float32, float16, bfloat16, or auto: float16 on CUDA, bfloat16 on CPUs with AMX or AVX512-BF16, otherwise float32. "
        "Default: float32; for an int8 file auto."
    ),
]


@app.callback(invoke_without_command=True)
def _app(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print_result(f"tpn {__version__}")
        raise typer.Exit


def print_result(text: str) -> None:
    """Print to standard output, above the progress bar if there is one.

    `print` writes to `sys.stdout`, which rich redirects while it shows a bar. `typer.echo` bypasses that redirection.
    """
    print(text, flush=True)


@contextmanager
def progress_bars(*columns: ProgressColumn) -> Iterator[Progress]:
    """Show progress bars if standard error is a terminal. Text from `print_result` and `err.print` appears above them.

    Args:
        columns: shown before the remaining time. Default: description, bar, and count.
    """
    progress = Progress(
        *(columns or (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # rich redirects to standard error, which would leave a file or pipe empty
    )
    # rich before 14.3 prints an empty line even if `disable=True`.
    with progress if err.is_terminal else nullcontext():
        yield progress


def require_exists(path: str | Path) -> None:
    """Raise FileNotFoundError if `path` does not exist, before the model is downloaded."""
    os.stat(path)


def require_parent_folder(output: Path) -> None:
    """Raise an error if the folder of `output` is missing or `output` is a folder itself, before the model is downloaded."""
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output.parent}: no such folder")
    if output.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(output))


def require_picture_path(output: Path) -> None:
    """Raise an error if matplotlib cannot write a picture to `output`, before the model is downloaded."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if output.suffix.removeprefix(".").lower() not in formats:
        raise typer.BadParameter(f"must end in .png, .svg, or another picture format, got {str(output)!r}", param_hint="--output")
    require_parent_folder(output)


def parse_views_option(views: str | None) -> tuple[int | None, int | None]:
    """Parse --views to (num_clips, num_crops), or (None, None) for the published views."""
    from tpn.config import parse_views

    if views is None:
        return None, None
    try:
        return parse_views(views)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--views") from error
