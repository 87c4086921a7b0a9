"""A pseudo-terminal: run `tpn` on it, and read the lines that a user sees in the end."""

import contextlib
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOKEN = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|(.)", re.DOTALL)


def run_in_terminal(*args, cwd, columns=80, stdout=None):
    """Run `tpn` with standard error on a terminal, and standard output on the same one or on `stdout`.

    Returns:
        The exit code, the standard output if it was redirected, and the text that was written to the terminal.
    """
    terminal, program_side = os.openpty()
    fcntl.ioctl(program_side, termios.TIOCSWINSZ, struct.pack("4H", 50, columns, 0, 0))
    env = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        env.pop(name, None)
    written = []

    def read():  # a terminal that nobody reads fills up, and blocks whoever writes to it
        with contextlib.suppress(OSError):
            while data := os.read(terminal, 65536):
                written.append(data)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    command = [sys.executable, "-m", "tpn", *map(str, args)]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=stdout or program_side,
        stderr=program_side,
        text=True,
        timeout=100,
    )
    os.close(program_side)
    reader.join(10)
    os.close(terminal)
    return done.returncode, done.stdout, b"".join(written).decode()


def screen(text, columns=80):
    """Replay what was written to a terminal; return its lines, with those that the terminal wrapped joined again."""
    rows, wrapped = [[]], set()  # wrapped: rows that continue the one above
    row = column = 0
    for parameters, command, character in TOKEN.findall(text):
        if command == "A":
            row = max(row - int(parameters or 1), 0)
        elif command == "K":
            assert parameters == "2", "only erasing whole lines is implemented"
            rows[row] = []
            wrapped.discard(row)
        elif command:
            assert command in "mhl", f"CSI {parameters}{command} is not implemented"  # colors, and hiding the cursor
        elif character == "\r":
            column = 0
        else:
            if character == "\n" or column == columns:
                row += 1
                if row == len(rows):
                    rows.append([])
                if character != "\n":
                    wrapped.add(row)
                    column = 0
            if character != "\n":
                rows[row] += " " * (column + 1 - len(rows[row]))
                rows[row][column] = character
                column += 1
    lines = []
    for number, content in enumerate(rows):
        if number not in wrapped:
            lines.append("")
        lines[-1] += "".join(content)
    return [line.rstrip() for line in lines]
