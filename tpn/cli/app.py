"""The program itself: what all commands share, and how it ends."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

import tpn

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
        expected = isinstance(error, ValueError | TypeError | OSError | ImportError | tpn.WeightsUnavailableError)
        decode = sys.modules.get("tpn.video.decode")  # not loaded: not its error
        expected |= decode is not None and isinstance(error, decode.VideoError)
        kind = "" if expected else f"{type(error).__name__}: "
        err.print(f"error: {kind}{one_line(error)}" + ("" if expected else " (TPN_DEBUG=1 shows where)"))
        sys.exit(1)


@contextmanager
def progress_bars(*columns: ProgressColumn) -> Iterator[Progress]:
    """Show bars where standard error is a terminal, until the work is done; what is printed meanwhile appears above them.

    columns: what they say, beside the time that is left. Default: the task and its count.
    """
    progress = Progress(
        *(columns or (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # untouched in a file or pipe
    )
    # Bars that are disabled end in an empty line with rich before 14.3.
    with progress if err.is_terminal else nullcontext():
        yield progress


def check_there(*files: str | Path) -> None:
    """Refuse files of which none is there, before a model is fetched. One of several that is missing does not stop the others."""
    if files and not any(Path(file).exists() for file in files):
        raise not_there(files[0])


def not_there(file: str | Path) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))


def check_folder(output: Path) -> None:
    """Refuse a file whose folder is not there, before the work."""
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output.parent}: no such folder")
    if output.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(output))


def read_views(views: str | None) -> tuple[int | None, int | None]:
    """Read --views as (num_clips, num_crops), None for those that were published."""
    from tpn.predict import parse_views

    if views is None:
        return None, None
    try:
        return parse_views(views)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--views") from error


def check_picture(output: Path) -> None:
    """Refuse a picture that could not be drawn, before the work. Needs matplotlib."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if output.suffix.removeprefix(".").lower() not in formats:
        raise typer.BadParameter(f"a picture's name ends in .png, .svg, ..., got {str(output)!r}", param_hint="--output")
    check_folder(output)


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return next(iter(str(error).splitlines()), type(error).__name__)
