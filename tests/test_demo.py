"""The model that ships with tpn, and `tpn demo`."""

import re
import socket
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from test_cli import run
from videos import write_video

import tpn
from tpn import demo
from tpn.video import motion
from tpn.zoo import fetch
from tpn.zoo.checkpoints import get_checkpoint

NAME = "tpn_slowonly_tiny_motion"


def test_weights_in_the_package():
    entry = get_checkpoint(NAME)
    assert entry.source.path.stat().st_size < 4e6
    with safe_open(entry.source.path, "pt") as file:
        kinds = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert kinds == {torch.float16, torch.int64}
    assert entry.measured_top1 > 95
    assert entry.reported_top1 is None


def test_no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("network"))
    for create in (tpn.create_model, timm.create_model):
        model = create(NAME, pretrained=True)
        assert (model.labels[0], model.input_spec.num_frames) == ("moving left", 16)
        assert next(model.parameters()).dtype == torch.float32
    assert tpn.create_model(NAME, pretrained=True, num_classes=3).num_classes == 3


@pytest.mark.slow
def test_accuracy_on_new_videos(classifier, tmp_path):
    """Video files rendered with seeds of neither training nor validation."""
    motion.write_dataset(tmp_path, 2, seed=987)
    right = [classifier(path).top(1)[0][0] == name for name in motion.CLASSES for path in sorted((tmp_path / name).glob("*.mp4"))]
    assert len(right) == 28
    assert np.mean(right) > 0.85  # a model with 98 % fails once in thousands of draws


@pytest.mark.slow
def test_accuracy_without_motion_is_near_chance(classifier, tmp_path):
    """On one repeated frame. Chance is 1 in 14."""
    motion.write_dataset(tmp_path, 2, seed=988, num_frames=34, order="one frame")
    right = [classifier(path).top(1)[0][0] == name for name in motion.CLASSES for path in (tmp_path / name).glob("*.mp4")]
    assert np.mean(right) < 0.25


def test_rendered_video_is_classified_scene_by_scene(tmp_path):
    """What the command prints, and the files that it writes."""
    done = run("demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [re.fullmatch(r"([\d.]+) s – ([\d.]+) s  (.+)  ([\d.]+)%", line).groups() for line in done.stdout.splitlines()]
    named = [(float(start), float(end), name) for start, end, name, _ in found if name != "-"]
    assert [name for *_, name in named] == [name for name, _ in demo.SCENES]
    for i, (start, end, _) in enumerate(named):
        assert start < (i + 0.5) * demo.SCENE_FRAMES / motion.FPS < end
    assert done.stderr == "rendered tpn-demo.mp4\nwrote tpn-demo.png\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tpn-demo.mp4", "tpn-demo.png"]
    with Image.open(tmp_path / "tpn-demo.png") as picture:
        assert min(picture.size) > 500


def test_your_own_video(tmp_path):
    write_video(tmp_path / "my own.mp4", num_frames=3)
    done = run("demo", "my own.mp4", "--output", "picture.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0.0 s – 0.1 s  ")
    note, wrote = done.stderr.splitlines()
    assert re.fullmatch(rf"{NAME} .*rendered motion only.* tpn timeline 'my own.mp4'", note)
    assert wrote == "wrote picture.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my own.mp4", "picture.png"]
    tpn.save_pretrained(tpn.create_model(NAME, base_channels=4), tmp_path / "model")
    assert run("demo", "my own.mp4", "--model", "./model", cwd=tmp_path).stderr == "wrote tpn-demo.png\n"
    (tmp_path / "my own.mp4").write_bytes(b"broken")
    done = run("demo", "my own.mp4", "--model", "./model", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "not a video" in done.stderr


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "tpn-demo.png").exists()
    assert "swinging up and down" in done.stdout
    assert 'pip install "tpn[viz]"' in done.stderr


def test_a_video_that_cannot_be_written_is_reported_first(tmp_path):
    (tmp_path / "tpn-demo.mp4").mkdir()
    done = run("demo", "--model", "nonsense", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: tpn-demo.mp4: Is a directory\n")


@pytest.mark.parametrize("command", ["demo", "timeline"])
def test_models_of_segments_are_refused_before_their_weights_are_loaded(tmp_path, monkeypatch, command):
    monkeypatch.setattr(fetch, "weights_file", lambda *_, **__: pytest.fail("weights"))
    write_video(tmp_path / "mine.mp4", num_frames=3)
    done = run(command, "mine.mp4", "--model", "tpn_tsm_r50_sthv1", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "samples 8 segments" in done.stderr
