"""Keep account of the videos that cannot be read, in a dataset and its copies in loader workers."""

import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch

from tpn.errors import printable

MAX_LISTED = 20
"""Number of bad files that an error lists. Training also stops if this many videos fail before one can be read."""


class TooManyBadFilesError(RuntimeError):
    """More videos cannot be read than `max_bad` of the dataset allows. The message lists them."""


class SharedState:
    """State that a dataset shares with its copies in loader workers. A deep copy of the dataset gets a copy of the state."""

    def __init__(self, epoch: int = 0, any_read: bool = False, log: bytes = b"") -> None:
        self.epoch = torch.tensor(epoch).share_memory_()
        self.any_read = torch.tensor(any_read).share_memory_()
        handle, self.log = tempfile.mkstemp(prefix="tpn-bad-files-", suffix=".jsonl")
        with os.fdopen(handle, "wb") as file:
            file.write(log)
        weakref.finalize(self, _remove_log, self.log, os.getpid())

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedState":
        return SharedState(int(self.epoch), bool(self.any_read), Path(self.log).read_bytes())


def format_bad_files(bad: dict[str, str]) -> str:
    lines = [f"\n  {printable(path)}: {reason}" for path, reason in bad.items()]
    more = f"\n  and {len(lines) - MAX_LISTED} more; `tpn check` lists all" if len(lines) > MAX_LISTED else ""
    return "".join(lines[:MAX_LISTED]) + more


def _remove_log(path: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked loader worker
        Path(path).unlink(missing_ok=True)
