"""The model that comes with the package, and `tpn demo`."""

import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from servers import run_python, start_python
from videos import write_video

import tpn
from tpn import demo
from tpn.predict import VideoClassifier
from tpn.video import motion
from tpn.zoo.weights import get_weights

NAME = "tpn_slowonly_tiny_motion"


@pytest.fixture(scope="module")
def classifier():
    return VideoClassifier(NAME, pretrained=True)


def test_weights_in_the_package():
    entry = get_weights(NAME)
    assert entry.embedded.stat().st_size < 4e6
    with safe_open(entry.embedded, "pt") as file:
        kinds = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert kinds == {torch.float16, torch.int64}
    assert entry.measured_top1 > 95
    assert entry.reported_top1 is None


def test_no_network(tmp_path):
    script = f"""
import socket, timm, tpn
def refuse(*args): raise AssertionError("network")
socket.socket.connect = refuse
for create in (tpn.create_model, timm.create_model):
    model = create({NAME!r}, pretrained=True)
    print(model.labels[0], model.input_spec.num_frames, next(model.parameters()).dtype)
print(tpn.create_model({NAME!r}, pretrained=True, num_classes=3).num_classes)
"""
    said, _ = run_python(script, tmp_path, HF_HUB_OFFLINE="1")
    assert said.splitlines() == ["moving left 16 torch.float32"] * 2 + ["3"]


def test_it_knows_videos_it_has_not_seen(classifier, tmp_path):
    """Through the whole path, files included; seeds that neither training nor validation had."""
    motion.write_dataset(tmp_path, 4, seed=987)
    right = [classifier(path).top(1)[0][0] == name for name in motion.CLASSES for path in sorted((tmp_path / name).glob("*.mp4"))]
    assert len(right) == 56
    assert np.mean(right) > 0.92  # 98 of 100 would fall below once in thousands of draws


def test_it_needs_motion(classifier, tmp_path):
    """One repeated frame says nothing: near chance, which is 1 in 14."""
    motion.write_dataset(tmp_path, 4, seed=988, order="one frame")
    right = [classifier(path).top(1)[0][0] == name for name in motion.CLASSES for path in (tmp_path / name).glob("*.mp4")]
    assert np.mean(right) < 0.25


def test_rendered_video_shows_what_it_says(classifier, tmp_path):
    demo.render_video(tmp_path / "demo.mp4")
    seen = demo.look(classifier, tmp_path / "demo.mp4")
    assert {name for name, _ in seen.prediction.top(5)} == {name for name, _ in demo.SCENES}
    for i, (name, _) in enumerate(demo.SCENES):
        middle = (i + 0.5) * demo.SCENE_FRAMES / motion.FPS
        nearest = np.abs(seen.times - middle).argmin()
        assert motion.CLASSES[seen.probs[nearest].argmax()] == name
    np.testing.assert_allclose(seen.probs.mean(axis=0), seen.prediction.probs, atol=1e-6)
    assert seen.duration == pytest.approx(len(demo.SCENES) * demo.SCENE_FRAMES / motion.FPS)


def run(*args, cwd, before=""):
    script = f"import sys\nsys.argv = {['tpn', 'demo', *args]}\nfrom tpn import cli, demo\n{before}\ncli.main()"
    process = start_python(script, cwd)
    out, complaints = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, complaints)


def test_command(tmp_path):
    done = run(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tpn-demo.mp4", "tpn-demo.png"]
    assert len(done.stdout.splitlines()) == 6
    assert "drew tpn-demo.png" in done.stderr
    with Image.open(tmp_path / "tpn-demo.png") as picture:
        assert min(picture.size) > 500


def test_a_video_of_ones_own(tmp_path):
    write_video(tmp_path / "mine.mp4", num_frames=3)
    done = run("mine.mp4", "--output", "picture.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mine.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.mp4", "picture.png"]
    (tmp_path / "mine.mp4").write_bytes(b"broken")
    done = run("mine.mp4", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "not a video" in done.stderr


def test_without_matplotlib(tmp_path):
    done = run(cwd=tmp_path, before="demo.can_draw = lambda: False")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "tpn-demo.png").exists()
    assert "swinging up and down" in done.stdout
    assert 'pip install "tpn[viz]"' in done.stderr


def test_models_of_segments_have_no_course(tmp_path):
    model = tpn.create_model("tpn_tsm_r50_sthv1", base_channels=4)
    write_video(tmp_path / "mine.mp4", num_frames=12)
    with pytest.raises(ValueError, match="sees a whole video at once"):
        demo.look(VideoClassifier(model), tmp_path / "mine.mp4")
