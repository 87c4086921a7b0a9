"""The short scripts of `examples/`."""

import re
import runpy
import shutil
import sys

import pytest
import torch
from scripts import ROOT, example

import tpn
from tpn.demo import render_video
from tpn.video import motion

TINY = "tpn_slowonly_tiny_motion"
SHORT = ["predict", "features", "own_backbone", "timeline", "export"]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "video.mp4"
    render_video(path)
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Return a function that calls the `main` of a script in an empty folder, and returns the lines that it printed."""

    def run(name, *args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        example(name).main()
        return capsys.readouterr().out.splitlines()

    return run


SCRIPTS = sorted(path for path in (ROOT / "examples").rglob("*.py") if path.stem not in ("app", "classify_many"))  # with extras


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help(path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(path.parent)  # a script finds its neighbors
    if "ArgumentParser" not in path.read_text(encoding="utf-8"):
        runpy.run_path(path)
        return
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(path, run_name="__main__")
    assert stop.value.code in (None, 0)
    assert capsys.readouterr().out.startswith(f"usage: {path.name} ")


@pytest.mark.parametrize("name", SHORT)
def test_is_short(name):
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert text.count("\n") < 60
    assert f"python examples/{name}.py" in text


def test_predict(run, video):
    missing = video.with_name("missing.mp4")
    lines = run("predict", video, missing, "--model", TINY, "--clips", 3)
    assert lines[0] == str(video)
    assert all(line.split("%  ")[1] in motion.CLASSES for line in lines[1:6])
    assert "No such file" in lines[7]


def test_features(run, video):
    copy = shutil.copy(video, video.with_name("copy.mp4"))
    lines = run("features", video, copy, "--model", TINY, "--feature", "c4")
    assert lines == [f"1.000  {copy}", "2 videos, 64 features each"]


@pytest.mark.slow
def test_own_backbone(run):
    lines = run("own_backbone")
    assert lines[0] == "your own: clips (2, 3, 16, 112, 112), levels (channels: frames) {64: 8, 128: 4, 256: 2}, logits (2, 12)"
    assert lines[-1] == "same logits after loading: True"


def test_train(run, tmp_path):
    motion.write_dataset(tmp_path / "videos", 1, seed=1, num_frames=34)
    for name in motion.CLASSES[3:]:
        shutil.rmtree(tmp_path / "videos" / name)
    lines = run("train", "videos", "videos", "mine", "--epochs", 2, "--workers", 0)
    assert lines[1].startswith("epoch 1: loss ")
    assert lines[1].endswith("% of 3")
    assert tpn.create_model(f"local-dir:{tmp_path}/mine").labels == tuple(sorted(motion.CLASSES[:3]))


def test_timeline(run, video):
    lines = run("timeline", video, "--model", TINY)
    assert lines[0].strip().startswith("0.0 s – ")
    assert any("turning clockwise" in line for line in lines)
    assert all(" s – " in line for line in lines)


def test_track_people(monkeypatch, capsys, video, tmp_path):
    """A detector of fixed boxes: two people, one of whom is hidden for a while."""
    calls = []

    def detect(frame):
        calls.append(frame.shape)
        boxes = [[10.0 + len(calls) / 10, 10, 60, 90], [60, 20, 110, 100]]
        return torch.tensor(boxes[: 1 if 20 < len(calls) < 30 else 2])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["track_people.py", str(video), "--model", TINY])
    example("track_people").main(detect)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"person {id}, frames 0 to {len(calls) - 1}" for id in (1, 2)]
    assert all(line.split(": ")[1].split("  ")[0] in motion.CLASSES for line in lines)
    first, *_ = (tmp_path / "tracks.txt").read_text().splitlines()
    assert first == "1,1,10.1,10.0,49.9,80.0,1,-1,-1,-1"


@pytest.mark.slow
@pytest.mark.parametrize("output", ["model.onnx", "model.pt2"])
def test_export(run, video, output):
    difference, *predictions = run("export", video, "--output", output)
    assert re.fullmatch(r"largest relative difference of a logit: \de-\d\d", difference)
    assert len(predictions) == 2
    assert predictions[0] == predictions[1]
