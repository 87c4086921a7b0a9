"""Run scripts in forks of a process that has imported tpn: none of them waits for the imports, which take seconds."""

import multiprocessing
import os
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed.launcher.api", "tpn.cli", "tpn.training.loop", "torchvision.models"])


def run_forked(script, count=1, argv=(), cwd="."):
    """Run a script with the arguments `argv`. Return its exit code, standard output, and standard error.

    Several processes are forks of torchrun's agent, which gives them their environment and stops all when one fails.
    """
    with patch.dict(os.environ, OMP_NUM_THREADS="1"), tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("out", "err")]
        settings = (dict(os.environ), str(cwd), multiprocessing.get_start_method(), streams)
        process = FORKS.Process(target=_in_fork, args=(script, count, list(map(str, argv)), *settings))
        process.start()
        process.join(timeout=300)
        if process.exitcode is None:
            process.kill()
        out, err = (stream.read_text() for stream in streams)
        assert process.exitcode is not None, f"timeout\n{err}"
    return SimpleNamespace(returncode=process.exitcode, stdout=out, stderr=err)


def _in_fork(script, count, argv, env, cwd, start_method, streams):
    multiprocessing.set_start_method(start_method, force=True)  # for its own processes, such as those that load videos
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["script.py", *argv]
    if count == 1:
        return _execute(script)
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(1, 1, count, start_method="fork", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    elastic_launch(config, _execute)(script)


def _execute(script):
    try:
        exec(script, {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        raise
