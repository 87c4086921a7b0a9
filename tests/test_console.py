"""Colors of what commands print, and their help."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import typer
from scripts import ROOT, call
from terminal import run_in_terminal

from tpn import cli
from tpn.cli import console
from tpn.cli.commands import app

COMMANDS = typer.main.get_command(app).commands
ESCAPES = re.compile(r"\x1b\[[\d;]*m")
LINES = {
    "a [red]b[/red].mp4  (30 views)": "\x1b[2ma [red]b[/red].mp4  (30 views)\x1b[0m",
    "   97.10%  [bold]arm wrestling": "   \x1b[36m97.10%\x1b[0m  \x1b[1m[bold]arm wrestling\x1b[0m",
    "0.0 s – 12.5 s  -  40.3%": "\x1b[2m0.0 s – 12.5 s\x1b[0m  \x1b[1m-\x1b[0m  \x1b[36m40.3%\x1b[0m",
    "error: [/] a.mp4: the file is empty": "\x1b[1;31merror:\x1b[0m [/] a.mp4: the file is empty",
    "wrote [b].png": "wrote \x1b[2m[b].png\x1b[0m",
    '{"file": "a.mp4"}': '{"file": "a.mp4"}',
}


@pytest.fixture
def printed(monkeypatch, capsys):
    """Print a line with some environment, and return what arrives."""

    def printed(line, **env):
        for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        console.print_result(line)
        return capsys.readouterr().out

    return printed


@pytest.mark.parametrize("line", LINES)
def test_colors_follow_from_the_form_of_a_line(printed, line):
    assert printed(line) == f"{line}\n"
    assert printed(line, FORCE_COLOR="1") == f"{LINES[line]}\n"
    without = printed(line, FORCE_COLOR="1", NO_COLOR="1")
    assert ESCAPES.sub("", without) == f"{line}\n"
    assert not re.search(r"\x1b\[[\d;]*3\d", without)


def test_errors_on_a_terminal(tmp_path):
    code, _, text = run_in_terminal("info", "[red]x", cwd=tmp_path)
    assert code == 1
    assert text.startswith("\x1b[1;31merror:\x1b[0m unknown model '[red]x'")


def test_help_has_groups():
    command = [sys.executable, "-m", "tpn", "--help"]
    text = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True).stdout
    assert re.findall(r"^╭─ (.+?) ─", text, re.MULTILINE) == ["Options", "Use", "Train", "Export and features", "Models"]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_valid(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()  # click itself looks for the folder of one option
    title, *examples = COMMANDS[name].epilog.split("\n\n")
    assert title == "Examples:"
    assert examples
    for example in examples:
        program, command, *args = shlex.split(example.rpartition(" | ")[2].partition(" > ")[0])
        assert (program, command) == ("tpn", name)
        COMMANDS[name].make_context(name, args)
        assert example in " ".join(call(cli.main, "tpn", name, "--help").stdout.split())
