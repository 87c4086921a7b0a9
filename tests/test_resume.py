"""Runs that are interrupted continue, with the same numbers."""

import json
import os
import shutil
import signal

import pytest
import torch
from runs import CLASSES, KILL, KILL_WHILE_WRITING, LONG, SMALL, fit, in_processes, metrics, steps, without_times

from tpn.training import loop
from tpn.training.loop import train
from tpn.training.observer import Interrupted, Observer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill", "step"),
    [pytest.param(KILL, 4, id="within an epoch"), pytest.param(KILL_WHILE_WRITING, 3, id="while a checkpoint is written")],
)
def test_a_killed_run_resumes_bit_for_bit(videos, tmp_path, kill, step):
    """The run has two epochs of three steps; it writes checkpoints and metrics at every second step and after every epoch."""
    options = {**SMALL, **LONG, "data": str(videos)}
    train(**{**options, "output": tmp_path / "whole"})
    options["output"] = str(tmp_path / "killed")
    assert in_processes(options, before=kill, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["progress"]["step"] == step
    with pytest.raises(ValueError, match=r"killed.*checkpoint.*resume"):
        train(**options)
    train(**options, resume=True)
    lines = [without_times(metrics(tmp_path / run)) for run in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 6
    for file in ("model.safetensors", "best/model.safetensors"):
        same = (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()
        assert same, file


@pytest.mark.slow
@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 2), (signal.SIGINT, 3)])
def test_a_signal_saves_a_checkpoint_and_the_run_resumes_bit_for_bit(videos, tmp_path, number, step):
    """Within an epoch, and in its last step, after which the validation still takes place."""

    class Stop(Observer):
        def stepped(self, run, loss):
            if run.step == step:
                os.kill(os.getpid(), number)

    options = {**LONG, "workers": 0, "checkpoint_interval": None}
    fit(videos, tmp_path / "whole", **options)
    with pytest.raises(Interrupted, match=f"{number.name}.*step {step}") as caught:
        fit(videos, tmp_path / "stopped", observer=Stop(), **options)
    assert caught.value.number == number
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    fit(videos, tmp_path / "stopped", resume=True, **options)
    assert without_times(metrics(tmp_path / "whole")) == without_times(metrics(tmp_path / "stopped"))
    for file in ("model.safetensors", "best/model.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()


@pytest.mark.slow
def test_a_resumed_run_takes_the_settings_of_the_first_command(videos, tmp_path):
    """Options need not be repeated, and the reasons of the plan stay; a setting of the machine is chosen again."""
    options = {**SMALL, "epochs": 2, "accumulate": 3, "flip_prob": 0.0}
    stopping = {name: value for name, value in options.items() if name != "views"}

    class Stop(Observer):
        def logged(self, run, values):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(videos, output=tmp_path, observer=Stop(), **stopping)
    before = json.loads((tmp_path / "train.json").read_text())
    result = train(videos, output=tmp_path, resume=True, verbose=False, workers=1)
    after = json.loads((tmp_path / "train.json").read_text())
    assert {name for name in before if before[name] != after[name]} <= {"workers", "threads", "reasons"}
    assert {name for name in before["reasons"] if before["reasons"][name] != after["reasons"].get(name)} <= {"workers", "threads"}
    assert before["reasons"]["views"] == {line.name: line.reason for line in result.plan}["views"] != "given"
    assert [line["step"] for line in steps(tmp_path)] == [1, 2]


@pytest.mark.slow
def test_epochs_of_a_plan_are_resumed(videos, tmp_path):
    options = {name: value for name, value in SMALL.items() if name != "val_interval"}
    train(videos, output=tmp_path, verbose=False, epochs=1, **options)
    train(videos, output=tmp_path, verbose=False, resume=True)
    assert len(steps(tmp_path)) == 3
    train(videos, output=tmp_path, verbose=False, resume=True, steps=4)
    assert len(steps(tmp_path)) == 4


def test_a_class_with_another_name_is_refused(videos, tmp_path):
    shutil.copytree(videos / "train", tmp_path / "data")
    fit(tmp_path / "data", tmp_path / "run", epochs=1, val_fraction=0)
    (tmp_path / "data" / CLASSES[0]).rename(tmp_path / "data" / "zigzag")
    with pytest.raises(ValueError, match="classes and labels"):
        fit(tmp_path / "data", tmp_path / "run", epochs=2, val_fraction=0, resume=True)


def test_a_failed_validation_is_repeated(videos, tmp_path, monkeypatch):
    """The epoch before it is kept."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(videos, tmp_path / "run", epochs=1)
    for output in (tmp_path / "whole", tmp_path / "run"):
        result = fit(videos, output, epochs=1, resume=True)
        assert [line["step"] for line in metrics(output) if "val_loss" in line] == [3]
        assert (output / "best" / "model.safetensors").exists()
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(tmp_path / "whole"))
    assert result.evaluation is not None


def test_a_run_leaves_the_process_as_it_was(videos, tmp_path):
    threads = torch.get_num_threads()
    benchmark = torch.backends.cudnn.benchmark
    with pytest.raises(ValueError, match="less than one step"):
        fit(videos, tmp_path, epochs=1, batch_size=99, deterministic=True, threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert torch.backends.cudnn.benchmark == benchmark
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_resume_trains_longer_and_refuses_other_settings(videos, tmp_path):
    fit(videos, tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"checkpoint\.pt.*settings: seed=0, now 1"):
        fit(videos, tmp_path, epochs=1, seed=1, resume=True)
    with pytest.raises(ValueError, match=r"settings: .*recipe=None, now 'motion'"):
        fit(videos, tmp_path, recipe="motion", resume=True)
    before = (tmp_path / "model.safetensors").read_bytes()
    fit(videos, tmp_path, epochs=1, workers=1, resume=True)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    fit(videos, tmp_path, epochs=2, resume=True)
    assert [line["step"] for line in steps(tmp_path)] == list(range(1, 7))
