"""Real videos, in `$TPN_REFERENCE/video`."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from recipe import upstream_state_dict

import tpn
from tpn.devices import fastest_dtype
from tpn.training.loop import train
from tpn.video.decode import VideoError, probe, read_frames
from tpn.video.encode import write_video
from tpn.video.transforms import center_crop
from tpn.zoo.checkpoints import CHECKPOINTS

pytestmark = pytest.mark.skipif("TPN_REFERENCE" not in os.environ, reason="set TPN_REFERENCE to a folder with reference videos")
VIDEOS = Path(os.environ.get("TPN_REFERENCE", "."), "video")
FIXTURES = Path(__file__).parent / "fixtures"


def test_table_of_published_weights():
    """Every published checkpoint is an entry, with the facts that its publisher gives."""
    published = json.loads((VIDEOS.parent / "upstream_weights.json").read_text())
    assert {f"{row['model']}.{row['tag']}" for row in published} == {name for name, e in CHECKPOINTS.items() if e.layout != "tpn"}
    for row in published:
        entry = CHECKPOINTS[f"{row['model']}.{row['tag']}"]
        spec, sha256 = entry.config.input_spec, getattr(entry.source, "sha256", None)
        assert (entry.layout, entry.source.url, sha256) == (row["layout"], row["url"], row["sha256_prefix"])
        assert (entry.dataset.lower().replace(" ", "-"), entry.config.num_classes) == (row["dataset"], row["num_classes"])
        assert (spec.num_frames, spec.frame_interval) == (row["num_frames"], row["frame_interval"])
        assert (entry.reported_top1, entry.reported_top5) == (row["reported_top1"], row["reported_top5"])
        assert entry.initialized_from == (row["initialised_from"] or "random")
        assert row["params"] in (None, tpn.model_info(entry.name).params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "manifest"),
    [("tpn_slowonly_r50_k400", "mmaction2_tpn_slowonly_r50_8x8_k400"), ("tpn_tsm_r50_sthv1", "mmaction2_tpn_tsm_r50_sthv1")],
)
def test_published_protocol_on_a_real_video(name, manifest, tmp_path):
    expected = np.load(FIXTURES / f"e2e_{manifest}_arm_wrestling_s0.npz")
    state = upstream_state_dict(manifest)
    state = {k: torch.as_tensor(v) * (0.2 if k.startswith("cls_head.fc_cls") else 1) for k, v in state.items()}
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    model = tpn.create_model(name, checkpoint_path=tmp_path / "weights.pth")
    (tmp_path / "weights.pth").unlink()
    prediction = tpn.VideoClassifier(model, precision="float32")(VIDEOS / "arm_wrestling.mp4")
    np.testing.assert_allclose(prediction.probs, expected["probs"], rtol=0, atol=1e-4)
    bound = 2e-5 * np.abs(expected["view_logits"]).max()
    np.testing.assert_allclose(prediction.view_logits, expected["view_logits"], rtol=0, atol=bound)
    if fastest_dtype(torch.device("cpu")) == torch.bfloat16:  # minutes for each view otherwise
        half = tpn.VideoClassifier(model, precision="bfloat16")(VIDEOS / "arm_wrestling.mp4")
        np.testing.assert_allclose(half.probs, expected["probs"], rtol=0, atol=5e-3)
        assert half.top(1)[0][0] == prediction.top(1)[0][0]


@pytest.mark.parametrize(
    ("name", "frames", "width", "height"),
    [
        ("arm_wrestling.mp4", 280, 340, 256),
        ("av1_video.mkv", 125, 640, 360),
        ("flipping_a_pancake.mkv", 310, 426, 240),
        ("h265_10bits.mp4", 30, 200, 200),
        ("nasa_13013.mp4", 390, 480, 270),
        ("unordered.mov", 4, 50, 50),
        ("video_90.mov", 3, 320, 568),
        ("video_270.mov", 3, 320, 568),
    ],
)
def test_readable(name, frames, width, height):
    info = probe(VIDEOS / name)
    assert (info.num_frames, info.width, info.height) == (frames, width, height)
    assert read_frames(VIDEOS / name, [0, frames - 1]).shape == (2, 3, height, width)
    with pytest.raises(IndexError, match=f"has {frames} frames"):
        read_frames(VIDEOS / name, [frames])


@pytest.mark.parametrize(
    ("name", "says"), [("corrupted.mp4", "damaged"), ("truncated.mp4", "not a video"), ("sine_mono_s16.wav", "not a video")]
)
def test_unreadable(name, says):
    with pytest.raises(VideoError, match=f"{name}: .*{says}"):
        read_frames(VIDEOS / name, [40])


@pytest.mark.slow
def test_overfits_six_real_clips(tmp_path):
    """Three clips of each of two videos, one per class: the classes differ in motion, not in appearance."""
    sources = ("arm_wrestling.mp4", "flipping_a_pancake.mkv")
    for source in sources:
        for i in range(3):
            folder = tmp_path / "videos" / f"class {i}"
            folder.mkdir(parents=True, exist_ok=True)
            frames = read_frames(VIDEOS / source, range(40 * i, 40 * i + 34), short_side=72)
            frames = center_crop(frames, 72)
            write_video(folder / f"{source}.mp4", frames.permute(0, 2, 3, 1).numpy(), fps=25)
    options = {"recipe": "motion", "epochs": 60, "batch_size": 6, "lr_batch": 6, "warmup": 1 / 12, "crop_area": (0.9, 1.0)}
    options |= {"flip_prob": 0.0, "ema": 0.9, "val_interval": 60, "workers": 0, "threads": torch.get_num_threads()}
    result = train(tmp_path / "videos", val=str(tmp_path / "videos"), output=tmp_path / "run", **options)
    assert result.evaluation.metrics["top1"] == 100
