"""Import and run the scripts of `examples/`."""

import importlib.util
import io
import os
import subprocess
import sys
import tempfile
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
    """Do what `run_example` does, without the imports; see `forks`."""
    path = [str(ROOT / "tests"), str((ROOT / "examples" / f"{name}.py").parent)]
    script = f"import sys\nsys.path[:0] = {path}\nfrom scripts import example\nexample = example({name!r})\n{before}\n"
    done = run_forked(f"{script}example.run_cli(example.main)\n", argv=args)
    assert done.returncode == 0, done.stderr
    return done


def run_example(name, *args, processes=0, before="", check=True):
    """Run a script as a command, with `processes` under torchrun. `before` is code that changes the module `example` first."""
    script = ROOT / "examples" / f"{name}.py"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", script.parent))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    with tempfile.TemporaryDirectory() as folder:
        if before:
            script = Path(folder, "changed.py")
            script.write_text(
                f"import sys\nfrom scripts import example\nexample = example({name!r})\n{before}\n"
                "if __name__ == '__main__':\n    example.run_cli(example.main)\n"
            )
        done = subprocess.run([*map(str, (*command, script, *args))], env=env, capture_output=True, text=True, timeout=300)
    if check:
        assert done.returncode == 0, done.stderr
    return done
