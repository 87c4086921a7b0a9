"""The rendered dataset is deterministic, and no single frame reveals the class."""

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from servers import run_python

from tpn.video import decode
from tpn.video.encode import write_video
from tpn.video.motion import (
    CLASSES,
    FPS,
    HEIGHT,
    MIRRORED,
    SLOWEST_CYCLE,
    WIDTH,
    _random_state,
    _trajectory,
    masks,
    render,
    render_sequence,
    write_dataset,
)


def test_rendering_is_deterministic():
    clip = render(3, tempo=2, seed=7, num_frames=5)
    assert (clip.shape, clip.dtype) == ((5, HEIGHT, WIDTH, 3), np.uint8)
    assert np.array_equal(clip, render(3, tempo=2, seed=7, num_frames=5))
    assert not np.array_equal(clip, render(3, tempo=2, seed=8, num_frames=5))
    assert not np.array_equal(clip[0], clip[4])


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_tempo(label):
    """At twice the tempo, a clip consists of every second frame of the slower clip."""
    slow, fast = (render(label, tempo=tempo, seed=1, num_frames=n) for tempo, n in ((1, 33), (2, 17)))
    assert np.array_equal(slow[::2], fast)
    assert not (slow == slow[:1]).all()


@pytest.mark.parametrize("label", [label for label, name in enumerate(CLASSES) if name != "jumping"])
def test_a_cycle_ends_where_it_began(label):
    clip = render(label, tempo=8, seed=2, num_frames=SLOWEST_CYCLE // 8 + 1)
    assert np.abs(clip[0].astype(int) - clip[-1]).max() <= 2


COUNT = 1000


@cache
def states(label):
    """Return the state at a random time of COUNT clips, (COUNT, 5)."""
    rng = np.random.default_rng(label)
    rows = []
    for _ in range(COUNT):
        state = _trajectory(label, _random_state(rng), rng)(rng.uniform(0, 8))
        rows.append((state.x % WIDTH / WIDTH, state.y % HEIGHT / HEIGHT, state.log_size, state.angle % (2 * np.pi), state.hue))
    return np.array(rows)


@pytest.mark.slow
@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_single_frames_do_not_reveal_the_class(label):
    """Each quantity has the same distribution in two classes, by the Kolmogorov-Smirnov statistic."""
    ours, others = states(label), states((label + 5) % len(CLASSES))
    for quantity in range(5):
        points = np.sort(np.concatenate((ours[:, quantity], others[:, quantity])))
        gap = [np.searchsorted(np.sort(side[:, quantity]), points, "right") / len(side) for side in (ours, others)]
        assert np.abs(gap[0] - gap[1]).max() < 1.95 * np.sqrt(2 / COUNT)  # exceeded by 0.1 % of equal distributions


def test_mirrored_classes_swap_directions():
    for a, b in MIRRORED:
        assert b in (a.replace("left", "right"), a.replace("clockwise", "counter-clockwise"))
        assert {a, b} < set(CLASSES)


def test_files(tmp_path):
    write_dataset(tmp_path, 2, seed=3, num_frames=6)
    files = sorted(tmp_path.rglob("*.mp4"))
    assert len(files) == 2 * len(CLASSES)
    assert sorted(os.listdir(tmp_path)) == sorted(CLASSES)
    info = decode.probe(files[0])
    assert (info.num_frames, info.width, info.height, info.fps) == (6, WIDTH, HEIGHT, FPS)
    before = {path: path.read_bytes() for path in files}
    files[3].unlink()
    files[5].write_bytes(b"somebody else's")
    write_dataset(tmp_path, 2, seed=3, num_frames=6)
    assert files[3].read_bytes() == before[files[3]]
    assert files[5].read_bytes() == b"somebody else's"
    label = CLASSES.index(Path(files[0]).parent.name)
    decoded = decode.read_frames(files[0], range(6)).permute(0, 2, 3, 1).numpy()
    tempo = float(np.exp(np.random.default_rng([3, label, 0]).uniform(0, np.log(8))))
    error = np.abs(decoded.astype(int) - render(label, tempo=tempo, seed=(3, 0), num_frames=6)).mean()
    assert error < 6


def test_interrupted_write(tmp_path):
    path = tmp_path / "clip.mp4"
    frames = np.zeros((4, HEIGHT, WIDTH, 3), np.uint8)
    write_video(path, frames, fps=FPS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="float64"):
        write_video(path, frames.astype(float), fps=FPS)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["clip.mp4"]


@pytest.mark.parametrize(("kwargs", "says"), [({"label": 14, "tempo": 1}, "label.*14"), ({"label": 0, "tempo": 0}, "tempo.* 0 ")])
def test_invalid_arguments(kwargs, says):
    with pytest.raises(ValueError, match=says):
        render(seed=0, **kwargs)


def test_clips_without_motion(tmp_path):
    for order in ("as rendered", "one frame", "shuffled"):
        write_dataset(tmp_path / order, 1, seed=4, num_frames=8, order=order)
    for name in CLASSES:
        clips = {path.name: decode.read_frames(path / name / "000000.mp4", range(8)).float() for path in tmp_path.iterdir()}
        rendered, repeated, shuffled = clips["as rendered"], clips["one frame"], clips["shuffled"]
        assert (repeated - repeated[:1]).abs().mean() < 1
        assert (repeated[0] - rendered[0]).abs().mean() < 3
        distance = (shuffled[:, None] - rendered[None]).abs().mean(dim=(2, 3, 4))
        assert distance.min(dim=1).values.max() < 4  # each frame is one of the rendered frames
    with pytest.raises(ValueError, match="order.*'reversed'"):
        write_dataset(tmp_path, 1, seed=4, order="reversed")


def test_sequence():
    """The next motion continues from the last state of the shape. The background stays."""
    clip = render_sequence([(1, 2.0, 10), (4, 4.0, 10)], seed=3)
    assert clip.shape == (20, HEIGHT, WIDTH, 3)
    assert np.array_equal(clip, render_sequence([(1, 2.0, 10), (4, 4.0, 10)], seed=3))
    assert np.array_equal(clip[9], clip[10])
    changed = (clip.astype(int) - clip[:1]).any(axis=(0, 3))
    assert 0.01 < changed.mean() < 0.5


def test_the_same_seed_gives_the_same_files(tmp_path):
    """In every process, whatever its memory contained before."""
    write_dataset(tmp_path / "a", 1, seed=1, num_frames=34)
    script = "from tpn.video.motion import write_dataset; junk = [bytearray(10**6 + i) for i in range(50)]; del junk\n"
    run_python(f"{script}write_dataset('b', 1, seed=1, num_frames=34)", tmp_path)
    for path in sorted((tmp_path / "a").rglob("*.mp4")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_masks(label):
    """Masks cover the shape and nothing else, also where it wraps around an edge."""
    arguments = {"tempo": 3, "seed": 5, "num_frames": 12}
    clip, inside = render(label, **arguments).astype(int), masks(label, **arguments)
    assert (inside.shape, inside.dtype) == (clip.shape[:3], bool)
    assert (inside.mean(axis=(1, 2)) > 0.01).all()
    near = np.stack([np.roll(inside, (y, x), (1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)])
    for frame, touched, filled in zip(clip, near.any(axis=0), near.all(axis=0), strict=True):
        assert len(np.unique(frame[filled], axis=0)) == 1  # the shape has one color
        seen = ~touched & ~near.any(axis=0)[0]
        changed = (frame[seen] != clip[0][seen]).any(axis=1)
        assert changed.mean() < 0.001  # the background does not change; tips are thinner than a pixel
