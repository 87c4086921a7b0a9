"""The command line, `tpn COMMAND` or `python -m tpn COMMAND`.

Results go to standard output, everything else to standard error. Exit codes: 0 success, 1 error (described in one line),
2 wrong usage, 130 interrupted.

Commands import PyTorch and the rest of tpn when they run, so that help, completion, and `tpn list` do not wait for it.
"""

import signal
import threading
from types import FrameType

from tpn.cli.script import run_cli


def main() -> None:
    """Run the command line. Report an error as one line on standard error."""
    run_cli(_run)


def _run() -> None:
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # another one in the background
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from tpn.cli.commands import app

        app(prog_name="tpn")
    finally:
        if in_main_thread and signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but end the process during an import, where packages catch it or raise another error."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        frame = frame.f_back
    raise KeyboardInterrupt
