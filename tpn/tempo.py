"""Classify a clip that slides over a video, find actions in time, and measure their tempo.

Files, arrays, and live frames give the same results. For videos of any length, only the cropped frames of one clip are kept.
The tempo of an action (Yang et al., CVPR 2020) is the full width at half maximum of its probability along time.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tpn.config import InputSpec
from tpn.files import StrPath
from tpn.predict import Prediction, VideoClassifier
from tpn.validation import check_int, check_number
from tpn.video import decode
from tpn.video.datasets import Item, RawFrames, VideoDataset, bad_reason
from tpn.video.decode import VideoError
from tpn.video.live import newest
from tpn.video.sampling import dense_indices
from tpn.video.sources import Array, channels_first
from tpn.video.transforms import center_crop, resize_short_side

Kept = TypeVar("Kept")


@dataclass(frozen=True, eq=False)
class Clip:
    """The prediction for one clip.

    Attributes:
        first: index of its first frame in the video, from 0.
        last: index of its last frame in the video.
        probs: (K,) float32 on the CPU.
    """

    first: int
    last: int
    probs: Tensor

    def time(self, fps: float) -> float:
        """Return the middle of the clip in seconds."""
        return (self.first + self.last) / 2 / fps


@dataclass(frozen=True)
class Segment:
    """A part of a video in which one class is the most probable one, or none is probable enough.

    Attributes:
        label: index of the class, or None.
        start: in seconds.
        end: in seconds.
        probability: mean over the clips of the segment of the probability of the class, 0..1; without a class, of the most
            probable one of each clip.
    """

    label: int | None
    start: float
    end: float
    probability: float


@dataclass(frozen=True)
class InstanceTempo:
    """The tempo of one video of a dataset.

    Attributes:
        item: the video.
        seconds: as returned by `instance_tempo`, or None if the video is unreadable.
        reason: why the video is unreadable, or None.
    """

    item: Item
    seconds: float | None
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class GainAgainstVariance:
    """The relation between the accuracy gain and the tempo variance of the classes.

    Attributes:
        gain: accuracy gain of each class (K,), NaN where it is unknown.
        num_classes: number of classes with a known gain and a known variance; only these are correlated.
        pearson: Pearson correlation of gain and variance. NaN if one of them is constant.
        spearman: Spearman rank correlation of gain and variance. NaN if one of them is constant.
    """

    gain: NDArray[np.float64]
    num_classes: int
    pearson: float
    spearman: float


def slide(
    classifier: VideoClassifier,
    frames: StrPath | Iterable[Array],
    *,
    stride: int | None = None,
    frame_interval: int | None = None,
    live: bool = False,
) -> Generator[Clip]:
    """Classify the center crop of a clip that slides over a video.

    The clips start at frame 0, `stride`, 2 `stride`, ... and end within the video. A video that is shorter than one clip gives
    one clip, which repeats its frames as in `dense_indices`.

    Args:
        classifier: its batch size applies on a GPU; 1 yields each clip as soon as it is complete.
        frames: a video file; or an array, a `Camera`, or another iterable of frames, uint8 RGB 0..255, (H, W, 3) or (3, H, W).
        stride: step from clip to clip, in frames. Default: a quarter of a clip, `num_frames // 4 * frame_interval`.
        frame_interval: step between the frames of a clip, 1 for consecutive frames. Default: that of the model's `input_spec`.
        live: keep up with a camera. Frames are read in a thread and each clip is classified as soon as it is complete. If several
            clips are complete before the model is ready, only the last of them is classified.

    Yields:
        A `Clip` for each position.

    Raises:
        ValueError: `stride` or `frame_interval` is less than 1, there are no frames, the model has no classes, or it samples
            segments and `frame_interval` is None.
        TypeError: a frame is not a uint8 array.
        VideoError, OSError: the video cannot be read. Clips before the error are yielded first.
    """
    if not classifier.model.num_classes:
        raise ValueError("the model has no classes (num_classes=0); use tpn features for its features")
    spec = sliding_spec(classifier.spec, frame_interval)
    stride = default_stride(spec) if stride is None else stride
    check_int("stride", stride, minimum=1)
    if isinstance(frames, str | os.PathLike):
        frames = decode.iter_frames(frames)
    windows = sliding_windows(frames, spec, stride, partial(preprocess, spec=spec, device=classifier.device))
    return _classify(classifier, newest(windows) if live else windows, spec, one_by_one=live or classifier.batch_size == 1)


def sliding_spec(spec: InputSpec, frame_interval: int | None = None) -> InputSpec:
    """Return the input of a model for sliding clips: dense sampling and one center crop. Raises ValueError as `slide` does."""
    if spec.sampling != "dense" and frame_interval is None:
        raise ValueError(
            f"the model samples {spec.num_frames} segments of a whole video and has no frame interval; pass frame_interval"
            " (tpn timeline --frame-interval) to classify clips, for which it was not trained"
        )
    if spec.target_fps is not None and frame_interval is None:
        raise ValueError(
            f"the model samples {spec.target_fps:g} frames per second, whatever the rate of the video; pass frame_interval"
            " (tpn timeline --frame-interval) in frames of the video"
        )
    interval = spec.frame_interval if frame_interval is None else frame_interval
    return replace(spec, sampling="dense", frame_interval=interval, num_clips=1, num_crops=1, flip=False)


def default_stride(spec: InputSpec) -> int:
    """Return a quarter of a clip, in frames."""
    return max(spec.num_frames // 4, 1) * spec.frame_interval


def curves(clips: Iterable[Clip], *, fps: float) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Return the middles of the clips in seconds (N,) and the probabilities of all classes (N, K)."""
    clips = list(clips)
    if not clips:
        raise ValueError("there are no clips")
    return np.array([clip.time(fps) for clip in clips]), np.stack([clip.probs.numpy() for clip in clips])


def segments(clips: Iterable[Clip], *, fps: float, min_probability: float = 0.5) -> Generator[Segment]:
    """Join neighboring clips with the same most probable class, or without one, and yield each segment when it ends.

    A segment starts and ends halfway between the middles of its outer clips and of their neighbors. The first one starts with the
    video, the last one ends with the last clip.

    Args:
        clips: in order, such as from `slide`.
        fps: frame rate of the video.
        min_probability: of the class, 0..1. Clips below it are in segments without a class, whose `label` is None.
    """
    check_number("min_probability", min_probability, minimum=0, maximum=1)
    if not fps > 0:
        raise ValueError(f"fps must be greater than 0, got {fps}")
    before: Clip | None = None
    label: int | None = None
    start, total, count = 0.0, 0.0, 0  # of the current segment
    for clip in clips:
        best = int(clip.probs.argmax())
        probability = float(clip.probs[best])
        clip_label = best if probability >= min_probability else None
        if before is not None and clip_label != label:
            boundary = (before.time(fps) + clip.time(fps)) / 2
            yield Segment(label, start, boundary, total / count)
            start, total, count = boundary, 0.0, 0
        label, total, count = clip_label, total + probability, count + 1
        before = clip
    if before is not None:
        yield Segment(label, start, (before.last + 1) / fps, total / count)


def full_width_at_half_maximum(times: ArrayLike, values: ArrayLike, *, ends: tuple[float, float] | None = None) -> float:
    """Return how long a curve stays at or above half of its maximum, around the first maximum.

    Args:
        times: (N,), increasing.
        values: (N,), at least 0. The curve is linear between them.
        ends: start and end of the video. A curve that has not fallen below half of its maximum there is cut there. Default: the
            first and the last time.

    Returns:
        The width in the unit of `times`; 0 for a curve that is 0 everywhere.

    Raises:
        ValueError: the arrays or the ends are not as described.
    """
    t, v = np.asarray(times, np.float64), np.asarray(values, np.float64)
    if t.ndim != 1 or t.shape != v.shape or not len(t):
        raise ValueError(f"times and values must have the same shape (N,) with N >= 1, got {t.shape}, {v.shape}")
    if not (np.diff(t) > 0).all():
        raise ValueError("times must increase")
    if not (v >= 0).all():
        raise ValueError("values must be at least 0")
    start, end = (t[0], t[-1]) if ends is None else ends
    if not start <= t[0] <= t[-1] <= end:
        raise ValueError(f"ends must enclose the times {t[0]}..{t[-1]}, got {start}..{end}")
    peak = int(v.argmax())
    if v[peak] == 0:
        return 0.0
    after = _half_maximum_time(t[peak:], v[peak:])
    before = _half_maximum_time(-t[peak::-1], v[peak::-1])
    return float((end if after is None else after) - (start if before is None else -before))


def instance_tempo(clips: Iterable[Clip], label: int, *, fps: float) -> float:
    """Return the tempo of an action in one video: the full width at half maximum of its probability, in seconds.

    Args:
        clips: all clips of the video, such as from `slide`.
        label: index of the class.
        fps: frame rate of the video.
    """
    rows = [(clip.time(fps), float(clip.probs[label]), clip.last) for clip in clips]
    if not rows:
        raise ValueError("there are no clips")
    times, values, last = zip(*rows, strict=True)
    return full_width_at_half_maximum(times, values, ends=(0.0, (last[-1] + 1) / fps))


def dataset_tempos(
    classifier: VideoClassifier,
    dataset: VideoDataset,
    *,
    stride: int | None = None,
    frame_interval: int | None = None,
) -> Generator[InstanceTempo]:
    """Measure the tempo of every video of a `VideoFolder` or `VideoList` from the probability of its own class.

    Args:
        classifier: its labels must include the classes of the dataset.
        dataset: a `VideoFolder` or `VideoList` of whole videos, whose `spec` has no `target_fps`.
        stride: as in `slide`.
        frame_interval: as in `slide`.

    Yields:
        The tempo of each video, or the reason why it is unreadable.

    Raises:
        ValueError: the classifier lacks a class, or the dataset does not have whole videos at their own frame rates.
    """
    if isinstance(dataset, RawFrames) or dataset.spec.target_fps is not None:
        raise ValueError("tempo is measured at the videos' own frame rates; pass a VideoFolder or VideoList without target_fps")
    if any(item.is_part for item in dataset.items):
        raise ValueError("tempo is measured in whole videos; pass a VideoList without the columns start, end, and track")
    unknown = [name for name in dataset.classes if name not in classifier.labels]
    if unknown:
        raise ValueError(f"the model has no class {unknown[0]!r}; pass classes=classifier.labels to the dataset")
    labels = [classifier.labels.index(name) for name in dataset.classes]

    def measure(item: Item) -> InstanceTempo:
        try:
            fps, _ = decode.header(item.path)
            if fps is None:
                raise VideoError(f"{item.path}: the file does not state its frame rate")
            clips = slide(classifier, item.path, stride=stride, frame_interval=frame_interval)
            return InstanceTempo(item, instance_tempo(clips, labels[item.labels[0]], fps=fps))
        except (VideoError, OSError) as error:
            return InstanceTempo(item, None, bad_reason(item, error))

    return (measure(item) for item in dataset.items)


def tempo_variance(tempos: Iterable[InstanceTempo], num_classes: int) -> NDArray[np.float64]:
    """Return the sample variance of the tempo in each class, (K,) in s². NaN for classes with fewer than two readable videos."""
    seconds: list[list[float]] = [[] for _ in range(num_classes)]
    for tempo in tempos:
        if tempo.seconds is not None:
            seconds[tempo.item.labels[0]].append(tempo.seconds)
    return np.array([np.var(values, ddof=1) if len(values) > 1 else np.nan for values in seconds])


def gain_against_variance(
    baseline: Sequence[float] | NDArray[np.floating],
    improved: Sequence[float] | NDArray[np.floating],
    variance: Sequence[float] | NDArray[np.floating],
) -> GainAgainstVariance:
    """Correlate the accuracy gain of one model over another with the tempo variance, class by class.

    Args:
        baseline: accuracy of one model in each class (K,), NaN where unknown.
        improved: accuracy of the other model in each class (K,), NaN where unknown.
        variance: (K,), from `tempo_variance`.
    """
    one, two, var = (np.asarray(values, np.float64) for values in (baseline, improved, variance))
    if not one.shape == two.shape == var.shape or one.ndim != 1:
        raise ValueError(f"baseline, improved, and variance must have one shape (K,), got {one.shape}, {two.shape}, {var.shape}")
    gain = two - one
    known = np.isfinite(gain) & np.isfinite(var)
    x, y = var[known], gain[known]
    return GainAgainstVariance(gain, int(known.sum()), _correlation(x, y), _correlation(_ranks(x), _ranks(y)))


def sliding_windows(
    frames: Iterable[Array], spec: InputSpec, stride: int, prepare: Callable[[Array], Kept]
) -> Generator[tuple[int, int, list[Kept]]]:
    """Yield each clip as soon as its last frame has been read. Keep only frames that this clip and later ones need.

    Args:
        frames: as in `slide`.
        stride: as in `slide`.
        spec: from `sliding_spec`.
        prepare: called once for each frame that a clip may need; returns what to keep of it, such as `preprocess`.

    Yields:
        Indices of the first and the last frame of a clip, and what is kept of its frames.
    """
    span, interval = spec.clip_span, spec.frame_interval
    kept: dict[int, Kept] = {}
    start, index = 0, -1  # first frame of the next clip; current frame

    def is_needed(index: int) -> bool:
        return any((index - first) % interval == 0 for first in range(start, index + 1, stride))

    for index, frame in enumerate(frames):
        if start == 0 or is_needed(index):  # a video shorter than the first clip may need every frame
            kept[index] = prepare(frame)
        if index == start + span - 1:
            yield start, index, [kept[i] for i in range(start, index + 1, interval)]
            start += stride
            kept = {i: image for i, image in kept.items() if is_needed(i)}
    if index < 0:
        raise ValueError("there are no frames")
    if start == 0:
        (indices,) = dense_indices(index + 1, num_frames=spec.num_frames, frame_interval=interval)
        yield 0, index, [kept[i] for i in indices.tolist()]


def preprocess(frame: Array, spec: InputSpec, device: torch.device) -> Tensor:
    """Resize and crop a frame to uint8 (3, S, S)."""
    if not isinstance(frame, np.ndarray | Tensor) or frame.ndim != 3:
        shape = getattr(frame, "shape", type(frame).__name__)
        raise TypeError(f"frames must be arrays (3, H, W) or (H, W, 3), got {shape}")
    image = channels_first(frame[None])[0].to(device)
    # The copy frees the memory of the whole frame, and lets the caller overwrite it.
    return center_crop(resize_short_side(image, spec.short_side), spec.crop_size).clone()


def _classify(
    classifier: VideoClassifier, windows: Generator[tuple[int, int, list[Tensor]]], spec: InputSpec, *, one_by_one: bool
) -> Generator[Clip]:
    spec = replace(spec, short_side=spec.crop_size)  # the frames are resized and cropped already
    spans: deque[tuple[int, int]] = deque()
    clip_indices = torch.arange(spec.num_frames)[None]

    def classify(windows: Iterable[tuple[int, int, list[Tensor]]]) -> Generator[Clip]:
        failures: list[Exception] = []

        def videos() -> Generator[tuple[Tensor, Tensor]]:
            try:
                for first, last, frames in windows:
                    spans.append((first, last))
                    yield torch.stack(frames), clip_indices
            except Exception as error:  # raised below, after the earlier clips that still wait for a full batch
                failures.append(error)

        for result in classifier.classify_each(videos(), spec=spec):
            assert isinstance(result, Prediction)  # `videos` yields no errors
            yield Clip(*spans.popleft(), result.probs)
        if failures:
            raise failures[0]

    try:
        if one_by_one:
            for window in windows:
                yield from classify([window])
        else:
            yield from classify(windows)
    finally:
        windows.close()


def _half_maximum_time(times: NDArray[np.float64], values: NDArray[np.float64]) -> float | None:
    """Return when a curve that starts at its maximum first falls below half of it, or None."""
    half = values[0] / 2
    below = np.flatnonzero(values < half)
    if not len(below):
        return None
    i = below[0] - 1
    return float(times[i] + (values[i] - half) / (values[i] - values[i + 1]) * (times[i + 1] - times[i]))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ranks from 1. Equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
