"""Choose which frames of a video a model sees. These functions compute indices only; they read no video.

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

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

FrameSampler = Callable[[int], NDArray[np.int64]]
"""Returns the frame indices to read from a video with the given number of frames, for example `InputSpec.indices`."""


def clip_span(num_frames: int, frame_interval: int) -> int:
    """Return the number of consecutive frames from the first to the last frame of a clip."""
    return frame_interval * (num_frames - 1) + 1


def dense_indices(total_frames: int, *, num_frames: int, frame_interval: int, num_clips: int = 1) -> NDArray[np.int64]:
    """Return the frame indices of clips that are spread evenly over a video.

    A single clip is centered. Indices past the end of a short video wrap around to its start.

    Args:
        total_frames: number of frames of the video, at least 1.
        num_frames: number of frames of a clip, at least 1.
        frame_interval: index step between the frames of a clip, at least 1; 1 takes consecutive frames.
        num_clips: number of clips, at least 1.

    Returns:
        Indices (num_clips, num_frames).
    """
    _check_positive(total_frames=total_frames, num_frames=num_frames, frame_interval=frame_interval, num_clips=num_clips)
    last_start = max(total_frames - clip_span(num_frames, frame_interval), 0)
    if num_clips == 1:
        starts = np.array([last_start // 2])
    else:
        starts = np.round(np.arange(num_clips) * (last_start / (num_clips - 1))).astype(np.int64)
    return (starts[:, None] + np.arange(num_frames) * frame_interval) % total_frames


def segment_indices(total_frames: int, *, num_segments: int, num_clips: int = 1) -> NDArray[np.int64]:
    """Divide a video into equal segments and return the index of one frame from each.

    Args:
        total_frames: number of frames of the video, at least 1. Frames repeat if the video has fewer frames than segments.
        num_segments: number of segments, at least 1.
        num_clips: 1 takes the middle frame of each segment; 2 adds a second clip with the first frame of each segment.

    Returns:
        Indices (num_clips, num_segments).
    """
    _check_positive(total_frames=total_frames, num_segments=num_segments, num_clips=num_clips)
    if num_clips > 2:
        raise ValueError(f"num_clips must be 1 or 2 for segment sampling, got {num_clips}")
    length = total_frames / num_segments
    starts = np.arange(num_segments) * length
    return np.stack([starts + length / 2, starts])[:num_clips].astype(np.int64)


def random_dense_indices(
    total_frames: int, *, num_frames: int, frame_interval: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return the frame indices (1, num_frames) of a training clip with a random start.

    Every start at which the clip fits into the video is equally likely. Shorter videos wrap around as in `dense_indices`, which
    describes the arguments.
    """
    _check_positive(total_frames=total_frames, num_frames=num_frames, frame_interval=frame_interval)
    last_start = max(total_frames - clip_span(num_frames, frame_interval), 0)
    start = rng.integers(last_start + 1)
    return (start + np.arange(num_frames)[None] * frame_interval) % total_frames


def random_segment_indices(total_frames: int, *, num_segments: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the frame indices (1, num_segments) of a training clip with one random frame from each segment.

    Each segment has `total_frames // num_segments` frames. A video with fewer frames than segments repeats frames evenly.
    """
    _check_positive(total_frames=total_frames, num_segments=num_segments)
    length = total_frames // num_segments
    if length == 0:
        return (np.arange(num_segments)[None] * total_frames) // num_segments
    return np.arange(num_segments)[None] * length + rng.integers(length, size=(1, num_segments))


def at_frame_rate(sample: FrameSampler, fps: float | None, target_fps: float) -> FrameSampler:
    """Return a sampler that chooses the frames that `sample` would choose at another frame rate.

    Args:
        sample: sampler for a video with `target_fps`.
        fps: frames per second of the video. If it is None (unknown) or 0, `sample` is returned.
        target_fps: frames per second that `sample` assumes.
    """
    if not fps:
        return sample
    ratio = fps / target_fps

    def resampled(total_frames: int) -> NDArray[np.int64]:
        indices = sample(max(round(total_frames / ratio), 1))
        return np.minimum(np.floor(indices * ratio), total_frames - 1).astype(np.int64)

    return resampled


def _check_positive(**counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
