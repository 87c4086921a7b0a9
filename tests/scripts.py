"""Import and run the scripts of `examples/`."""

import importlib.util
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from forks import run_forked

ROOT = Path(__file__).parents[1]


@cache
def example(name):
    """Import a script, such as "train" or "benchmarks/speed"."""
    spec = importlib.util.spec_from_file_location(f"example_{name.replace('/', '_')}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(main, *argv):
    """Call a program's `main` in this process. Return its exit code, standard output, and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", list(map(str, argv))), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def call_example(name, *args):
    """Run a script in this process; return what `call` returns."""
    script = example(name)
    return call(lambda: script.run_cli(script.main), f"{name}.py", *args)


def fork_example(name, *args, before=""):
    """Run a script in a fork, see `forks`; `before` is code that changes the module `example` first."""
    path = [str(ROOT / "tests"), str((ROOT / "examples" / f"{name}.py").parent)]
    script = f"import sys\nsys.path[:0] = {path}\nfrom scripts import example\nexample = example({name!r})\n{before}\n"
    done = run_forked(f"{script}example.run_cli(example.main)\n", argv=args)
    assert done.returncode == 0, done.stderr
    return done


def run_example(name, *args, check=True):
    """Run a script as a command."""
    script = ROOT / "examples" / f"{name}.py"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", script.parent))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, (script, *args))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    if check:
        assert done.returncode == 0, done.stderr
    return done
