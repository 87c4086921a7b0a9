"""Features of a window that slides over a video, as temporal action localization reads them.

A video of any length is decoded once. Frames that windows share go through the layers that compute each frame alone once; see
`TPNClassifier.forward_frames`. Only the frames of one batch of windows are kept, for a CPU those of one window.
"""

import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from tpn.config import InputSpec
from tpn.errors import printable
from tpn.features import Columns, DType, FeatureFile, FeatureFolder, WindowsAbout, add_results, describe, feature_model, is_table
from tpn.files import StrPath
from tpn.models.features import FeatureModel
from tpn.models.layers import reference_tensor
from tpn.predict import Unreadable, VideoClassifier
from tpn.tempo import preprocess, sliding_spec, sliding_windows
from tpn.validation import check_int
from tpn.video import decode
from tpn.video.decode import VideoError
from tpn.video.sources import Array


@dataclass(frozen=True, eq=False)
class Window:
    """The features of one window.

    Attributes:
        first: index of its first frame in the video, from 0.
        last: index of its last frame in the video.
        features: (C,) float32 on the CPU.
    """

    first: int
    last: int
    features: Tensor


@dataclass(eq=False)
class _Frame:
    """A frame (3, S, S), until the model needs it; then what the backbone computes of it alone."""

    image: Tensor | None
    maps: tuple[Tensor, ...] = ()


def window_features(
    classifier: VideoClassifier, frames: StrPath | Iterable[Array], *, stride: int, window: int | None = None
) -> Generator[Window]:
    """Return the features of the center crop of a window that slides over a video.

    The windows start at frame 0, `stride`, 2 `stride`, ... and end within the video. A video that is shorter than one window
    gives one window, which repeats its frames as in `dense_indices`. Up to rounding, the `FeatureModel` returns the same
    features for each window as a separate clip.

    Args:
        classifier: a `VideoClassifier` of a `FeatureModel`; its batch size applies.
        frames: a video file, or an array or another iterable of frames, uint8 RGB 0..255, (H, W, 3) or (3, H, W).
        stride: step from window to window, in frames.
        window: frames that a window spans, a multiple of the model's `num_frames`. The model sees one of
            `window // num_frames`. Default: `num_frames * frame_interval` of the model's `input_spec`.

    Yields:
        A `Window` for each position.

    Raises:
        ValueError: `stride` is less than 1, `window` is not a multiple of `num_frames`, or the model has no default; there are no
            frames; the model is in training mode, or its features are not finite.
        TypeError: the classifier has no `FeatureModel`, or a frame is not a uint8 array.
        VideoError, OSError: the video cannot be read. Windows before the error may have been yielded.

    Example:
        >>> classifier = tpn.VideoClassifier(FeatureModel(tpn.create_model("tpn_slowonly_r50_k400", pretrained=True)))
        >>> features = torch.stack([window.features for window in window_features(classifier, "video.mp4", stride=16)])
    """
    model, spec = feature_model(classifier), window_spec(classifier.spec, window)
    check_int("stride", stride, minimum=1)
    if any(part.training for part in model.modules()):
        raise ValueError("the model is in training mode; call model.eval()")
    if isinstance(frames, str | os.PathLike):
        frames = decode.iter_frames(frames)

    def prepare(frame: Array) -> _Frame:
        return _Frame(preprocess(frame, spec, classifier.device))

    return _run_in_batches(model, spec, sliding_windows(frames, spec, stride, prepare), classifier.batch_size)


def window_spec(spec: InputSpec, window: int | None = None) -> InputSpec:
    """Return the input of a model for windows of so many frames. Raises ValueError as `window_features` does."""
    if window is None and (spec.sampling != "dense" or spec.target_fps is not None):
        raise ValueError(
            "the model samples whole videos or a frame rate of its own, and has no window in frames; pass window (--window), a "
            f"multiple of {spec.num_frames} frames, such as {8 * spec.num_frames}"
        )
    if window is not None and (window < 1 or window % spec.num_frames):
        near = max(round(window / spec.num_frames), 1) * spec.num_frames
        raise ValueError(f"window must be a multiple of the model's {spec.num_frames} frames, got {window}; try {near}")
    return sliding_spec(spec, None if window is None else window // spec.num_frames)


def extract_windows(
    classifier: VideoClassifier,
    videos: Mapping[str, str],
    out: StrPath,
    *,
    name: str,
    stride: int,
    window: int | None = None,
    dtype: DType = "float32",
) -> Generator[tuple[str, Unreadable | None]]:
    """Write the features of the windows of videos to a folder, or to a table.

    A folder gets `NAME.npy`, (windows, C), and `NAME.json` for each video; see `FeatureFolder`. A table, `.npz` or `.parquet`,
    has the columns of a `FeatureFile`: "path", "features", and "clip" (0, 1, ...), "first" and "last" (frames), and "time" (the
    middle in seconds). Videos that are already there are skipped. A video that is damaged anywhere has no features.

    Args:
        classifier: as in `window_features`.
        stride: as in `window_features`.
        window: as in `window_features`.
        videos: files, each with the NAME of its features below the folder; a table has the paths.
        out: folder, or file with the suffix `.npz` or `.parquet`.
        name: name of the model to store.
        dtype: "float32" or, in a folder, "float16".

    Yields:
        Each new video when it is done, with the error if it is unreadable, otherwise None.

    Raises:
        TypeError, ValueError: as in `window_features`; `out` has features with other settings, or of other videos with the same
            names.
        ImportError, OSError: as in `FeatureFile`.
    """
    model, spec = feature_model(classifier), window_spec(classifier.spec, window)
    about = WindowsAbout(
        model=name,
        level="window",
        **describe(model, spec),
        stride=stride,
        window=spec.num_frames * spec.frame_interval,
        span=spec.clip_span,
        dtype=dtype,
    )

    def read(video: str) -> "_Result | Unreadable":
        try:
            return _read(classifier, video, stride, window)
        except (VideoError, OSError) as error:
            return error

    if is_table(out):
        if dtype != "float32":
            raise ValueError(f"tables have float32 features, got dtype {dtype}; write to a folder")
        file = FeatureFile(out, about)
        results = ((video, read(video)) for video in videos if video not in file)
        yield from add_results(file, ((video, each.columns if isinstance(each, _Result) else each) for video, each in results))
        return
    folder = FeatureFolder(out, about)
    for video in folder.missing(videos):
        result = read(video)
        if isinstance(result, _Result):
            folder.add(video, videos[video], result.columns, fps=result.fps, total_frames=result.total_frames)
        yield video, None if isinstance(result, _Result) else result


@dataclass(frozen=True, eq=False)
class _Result:
    """What is stored of one video."""

    columns: Columns
    fps: float
    total_frames: int


def _read(classifier: VideoClassifier, video: str, stride: int, window: int | None) -> _Result:
    fps, _ = decode.header(video)
    if fps is None:
        raise VideoError(f"{printable(video)}: the file does not state its frame rate")
    total_frames = 0

    def counted() -> Iterator[Tensor]:
        nonlocal total_frames
        for frame in decode.iter_frames(video):
            total_frames += 1
            yield frame

    first, last, features = [], [], []
    for each in window_features(classifier, counted(), stride=stride, window=window):
        first.append(each.first)
        last.append(each.last)
        features.append(each.features)
    columns = {"clip": np.arange(len(first)), "first": np.array(first), "last": np.array(last)}
    columns |= {"time": (columns["first"] + columns["last"]) / 2 / fps, "features": torch.stack(features).numpy()}
    return _Result(columns, fps, total_frames)


def _run_in_batches(
    model: FeatureModel, spec: InputSpec, windows: Generator[tuple[int, int, list[_Frame]]], batch_size: int
) -> Generator[Window]:
    with closing(windows):
        while batch := list(islice(windows, batch_size)):
            yield from _run(model, spec, batch)
            batch.clear()  # of its frames, the next windows need only some


def _run(model: FeatureModel, spec: InputSpec, batch: list[tuple[int, int, list[_Frame]]]) -> list[Window]:
    """Return the features of a batch of windows; what the backbone computes of a frame alone is computed for new frames."""
    with torch.inference_mode():
        new = {frame: frame.image for _, _, frames in batch for frame in frames if frame.image is not None}
        if new:
            x = spec.normalize(torch.stack(list(new.values())))[None]  # (1, 3, N, S, S)
            results = model.model.forward_frames(x.to(reference_tensor(model).dtype))
            for i, frame in enumerate(new):
                frame.image, frame.maps = None, tuple(each[0, :, i].clone() for each in results)
        per_map = zip(*(frame.maps for _, _, frames in batch for frame in frames), strict=True)
        clips = [torch.stack(each).unflatten(0, (len(batch), -1)).transpose(1, 2) for each in per_map]  # (B, C_i, T, H_i, W_i)
        features = model(clips).float().cpu()
    if not features.isfinite().all():
        raise ValueError("the model returned NaN or infinite values; check its weights")
    return [Window(first, last, each.clone()) for (first, last, _), each in zip(batch, features, strict=True)]
