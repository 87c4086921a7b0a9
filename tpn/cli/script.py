"""Errors as one line, and exits that do not wait for other processes, for commands and scripts.

Nothing here imports PyTorch or PyAV: an error of theirs cannot arise before somebody else imports them.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from tpn.cli.console import err
from tpn.errors import WeightsUnavailableError, printable

_EXPECTED = (ValueError, TypeError, OSError, ImportError, FloatingPointError, WeightsUnavailableError)
"""Errors that users can cause."""


def run_cli(main: Callable[[], None]) -> None:
    """Run the `main` function of a program, and report an error as one line on standard error.

    The exit code is 1 after an error, and 130 after Ctrl-C. TPN_DEBUG=1 shows tracebacks. In a distributed run, a process that
    fails exits without waiting for the others, which may be waiting for it; torchrun ends them.
    """
    for stream in (sys.stdout, sys.stderr):  # file names may contain characters that the terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        _exit(130, "interrupted")
    except SystemExit as stop:  # how typer and argparse end every program
        if stop.code and _in_process_group():
            _exit(stop.code if isinstance(stop.code, int) else 1, "" if isinstance(stop.code, int) else str(stop.code))
        if not stop.code:
            _leave_processes()
        raise
    except Exception as error:
        if os.environ.get("TPN_DEBUG"):
            raise
        _exit(1, error_message(error))
    _leave_processes()


def error_message(error: Exception) -> str:
    """Return what a user should read about an error. For unexpected errors, it starts with their class."""
    message = one_line_message(error)
    if _is_a(error, "tpn.video.datasets", "TooManyBadFilesError"):
        return _from_worker(error)  # it lists the files
    if _is_a(error, "torch", "OutOfMemoryError"):
        return f"{'. '.join(message.split('. ')[:2])}. Try a smaller batch size"
    if "DefaultCPUAllocator: can't allocate memory" in message:
        return "out of memory. Try a smaller batch size"
    lost = _is_a(error, "torch.distributed", "DistError") or "Connection closed by peer" in str(error)
    if lost and _in_process_group():
        return "another process failed; see its message"
    if isinstance(error, _EXPECTED) or _is_a(error, "tpn.video.decode", "VideoError"):
        return message
    return f"{type(error).__name__}: {message} (set TPN_DEBUG=1 for the traceback)"


def one_line_message(error: BaseException) -> str:
    """Return the first line of an error's message, without "[Errno 2]" in front of it."""
    if isinstance(error, OSError) and error.strerror:
        return printable(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return next(iter(_from_worker(error).splitlines()), type(error).__name__)


def is_first_process() -> bool:
    """Return whether this process speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def positive_int(text: str) -> int:
    """Parse an integer >= 1; a `type` for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def _is_a(error: BaseException, module: str, name: str) -> bool:
    """Return whether an error is of a class in a module, which is not imported for this."""
    return isinstance(error, getattr(sys.modules.get(module), name, ()))


def _from_worker(error: BaseException) -> str:
    """Return an error's message. From a loader process, PyTorch puts a traceback in front of it."""
    message = str(error)
    if message.startswith("Caught ") and "Original Traceback" in message:
        return message.rpartition(f"{type(error).__name__}: ")[2].rstrip()
    return message


def _in_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _leave_processes() -> None:
    if _in_process_group():
        sys.modules["torch.distributed"].destroy_process_group()


def _exit(code: int, message: str = "") -> NoReturn:
    if message:
        err.print(f"error: {message}")
    sys.stdout.flush()
    sys.stderr.flush()
    if _in_process_group():
        os._exit(code)
    sys.exit(code)
