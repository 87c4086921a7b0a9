"""Report the progress of a run, and stop it on a signal."""

import signal
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tpn.training.loop import Run


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal: at a step, after which it saved a checkpoint, or outside the training loop (None)."""

    def __init__(self, number: int, step: int | None = None) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}" + ("" if step is None else f" at step {step}"))
        self.number = number


class Observer:
    """Receive the progress of a run. The base class does nothing."""

    def planned(self, run: "Run") -> None:
        """The run is set up, nothing is trained yet."""

    def stepped(self, run: "Run", loss: Tensor) -> None:
        """A step is done."""

    def logged(self, run: "Run", values: Mapping[str, float]) -> None:
        """Metrics are written."""

    def validating(self, run: "Run") -> None:
        """A validation begins."""

    def finished(self, run: "Run") -> None:
        """The model and the report are written."""

    def close(self) -> None:
        """The run is over, also if it failed."""
