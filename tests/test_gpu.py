"""GPU only: half precision, CUDA graphs, uploads by reading threads, mixed-precision training."""

import json

import pytest
import torch
from torch import nn
from videos import write_video

import tpn
from tpn.training.loop import train
from tpn.video.motion import write_dataset
from tpn.video.transforms import resize_short_side

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FAMILIES = ["tpn_slowonly_r50_k400", "tpn_slowonly_r101_k400", "tpn_tsm_r50_sthv1", "slowonly_r50_k400"]


@pytest.fixture(scope="module")
def motion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("motion")
    write_dataset(folder, 4, seed=11)
    return folder


def clips_of(model, batch):
    size = model.input_spec.crop_size
    return torch.randn(batch, 3, model.input_spec.num_frames, size, size, device=DEVICE)


def create_model(name):
    """Return a model whose batch norms have seen clips, as after training: with random ones, R101 exceeds float16."""
    torch.manual_seed(0)
    model = tpn.create_model(name).to(DEVICE).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.momentum = 1.0
    with torch.no_grad():
        model(clips_of(model, 4))
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_float16_keeps_the_probabilities(name):
    model = create_model(name)
    fast = tpn.optimize(model)
    assert fast.report.dtype == torch.float16
    x = clips_of(model, 4)
    with torch.inference_mode():
        expected, got = model(x).softmax(dim=1), fast(x).softmax(dim=1)
    assert (expected - got).abs().max() < 5e-3
    assert fast.report.max_difference < 5e-3


@pytest.mark.parametrize("name", ["tpn_slowonly_tiny_motion", "tpn_tsm_r50_sthv1"])
def test_compiled_with_and_without_graphs(name):
    model = tpn.create_model(name).to(DEVICE).eval()
    plain = tpn.optimize(model)
    small, large = clips_of(model, 1), clips_of(model, 8)
    fast = tpn.optimize(model, compile=True, sample=small)
    first = fast(small)
    other = fast(-small)  # a graph writes to the same memory again
    for x, got in ((small, first), (-small, other), (large, fast(large)), (small, fast(small))):
        assert (got.softmax(dim=1) - plain(x).softmax(dim=1)).abs().max() < 5e-3
    assert torch.equal(fast(small), first)


def test_resized_pixels_equal_those_of_the_cpu():
    x = torch.randint(0, 256, (8, 3, 90, 121), dtype=torch.uint8)
    assert torch.equal(resize_short_side(x.to(DEVICE), 64).cpu(), resize_short_side(x, 64))


def test_many_videos_equal_the_cpu(motion):
    """Several threads upload, batches hold views of several videos."""
    videos = [*sorted(motion.rglob("*.mp4")), motion / "missing.mp4"]
    on_cpu = tpn.VideoClassifier("tpn_slowonly_tiny_motion", device="cpu")
    for options in ({}, {"precision": "auto"}, {"precision": "auto", "compile": True}):
        on_gpu = tpn.VideoClassifier("tpn_slowonly_tiny_motion", device=DEVICE, workers=4, **options)
        for expected, got in zip(on_cpu.predict_each(videos), on_gpu.predict_each(videos), strict=True):
            assert type(expected) is type(got)
            if isinstance(expected, tpn.Prediction):
                assert (expected.probs - got.probs).abs().max() < 5e-3
                assert expected.top(1)[0][0] == got.top(1)[0][0]


def test_larger_frames_are_resized_on_the_gpu(tmp_path):
    video = write_video(tmp_path / "v.mp4", 40, size=(200, 136))
    model = "tpn_slowonly_tiny_motion"
    on_cpu, on_gpu = (tpn.VideoClassifier(model, device=device)(video) for device in ("cpu", DEVICE))
    assert (on_cpu.probs - on_gpu.probs).abs().max() < 5e-3


def test_training_in_other_precisions(motion, tmp_path):
    """The losses are those of float32."""
    losses = {}
    options = {"compile": {"amp": "bfloat16", "compile": True}, "checkpointing": {"amp": "float32", "checkpointing": True}}
    for name, changes in {"float32": {"amp": "float32"}, "float16": {"amp": "float16"}, **options}.items():
        small = {"epochs": 3, "batch_size": 8, "model_args": {"drop_rate": 0.0}, "device": DEVICE, "workers": 2}
        train(motion, val=str(motion), output=tmp_path / name, recipe="motion", **small, **changes)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["loss"] for row in rows if "loss" in row]
        assert losses[name] == pytest.approx(losses["float32"], abs=0.05)
