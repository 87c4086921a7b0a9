"""What commands print: results on standard output, everything else on standard error, both in color on a terminal.

Colors follow from the form of a line, so that text stays text: in a pipe or a file it has no escape codes, and brackets in file
names mean nothing. NO_COLOR=1 turns colors off, FORCE_COLOR=1 turns them on everywhere.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.theme import Theme


class _Lines(RegexHighlighter):
    """Color the parts of a line by the forms that results and messages have."""

    base_style = "tpn."
    highlights = (
        r"^(?P<error>error:)",
        r"^(?:wrote|rendered) (?P<path>.+)$",
        r"^(?P<path>\S.*  \(\d+ views?\))$",  # the file above its classes
        r"^ +(?P<probability>\d+\.\d\d%)  (?P<label>.+)$",
        r"^(?:track \d+  )?(?P<path>[\d.]+ s – [\d.]+ s)  (?P<label>.+)  (?P<probability>\d+\.\d%)$",
    )


_THEME = Theme({"tpn.error": "bold red", "tpn.path": "dim", "tpn.probability": "cyan", "tpn.label": "bold"})


def _console(**options: Any) -> Console:
    return Console(soft_wrap=True, markup=False, emoji=False, highlighter=_Lines(), theme=_THEME, **options)


err = _console(stderr=True)


def print_result(text: str) -> None:
    """Print to standard output, above the progress bar if there is one.

    `print` writes to `sys.stdout`, which rich redirects while it shows a bar. A console bypasses that redirection.
    """
    out = _console()
    if out.is_terminal:
        with out.capture() as colored:
            out.print(text)
        text = colored.get().removesuffix("\n")
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
    with progress if sys.stderr.isatty() else nullcontext():  # FORCE_COLOR is about colors
        yield progress
