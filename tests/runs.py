"""Short trainings of a small model, in this process and in others."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from forks import run_forked
from scripts import ROOT

import tpn
from tpn.training.loop import train

CLASSES = ("moving left", "turning clockwise", "blinking")
SMALL = {
    "model": "tpn_slowonly_tiny_motion",
    "model_args": {"base_channels": 4, "drop_rate": 0.2},
    "weights": "random",
    "frame_interval": 2,
    "crop_size": 32,
    "short_side": 36,
    "views": "1x1",
    "lr": 0.01,
    "lr_batch": 4,
    "batch_size": 4,
    "val_interval": 1,
    "label_smoothing": 0.0,
    "amp": "float32",
    "workers": 0,
    "threads": 1,
    "log_interval": 1,
}


def fit(data, output, resume=False, observer=None, **options):
    return train(data, output=output, resume=resume, observer=observer, **{**SMALL, **options})


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(lines):
    return [{k: v for k, v in line.items() if k not in ("clips_per_s", "data_wait")} for line in lines]


def steps(folder):
    return [line for line in without_times(metrics(folder)) if "loss" in line]


def weights(folder):
    return tpn.create_model(f"local-dir:{folder}").state_dict()


def in_processes(options, count=1, before="", check=True, fork=True):
    """Run `train` in processes of its own; `before` is code that runs first. fork: see `forks`."""
    script = f"import sys\nfrom tpn.training import loop\nfrom pathlib import Path\noptions = {options!r}\n{before}\nloop.train(**options)\n"
    done = run_forked(script, count) if fork else run_program(script, count)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def run_program(script, count):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "script.py")
        file.write_text(script)
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command = [sys.executable, *(torchrun if count > 1 else []), str(file)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


KILL = """
import os, signal
write = loop.MetricsLog.write
def kill(self, step, values):
    write(self, step, values)
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
loop.MetricsLog.write = kill
"""
KILL_WHILE_WRITING = """
import os, signal
write_bytes, count = Path.write_bytes, 0
def kill(self, content):
    global count
    count += self.name == "checkpoint.pt"
    if count == 3:
        write_bytes(self, bytes(content)[:len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write_bytes(self, content)
Path.write_bytes = kill
"""
LONG = {"log_interval": 2, "workers": 1, "epochs": 2, "batch_size": 2, "accumulate": 2, "ema": 0.9, "checkpoint_interval": 2}
