"""The training of the bundled model, and the people that it sees."""

import os
import sys

import numpy as np
import pytest
from scripts import ROOT, call_example, example

import tpn
from tpn.video import decode, motion


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "bundled_model")


@pytest.fixture
def figures():
    return example("bundled_model/figures")


def test_people_are_the_same_for_the_same_seed(figures):
    clip = figures.render(3, seed=7, num_frames=5)
    assert (clip.shape, clip.dtype) == ((5, figures.HEIGHT, figures.WIDTH, 3), np.uint8)
    assert np.array_equal(clip, figures.render(3, seed=7, num_frames=5))
    assert not np.array_equal(clip, figures.render(3, seed=8, num_frames=5))
    with pytest.raises(ValueError, match="label.*22"):
        figures.render(22, seed=0)


@pytest.mark.slow
def test_people_move_within_the_picture(figures):
    """In each class, most of the clips change where somebody is: by more than a camera at rest and noise do."""
    for label, name in enumerate(figures.CLASSES):
        clips = np.stack([figures.render(label, seed=seed, num_frames=25)[::12] for seed in range(6)]).astype(int)
        changed = (np.abs(clips[:, 1:] - clips[:, :1]).max(axis=-1) > 40).mean(axis=(2, 3)).max(axis=1)
        assert (changed > 0.003).sum() >= 4, (name, changed)


def test_movements(figures):
    """What the names say: a person who falls ends up lying, a chased one stays ahead, people who hug meet."""
    poses = sys.modules["poses"]
    rng = np.random.default_rng(0)
    for _ in range(20):
        one, two = poses.Style.random(rng), poses.Style.random(rng)
        assert abs(poses.ALONE["falling"](3, one).lean) == pytest.approx(1.5)
        assert poses.ALONE["walking"](1, one).x < poses.ALONE["running"](1, one).x
        for t in (0.0, 1.0):
            (a, way), (b, _) = poses.TOGETHER["chasing"](t, one, two)
            assert b.x > a.x
            assert way == 1
        far, near = (poses.TOGETHER["hugging"](t, one, two) for t in (0.0, 3.0))
        assert near[0][0].x == pytest.approx(-0.14)
        assert far[0][0].x < -0.8


@pytest.mark.slow
def test_files(figures, tmp_path):
    figures.write_dataset(tmp_path, 1, seed=3)
    files = sorted(tmp_path.rglob("*.mp4"))
    assert [file.parent.name for file in files] == sorted(figures.CLASSES)
    assert not set(figures.CLASSES) & set(motion.CLASSES)
    info = decode.probe(files[0])
    assert (info.num_frames, info.width, info.height, info.fps) == (32, figures.WIDTH, figures.HEIGHT, figures.FPS)
    before = os.stat(files[0]).st_mtime_ns
    figures.write_dataset(tmp_path, 1, seed=3)
    assert os.stat(files[0]).st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_training(monkeypatch, tmp_path):
    """The same command resumes; the model has the 14 classes, and the weights of the last step."""
    script = example("bundled_model/train")
    monkeypatch.setattr(script, "PARTS", {"train": (1, 1, 1), "val": (2, 1, 1), "test": (3, 1, 0)})
    monkeypatch.setitem(script.OPTIONS, "epochs", 1)
    for _ in range(2):
        done = call_example("bundled_model/train", "--output", tmp_path)
        assert done.returncode == 0, done.stderr
    assert "'top1'" in done.stdout
    run, model = (tpn.create_model(f"local-dir:{tmp_path / name}") for name in ("run", "model"))
    assert model.labels == motion.CLASSES
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 4e6
    assert len(run.labels) == 36
    row = run.labels.index("jumping")
    for head in ("head", "aux_head"):
        kept, whole = (getattr(m, head).fc.weight.detach() for m in (model, run))
        assert np.allclose(kept[13].float(), whole[row], atol=1e-3)
    assert model.input_spec == tpn.input_spec("tpn_slowonly_tiny_motion")
