"""`tpn train`: its options, what it prints, its files, and how it reports faults."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.run
import typer
from forks import run_forked
from rich.console import Console
from scripts import ROOT, call
from terminal import run_in_terminal, screen

import tpn
from tpn import cli
from tpn.cli.commands import app
from tpn.cli.script import run_cli
from tpn.training import loop, wording
from tpn.training.console import MAX_LINES, TrainingConsole
from tpn.training.observer import Interrupted
from tpn.training.plan import PlanLine
from tpn.video.datasets import TooManyBadFilesError

CLASSES = ("blinking", "moving left", "turning clockwise")
SMALL = ["--model", "tpn_slowonly_tiny_motion", "--weights", "random", "--model-args", '{"base_channels": 4}', "--crop-size", "32",
         "--short-side", "36", "--batch-size", "4", "--workers", "0", "--threads", "1", "--log-interval", "1", "--val-interval", "1"]  # fmt: skip


def tpn_train(*args):
    return call(cli.main, "tpn", "train", *args)


@pytest.fixture
def given(monkeypatch):
    """The arguments with which the command calls `train`, which does nothing."""
    calls = []
    monkeypatch.setattr(loop, "train", lambda *args, **kwargs: calls.append((args, kwargs)))
    return calls


@pytest.fixture
def command():
    return typer.main.get_command(app).commands["train"]


def test_options_are_the_fields_of_the_config(command):
    options = {option.name: option for option in command.params if not option.hidden}
    names = {field.name for field in dataclasses.fields(tpn.TrainConfig)}
    assert options.keys() - names == {"data", "output", "resume", "dry_run"}
    for field in dataclasses.fields(tpn.TrainConfig):
        option = options[field.name]
        assert option.opts[0] == f"--{field.name.replace('_', '-')}"
        assert option.help.startswith(field.metadata["help"])
        assert option.rich_help_panel == field.metadata["group"]
        assert option.default is None
    assert options["clip_grad"].help.endswith("Default: 40.0.")


def test_torchrun_passes_every_option_on(command):
    """Its parser takes an option for its own if the option is the beginning of several of its own ones, wherever it stands."""
    flags = [flag for option in command.params for flag in option.opts + option.secondary_opts if flag.startswith("--")]
    parser = torch.distributed.run.get_args_parser()
    refused = []
    for flag in flags:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parser, "error", refused.append)
            parser.parse_args(["-m", "tpn", "train", "videos", flag, "x"])
    assert not refused


def test_help_is_readable_in_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = tpn_train("--help").stdout
    assert "…" not in text
    lines = text.splitlines()
    assert [re.search(r"─ (\w+) ─", line)[1] for line in lines if "╭" in line] == [
        "Arguments", "Options", *dict.fromkeys(field.metadata["group"] for field in dataclasses.fields(tpn.TrainConfig))
    ]  # fmt: skip


def test_options_have_the_types_of_the_fields(given, tmp_path):
    done = tpn_train(tmp_path, "-o", "out", "--steps", 5, "--lr", 0.1, "--crop-area", 0.4, 1, "--milestones", "3,4", "--no-color-jitter",
                     "--compile", "--model-args", '{"depth": 18}', "--schedule", "multistep", "--freeze", "bn", "--group", "(a)")  # fmt: skip
    assert done.returncode == 0, done.stderr
    ((data,), options) = given[0]
    assert data == str(tmp_path)
    assert {name: value for name, value in options.items() if name not in ("output", "resume", "dry_run")} == {
        "steps": 5,
        "lr": 0.1,
        "crop_area": (0.4, 1.0),
        "milestones": (3, 4),
        "color_jitter": False,
        "compile": True,
        "model_args": {"depth": 18},
        "schedule": "multistep",
        "freeze": "bn",
        "group": "(a)",
    }
    assert (str(options["output"]), options["resume"], options["dry_run"]) == ("out", False, False)


def test_what_is_not_given_is_not_passed(given, tmp_path):
    """So that recipes and the plan decide."""
    tpn_train(tmp_path, "-o", "out", "--recipe", "motion", "--resume", "--dry-run", "--no-keep-classes")
    assert given[0][1] == {
        "output": given[0][1]["output"],
        "recipe": "motion",
        "resume": True,
        "dry_run": True,
        "keep_classes": False,
    }


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--schedule", "linear"], 2, "linear.*cosine.*multistep"),
        (["--model-args", "{depth"], 2, "JSON.*{depth"),
        (["--model-args", "[1]"], 2, r"JSON object.*\[1\]"),
        (["--milestones", "a,b"], 2, "integers.*a,b"),
        (["--recipe", "k600"], 2, "k600.*k400-scratch"),
        (["--steps", "0"], 1, "steps.*0"),
        (["--steps", "1", "--epochs", "1"], 1, "steps=1.*epochs=1"),
        (["--model", "tpn_slowonly_r5"], 1, "tpn_slowonly_r5"),
    ],
)
def test_wrong_values(videos, tmp_path, args, code, message):
    done = tpn_train(videos, "-o", tmp_path / "out", *args)
    assert done.returncode == code
    assert re.search(message, " ".join(done.stderr.replace("│", "").split()))
    if code == 1:
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_missing_data_is_reported_before_the_model_is_loaded(tmp_path):
    done = tpn_train("nowhere", "-o", tmp_path / "out", "--model", "nonsense")
    assert (done.returncode, done.stderr) == (1, "error: nowhere: No such file or directory\n")


def test_a_run(videos, tmp_path):
    out = tmp_path / "my run"
    done = tpn_train(videos, "-o", out, *SMALL, "--epochs", 2, "--flip-prob", 0)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"data +12 videos for training, 6 for validation \(the folders train and val\)", lines[0])
    assert re.fullmatch(r"3 classes +blinking 4, moving left 4, turning clockwise 4", lines[1])
    assert re.fullmatch(r"start +random weights", lines[3])
    assert re.fullmatch(r"length +6 steps of 4 clips, 2 epochs, on cpu", lines[4])
    assert any(re.fullmatch(r"batch-size +4 +given", line) for line in lines)
    assert any(re.fullmatch(r"frame-interval +2 +\S.*", line) for line in lines)
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split(":")[0] for line in steps] == [f"step {i} of 6, epoch {1 + i // 4}" for i in range(1, 7)]
    assert all(re.search(r"loss \d\.\d+, top-1 [\d.]+%, [\d.e+]+ clips/s, \d+ s left", line) for line in steps[:-1])
    validations = [line for line in lines if line.startswith("validation at step ")]
    assert [line.split(":")[0] for line in validations] == ["validation at step 3, epoch 1", "validation at step 6, epoch 2"]
    assert "(best so far)" in validations[0]
    assert f"tpn predict VIDEO --model '{out}'" in lines[-1]
    model = lines[-1].split("--model ")[1]
    assert tpn.create_model(*shlex.split(model)).labels == CLASSES
    report = (out / "report.html").read_text()
    assert all(f"<h2>{name}</h2>" in report for name in ("Curves", "Confusion matrix", "Classes", "Mistakes", "Plan"))
    again = tpn_train(videos, "-o", out, *SMALL, "--epochs", 2)
    assert again.returncode == 1
    assert re.fullmatch(rf"error: {re.escape(str(out))} .*--resume.*\n", again.stderr)


@pytest.mark.parametrize(("steps", "epochs"), [(3, "1 epoch"), (4, "1.3 epochs"), (6000, "2,000 epochs")])
def test_length_in_epochs(videos, tmp_path, steps, epochs):
    done = tpn_train(videos, "-o", tmp_path / "out", *SMALL, "--steps", steps, "--dry-run")
    assert f" of 4 clips, {epochs}, on cpu\n" in done.stdout


def test_dry_run_shows_the_plan_and_trains_nothing(videos, tmp_path):
    done = tpn_train(videos, "-o", tmp_path / "out", *SMALL, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "12 videos for training" in done.stdout
    assert re.search(r"^batch-size +4 +given$", done.stdout, re.MULTILINE)
    assert "step 1 of" not in done.stdout
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_python_prints_the_same(videos, tmp_path, capsys):
    options = {"model": "tpn_slowonly_tiny_motion", "weights": "random", "model_args": {"base_channels": 4}, "crop_size": 32}
    options |= {"short_side": 36, "steps": 1, "batch_size": 4, "workers": 0, "threads": 1, "val_interval": 1}
    result = tpn.train(videos, output=tmp_path / "loud", **options)
    assert "12 videos for training" in capsys.readouterr().out
    assert isinstance(result, tpn.TrainResult)
    tpn.train(str(videos), output=tmp_path / "quiet", verbose=False, **options)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_terminal_shows_a_bar_for_each_epoch(videos, tmp_path):
    code, _, text = run_in_terminal("train", videos, "-o", "out", *SMALL, "--epochs", 2, cwd=tmp_path, columns=120)
    assert code == 0, text
    for step in (1, 2, 3):
        assert re.search(rf"epoch 2 .*{step}/3.* loss ", text)
    lines = screen(text, 120)
    assert not any(line.startswith("epoch 2") for line in lines)  # the bar is gone
    assert sum(line.startswith("validation at step") for line in lines) >= 1


def worker_error():
    """The error of a data loader whose process was killed."""

    class Dataset(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        next(iter(torch.utils.data.DataLoader(Dataset(), num_workers=1)))
    except RuntimeError as error:
        return error


def bad_files_error():
    """The error of a data loader whose process met too many bad files."""

    class Dataset(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise TooManyBadFilesError("2 of 3 videos cannot be read:\n  a.mp4: the file is empty")

    try:
        next(iter(torch.utils.data.DataLoader(Dataset(), num_workers=1)))
    except TooManyBadFilesError as error:
        return error


def full_disk_error():
    try:
        with open("/dev/full", "w") as file:
            file.write("x")
    except OSError as error:
        return error


ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
AGAIN = r"tpn train 'my videos' -o out --resume"


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda: Interrupted(signal.SIGTERM, 7), 143, f"stopped by SIGTERM at step 7; continue with: {AGAIN}"),
        (lambda: Interrupted(signal.SIGINT, 7), 130, f"stopped by SIGINT at step 7; continue with: {AGAIN}"),
        (full_disk_error, 1, f"error: No space left on device; free .*: {AGAIN}"),
        (lambda: OSError("m.safetensors: I/O error: No space left on device (os error 28)"), 1,
         f"error: m.safetensors: .*; free .*: {AGAIN}"),
        (lambda: RuntimeError("shm </torch_1>: No space left on device (28)"), 1, f"error: shm .*28.; free .*: {AGAIN}"),
        (worker_error, 1, f"error: .*killed.*--workers: {AGAIN}"),
        (bad_files_error, 1, "error: 2 of 3 videos cannot be read:\n  a.mp4: the file is empty"),
        (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), 1,
         r"error: CUDA out of memory\. Tried to allocate 2\.00 GiB\. .*--batch-size.*"),
        (lambda: FloatingPointError("the gradients are not finite"), 1, "error: the gradients are not finite"),
        (lambda: KeyError("x"), 1, "error: KeyError: .*TPN_DEBUG=1.*"),
    ],
    ids=["SIGTERM", "Ctrl-C", "full disk", "full disk, safetensors", "full shared memory", "killed worker", "bad files", "GPU memory", "not finite", "unexpected"],
)  # fmt: skip
def test_faults_are_one_sentence(monkeypatch, tmp_path, make, code, message):
    error = make()

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(loop, "train", fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my videos").mkdir()
    done = tpn_train("my videos", "-o", "out")
    assert done.returncode == code
    assert re.fullmatch(message + "\n", done.stderr)
    assert tpn_train("my videos", "-o", "out", "--resume").stderr == done.stderr


def test_torchrun_continues_with_torchrun(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise Interrupted(signal.SIGTERM, 7)

    monkeypatch.setattr(loop, "train", fail)
    monkeypatch.setenv("RANK", "0")
    done = tpn_train(tmp_path, "-o", "out")
    assert done.stderr == "stopped by SIGTERM at step 7; continue with: the same torchrun command with --resume\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step_is_one_sentence(monkeypatch, tmp_path, number, code):
    before = signal.getsignal(number)
    monkeypatch.setattr(loop, "train", lambda *args, **kwargs: os.kill(os.getpid(), number))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my videos").mkdir()
    done = tpn_train("my videos", "-o", "out")
    assert done.returncode == code
    assert re.fullmatch(f"stopped by {number.name}; continue with: {AGAIN}\n", done.stderr)
    assert signal.getsignal(number) == before


def test_interrupted_imports(tmp_path):
    """Python lists the imports on standard error, and the signal arrives after those of PyTorch have begun."""
    command = [sys.executable, "-X", "importtime", "-m", "tpn", "train", str(tmp_path), "-o", "out"]
    with subprocess.Popen(command, cwd=tmp_path, env=ENV, stderr=subprocess.PIPE, text=True) as process:
        while "torch" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == -signal.SIGINT
    assert all(line.startswith("import time:") for line in rest.splitlines()[:-1])  # the last one may be cut off


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_of_a_thread_is_left_to_the_run(monkeypatch, tmp_path):
    """TensorBoard's writer raises the error of its thread."""

    def fail(*args, **kwargs):
        thread = threading.Thread(target=open, args=(tmp_path / "no" / "file",))
        thread.start()
        thread.join()
        raise OSError("a file")

    monkeypatch.setattr(loop, "train", fail)
    assert tpn_train(tmp_path, "-o", "out").stderr == "error: a file\n"


def test_other_errors_of_a_thread_are_reported(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: seen.append(failure.exc_type))

    def fail(*args, **kwargs):
        thread = threading.Thread(target=int, args=("x",))
        thread.start()
        thread.join()

    monkeypatch.setattr(loop, "train", fail)
    assert tpn_train(tmp_path, "-o", "out").returncode == 0
    assert seen == [ValueError]


@pytest.mark.slow
def test_a_terminated_run_continues_with_the_printed_command(videos, tmp_path):
    command = [sys.executable, "-m", "tpn", "train", str(videos), "-o", "out", *SMALL, "--epochs", "6", "--val-interval", "6"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (tmp_path / "out" / "metrics.jsonl").exists() or not (tmp_path / "out" / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 143
    (line,) = stderr.splitlines()
    step = int(re.match(r"stopped by SIGTERM at step (\d+); continue with: tpn train ", line)[1])
    assert 1 <= step < 18
    again = call(cli.main, *shlex.split(line.partition("continue with: ")[2].replace(" out ", f" {tmp_path / 'out'} ")))
    assert again.returncode == 0, again.stderr
    assert f"resuming at step {step} of 18" in again.stdout
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 19))


def torchrun(*args, **kwargs):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, args)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=100, **kwargs)


@pytest.mark.slow
def test_only_the_first_process_prints(videos, tmp_path):
    options = ["--model", "tpn_slowonly_tiny_motion", "--crop-size", 32, "--short-side", 36, "--workers", 0, "--log-interval", 1]
    options += ["--batch-size", 2, "--epochs", 1, "--val-interval", 1, "--device", "cpu"]
    done = torchrun("-m", "tpn", "train", videos, "-o", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    for start in ("data ", "batch-size ", "step 1 of 3", "validation at step 3", "use "):
        assert sum(line.startswith(start) for line in done.stdout.splitlines()) == 1


FAIL = """
import sys, time
import torch.distributed as dist
from tpn.cli.script import run_cli
def main():
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        time.sleep(1)
        raise ValueError("no such class")
    dist.barrier()
run_cli(main)
"""


@pytest.mark.slow
def test_a_process_that_fails_does_not_wait_for_the_others(tmp_path):
    done = run_forked(FAIL, 2, cwd=tmp_path)
    assert done.returncode != 0
    assert "error: no such class\n" in done.stderr
    assert "raise ValueError" not in done.stderr  # no traceback, except that of torchrun


PEER = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5123")


@pytest.mark.parametrize(
    ("error", "left", "message"),
    [
        (None, "group", ""),
        (SystemExit(0), "group", ""),
        (SystemExit(2), 2, ""),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (ValueError("no such class"), 1, "error: no such class\n"),
        (PEER, 1, "error: another process failed; see its message\n"),
    ],
    ids=["done", "exit 0", "exit 2", "Ctrl-C", "error", "peer"],
)
def test_how_a_process_of_several_ends(monkeypatch, capsys, error, left, message):
    """A process that is done leaves the group; others exit at once, because leaving may wait for all processes."""
    calls = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("group"))
    monkeypatch.setattr(os, "_exit", calls.append)

    def main():
        if error is not None:
            raise error

    with contextlib.suppress(SystemExit):
        run_cli(main)
    assert calls == [left]
    assert capsys.readouterr().err == message


def run_of(tmp_path, **changes):
    """A run of 1000 steps, 10 per epoch, as far as the console reads it."""
    run = {
        "step": 0,
        "total_steps": 1000,
        "epoch_steps": 10,
        "best": -1.0,
        "skipped": 0,
        "without_progress": 0,
        "folder": tmp_path,
    }
    run |= {"model": torch.nn.Linear(2, 2), "world": 1, "device": torch.device("cpu"), "batch": 4, "weights": "random"}
    run["model"].num_classes = 2
    run |= {"new_classifier": False, "plan": [PlanLine("lr", 0.1, "given")], "config": tpn.TrainConfig(model="m")}
    run |= {"facts": SimpleNamespace(class_counts=(3, 4)), "data": SimpleNamespace(train=Data(), val=None, split="none")}
    return SimpleNamespace(**(run | changes))


class Data:
    classes, multi_label = ("a\x1b[31m", "[bold]b"), False

    def __len__(self):
        return 7


def console(**options):
    return Console(file=io.StringIO(), highlight=False, markup=False, emoji=False, soft_wrap=True, **options)


def test_the_lines_of_a_long_run_are_few(tmp_path):
    output = console()
    observer, run = TrainingConsole(output), run_of(tmp_path)
    observer.planned(run)
    for run.step in range(1, 1001):
        observer.stepped(run, torch.tensor(1.0))
        observer.logged(run, {"loss": 1.0, "top1": 50.0, "clips_per_s": 8.0})
    lines = output.file.getvalue().splitlines()
    assert MAX_LINES // 2 <= sum(line.startswith("step ") for line in lines) <= MAX_LINES
    assert re.fullmatch(r"2 classes +a\\x1b\[31m 3, \[bold\]b 4", lines[1])


def test_the_bar_is_removed_after_an_error(videos, tmp_path, monkeypatch):
    output = console(force_terminal=True, width=100)

    def fail(run):
        assert "\x1b[?25l" in output.file.getvalue()  # the cursor is hidden
        raise KeyError("x")

    monkeypatch.setattr(loop.Run, "_validate", lambda run: fail(run))
    options = {
        "model": "tpn_slowonly_tiny_motion",
        "weights": "random",
        "crop_size": 32,
        "short_side": 36,
        "workers": 0,
        "val_interval": 1,
    }
    with pytest.raises(KeyError):
        tpn.train(videos, output=tmp_path / "out", observer=TrainingConsole(output), steps=1, batch_size=4, **options)
    assert output.file.getvalue().rindex("\x1b[?25h") > output.file.getvalue().rindex("\x1b[?25l")


def test_the_end_of_a_run(tmp_path):
    output = console()
    (tmp_path / "report.html").touch()
    (tmp_path / "bad_files.txt").touch()
    TrainingConsole(output).finished(run_of(tmp_path, step=300, without_progress=4, skipped=2))
    text = output.file.getvalue()
    assert "stopped at step 300 of 1,000: 4 validations without a better one" in text
    assert re.search(r"^skipped +2 steps", text, re.MULTILINE)
    assert f"{tmp_path}/bad_files.txt" in text
    assert f"{tmp_path}/report.html" in text


def test_words():
    assert [wording.duration(s) for s in (5, 89, 600, 3 * 3600 + 300)] == ["5 s", "89 s", "10 min", "3 h 05 min"]
    assert [wording.plural(*x) for x in ((1, "video"), (1200, "video"), (2, "class"))] == ["1 video", "1,200 videos", "2 classes"]
    assert wording.class_counts([f"c{i}" for i in range(6)], [1, 6, 5, 2, 4, 3], shown=4) == "c1 6, c2 5, … 2 more …, c3 2, c0 1"
    assert [wording.setting(v) for v in (None, True, 0.1 + 0.2, (0.3, 1.0), "a\nb")] == ["-", "yes", "0.3", "0.3, 1", "a\\nb"]
    assert wording.metric("val_loss", float("nan")) == wording.metric("mAP", float("inf")) == "not finite"
    assert wording.printable("日本\u3000語 é 👩‍👩‍👧") == "日本\u3000語 é 👩‍👩‍👧"
