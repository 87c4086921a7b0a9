"""`tpn.training.loop`: options, files, faults, and that an interrupted run gives the same result."""

import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from scripts import ROOT
from torch.utils.data import DataLoader

import tpn
from tpn.predict import VideoClassifier
from tpn.training import evaluation, loop
from tpn.training.config import RECIPES, TrainConfig
from tpn.training.loop import train
from tpn.training.observer import Interrupted, Observer
from tpn.training.state import locked_folder
from tpn.video import motion
from tpn.video.datasets import TooManyBadFilesError, VideoFolder

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


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return a folder with three classes of four short videos for training, and of two for validation."""
    root = tmp_path_factory.mktemp("motion")
    for part, clips, seed in (("train", 4, 1), ("val", 2, 2)):
        motion.write_dataset(root / "all" / part, clips, seed=seed, num_frames=34)
        for name in CLASSES:
            shutil.copytree(root / "all" / part / name, root / part / name)
    return root


@pytest.fixture(autouse=True)
def threads():
    """Restore the number of threads, which a run sets."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


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


def in_processes(options, count=1, before="", check=True):
    """Run `train` in processes of its own; `before` is code that runs first."""
    script = f"import sys\nfrom tpn.training import loop\nfrom pathlib import Path\noptions = {options!r}\n{before}\nloop.train(**options)\n"
    command = [sys.executable, "-c", script]
    if count > 1:
        file = options["output"] + ".py"
        with open(file, "w") as f:
            f.write(script)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), file]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    if check:
        assert done.returncode == 0, done.stderr
    return done


# What a run writes


def test_training_writes_metrics_and_models(videos, tmp_path):
    result = fit(videos, tmp_path, epochs=3, warmup=1 / 3, lr=0.04, lr_batch=16)
    lines = metrics(tmp_path)
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 10))
    assert trained[0]["lr"] == pytest.approx(0.0001)  # warm-up
    assert trained[3]["lr"] > trained[8]["lr"] > 0
    assert all(line["clips_per_s"] > 0 and 0 <= line["data_wait"] <= 1 and line["grad_norm"] > 0 for line in trained)
    validations = [line for line in lines if "val_loss" in line]
    assert [(line["step"], line["val_top5"]) for line in validations] == [(3, 100), (6, 100), (9, 100)]
    assert json.loads((tmp_path / "train.json").read_text())["lr"] == 0.04

    for folder in (tmp_path, tmp_path / "best"):
        model = tpn.create_model(f"local-dir:{folder}")
        assert model.labels == tuple(sorted(CLASSES))
        assert model.input_spec.crop_size == 32
    assert all(torch.equal(value, weights(tmp_path)[name]) for name, value in result.model.state_dict().items())
    video = next((videos / "val").rglob("*.mp4"))
    assert {name for name, _ in VideoClassifier(model)(video).top(5)} == set(CLASSES)


def test_validation_and_evaluation_agree(videos, tmp_path):
    """Both use the views that are saved with the model."""
    result = fit(videos, tmp_path, epochs=1, views="2x3", short_side=40)
    model = tpn.create_model(f"local-dir:{tmp_path}").eval()
    assert (model.input_spec.num_clips, model.input_spec.num_crops) == (2, 3)
    data = VideoFolder(videos / "val", model.input_spec, train=False, classes=model.labels)
    again = evaluation.validate(model, data)
    assert again.views == result.evaluation.views == 6
    assert again.metrics == result.evaluation.metrics
    assert metrics(tmp_path)[-1]["val_loss"] == pytest.approx(again.metrics["loss"])
    classify = VideoClassifier(model)
    for item, probs in zip(again.items, again.probs, strict=True):
        assert torch.equal(classify(item.path).probs, torch.from_numpy(probs))


def test_a_loaded_classifier_and_the_order_of_its_classes_are_kept(videos, tmp_path):
    options = {"weights": "pretrained", "model_args": {}}
    result = fit(videos / "all" / "train", tmp_path, epochs=1, batch_size=8, val_fraction=0, **options)
    assert result.model.labels == motion.CLASSES != tuple(sorted(motion.CLASSES))
    assert tpn.create_model(f"local-dir:{tmp_path}").labels == motion.CLASSES


@pytest.mark.parametrize("start", ["saved", "random"])
def test_whether_a_loaded_classifier_is_replaced(videos, tmp_path, start):
    tpn.save_pretrained(tpn.create_model("tpn_slowonly_tiny_motion", base_channels=4), tmp_path / "start")
    files = sorted((videos / "train").rglob("*.mp4"))
    (tmp_path / "list.txt").write_text("".join(f"{file.relative_to(videos)} {i % 3}\n" for i, file in enumerate(files)))
    seen = []
    observer = Observer()
    observer.planned = seen.append
    options = {"model": f"local-dir:{tmp_path / 'start'}", "model_args": {}, "weights": None} if start == "saved" else {}
    fit(tmp_path / "list.txt", tmp_path / "run", root=str(videos), epochs=1, observer=observer, **options)
    assert seen[0].new_classifier == (start == "saved")
    assert tpn.create_model(f"local-dir:{tmp_path / 'run'}").labels == ("class 0", "class 1", "class 2")


def test_numeric_labels_keep_the_models_classes_only_if_asked(videos, tmp_path):
    files = sorted((videos / "train").rglob("*.mp4"))
    (tmp_path / "list.txt").write_text("".join(f"{files[i % 12].relative_to(videos)} {i}\n" for i in range(14)))
    for keep, expected in ((True, motion.CLASSES), (False, tuple(f"class {i}" for i in range(14)))):
        result = fit(tmp_path / "list.txt", tmp_path / str(keep), root=str(videos), epochs=1, val_fraction=0, keep_classes=keep)
        assert result.model.labels == expected


def test_dry_run_trains_nothing(videos, tmp_path):
    result = train(videos, output=tmp_path / "run", dry_run=True, **SMALL)
    assert {line.name: line.reason for line in result.plan}["batch_size"] == "given"
    assert not (tmp_path / "run").exists()


# Interruption


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill", "step"),
    [pytest.param(KILL, 4, id="within an epoch"), pytest.param(KILL_WHILE_WRITING, 3, id="while a checkpoint is written")],
)
def test_a_killed_run_resumes_bit_for_bit(videos, tmp_path, kill, step):
    """The run has two epochs of three steps; it writes checkpoints and metrics at every second step and after every epoch."""
    options = {**SMALL, **LONG, "data": str(videos)}
    in_processes({**options, "output": str(tmp_path / "whole")})
    options["output"] = str(tmp_path / "killed")
    assert in_processes(options, before=kill, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["progress"]["step"] == step
    with pytest.raises(ValueError, match=r"killed.*checkpoint.*resume"):
        train(**options)
    in_processes({**options, "resume": True})
    lines = [without_times(metrics(tmp_path / run)) for run in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 6
    for file in ("model.safetensors", "best/model.safetensors"):
        same = (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()
        assert same, file


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


# Faults


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


@pytest.mark.parametrize(
    ("count", "workers"),
    [pytest.param(1, 1, id="loader process"), pytest.param(2, 0, id="process of torchrun", marks=pytest.mark.slow)],
)
def test_processes_end_with_their_parent(videos, tmp_path, count, workers):
    """While they read a video that takes long. They would keep the lock on the folder."""
    options = {**SMALL, "batch_size": 2, "data": str(videos), "output": str(tmp_path / "run"), "workers": workers}
    done = in_processes(options, count, before=KILL_PARENT, check=False)
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
        ({"learning_rate": 1}, TypeError, "learning_rate"),
        ({"freeze": "head"}, ValueError, "freeze.*backbone.*'head'"),
        ({"views": "3"}, ValueError, "views.*'3'"),
        ({"group": "("}, ValueError, r"group.*'\('"),
        ({"group": "x", "val": "y"}, ValueError, "group='x'.*--val y"),
    ],
)
def test_errors(videos, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        fit(videos, tmp_path, **options)


# Several processes


TWO_RANKS = """
import os
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
import tpn
from tpn.models.layers import freeze_batch_norm
from tpn.training.loss import TrainingLoss

def gradients(part, weights):
    torch.manual_seed(0)
    model = tpn.create_model("tpn_slowonly_tiny_motion", base_channels=8, drop_rate=0.0)
    loss = TrainingLoss(model, weights=weights)
    network = DistributedDataParallel(loss) if dist.is_initialized() else loss
    freeze_batch_norm(model.train())
    frames = torch.randint(256, (8, 16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    targets = torch.eye(14)[:8]
    network(frames[part], targets[part])[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])

def rank(i, path, weights):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=i, world_size=2)
    got = gradients(slice(4 * i, 4 * i + 4), weights)
    expected = torch.load(path + ".pt")
    error = (got - expected).abs().max() / expected.abs().max()
    print(f"{error:.1e}", flush=True)
    assert error < 1e-5 and expected.abs().max() > 0.01
    dist.destroy_process_group()

if __name__ == "__main__":
    for i, weights in enumerate((None, torch.linspace(0.2, 2, 14))):
        path = os.path.abspath(str(i))
        torch.save(gradients(slice(0, 8), weights), path + ".pt")
        mp.spawn(rank, (path, weights), nprocs=2)
"""


@pytest.mark.slow
def test_two_devices_give_the_gradients_of_one(tmp_path):
    """Each device has half of the batch; batch norm is frozen. With class weights, the halves have different sums of weights."""
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "two_ranks.py"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    assert len(re.findall(r"\de-\d\d", done.stdout)) == 4  # two processes, two losses


ELSEWHERE = """
import os
if os.environ["RANK"] == "1":  # as on another machine, without the checkpoint
    options["output"] += " elsewhere"
"""


@pytest.mark.slow
def test_two_devices_resume_bit_for_bit(videos, tmp_path):
    options = {**SMALL, **LONG, "accumulate": 1, "log_interval": 1, "data": str(videos)}
    in_processes({**options, "output": str(tmp_path / "whole")}, 2)
    options["output"] = str(tmp_path / "killed")
    assert in_processes(options, 2, before=KILL, check=False).returncode != 0
    assert torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["progress"]["step"] == 4
    in_processes({**options, "resume": True}, 2, before=ELSEWHERE)
    assert not (tmp_path / "killed elsewhere").exists()
    lines = [without_times(metrics(tmp_path / run)) for run in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (tmp_path / "killed" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_bad_files_of_all_devices_are_counted(videos, tmp_path):
    """Five of 25 files are bad. Neither of the two processes meets more than max_bad alone, but both together do."""
    for i in range(20):
        source = sorted((videos / "train").rglob("*.mp4"))[i % 12]
        (tmp_path / "train" / source.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / "train" / source.parent.name / f"{i}.mp4")
    for i in range(5):
        (tmp_path / "train" / CLASSES[0] / f"bad {i}.mp4").write_bytes(b"bad")
    options = {**SMALL, "data": str(tmp_path / "train"), "val_fraction": 0, "epochs": 1, "batch_size": 2, "max_bad": 0.17}
    done = in_processes({**options, "output": str(tmp_path / "run")}, 2, check=False)
    assert done.returncode != 0
    assert re.search("TooManyBadFilesError: .*5 of 25 videos", done.stderr)


FACTS_OF_RANK_0 = """
import os
if os.environ["RANK"] == "1":  # whose files may differ, and with them its plan
    loop.facts_of = None
"""


@pytest.mark.slow
def test_two_devices_train_like_one(videos, tmp_path):
    options = {**SMALL, "model_args": {"base_channels": 4, "drop_rate": 0.0}, "freeze": "bn", "data": str(videos)}
    options |= {"epochs": 2, "log_interval": 2, "optimizer": "sgd", "lr": 0.1, "class_weights": True}
    in_processes({**options, "batch_size": 3, "output": str(tmp_path / "two")}, 2, before=FACTS_OF_RANK_0)
    in_processes({**options, "batch_size": 6, "output": str(tmp_path / "one")})
    in_processes({**options, "batch_size": 2, "accumulate": 3, "output": str(tmp_path / "passes")})
    one, two, passes = (without_times(metrics(tmp_path / run)) for run in ("one", "two", "passes"))
    for other in (two, passes):
        for a, b in zip(one, other, strict=True):
            assert b == pytest.approx(a, rel=1e-4)
    start, end = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(start[name], end[name], atol=1e-5) for name in start)


# Options


@pytest.mark.parametrize("freeze", ["none", "bn", "backbone"])
def test_freezing(videos, tmp_path, freeze):
    torch.manual_seed(5)
    tpn.save_pretrained(tpn.create_model("tpn_slowonly_tiny_motion", base_channels=4), tmp_path / "start")
    options = {"model": f"local-dir:{tmp_path / 'start'}", "model_args": {}, "weights": None}
    fit(videos, tmp_path / "end", epochs=1, freeze=freeze, **options)
    before, after = weights(tmp_path / "start"), weights(tmp_path / "end")
    changed = {name for name in before if before[name].shape == after[name].shape and not torch.equal(before[name], after[name])}
    statistics = {name for name in changed if "running" in name or "num_batches" in name}
    assert bool(statistics) == (freeze != "bn")
    assert any(name.startswith("backbone.") for name in changed) == (freeze != "backbone")
    assert any(name.startswith("neck.") for name in changed - statistics)


@pytest.mark.parametrize(
    "options",
    [
        {"aux_weight": 0.0},
        {"amp": "bfloat16", "ema": 0.9, "layer_decay": 0.8},
        # deterministic fills uninitialized memory with NaN
        {"amp": "float16", "channels_last": False, "clip_grad": 0.0, "optimizer": "sgd", "deterministic": True},
        {"schedule": "multistep", "milestones": (1,), "accumulate": 2, "batch_size": 2, "warmup": 0.0},
    ],
)
def test_options(videos, tmp_path, options):
    try:
        fit(videos, tmp_path, epochs=2, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    lines = steps(tmp_path)
    assert len(lines) == 6
    assert all(0 < line["loss"] < 20 for line in lines)
    if "milestones" in options:
        assert [line["lr"] for line in lines] == pytest.approx([0.01] * 3 + [0.001] * 3)
    if "ema" in options:
        saved, parts = weights(tmp_path), torch.load(tmp_path / "checkpoint.pt")["parts"]
        assert all(torch.equal(value, parts["ema"][name]) for name, value in saved.items())
        assert not torch.equal(saved["head.fc.weight"], parts["model"]["head.fc.weight"])
    if "aux_weight" in options:
        assert lines[0]["loss"] == pytest.approx(1.1, abs=0.2)  # ln 3, not 1.5 ln 3


@pytest.fixture(scope="module")
def plain(videos, tmp_path_factory):
    """Return the metrics of an epoch without options."""
    folder = tmp_path_factory.mktemp("plain")
    fit(videos, folder, epochs=1)
    return steps(folder)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("balanced", True), ("label_smoothing", 0.1), ("layer_decay", 0.5), ("target_fps", 12.0), ("frame_interval", 1)),
        *(("crop_area", (0.9, 1.0)), ("flip_prob", 0.0), ("color_jitter", False), ("clip_grad", 0.1), ("weight_decay", 2.0)),
        *(("freeze", "bn"), ("seed", 1), ("backbone_lr", 0.1), ("class_weights", True), ("mixup", 0.8), ("cutmix", 1.0)),
        *(("rand_augment", 9), ("random_erasing", 1.0)),
    ],
)
def test_an_option_changes_something(videos, tmp_path, plain, option, value):
    data = videos
    if option == "class_weights":  # without effect on classes of one size
        shutil.copytree(videos, tmp_path / "data")
        extra = next((tmp_path / "data" / "train" / "blinking").iterdir())
        shutil.copy(extra, extra.with_name("again.mp4"))
        data = tmp_path / "data"
    fit(data, tmp_path / "run", epochs=1, **{option: value})
    lines = steps(tmp_path / "run")
    assert [line["loss"] for line in lines] != [line["loss"] for line in plain]
    assert lines[0]["lr"] == pytest.approx(plain[0]["lr"])  # with layer_decay, that of the classifier


@pytest.mark.parametrize(
    "option", [{"checkpointing": True}, {"channels_last": False}, {"compile": True}, {"deterministic": True}]
)
def test_an_option_does_not_change_the_result(videos, tmp_path, plain, monkeypatch, option):
    compiled, original = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or original(net, backend="eager"))  # no C++ compiler
    try:
        fit(videos, tmp_path, epochs=1, **option)
    finally:
        torch.use_deterministic_algorithms(False)
    lines = steps(tmp_path)
    if "channels_last" in option:  # sums have another order; small batches and steps magnify the difference
        lines, plain = lines[0]["loss"], pytest.approx(plain[0]["loss"], rel=1e-5)
    assert lines == plain
    assert len(compiled) == ("compile" in option)


COMMON = {"lr": 0.01, "schedule": "multistep", "optimizer": "sgd", "momentum": 0.9, "aux_weight": 0.5, "lr_batch": 64}


def test_recipes():
    expected = {"model": "tpn_tsm_r50_sthv1", "weights": "backbone", "epochs": 9, "weight_decay": 5e-4, "clip_grad": 20}
    config = TrainConfig.of("sthv1-tsm", epochs=9)
    assert {name: getattr(config, name) for name in COMMON | expected} == COMMON | expected
    for recipe in ("k400-scratch", "k400-in1k"):
        start = {"k400-scratch": "random", "k400-in1k": "backbone"}[recipe]
        expected = {"model": "tpn_slowonly_r50_k400", "weights": start, "epochs": 150, "weight_decay": 1e-4, "clip_grad": 40}
        expected |= {"milestones": (75, 125), "flip_prob": 0.5, "crop_area": (0.08, 1), "frame_interval": None}
        config = TrainConfig.of(recipe)
        assert {name: getattr(config, name) for name in COMMON | expected} == COMMON | expected


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_leaves_nothing_about_learning_to_the_plan(videos, tmp_path, recipe):
    overrides = {name: SMALL[name] for name in ("crop_size", "short_side", "workers", "threads", "batch_size")}
    overrides |= {"model": "tpn_slowonly_tiny_motion", "weights": "random"}
    result = train(videos, output=tmp_path, recipe=recipe, dry_run=True, **overrides)
    of_recipe = {line.name for line in result.plan if line.reason == f"recipe {recipe}"}
    given = {line.name for line in result.plan if line.reason == "given"}
    assert of_recipe | given >= RECIPES[recipe].keys()
    assert {line.name for line in result.plan} - RECIPES[recipe].keys() <= {"workers", "threads", "amp"}
    assert result.model.input_spec.frame_interval == 2
    assert result.model.input_spec.num_clips == 3
