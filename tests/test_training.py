"""Order of the batches, files, checkpoints, metrics: what `examples/train.py` is made of."""

import argparse
import json
import math
import time
from collections import Counter

import pytest
import torch
from torch import nn

from tpn.training import Checkpoint, MetricsLog, RunningMeans, class_weights, epoch_batches, positive_int, whole_file

LABELS = [0] * 13 + [1] * 3 + [2] * 21


def test_class_weights():
    weights = class_weights(LABELS, 4)
    assert weights[torch.tensor(LABELS)].mean().item() == pytest.approx(1)
    assert (weights[0] * 13).item() == pytest.approx((weights[1] * 3).item())


def test_every_video_once():
    (batch,) = epoch_batches(LABELS, 37, seed=1, epoch=0)
    assert sorted(index for index, _ in batch) == list(range(37))
    assert {draw for _, draw in batch} == {0}
    assert epoch_batches(LABELS, 37, seed=1, epoch=0) == [batch]
    assert epoch_batches(LABELS, 37, seed=1, epoch=1) != [batch]
    assert epoch_batches(LABELS, 37, seed=2, epoch=0) != [batch]
    assert epoch_batches(LABELS, 38, seed=1, epoch=0) == []


@pytest.mark.parametrize(("world", "size", "accumulate"), [(1, 6, 1), (2, 3, 1), (3, 2, 1), (1, 2, 3), (3, 1, 2)])
def test_a_step_takes_the_same_videos_however_it_is_divided(world, size, accumulate):
    """37 videos in steps of 6: the last is left out."""
    whole = epoch_batches(LABELS, 6, seed=3, epoch=5)
    parts = [
        epoch_batches(LABELS, size, seed=3, epoch=5, accumulate=accumulate, rank=rank, world_size=world) for rank in range(world)
    ]
    assert len(whole) == 6
    for step, expected in enumerate(whole):
        passes = range(step * accumulate, (step + 1) * accumulate)
        assert sorted(item for part in parts for i in passes for item in part[i]) == sorted(expected)


def test_balanced():
    counts = Counter()
    for epoch in range(60):
        (batch,) = epoch_batches(LABELS, 37, seed=0, epoch=epoch, balanced=True)
        assert len(set(batch)) == 37  # a video that comes twice is drawn in two ways
        counts.update(LABELS[index] for index, _ in batch)
    assert max(counts.values()) < 1.15 * min(counts.values())


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "file.txt"
    with whole_file(path, "w") as file:
        file.write("fïrst")
    with pytest.raises(TypeError), whole_file(path, "w") as file:
        file.write(2)
    assert path.read_text(encoding="utf-8") == "fïrst"
    with whole_file(path) as binary:
        binary.write(b"third")
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_bytes() == b"third"


def test_checkpoint(tmp_path):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    Checkpoint(tmp_path / "c.pt", {"model": model}, {"lr": 0.1, "list": [1, 2]}).save({"step": 7})
    assert Checkpoint(tmp_path / "c.pt", {"model": other}, {"lr": 0.1, "list": [1, 2]}).load() == {"step": 7}
    assert torch.equal(model.weight, other.weight)
    with pytest.raises(ValueError, match=r"c\.pt was written with other settings: list=\[1, 2\], now None; lr=0\.1, now 0\.2"):
        Checkpoint(tmp_path / "c.pt", {"model": other}, {"lr": 0.2}).load()


def test_metrics_go_on_after_the_step_of_a_checkpoint(tmp_path, capsys):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"loss": 0.1 * step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    MetricsLog(tmp_path, 2).write(3, {"loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": 0.5}]
    assert "step 3: loss 0.5" in capsys.readouterr().out


def test_metrics_are_json_whatever_happens(tmp_path):
    MetricsLog(tmp_path).write(1, {"loss": 0.5, "grad_norm": math.inf})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "step": 1,
        "loss": 0.5,
        "grad_norm": None,
    }


def test_running_means():
    means = RunningMeans(torch.device("cpu"))
    means.add(torch.tensor(1.0), torch.tensor([True, False]))
    kept = means.collect()
    means.add(torch.tensor(3.0), torch.tensor([True, True]))
    expected = {"loss": 2, "top1": 75}
    assert means.read() == expected
    means.restore(kept)
    means.add(torch.tensor(3.0), torch.tensor([True, True]))
    assert means.read() == expected
    means.add(torch.tensor(math.nan), torch.tensor([True, True]))
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        means.collect()


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    checkpoint = Checkpoint(tmp_path / "c.pt", {}, {})
    assert checkpoint.load() is None
    (tmp_path / "c.pt").write_bytes(content) if content is not None else torch.save([1], tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt is no checkpoint of such a training; remove it to start anew"):
        checkpoint.load()


def test_names_that_are_not_unicode(tmp_path):
    with whole_file(tmp_path / "report.txt", "w") as file:
        file.write("caf\udce9.mp4")
    assert (tmp_path / "report.txt").read_text() == r"caf\udce9.mp4"


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many"])
def test_positive_int(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"must be an integer >= 1, got '{text}'"):
        positive_int(text)
    assert positive_int("12") == 12


def test_tensorboard_shows_the_same(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"loss": 0.1 * step})
    time.sleep(1.1)  # TensorBoard reads files in the order of the seconds in their names
    MetricsLog(tmp_path, 2).write(4, {"loss": 0.5})  # continues after step 2
    board = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (step, pytest.approx(loss)) for step, loss in ((1, 0.1), (2, 0.2), (4, 0.5))
    ]
