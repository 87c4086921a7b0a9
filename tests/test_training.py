"""Batch order, class weights, validation, checkpoints and metrics: the parts of `tpn.train`."""

import json
import math
import time
from collections import Counter

import pytest
import torch
from torch import nn
from videos import write_video

import tpn
from tpn.models.layers import freeze_batch_norm
from tpn.training.evaluation import validate
from tpn.training.loss import class_weights, draw_weights, epoch_batches
from tpn.training.state import Checkpoint, MetricsLog, RunningMeans, report_bad_files
from tpn.video.datasets import VideoFolder

LABELS = [0] * 13 + [1] * 3 + [2] * 21
TARGETS = torch.eye(4)[LABELS]


def test_class_weights():
    weights = class_weights(TARGETS)
    assert weights[torch.tensor(LABELS)].mean().item() == pytest.approx(1)
    assert (weights[0] * 13).item() == pytest.approx((weights[1] * 3).item())
    assert weights[3] == 0  # no video


def test_every_video_is_drawn_once():
    (batch,) = epoch_batches(37, 37, seed=1, epoch=0)
    assert sorted(index for index, _ in batch) == list(range(37))
    assert {draw for _, draw in batch} == {0}
    assert epoch_batches(37, 37, seed=1, epoch=0) == [batch]
    assert epoch_batches(37, 37, seed=1, epoch=1) != [batch]
    assert epoch_batches(37, 37, seed=2, epoch=0) != [batch]
    assert epoch_batches(37, 38, seed=1, epoch=0) == []


@pytest.mark.parametrize(("world", "size", "accumulate"), [(1, 6, 1), (2, 3, 1), (3, 2, 1), (1, 2, 3), (3, 1, 2)])
def test_a_step_uses_the_same_videos_for_every_division(world, size, accumulate):
    """37 videos in steps of 6: the last video is dropped."""
    whole = epoch_batches(37, 6, seed=3, epoch=5)
    parts = [
        epoch_batches(37, size, seed=3, epoch=5, accumulate=accumulate, rank=rank, world_size=world) for rank in range(world)
    ]
    assert len(whole) == 6
    for step, expected in enumerate(whole):
        passes = range(step * accumulate, (step + 1) * accumulate)
        assert sorted(item for part in parts for i in passes for item in part[i]) == sorted(expected)


def test_balanced_batches():
    counts = Counter()
    for epoch in range(60):
        (batch,) = epoch_batches(37, 37, seed=0, epoch=epoch, weights=draw_weights(TARGETS))
        assert len(set(batch)) == 37  # a video that is drawn twice gives two different clips
        counts.update(LABELS[index] for index, _ in batch)
    assert max(counts.values()) < 1.15 * min(counts.values())


def test_videos_without_a_class_are_drawn_like_one_more_class():
    targets = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    weights = draw_weights(targets)
    assert weights[3:].sum() == pytest.approx(float(weights[:2].sum()))


def test_validation_leaves_frozen_batch_norms_frozen(tmp_path):
    model = tpn.create_model("tpn_slowonly_tiny_motion", base_channels=4).train()
    freeze_batch_norm(model.backbone)
    modes = [module.training for module in model.modules()]
    for name in ("blinking", "growing"):
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "1.mp4", num_frames=20)
    (tmp_path / "growing" / "bad.mp4").write_bytes(b"no video")
    result = validate(model, VideoFolder(tmp_path, model.input_spec, train=False, classes=model.labels))
    assert result.metrics.keys() == {"top1", "top5", "mean_class", "loss", "ece"}
    assert len(result.items) == 2
    assert list(result.failed) == [str(tmp_path / "growing" / "bad.mp4")]
    assert not all(modes)
    assert [module.training for module in model.modules()] == modes


def test_checkpoint(tmp_path):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    Checkpoint(tmp_path / "c.pt", {"model": model}, {"lr": 0.1, "list": [1, 2]}).save({"step": 7})
    assert Checkpoint(tmp_path / "c.pt", {"model": other}, {"lr": 0.1, "list": [1, 2]}).load() == {"step": 7}
    assert torch.equal(model.weight, other.weight)
    with pytest.raises(ValueError, match=r"c\.pt.*list=\[1, 2\], now None; lr=0\.1, now 0\.2"):
        Checkpoint(tmp_path / "c.pt", {"model": other}, {"lr": 0.2}).load()


def test_metrics_resume_after_the_step_of_a_checkpoint(tmp_path):
    """Values that are not finite become null, because JSON has none."""
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"loss": 0.1 * step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    MetricsLog(tmp_path, 2).write(3, {"loss": 0.5, "grad_norm": math.inf})
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in written]
    assert lines == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": 0.5, "grad_norm": None}]


def test_a_validation_that_is_repeated_is_written_once(tmp_path):
    log = MetricsLog(tmp_path)
    for values in ({"loss": 0.5}, {"val_loss": 0.6}):
        log.write(3, values)
    assert MetricsLog(tmp_path, 3, 3).lines == [{"step": 3, "loss": 0.5}, {"step": 3, "val_loss": 0.6}]
    assert MetricsLog(tmp_path, 3, 0).lines == [{"step": 3, "loss": 0.5}]


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
    means.add(torch.tensor(math.nan), torch.tensor([True, True]))  # of a step that is skipped
    assert means.read() == {}
    means.add(torch.tensor(math.inf), torch.tensor([False, True]))
    means.add(torch.tensor(4.0), torch.tensor([False, True]))
    assert means.read() == {"loss": 4, "top1": 50}


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_file_that_is_not_a_checkpoint(tmp_path, content):
    checkpoint = Checkpoint(tmp_path / "c.pt", {}, {})
    assert checkpoint.load() is None
    (tmp_path / "c.pt").write_bytes(content) if content is not None else torch.save([1], tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt.*checkpoint.*remove it"):
        checkpoint.load()


def test_bad_files_are_reported(tmp_path):
    checked = []

    class Bad:
        def bad_files(self):
            return {"caf\udce9.mp4": "not a video"}

        check_bad = checked.append

    path = tmp_path / "bad.txt"
    report_bad_files(path, Bad(), {"b.mp4": "empty"})
    assert checked == [Bad().bad_files()]
    assert path.read_text() == "caf\\udce9.mp4\tnot a video\nb.mp4\tempty\n"  # a name that is not Unicode is escaped


def test_tensorboard_has_the_same_metrics(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"loss": 0.1 * step})
    time.sleep(1.1)  # TensorBoard sorts files by the seconds in their names
    MetricsLog(tmp_path, 2).write(4, {"loss": 0.5})  # resumes after step 2
    board = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (step, pytest.approx(loss)) for step, loss in ((1, 0.1), (2, 0.2), (4, 0.5))
    ]
