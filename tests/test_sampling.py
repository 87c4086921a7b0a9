import json
from pathlib import Path

import numpy as np
import pytest

from tpn import InputSpec
from tpn.video.sampling import (
    at_frame_rate,
    clip_span,
    dense_indices,
    random_dense_indices,
    random_segment_indices,
    segment_indices,
)

CASES = json.loads((Path(__file__).parent / "fixtures" / "sampling.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(c[k]) for k in c if k != "indices"))
def test_equal_to_the_reference(case):
    if case["num_frames"] == 1:  # the reference represents segments as clips of one frame
        clips = 2 if case["twice_sample"] else 1
        got = segment_indices(case["total_frames"], num_segments=case["num_clips"], num_clips=clips).reshape(-1, 1)
    else:
        names = ("num_frames", "frame_interval", "num_clips")
        got = dense_indices(case["total_frames"], **{n: case[n] for n in names})
    assert got.tolist() == case["indices"]


@pytest.mark.parametrize("total", [1, 2, 7, 8, 56, 57, 58, 300, 10_001])
@pytest.mark.parametrize("num_clips", [1, 2, 10])
def test_dense_covers_the_video(total, num_clips):
    indices = dense_indices(total, num_frames=8, frame_interval=8, num_clips=num_clips)
    assert indices.shape == (num_clips, 8)
    assert indices.dtype == np.int64
    assert indices.min() >= 0
    assert indices.max() < total
    assert (np.diff(indices, axis=1) % total == 8 % total).all()
    if total >= clip_span(8, 8) and num_clips > 1:
        assert indices[0, 0] == 0
        assert indices[-1, -1] == total - 1


def test_short_videos_wrap_around():
    assert dense_indices(3, num_frames=4, frame_interval=2).tolist() == [[0, 2, 1, 0]]
    assert dense_indices(1, num_frames=4, frame_interval=2).tolist() == [[0, 0, 0, 0]]
    assert segment_indices(2, num_segments=4, num_clips=2).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("num_frames", 0, ValueError),
        ("total_frames", -3, ValueError),
        ("num_clips", 1.5, TypeError),
        ("frame_interval", True, TypeError),
    ],
)
def test_invalid_counts(name, value, error):
    arguments = {"total_frames": 10, "num_frames": 4, "frame_interval": 2, "num_clips": 1} | {name: value}
    with pytest.raises(error, match=f"{name}.*{value}"):
        dense_indices(arguments.pop("total_frames"), **arguments)


def test_at_most_two_clips_of_segments():
    with pytest.raises(ValueError, match="num_clips.*3"):
        segment_indices(10, num_segments=4, num_clips=3)


@pytest.mark.parametrize(("fps", "target_fps"), [(25, 12.5), (25, 30), (60, 7.5), (29.97, 30)])
@pytest.mark.parametrize("total", [1, 2, 10, 300])
def test_at_frame_rate(fps, target_fps, total):
    def every(total_frames):
        return np.arange(total_frames)

    indices = at_frame_rate(every, fps, target_fps)(total)
    assert len(indices) == max(round(total * target_fps / fps), 1)
    assert indices[0] == 0
    assert indices[-1] < total
    assert np.allclose(np.diff(indices), fps / target_fps, atol=1)
    assert at_frame_rate(every, None, target_fps) is every


def test_input_spec():
    spec = InputSpec(8, 8, num_clips=10, num_crops=3, flip=True)
    assert (spec.clip_span, spec.num_views) == (57, 60)
    assert spec.indices(300).tolist() == dense_indices(300, num_frames=8, frame_interval=8, num_clips=10).tolist()
    spec = InputSpec(8, sampling="segments", num_clips=2)
    assert spec.indices(300).tolist() == segment_indices(300, num_segments=8, num_clips=2).tolist()


@pytest.mark.parametrize("total", [1, 5, 56, 57, 58, 300])
def test_random_dense_clips(total):
    rng = np.random.default_rng(0)
    clips = np.stack([random_dense_indices(total, num_frames=8, frame_interval=8, rng=rng) for _ in range(2000)])
    assert clips.shape == (2000, 1, 8)
    assert set(clips[:, 0, 0]) == set(range(max(total - 57, 0) + 1))
    assert (clips == (clips[:, :, :1] + np.arange(8) * 8) % total).all()


@pytest.mark.parametrize(("total", "length"), [(8, 1), (16, 2), (23, 2), (240, 30)])
def test_random_segments(total, length):
    rng = np.random.default_rng(0)
    clips = np.concatenate([random_segment_indices(total, num_segments=8, rng=rng) for _ in range(2000)])
    for i, column in enumerate(clips.T):
        assert set(column) == set(range(i * length, (i + 1) * length))


def test_random_segments_of_a_short_video():
    rng = np.random.default_rng(0)
    assert random_segment_indices(3, num_segments=8, rng=rng).tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]
    assert random_segment_indices(1, num_segments=4, rng=rng).tolist() == [[0, 0, 0, 0]]
