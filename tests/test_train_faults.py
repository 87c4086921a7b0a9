"""Runs that meet infinite gradients, full disks, damaged files, and signals."""

import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from runs import SMALL, fit, in_processes, steps
from torch.utils.data import DataLoader

import tpn
from tpn.training import evaluation, loop
from tpn.training.observer import Interrupted, Observer
from tpn.training.state import locked_folder
from tpn.video import motion
from tpn.video.datasets import TooManyBadFilesError, VideoFolder


class Poison(Observer):
    """Makes gradients infinite after the given steps."""

    def __init__(self, bad):
        self.bad, self.run = bad, None

    def planned(self, run):
        self.run = run
        next(run.model.parameters()).register_hook(lambda gradient: gradient * (math.inf if run.step in self.bad else 1))


def test_a_step_with_an_infinite_gradient_changes_nothing(videos, tmp_path):
    """Also in the last step."""
    poison = Poison({1, 5})
    states = []
    parts = ("model", "saved_model")  # the second one has the averaged weights
    poison.stepped = lambda run, loss: states.append(
        {f"{part}.{name}": value.clone() for part in parts for name, value in getattr(run, part).state_dict().items()}
    )
    result = fit(videos, tmp_path, epochs=2, ema=0.5, observer=poison)
    assert poison.run.skipped == 2
    for before, after in ((0, 1), (4, 5)):
        changed = [n for n, value in states[before].items() if not torch.equal(value, states[after][n])]
        assert all("num_batches_tracked" in name for name in changed)
    for part in parts:
        assert not torch.equal(states[1][f"{part}.head.fc.weight"], states[2][f"{part}.head.fc.weight"])
    assert all(value.isfinite().all() for value in result.model.state_dict().values())


@pytest.mark.slow
def test_ten_infinite_gradients_in_a_row_stop_the_run(videos, tmp_path):
    with pytest.raises(FloatingPointError, match=r"10 steps.*lr"):
        fit(videos, tmp_path, epochs=5, observer=Poison(set(range(3, 99))))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["step"] == 12
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_that_are_not_finite_are_not_saved(videos, tmp_path):
    class Break(Observer):
        def stepped(self, run, loss):
            if run.step == 4:
                with torch.no_grad():
                    run.model.head.fc.bias[0] = math.nan

    with pytest.raises(FloatingPointError, match=r"head\.fc\.bias.*lr"):
        fit(videos, tmp_path / "val", epochs=2, observer=Break())
    with pytest.raises(FloatingPointError, match=r"head\.fc\.bias.*lr"):
        fit(videos / "train", tmp_path / "run", epochs=2, val_fraction=0, observer=Break())
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["progress"]["step"] == 3


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(videos, tmp_path, monkeypatch):
    write_bytes, count = type(tmp_path).write_bytes, []

    def full(path, content):
        if path.name == "checkpoint.pt":
            count.append(path)
            if len(count) == 2:
                raise OSError(28, "No space left on device", str(path))
        return write_bytes(path, content)

    fit(videos, tmp_path / "whole", epochs=2)
    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        fit(videos, tmp_path / "run", epochs=2)
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pt")) == ["checkpoint.pt"]
    fit(videos, tmp_path / "run", epochs=2, resume=True)
    assert steps(tmp_path / "whole") == steps(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "flipped bit", "text"])
def test_a_damaged_checkpoint_is_refused(videos, tmp_path, damage):
    fit(videos, tmp_path, epochs=1)
    content = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes({"cut": content[: len(content) // 2], "text": b"no"}.get(damage, content))
    with pytest.raises(ValueError, match=r"checkpoint\.pt.*damaged"):
        fit(videos, tmp_path, epochs=2, resume=True)


def test_garbage_in_the_metrics_is_dropped(videos, tmp_path):
    fit(videos, tmp_path, epochs=1)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "lo\n\xff\xfe garbage\n[1]\n{"no": 1}\n')
    fit(videos, tmp_path, epochs=2, resume=True)
    assert [line["step"] for line in steps(tmp_path)] == list(range(1, 7))


def test_two_runs_in_one_folder(videos, tmp_path):
    class Second(Observer):
        def planned(self, run):
            with pytest.raises(ValueError, match=rf"in use.*process {os.getpid()} on {re.escape(platform.node())}\b"):
                fit(videos, tmp_path, epochs=1)

    fit(videos, tmp_path, epochs=1, observer=Second())
    assert len(steps(tmp_path)) == 3


def test_a_killed_loader_worker(videos, tmp_path, monkeypatch):
    original = DataLoader.__iter__

    def kill(self):
        batches = original(self)
        if self.num_workers:
            os.kill(batches._workers[0].pid, signal.SIGKILL)
        return batches

    monkeypatch.setattr(DataLoader, "__iter__", kill)
    with pytest.raises(RuntimeError, match="worker"):
        fit(videos, tmp_path, epochs=1, workers=1)


KILL_PARENT = """
import os, signal, time
from tpn.video.datasets import VideoDataset
def kill(self, index):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)
VideoDataset.__getitem__ = kill
"""


@pytest.mark.slow
@pytest.mark.parametrize(("count", "workers"), [(1, 1), (2, 0)], ids=["loader process", "process of torchrun"])
def test_processes_end_with_their_parent(videos, tmp_path, count, workers):
    """While they read a video that takes long. They would keep the lock on the folder."""
    options = {**SMALL, "batch_size": 2, "data": str(videos), "output": str(tmp_path / "run"), "workers": workers}
    done = in_processes(options, count, before=KILL_PARENT, check=False, fork=False)  # in a fork, the parents are others
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while True:
        try:
            with locked_folder(tmp_path / "run"):
                return
        except ValueError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_second_signal_keeps_the_epoch(videos, tmp_path):
    """It ends the validation."""

    class Stop(Observer):
        def validating(self, run):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(videos, tmp_path, epochs=2, observer=Stop())
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["step"] == 3


def test_a_signal_to_all_processes_of_a_group_saves_a_checkpoint(videos, tmp_path):
    """The loader process leaves the signal to the run."""

    class Stop(Observer):
        def stepped(self, run, loss):
            if run.step == 1:
                for child in multiprocessing.active_children():
                    subprocess.run(["kill", str(child.pid)], check=True)  # PyTorch ends workers quietly if the parent asks
                    child.join(timeout=1)
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="step 1"):
        fit(videos, tmp_path, epochs=2, workers=1, observer=Stop())


def test_unreadable_validation_videos_are_listed_and_limited(videos, tmp_path):
    shutil.copytree(videos, tmp_path / "data")
    (tmp_path / "data" / "val" / "blinking" / "broken.mp4").write_bytes(b"not a video")
    fit(tmp_path / "data", tmp_path / "run", epochs=1, max_bad=0.2)
    assert (tmp_path / "run" / "bad_files.txt").read_text().split("\t")[0].endswith("broken.mp4")
    with pytest.raises(TooManyBadFilesError, match=r"1 of 7 .*max_bad"):
        fit(tmp_path / "data", tmp_path / "strict", epochs=1)
    assert torch.load(tmp_path / "strict" / "checkpoint.pt", weights_only=True)["progress"]["step"] == 3


def test_several_labels_of_the_models_own_classes(videos, tmp_path):
    """The classifier is replaced: it was trained for one label per video."""
    files = sorted((videos / "train").rglob("*.mp4"))
    rows = [f"{files[i % 12]},{name}|{motion.CLASSES[0]}" for i, name in enumerate(motion.CLASSES[1:])]
    (tmp_path / "table.csv").write_text("path,label\n" + "\n".join(rows))
    result = fit(tmp_path / "table.csv", tmp_path / "run", epochs=1, val_fraction=0, weights="pretrained", model_args={})
    assert result.model.multi_label
    assert tpn.create_model(f"local-dir:{tmp_path / 'run'}").multi_label


@pytest.mark.slow
def test_early_stopping(videos, tmp_path, monkeypatch):
    """No validation is better than the first one."""
    monkeypatch.setattr(loop, "validate", lambda *args, **kwargs: result)
    result = evaluation.validate(tpn.create_model("tpn_slowonly_tiny_motion", num_classes=3), _val(videos))
    fit(videos, tmp_path, epochs=9, patience=2)
    assert len(steps(tmp_path)) == 9


def _val(videos):
    return VideoFolder(videos / "val", tpn.input_spec("tpn_slowonly_tiny_motion"), train=False)


def test_bad_files_are_replaced_and_listed(videos, tmp_path):
    shutil.copytree(videos / "train", tmp_path / "train")
    (tmp_path / "train" / "blinking" / "broken.mp4").write_bytes(b"not a video")
    fit(tmp_path / "train", tmp_path / "run", epochs=1, val_fraction=0, max_bad=0.1)
    assert (tmp_path / "run" / "bad_files.txt").read_text().split("\t")[0].endswith("blinking/broken.mp4")
    with pytest.raises(TooManyBadFilesError, match=r"1 of 13 .*max_bad.*0\.05"):
        fit(tmp_path / "train", tmp_path / "strict", epochs=1, val_fraction=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 13}, ValueError, "12 videos.*13 clips.*batch_size"),
        ({"model": "tpn_slowonly_r5"}, ValueError, "tpn_slowonly_r5"),
        ({"val": "nowhere"}, FileNotFoundError, "nowhere"),
        ({"crop_size": 64}, ValueError, "crop_size.*short_side=36.*64"),
        ({"device": "gpu"}, ValueError, "device.*'gpu'"),
        ({"weights": "backbone", "model": "local-dir:x"}, FileNotFoundError, "x"),
        ({"model": "local-dir:x"}, ValueError, "weights='random'.*local-dir:x"),
        ({"epochs": 1, "steps": 1}, ValueError, "steps=1.*epochs=1"),
        ({"flip_prob": 2}, ValueError, "flip_prob.*between 0 and 1.*2"),
        ({"recipe": "k600"}, ValueError, "recipe.*k400-in1k.*'k600'"),
        ({"step": 1}, TypeError, "'step'.*'steps'"),
        ({"optimizer": "adamx", "lr": None}, ValueError, "^(?!.*lr).*adamx"),
        ({"optimizer": "lamb", "lr": None}, ValueError, "lamb.* lr"),
        ({"weights": "imagenet"}, ValueError, "weights.*backbone.*'imagenet'"),
        ({"freeze": "head"}, ValueError, "freeze.*backbone.*'head'"),
        ({"views": "3"}, ValueError, "views.*'3'"),
        ({"group": "("}, ValueError, r"group.*'\('"),
        ({"group": "x", "val": "y"}, ValueError, "group='x'.*val=y"),
    ],
)
def test_errors(videos, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        fit(videos, tmp_path, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("threads", 0), ("seed", -1), ("target_fps", -5.0), ("crop_area", (2.0, 1.0)), ("crop_area", (0.5, 0.4))],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{re.escape(str(value))}"):
        tpn.TrainConfig(**{name: value})
