"""Print a training run in the terminal."""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor

from tpn.errors import plural, printable
from tpn.training import wording
from tpn.training.observer import Observer
from tpn.training.wording import METRIC_NAMES, metric

if TYPE_CHECKING:
    from tpn.training.loop import Run

MAX_LINES = 100
"""Training lines of a run that is not shown on a terminal, at most."""


class TrainingConsole(Observer):
    """Print a run: what was understood, the plan, a progress bar for each epoch, validations, and where the result is.

    The bar is for terminals. Elsewhere, there are plain lines instead, at most 100 for a run, and one for each validation.

    Args:
        console: to print to. Default: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=True,
            force_terminal=sys.stdout.isatty(),  # Jupyter sets FORCE_COLOR, which is not about bars
            force_jupyter=False,  # otherwise each line becomes an HTML output of its own
        )
        self._progress: Progress | None = None
        self._values: dict[str, float] = {}
        self._first_step = self._printed_step = 0
        self._start = time.monotonic()

    def planned(self, run: "Run") -> None:
        """Print what was understood, and the plan."""
        self._print_facts(run)
        self.console.print()
        self._print_rows([("setting", "value", "reason"), *wording.plan_rows(run.plan)])
        self.console.print()
        if run.step:
            self.console.print(f"resuming at step {run.step:,} of {run.total_steps:,}")
        self._first_step = self._printed_step = run.step
        self._start = time.monotonic()

    def stepped(self, run: "Run", loss: Tensor) -> None:
        """Advance the bar."""
        if not self.console.is_terminal:
            return
        self._values["loss"] = float(loss.detach())
        done = run.step - (_epoch(run) - 1) * run.epoch_steps
        self._show(run, f"epoch {_epoch(run)}", done)

    def logged(self, run: "Run", values: Mapping[str, float]) -> None:
        """Print a validation. Off a terminal, also print the metrics of the training, a few times in a run."""
        if any(name.startswith("val_") for name in values):
            self._print_validation(run, values)
            return
        self._values |= values
        due = run.step - self._printed_step >= run.total_steps / MAX_LINES
        if not self.console.is_terminal and due:
            self._printed_step = run.step
            self.console.print(f"step {run.step:,} of {run.total_steps:,}, epoch {_epoch(run)}: {self._state(run)}")

    def validating(self, run: "Run") -> None:
        """Say in the bar that a validation runs."""
        if self.console.is_terminal:
            self._show(run, "validation", run.epoch_steps)

    def finished(self, run: "Run") -> None:
        """Print the best validation, where the files are, and how to use the model."""
        self.close()
        if run.step < run.total_steps:
            self.console.print(
                f"stopped at step {run.step:,} of {run.total_steps:,}: {run.without_progress} validations without a better one"
            )
        folder = printable(run.folder)
        best = (run.folder / "best").is_dir()
        rows = [("model", f"{folder}" + (f", and of the best validation, {folder}/best" if best else ""))]
        rows += [("report", f"{folder}/report.html")] if (run.folder / "report.html").exists() else []
        if (run.folder / "bad_files.txt").exists():
            rows.append(("unreadable", f"videos that were left out are listed in {folder}/bad_files.txt"))
        if run.skipped:
            rows.append(("skipped", f"{plural(run.skipped, 'step')} whose gradient was not finite"))
        rows.append(("use", f"tpn predict VIDEO --model {shlex.quote(folder)}"))
        self.console.print()
        self._print_rows(rows, wrap=False)  # a command that is easy to copy

    def close(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print_facts(self, run: "Run") -> None:
        train, val = run.data.train, run.data.val
        videos = plural(len(train), "video")
        videos += f" for training, {len(val):,} for validation" if val else " for training"
        kind = " (a video may have several)" if train.multi_label else ""
        params = sum(parameter.numel() for parameter in run.model.parameters())
        counts = wording.class_counts(train.classes, run.facts.class_counts)
        devices = f"{run.world} devices of type {run.device.type}" if run.world > 1 else str(run.device)
        epochs = run.total_steps / run.epoch_steps
        shown = f"{epochs:,.1f}".removesuffix(".0")
        unit = "epoch" if shown == "1" else "epochs"
        length = f"{plural(run.total_steps, 'step')} of {plural(run.batch, 'clip')}, {shown} {unit}, on {devices}"
        self._print_rows(
            [
                ("data", f"{videos} ({printable(run.data.split)})"),
                (plural(len(train.classes), "class"), counts + kind),
                ("model", f"{printable(run.config.model)}, {params / 1e6:.1f} M parameters"),
                ("start", wording.weights_line(run.weights, run.new_classifier, len(train.classes))),
                ("length", length),
            ]
        )

    def _print_rows(self, rows: Sequence[tuple[str, ...]], *, wrap: bool = True) -> None:
        """Print columns. On a terminal, the last one is wrapped within its width, unless `wrap` is False."""
        if wrap and self.console.is_terminal:
            table = Table.grid(padding=(0, 2))
            for row in rows:
                table.add_row(*row)
            self.console.print(table, soft_wrap=False)
            return
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            self.console.print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    def _print_validation(self, run: "Run", values: Mapping[str, float]) -> None:
        """Print the metrics of a validation, which has just ended."""
        metrics = {name.removeprefix("val_"): value for name, value in values.items() if name.startswith("val_")}
        if run.model.num_classes <= 5:
            metrics.pop("top5", None)
        text = ", ".join(f"{METRIC_NAMES.get(name, name)} {metric(name, value)}" for name, value in metrics.items())
        best = " (best so far)" if metrics["mAP" if "mAP" in metrics else "top1"] >= run.best else ""
        self.console.print(f"validation at step {run.step:,}, epoch {_epoch(run)}: {text}{best}")

    def _state(self, run: "Run") -> str:
        """Return loss, accuracy, speed, and remaining time, as far as they are known."""
        values = self._values
        parts = [f"{METRIC_NAMES[name]} {metric(name, values[name])}" for name in ("loss", "top1") if name in values]
        if values.get("clips_per_s"):
            parts.append(f"{values['clips_per_s']:.3g} clips/s")
        done = run.step - self._first_step
        if done and run.step < run.total_steps:
            remaining = (time.monotonic() - self._start) / done * (run.total_steps - run.step)
            parts.append(f"{wording.duration(remaining)} left")
        return ", ".join(parts)

    def _show(self, run: "Run", description: str, done: int) -> None:
        if self._progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
            # No thread refreshes the bar: loader processes are forked, and a lock that the thread holds would stay locked there.
            self._progress = Progress(*columns, console=self.console, transient=True, auto_refresh=False)
            self._progress.add_task("", state="")
            self._progress.start()
        values: dict[str, Any] = {"description": description, "state": self._state(run)}
        self._progress.update(self._progress.task_ids[0], completed=done, total=run.epoch_steps, refresh=True, **values)


def _epoch(run: "Run") -> int:
    """Return the number of the epoch of the last step, from 1."""
    return max(run.step - 1, 0) // run.epoch_steps + 1
