"""Which frames of a video a model sees: index arithmetic, no video needed.

Dense sampling (Kinetics models), num_frames=3, frame_interval=2, num_clips=2, 11 frames:

    frame    0  1  2  3  4  5  6  7  8  9 10
    clip 0   x     x     x                       clip_span = 2 * (3 - 1) + 1 = 5
    clip 1                     x     x     x     clips spread evenly, first at the start, last at the end

Segment sampling (Something-Something models), num_segments=4, 11 frames, segments of 2.75 frames:

    frame    0  1  2  3  4  5  6  7  8  9 10
    segment  |-------|-------|-------|-------|
    clip 0      x        x        x       x      the middle of each segment, rounded down
    clip 1   x     x           x        x        the start of each segment ("twice sampled")
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def clip_span(num_frames: int, frame_interval: int) -> int:
    """Return the number of consecutive frames that a clip reaches over."""
    return frame_interval * (num_frames - 1) + 1


def dense_indices(total_frames: int, *, num_frames: int, frame_interval: int, num_clips: int = 1) -> NDArray[np.int64]:
    """Return frame indices (num_clips, num_frames) of clips spread evenly over a video.

    A single clip is centred. Indices past the end of a short video wrap around to its start.

    total_frames, num_frames, num_clips: counts >= 1. frame_interval: index step >= 1, 1 = consecutive frames.
    """
    _check_positive(total_frames=total_frames, num_frames=num_frames, frame_interval=frame_interval, num_clips=num_clips)
    last_start = max(total_frames - clip_span(num_frames, frame_interval), 0)
    if num_clips == 1:
        starts = np.array([last_start // 2])
    else:
        starts = np.round(np.arange(num_clips) * (last_start / (num_clips - 1))).astype(np.int64)
    return (starts[:, None] + np.arange(num_frames) * frame_interval) % total_frames


def segment_indices(total_frames: int, *, num_segments: int, num_clips: int = 1) -> NDArray[np.int64]:
    """Return frame indices (num_clips, num_segments), one frame for each of `num_segments` equal parts of a video.

    num_clips: 1 takes the middles of the segments; 2 adds a second clip of the segments' first frames.
    total_frames, num_segments: counts >= 1; a video shorter than num_segments repeats frames.
    """
    _check_positive(total_frames=total_frames, num_segments=num_segments, num_clips=num_clips)
    if num_clips > 2:
        raise ValueError(f"segment sampling knows 1 clip (middles) or 2 (middles, starts), got num_clips={num_clips}")
    length = total_frames / num_segments
    starts = np.arange(num_segments) * length
    return np.stack([starts + length / 2, starts])[:num_clips].astype(np.int64)


def random_dense_indices(
    total_frames: int, *, num_frames: int, frame_interval: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return frame indices (1, num_frames) of a training clip that starts anywhere it fits.

    A video shorter than the clip wraps around, as in `dense_indices`.
    """
    _check_positive(total_frames=total_frames, num_frames=num_frames, frame_interval=frame_interval)
    last_start = max(total_frames - clip_span(num_frames, frame_interval), 0)
    start = rng.integers(last_start + 1)
    return (start + np.arange(num_frames)[None] * frame_interval) % total_frames


def random_segment_indices(total_frames: int, *, num_segments: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return frame indices (1, num_segments) of a training clip, one random frame of each of `num_segments` equal parts.

    The parts have `total_frames // num_segments` frames. A video with fewer frames than segments repeats frames evenly.
    """
    _check_positive(total_frames=total_frames, num_segments=num_segments)
    length = total_frames // num_segments
    if length == 0:
        return (np.arange(num_segments)[None] * total_frames) // num_segments
    return np.arange(num_segments)[None] * length + rng.integers(length, size=(1, num_segments))


def _check_positive(**counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
