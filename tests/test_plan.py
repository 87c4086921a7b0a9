"""What a run decides by itself, from its data, its model, its start, and the device."""

import os
from types import SimpleNamespace

import pytest
import torch

import tpn
from tpn.training import plan as training_plan
from tpn.training.config import TrainConfig
from tpn.training.data import DataFacts
from tpn.training.plan import make_plan
from tpn.training.setup import set_clips

FIGHTS = DataFacts(videos=240, class_counts=(120, 120), frames=60, fps=30)


def plan(facts=FIGHTS, start="pretrained", *, size=64, backbone="timm/resnet18", **options):
    model = tpn.create_model("tpn", backbone=backbone, num_frames=8, num_classes=2)
    model.input_spec = tpn.InputSpec(8, 8, num_clips=1, num_crops=1, short_side=size + 32, crop_size=size)
    return make_plan(TrainConfig(**options), facts, model, start, device=torch.device("cpu"))[0]


@pytest.mark.parametrize(("frames", "interval", "views"), [(60, 8, "1x1"), (300, 15, "3x1"), (8, 1, "1x1"), (4, 1, "1x1")])
def test_a_clip_spans_a_typical_video_but_steps_are_at_most_half_a_second(frames, interval, views):
    config = plan(DataFacts(240, (120, 120), frames, fps=30))
    assert (config.frame_interval, config.views) == (interval, views)


@pytest.mark.parametrize(("videos", "clips"), [(20, 6_000), (240, 7_200), (5_000, 150_000), (100_000, 200_000)])
def test_steps_follow_from_the_number_of_videos(videos, clips):
    config = plan(DataFacts(videos, (videos,), 60, 30))
    assert config.steps * config.batch_size == pytest.approx(clips, rel=0.01)
    assert plan(DataFacts(videos, (videos,), 60, 30), epochs=3).steps is None


def test_a_cpu_keeps_the_weights_for_images():
    config = plan(start="backbone", size=224)
    assert (config.freeze, config.crop_size, config.steps) == ("backbone", 112, 375)
    config = plan(start="backbone", size=224, crop_size=168, steps=7)
    assert (config.freeze, config.crop_size, config.steps) == ("backbone", 168, 7)
    config = plan(start="pretrained", size=224)
    assert (config.freeze, config.crop_size, config.steps) == ("none", None, 900)


@pytest.mark.parametrize(
    ("backbone", "freeze", "amp"),
    [
        ("resnet18", "none", "bfloat16"),
        ("tf_efficientnet_lite0", "none", "float32"),
        ("tf_efficientnet_lite0", "backbone", "bfloat16"),
    ],
)
def test_depthwise_convolutions_learn_in_float32_on_cpus(monkeypatch, backbone, freeze, amp):
    monkeypatch.setattr(training_plan, "cpu_has_amx", lambda: True)
    assert plan(backbone=f"timm/{backbone}", freeze=freeze).amp == amp


@pytest.mark.parametrize(("cores", "workers", "threads"), [(1, 1, 1), (2, 2, 1), (4, 2, 2), (16, 4, 12)])
def test_workers_and_threads_share_the_cores(monkeypatch, cores, workers, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores), raising=False)
    config = plan()
    assert (config.workers, config.threads) == (workers, threads)


def test_the_learning_rate_is_that_of_the_optimizer():
    adamw, sgd = plan(), plan(optimizer="sgd")
    assert (adamw.lr, adamw.weight_decay) == (1e-3, 0.05)
    assert (sgd.lr, sgd.weight_decay) == (2e-2, 1e-4)
    assert plan(optimizer="lion", lr=1e-4).lr == 1e-4
    with pytest.raises(ValueError, match="'lion' needs lr"):
        plan(optimizer="lion")


@pytest.mark.parametrize(("given", "short_side"), [({}, 96), ({"crop_size": 32}, 48), ({"crop_size": 32, "short_side": 36}, 36)])
def test_other_crops_show_as_much_of_a_frame(given, short_side):
    model = SimpleNamespace(input_spec=tpn.InputSpec(8, 8, num_crops=3, short_side=96, crop_size=64, three_crop_size=96))
    data = SimpleNamespace(train=SimpleNamespace(use_spec=lambda spec, **draws: None), val=None)
    set_clips(model, data, TrainConfig(**given))
    assert (model.input_spec.short_side, model.input_spec.crop_size) == (short_side, given.get("crop_size", 64))
    assert model.input_spec.view_size == short_side
