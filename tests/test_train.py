"""`examples/train.py`: its options, its files, and that an interrupted run gives the same result."""

import json
import re
import shutil

import pytest
import torch
from scripts import call_example, example, run_example
from servers import run_python
from videos import write_video

import tpn
from tpn.predict import VideoClassifier
from tpn.video import motion
from tpn.video.datasets import TooManyBadFilesError

CLASSES = ("moving left", "turning clockwise", "blinking")
SMALL = ["--model", "tpn_slowonly_tiny_motion", "--model-args", '{"base_channels": 4, "drop_rate": 0.2}', "--crop-size", "32",
         "--short-side", "36", "--optimizer", "adamw", "--lr", "0.01", "--lr-batch", "4", "--workers", "0", "--log-interval", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return a folder with three classes of four short videos for training, and of two for validation."""
    root = tmp_path_factory.mktemp("motion")
    for part, clips, seed in (("train", 4, 1), ("val", 2, 2)):
        motion.write_dataset(root / "all" / part, clips, seed=seed, num_frames=34)
        for name in CLASSES:
            shutil.copytree(root / "all" / part / name, root / part / name)
    return root


def train(videos, output, *args, small=SMALL):
    example("train").main([*small, "--train", str(videos / "train"), "--output", str(output), *map(str, args)])
    return metrics(output)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(lines):
    return [{k: v for k, v in line.items() if k not in ("clips_per_s", "data_wait")} for line in lines]


def weights(folder):
    return tpn.create_model(f"local-dir:{folder}").state_dict()


def test_training_writes_metrics_and_models(videos, tmp_path, capsys):
    lines = train(
        videos, tmp_path, "--val", videos / "val", "--epochs", 3, "--batch-size", 4, "--warmup", 1, "--lr", 0.04, "--lr-batch", 16
    )
    printed = capsys.readouterr().out
    assert "12 videos, 3 classes, 3 steps per epoch, float32 on cpu" in printed
    assert "4 clips per step: 4 x 1 forward passes x 1 devices" in printed
    assert "learning rate 0.01, scaled from 0.04 for 16 clips per step" in printed
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert steps[0]["lr"] == pytest.approx(0.0001)  # warm-up
    assert steps[3]["lr"] > steps[8]["lr"] > 0
    assert all(line["clips_per_s"] > 0 and 0 <= line["data_wait"] <= 1 and line["grad_norm"] > 0 for line in steps)
    validations = [line for line in lines if "val_loss" in line]
    assert [(line["step"], line["val_top5"]) for line in validations] == [(3, 100), (6, 100), (9, 100)]

    for folder in (tmp_path, tmp_path / "best"):
        model = tpn.create_model(f"local-dir:{folder}")
        assert model.labels == tuple(sorted(CLASSES))
        assert model.input_spec.crop_size == 32
        assert model.input_spec.flip_label_pairs == ()
    video = next((videos / "val").rglob("*.mp4"))
    assert {name for name, _ in VideoClassifier(model)(video).top(5)} == set(CLASSES)


def test_a_loaded_classifier_and_the_order_of_its_classes_are_kept(videos, tmp_path, capsys):
    options = ["--model", "tpn_slowonly_tiny_motion", "--pretrained", *SMALL[4:]]
    train(videos / "all", tmp_path, "--epochs", 1, "--batch-size", 8, small=options)
    assert "untrained" not in capsys.readouterr().out
    model = tpn.create_model(f"local-dir:{tmp_path}")
    assert model.labels == motion.CLASSES != tuple(sorted(motion.CLASSES))
    assert model.input_spec.flip_label_pairs == motion.MIRRORED


@pytest.mark.parametrize("loaded", [True, False], ids=["saved model", "no weights"])
def test_replacing_a_loaded_classifier_is_printed(videos, tmp_path, capsys, loaded):
    """The list's numeric labels are fewer than the model's 14 classes."""
    model = tpn.create_model("tpn_slowonly_tiny_motion", base_channels=4)
    tpn.save_pretrained(model, tmp_path / "start")
    files = sorted((videos / "train").rglob("*.mp4"))
    (tmp_path / "list.txt").write_text("".join(f"{file.relative_to(videos)} {i % 3}\n" for i, file in enumerate(files)))
    options = ["--model", f"local-dir:{tmp_path / 'start'}", *SMALL[4:]] if loaded else SMALL
    options = [*options, "--train", tmp_path / "list.txt", "--root", videos, "--epochs", 1, "--batch-size", 4]
    example("train").main([*map(str, options), "--output", str(tmp_path / "run")])
    printed = [line for line in capsys.readouterr().out.splitlines() if "untrained" in line]
    assert len(printed) == loaded
    for line in printed:
        assert re.search(r"\b3 classes.*\b14\b.*\bhead\.fc\b.*\baux_head\.fc\b", line)
    assert tpn.create_model(f"local-dir:{tmp_path / 'run'}").labels == ("class 0", "class 1", "class 2")


KILL = """
import os, signal, torch
from tpn import training
class Log(training.MetricsLog):
    def write(self, step, values):
        super().write(step, values)
        if step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
training.MetricsLog = Log
"""
KILL_WHILE_WRITING = """
import os, signal, torch
original, count = torch.save, 0
def save(content, path):
    global count
    count += 1
    original(content, path)
    if count == 3:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
"""


@pytest.mark.parametrize(
    ("kill", "step"),
    [
        pytest.param(KILL, 4, id="within an epoch"),
        pytest.param(KILL_WHILE_WRITING, 3, id="while a checkpoint is written", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(videos, tmp_path, kill, step):
    """The run has two epochs of three steps; it writes checkpoints and metrics at every second step and after every epoch."""
    args = [*SMALL, "--train", videos / "train", "--val", videos / "val"]
    args += [
        "--log-interval",
        "2",
        "--workers",
        "1",
        "--epochs",
        "2",
        "--batch-size",
        "2",
        "--accumulate",
        "2",
        "--ema",
        "0.9",
        "--checkpoint-interval",
        "2",
    ]
    run_example("train", *args, "--output", tmp_path / "whole")
    args += ["--output", tmp_path / "killed"]
    done = run_example("train", *args, before=kill, check=False)
    assert done.returncode < 0
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["progress"]["step"] == step
    again = call_example("train", *args)
    assert again.returncode == 1
    assert re.fullmatch(rf"error: {re.escape(str(tmp_path / 'killed'))} .*--resume auto.*\n", again.stderr)
    run_example("train", *args, "--resume", "auto")
    lines = [without_times(metrics(tmp_path / run)) for run in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 6
    for file in ("model.safetensors", "best/model.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()


def test_other_settings_are_refused_on_resume(videos, tmp_path):
    args = ["--epochs", 1, "--batch-size", 4]
    train(videos, tmp_path, *args)
    with pytest.raises(ValueError, match=r"checkpoint\.pt.*settings: seed=0, now 1"):
        train(videos, tmp_path, *args, "--seed", 1, "--resume", "auto")
    before = (tmp_path / "model.safetensors").read_bytes()
    train(videos, tmp_path, *args, "--resume", "auto", "--workers", 1)
    assert (tmp_path / "model.safetensors").read_bytes() == before


TWO_RANKS = """
import os
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
import tpn
from scripts import example
from tpn.models.layers import freeze_batch_norm

def gradients(part, weights):
    torch.manual_seed(0)
    model = tpn.create_model("tpn_slowonly_tiny_motion", base_channels=8, drop_rate=0.0)
    loss = example("train").TrainingLoss(model, weights=weights)
    network = DistributedDataParallel(loss) if dist.is_initialized() else loss
    freeze_batch_norm(model.train())
    frames = torch.randint(256, (8, 16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(8)
    network(frames[part], labels[part])[0].backward()
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


def test_two_devices_give_the_gradients_of_one(tmp_path):
    """Each device has half of the batch; batch norm is frozen. With class weights, the halves have different sums of weights."""
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)
    printed, _ = run_python("import runpy; runpy.run_path('two_ranks.py', run_name='__main__')", tmp_path, OMP_NUM_THREADS="1")
    assert len(re.findall(r"\de-\d\d", printed)) == 4  # two processes, two losses


ELSEWHERE = """
import os
if os.environ["RANK"] == "1":  # as on another machine, without the checkpoint
    sys.argv[sys.argv.index("--output") + 1] += " elsewhere"
"""


@pytest.mark.slow
def test_two_devices_resume_bit_for_bit(videos, tmp_path):
    args = [*SMALL, "--train", videos / "train", "--val", videos / "val", "--epochs", 2, "--batch-size", 2, "--workers", 1]
    args += ["--ema", 0.9, "--checkpoint-interval", 2]
    run_example("train", *args, "--output", tmp_path / "whole", processes=2)
    args += ["--output", tmp_path / "killed"]
    done = run_example("train", *args, before=KILL, processes=2, check=False)
    assert done.returncode != 0
    assert torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["progress"]["step"] == 4
    run_example("train", *args, "--resume", "auto", before=ELSEWHERE, processes=2)
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
    args = [*SMALL, "--train", tmp_path / "train", "--epochs", 1, "--batch-size", 2, "--output", tmp_path / "run"]
    done = run_example("train", *args, "--max-bad", 0.17, processes=2, check=False)
    assert done.returncode != 0
    assert re.search("error: .*5 of 25 videos", done.stderr)
    assert 'train.py", line' not in done.stderr


@pytest.mark.slow
def test_two_devices_train_like_one(videos, tmp_path):
    args = [*SMALL, "--model-args", '{"base_channels": 4, "drop_rate": 0}', "--freeze", "bn", "--train", videos / "train"]
    args += ["--val", videos / "val", "--epochs", 2, "--log-interval", 2, "--optimizer", "sgd", "--lr", 0.1, "--class-weights"]
    run_example("train", *args, "--batch-size", 3, "--output", tmp_path / "two", processes=2)
    run_example("train", *args, "--batch-size", 6, "--output", tmp_path / "one")
    run_example("train", *args, "--batch-size", 2, "--accumulate", 3, "--output", tmp_path / "passes")
    one, two, passes = (without_times(metrics(tmp_path / run)) for run in ("one", "two", "passes"))
    for other in (two, passes):
        for a, b in zip(one, other, strict=True):
            assert b == pytest.approx(a, rel=1e-4)
    start, end = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(start[name], end[name], atol=1e-5) for name in start)


@pytest.mark.parametrize("freeze", ["none", "bn", "backbone"])
def test_freezing(videos, tmp_path, freeze):
    torch.manual_seed(5)
    model = tpn.create_model("tpn_slowonly_tiny_motion", base_channels=4)
    tpn.save_pretrained(model, tmp_path / "start")
    small = ["--model", f"local-dir:{tmp_path / 'start'}", *SMALL[4:]]
    train(videos, tmp_path / "end", "--epochs", 1, "--batch-size", 4, "--freeze", freeze, small=small)
    before, after = weights(tmp_path / "start"), weights(tmp_path / "end")
    changed = {name for name in before if before[name].shape == after[name].shape and not torch.equal(before[name], after[name])}
    statistics = {name for name in changed if "running" in name or "num_batches" in name}
    assert bool(statistics) == (freeze != "bn")
    assert any(name.startswith("backbone.") for name in changed) == (freeze != "backbone")
    assert any(name.startswith("neck.") for name in changed - statistics)


@pytest.mark.parametrize(
    "options",
    [
        "--aux-weight 0",
        "--amp bfloat16 --ema 0.9 --layer-decay 0.8",
        "--amp float16 --no-channels-last --clip-grad 0 --optimizer sgd --deterministic",  # fills uninitialized memory with NaN
        "--schedule multistep --milestones 1 --accumulate 2 --batch-size 2",
    ],
)
def test_options(videos, tmp_path, options):
    try:
        lines = train(videos, tmp_path, "--epochs", 2, "--batch-size", 4, *options.split())
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(lines) == 6
    assert all(0 < line["loss"] < 20 for line in lines)
    rates = [line["lr"] for line in lines]
    if "multistep" in options:
        assert rates == pytest.approx([0.01] * 3 + [0.001] * 3)
    if "--ema" in options:
        saved, parts = weights(tmp_path), torch.load(tmp_path / "checkpoint.pt")["parts"]
        assert all(torch.equal(value, parts["ema"][name]) for name, value in saved.items())
        assert not torch.equal(saved["head.fc.weight"], parts["model"]["head.fc.weight"])
    if "--aux-weight" in options:
        assert lines[0]["loss"] == pytest.approx(1.1, abs=0.2)  # ln 3, not 1.5 ln 3


@pytest.fixture(scope="module")
def plain(videos, tmp_path_factory):
    """Return the metrics of two epochs without options."""
    return without_times(train(videos, tmp_path_factory.mktemp("plain"), "--epochs", 2, "--batch-size", 4))


CHANGES = """--balanced, --label-smoothing 0.1, --layer-decay 0.5, --target-fps 12, --frame-interval 1, --crop-area 0.9 1,
    --flip-prob 0, --no-color-jitter, --clip-grad 0.1, --weight-decay 2, --freeze bn, --seed 1"""


@pytest.mark.parametrize("option", re.split(r",\s+", CHANGES))
def test_an_option_changes_something(videos, tmp_path, plain, option):
    lines = without_times(train(videos, tmp_path, "--epochs", 2, "--batch-size", 4, *option.split()))
    assert [line["loss"] for line in lines] != [line["loss"] for line in plain]
    assert lines[0]["lr"] == pytest.approx(plain[0]["lr"])  # with --layer-decay, that of the classifier


@pytest.mark.parametrize("option", ["--checkpointing", "--no-channels-last", "--compile", "--deterministic"])
def test_an_option_does_not_change_the_result(videos, tmp_path, plain, monkeypatch, option):
    compiled, original = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or original(net, backend="eager"))  # no C++ compiler
    try:
        lines = without_times(train(videos, tmp_path, "--epochs", 2, "--batch-size", 4, option))
    finally:
        torch.use_deterministic_algorithms(False)
    if option == "--no-channels-last":  # sums have another order; small batches and steps magnify the difference
        lines, plain = lines[0]["loss"], pytest.approx(plain[0]["loss"], rel=1e-5)
    assert lines == plain
    assert len(compiled) == (option == "--compile")


def test_class_weights_reach_the_loss(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(example("train"), "class_weights", lambda labels, num_classes: torch.zeros(num_classes))
    for options, expected in (([], False), (["--class-weights"], True)):
        lines = train(videos, tmp_path / str(expected), "--epochs", 1, "--batch-size", 4, *options)
        assert (lines[0]["loss"] == 0) is expected


COMMON = {"lr": 0.01, "schedule": "multistep", "optimizer": "sgd", "momentum": 0.9, "aux_weight": 0.5}


def test_recipes():
    def values(name, *options):
        args = vars(example("train").parse_args(["--train", "a", "--output", "b", "--recipe", name, *options]))
        return {key: args[key] for key in COMMON | expected}

    expected = {"model": "tpn_tsm_r50_sthv1", "imagenet": True, "epochs": 9, "weight_decay": 5e-4, "clip_grad": 20}
    expected |= {"milestones": [75, 125]}
    assert values("sthv1-tsm", "--epochs", "9") == COMMON | expected
    for name in ("k400-scratch", "k400-in1k"):
        expected = {"model": "tpn_slowonly_r50_k400", "imagenet": name == "k400-in1k", "epochs": 150, "weight_decay": 1e-4}
        expected |= {"clip_grad": 40, "lr_batch": 64, "flip_prob": 0.5, "crop_area": [0.08, 1]}
        assert values(name) == COMMON | expected


def test_bad_files_are_replaced_and_listed(videos, tmp_path, capsys):
    shutil.copytree(videos / "train", tmp_path / "train")
    (tmp_path / "train" / "blinking" / "broken.mp4").write_bytes(b"not a video")
    train(tmp_path, tmp_path / "run", "--epochs", 1, "--batch-size", 4, "--max-bad", 0.1)
    assert "1 unreadable videos were replaced" in capsys.readouterr().out
    assert (tmp_path / "run" / "bad_files.txt").read_text().split("\t")[0].endswith("blinking/broken.mp4")
    with pytest.raises(TooManyBadFilesError, match=r"1 of 13 .*max_bad.*0\.05"):
        train(tmp_path, tmp_path / "strict", "--epochs", 1, "--batch-size", 4)


def test_errors_are_one_line(videos, tmp_path):
    shutil.copytree(videos / "train", tmp_path / "train")
    for i in range(3):
        (tmp_path / "train" / "blinking" / f"broken {i}.mp4").write_bytes(b"not a video")
    args = [*SMALL, "--train", tmp_path / "train", "--batch-size", 4, "--epochs", 1, "--output", tmp_path / "run"]
    done = run_example("train", *args, "--workers", 2, check=False)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("skipped")]
    assert re.match(r"error: .*[123] of 15 videos", errors[0])  # each loader process may have met another one
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--batch-size", "13"], ValueError, "12 videos.*13 clips.*--batch-size"),
        (["--lr", "1e30", "--epochs", "3", "--log-interval", "100"], FloatingPointError, "loss is nan.*--lr"),
        (["--model", "tpn_slowonly_r5"], ValueError, "tpn_slowonly_r5"),
        (["--val", "nowhere"], FileNotFoundError, "nowhere"),
        (["--crop-size", "64"], ValueError, "crop_size.*short_side=36.*64"),
        (["--device", "gpu"], ValueError, "device.*'gpu'"),
        (["--pretrained", "--imagenet"], ValueError, "pretrained"),
    ],
)
def test_errors(videos, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        train(videos, tmp_path, "--batch-size", 4, *options)


def test_numeric_labels_keep_the_names_of_the_models_classes(tmp_path):
    """The list has as many numeric labels as the model has classes."""
    for i in range(2):
        write_video(tmp_path / f"{i}.mp4", num_frames=9)
    (tmp_path / "list.txt").write_text("".join(f"{i % 2}.mp4 {i}\n" for i in range(14)))
    args = [*SMALL, "--train", str(tmp_path / "list.txt"), "--output", str(tmp_path / "run"), "--epochs", "1"]
    example("train").main(args)
    assert tpn.create_model(f"local-dir:{tmp_path / 'run'}").labels == motion.CLASSES
