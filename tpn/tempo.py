"""What happens when in a video, and at what tempo: a clip that slides over its frames.

Files, arrays and live frames are seen in the same way, in memory for one clip's span of cropped frames, however long they are.
The paper's measure of visual tempo (Yang et al., CVPR 2020) comes from the same curves: how long the probability of an action
stays above half of its maximum, in one video; and how much that varies among the videos of a class.
"""

import os
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tpn.predict import Prediction, VideoClassifier, channels_first
from tpn.video import decode
from tpn.video.datasets import Item, RawFrames, VideoDataset, bad_reason
from tpn.video.decode import VideoError
from tpn.video.live import newest
from tpn.video.sampling import dense_indices
from tpn.video.spec import InputSpec
from tpn.video.transforms import center_crop, resize_short_side

Path = str | os.PathLike[str]
Frame = np.ndarray[Any, Any] | Tensor
Window = tuple[int, int, Tensor]
"""Numbers of its first and last frame, and a clip, uint8 (T, 3, S, S)."""


@dataclass(frozen=True, eq=False)
class Clip:
    """What a model says of one clip.

    Attributes:
        first, last: numbers of its first and last frame, from 0.
        probs: (K,) float32 on the CPU.
    """

    first: int
    last: int
    probs: Tensor

    def time(self, fps: float) -> float:
        """Return the middle of the clip, in seconds."""
        return (self.first + self.last) / 2 / fps


@dataclass(frozen=True)
class Segment:
    """A time in which one class is the most probable one.

    Attributes:
        label: number of the class.
        start, end: seconds.
        probability: of the class, the mean over the clips.
    """

    label: int
    start: float
    end: float
    probability: float


@dataclass(frozen=True)
class InstanceTempo:
    """The tempo of one video of a data set: seconds as in `instance_tempo`, or None and the reason why it cannot be read."""

    item: Item
    seconds: float | None
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class GainAgainstVariance:
    """How what a model gains goes with the variance of the tempo, over the classes for which all is known.

    Attributes:
        gain: (K,) of each class, NaN where it is not known.
        num_classes: that are known.
        pearson, spearman: correlation of gain and variance, and of their ranks; NaN where one of them is the same everywhere.
    """

    gain: NDArray[np.float64]
    num_classes: int
    pearson: float
    spearman: float


def slide(
    classifier: VideoClassifier,
    frames: Path | Iterable[Frame],
    *,
    stride: int | None = None,
    frame_interval: int | None = None,
    live: bool = False,
) -> Generator[Clip]:
    """Classify a clip that slides over a video, its centre crop; the clips start at frame 0, `stride`, 2 `stride`, ...

    A clip counts only if all of it is there; a video shorter than one wraps around, as in `dense_indices`, and is one clip.
    Only the frames that coming clips need are kept, cropped.

    Args:
        frames: a file; or frames in order, uint8 RGB 0..255, (H, W, 3) or (3, H, W): an array, a `Camera`, a generator, ...
        stride: in frames. Default: a quarter of the clip, `num_frames // 4 * frame_interval`.
        frame_interval: between the frames of a clip. Default: the model's own.
        live: for frames that do not wait, a camera's. They are read in a thread, each clip is classified as soon as it is
            complete, and those that are complete while the model is at work are skipped, all but the last: it never lags.
            Otherwise clips go through a model on a GPU in batches of `classifier.batch_size`; 1 gives each when it is complete.

    Raises ValueError: a model that samples segments, without `frame_interval`; no frames. TypeError, ValueError: frames of
    another type or shape. And what reading raises, on the way.
    """
    if not classifier.model.num_classes:
        raise ValueError("the model has no classes, num_classes is 0; tpn features writes what it gives")
    spec = sliding_spec(classifier.spec, frame_interval)
    stride = default_stride(spec) if stride is None else stride
    if stride < 1:
        raise ValueError(f"stride must be at least 1 frame, got {stride}")
    if isinstance(frames, str | os.PathLike):
        frames = decode.iter_frames(frames)
    windows = _windows(frames, spec, stride, classifier.device)
    return _classified(classifier, newest(windows) if live else windows, spec, at_once=live or classifier.batch_size == 1)


def sliding_spec(spec: InputSpec, frame_interval: int | None = None) -> InputSpec:
    """Return the input of a model whose clips slide over a video: dense, one crop. Raises ValueError as `slide` does."""
    if spec.sampling != "dense" and frame_interval is None:
        raise ValueError(
            "the model sees whole videos, as segments, not clips that can slide; pass frame_interval (--frame-interval)"
            f" to show it clips of {spec.num_frames} frames that far apart, which it was not trained for"
        )
    interval = spec.frame_interval if frame_interval is None else frame_interval
    if interval < 1:
        raise ValueError(f"frame_interval must be at least 1, got {interval}")
    return replace(spec, sampling="dense", frame_interval=interval, num_clips=1, num_crops=1, flip=False)


def default_stride(spec: InputSpec) -> int:
    """Return a quarter of a clip, in frames."""
    return max(spec.num_frames // 4, 1) * spec.frame_interval


def curves(clips: Iterable[Clip], *, fps: float) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Return the middles of the clips in seconds, (N,), and the probability of every class there, (N, K)."""
    clips = list(clips)
    if not clips:
        raise ValueError("there are no clips")
    return np.array([clip.time(fps) for clip in clips]), np.stack([clip.probs.numpy() for clip in clips])


def segments(clips: Iterable[Clip], *, fps: float, threshold: float = 0.5) -> Generator[Segment]:
    """Join neighbouring clips that have the same most probable class, at or above `threshold`; yield each run when it ends.

    A run reaches halfway to the middles of the clips before and after it; from the start of the video, and to the end of its last
    clip.
    """
    before: Clip | None = None
    label, start, total, count = -1, 0.0, 0.0, 0  # of the run under way: its class, or -1 for none
    for clip in clips:
        best = int(clip.probs.argmax())
        probability = float(clip.probs[best])
        now = best if probability >= threshold else -1
        if now != label:
            edge = 0.0 if before is None else (before.time(fps) + clip.time(fps)) / 2
            if label >= 0:
                yield Segment(label, start, edge, total / count)
            label, start, total, count = now, edge, 0.0, 0
        total, count = total + probability, count + 1
        before = clip
    if before is not None and label >= 0:
        yield Segment(label, start, (before.last + 1) / fps, total / count)


def full_width_at_half_maximum(times: ArrayLike, values: ArrayLike, *, ends: tuple[float, float] | None = None) -> float:
    """Return how long a curve stays at half of its maximum or above, around that maximum (the first one of equals).

    times: (N,), increasing. values: (N,), at least 0; the curve is linear between them.
    ends: where the video starts and ends. Default: the first and the last of the times. A curve that has not fallen below the
        half there, such as one that is the same everywhere, is cut there.

    Returns a time in the units of `times`; 0 for a curve that is 0 everywhere. Raises ValueError for other arrays.
    """
    t, v = np.asarray(times, np.float64), np.asarray(values, np.float64)
    if t.ndim != 1 or t.shape != v.shape or not len(t):
        raise ValueError(f"times and values must be lists of the same length, of one or more, got {t.shape} and {v.shape}")
    if not (np.diff(t) > 0).all() or not (v >= 0).all():
        raise ValueError("times must increase, and values must be at least 0")
    start, end = (t[0], t[-1]) if ends is None else ends
    if not start <= t[0] <= t[-1] <= end:
        raise ValueError(f"ends must enclose the times {t[0]}..{t[-1]}, got {start}..{end}")
    peak = int(v.argmax())
    if v[peak] == 0:
        return 0.0
    after = _falls_to_half(t[peak:], v[peak:])
    before = _falls_to_half(-t[peak::-1], v[peak::-1])
    return float((end if after is None else after) - (start if before is None else -before))


def instance_tempo(clips: Iterable[Clip], label: int, *, fps: float) -> float:
    """Return the tempo of an action in one video, in seconds: the full width at half maximum of its probability along time.

    clips: of the whole video. label: number of the class.
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
    """Measure the tempo of every video of a `VideoFolder` or `VideoList`, by the probability of its own class.

    stride, frame_interval: as in `slide`. A video that cannot be read is reported in its place, with the reason.
    Raises ValueError: a class that the model does not know, or videos whose frame rate is changed or unknown by design.
    """
    if isinstance(dataset, RawFrames) or dataset.target_fps is not None:
        raise ValueError("tempo is measured at the videos' own frame rate; pass a VideoFolder or VideoList without target_fps")
    unknown = [name for name in dataset.classes if name not in classifier.labels]
    if unknown:
        raise ValueError(f"the model does not know the class {unknown[0]!r}; pass classes=classifier.labels to the data set")
    labels = [classifier.labels.index(name) for name in dataset.classes]

    def measured(item: Item) -> InstanceTempo:
        try:
            fps, _ = decode.header(item.path)
            if fps is None:
                raise VideoError(f"{item.path}: the file does not state its frame rate")
            clips = slide(classifier, item.path, stride=stride, frame_interval=frame_interval)
            return InstanceTempo(item, instance_tempo(clips, labels[item.label], fps=fps))
        except (VideoError, OSError) as error:
            return InstanceTempo(item, None, bad_reason(item, error))

    return (measured(item) for item in dataset.items)


def tempo_variance(tempos: Iterable[InstanceTempo], num_classes: int) -> NDArray[np.float64]:
    """Return the variance of the tempo in each class, (K,) in s², with N - 1; NaN for fewer than two videos.

    Videos that could not be read do not count.
    """
    seconds: list[list[float]] = [[] for _ in range(num_classes)]
    for tempo in tempos:
        if tempo.seconds is not None:
            seconds[tempo.item.label].append(tempo.seconds)
    return np.array([np.var(values, ddof=1) if len(values) > 1 else np.nan for values in seconds])


def gain_against_variance(
    baseline: Sequence[float] | NDArray[np.floating],
    improved: Sequence[float] | NDArray[np.floating],
    variance: Sequence[float] | NDArray[np.floating],
) -> GainAgainstVariance:
    """Relate what a model gains in each class to the variance of its tempo.

    baseline, improved: accuracies of two models, (K,) each. variance: (K,), of `tempo_variance`. NaN: not known.
    """
    one, two, var = (np.asarray(values, np.float64) for values in (baseline, improved, variance))
    if not one.shape == two.shape == var.shape or one.ndim != 1:
        raise ValueError(f"expected a value for each class, three times, got shapes {one.shape}, {two.shape}, {var.shape}")
    gain = two - one
    known = np.isfinite(gain) & np.isfinite(var)
    x, y = var[known], gain[known]
    return GainAgainstVariance(gain, int(known.sum()), _correlation(x, y), _correlation(_ranks(x), _ranks(y)))


def _windows(frames: Iterable[Frame], spec: InputSpec, stride: int, device: torch.device) -> Generator[Window]:
    """Clips, each as soon as its last frame is there."""
    span, interval = spec.clip_span, spec.frame_interval
    kept: dict[int, Tensor] = {}
    start, number = 0, -1  # of the next clip; of the frame

    def needed(number: int) -> bool:
        return any((number - first) % interval == 0 for first in range(start, number + 1, stride))

    for number, frame in enumerate(frames):
        if start == 0 or needed(number):  # if the video ends before the first clip does, every frame may be wanted
            kept[number] = _prepared(frame, spec, device)
        if number == start + span - 1:
            clip = torch.stack([kept[i] for i in range(start, number + 1, interval)])
            start += stride
            kept = {i: image for i, image in kept.items() if needed(i)}
            yield start - stride, number, clip
    if number < 0:
        raise ValueError("there are no frames")
    if start == 0:
        (indices,) = dense_indices(number + 1, num_frames=spec.num_frames, frame_interval=interval)
        yield 0, number, torch.stack([kept[i] for i in indices.tolist()])


def _prepared(frame: Frame, spec: InputSpec, device: torch.device) -> Tensor:
    """uint8 (3, S, S), a copy: the whole frame need not be kept, and its owner may overwrite it."""
    if not isinstance(frame, np.ndarray | Tensor) or frame.ndim != 3:
        shape = getattr(frame, "shape", type(frame).__name__)
        raise TypeError(f"expected frames as arrays (3, H, W) or (H, W, 3), got {shape}")
    image = channels_first(frame[None])[0].to(device)
    return center_crop(resize_short_side(image, spec.short_side), spec.crop_size).clone()


def _classified(classifier: VideoClassifier, windows: Generator[Window], spec: InputSpec, *, at_once: bool) -> Generator[Clip]:
    spec = replace(spec, short_side=spec.crop_size)  # they are resized
    spans: deque[tuple[int, int]] = deque()
    places = torch.arange(spec.num_frames)[None]

    def put_through(windows: Iterable[Window]) -> Generator[Clip]:
        failures: list[Exception] = []

        def videos() -> Generator[tuple[Tensor, Tensor]]:
            try:
                for first, last, frames in windows:
                    spans.append((first, last))
                    yield frames, places
            except Exception as error:  # raised below, when the clips before it, which wait for a batch, have been through
                failures.append(error)

        for result in classifier.classify_each(videos(), spec=spec):
            assert isinstance(result, Prediction)  # errors were never handed in
            yield Clip(*spans.popleft(), result.probs)
        if failures:
            raise failures[0]

    try:
        if not at_once:
            yield from put_through(windows)
        else:
            for window in windows:
                yield from put_through([window])
    finally:
        windows.close()


def _falls_to_half(times: NDArray[np.float64], values: NDArray[np.float64]) -> float | None:
    """When a curve that starts at its maximum first goes below half of it; None: never."""
    half = values[0] / 2
    below = np.flatnonzero(values < half)
    if not len(below):
        return None
    i = below[0] - 1
    return float(times[i] + (values[i] - half) / (values[i] - values[i + 1]) * (times[i + 1] - times[i]))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
