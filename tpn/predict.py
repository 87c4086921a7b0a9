"""A video in, class names out, by the protocol that the weights' accuracy was measured with."""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast, overload

import numpy as np
import torch
from torch import Tensor, nn

from tpn.export import ExportedClassifier
from tpn.models.classifier import TPNClassifier, unwrapped
from tpn.models.features import FeatureModel
from tpn.models.layers import evaluating
from tpn.optimize import DTYPES, OptimizedClassifier, optimize, usable_device
from tpn.video import decode
from tpn.video.ahead import read_ahead
from tpn.video.decode import VideoError
from tpn.video.spec import InputSpec
from tpn.zoo.registry import create_model

Path = str | os.PathLike[str]
Source = Path | np.ndarray[Any, Any] | Tensor
Progress = Callable[[int, int], None]
Clips = tuple[Tensor, Tensor]
"""Distinct frames of a video, uint8 (N, 3, H, W), and its clips as places among them, int64 (clips, T)."""
Unreadable = VideoError | OSError
Model = TPNClassifier | FeatureModel | ExportedClassifier


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says of one video.

    Attributes:
        probs: (K,) float32 on the CPU, the mean over views of their softmax.
        view_logits: (V, K) float32 on the CPU; all clips of crop 0 first, then those of crop 1, ...
        labels: K class names, "class 0", ... where the model has none.
        source: the path, or None for frames.
    """

    probs: Tensor
    view_logits: Tensor
    labels: tuple[str, ...]
    source: str | None = None

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """Return the k most probable classes (all K if there are fewer) as (name, probability), best first."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        values, indices = self.probs.topk(min(k, len(self.labels)))
        return [(self.labels[i], p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)]


class _Views:
    """A video whose views are on their way: logits (K,) of each one that was put through the model, on the device."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.logits: list[Tensor] = []
        self.last_batch = 0


class VideoClassifier:
    """Classify video files or arrays of frames.

    Args:
        model: a name for `create_model`, a model that it made, a `FeatureModel`, or one that `tpn.export.load` read. A model in
            training mode is put in evaluation mode for each batch, and back afterwards.
        pretrained, **kwargs: for `create_model`, with a name.
        device: where to run. Default: a GPU if there is one, for a name; where the model is, for a model.
        batch_size: views at once. Default: 30 on a GPU, 1 on a CPU, where more are not faster.
        precision: "float32", "float16", "bfloat16", or "auto", the fastest that the device has: run what `tpn.optimize` makes of
            the model. Default: "float32" for a name, which changes probabilities by less than 1e-5; a model that was given is
            used as it is, now and after further training.
        compile: compile it, too; see `tpn.optimize`.
        workers: videos that are read ahead, each in a thread, by `predict_each`. Default: 2 on a CPU; on a GPU one for each core,
            16 at most.

    Attributes:
        model: the one that is run; an optimized one has a `report`.

    Example:
        >>> tpn.VideoClassifier("tpn_slowonly_r50_k400", pretrained=True)("video.mp4").top(5)
    """

    def __init__(
        self,
        model: str | Model,
        pretrained: bool = False,
        *,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        precision: str | None = None,
        compile: bool = False,
        workers: int | None = None,
        **kwargs: Any,
    ) -> None:
        if device is not None:
            device = usable_device(device)  # before a model is fetched
        if isinstance(model, str):
            model = create_model(model, pretrained, **kwargs)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            precision = precision or "float32"
        elif pretrained or kwargs:
            raise ValueError(f"pretrained and {sorted(kwargs)} go with a model's name; a built model was given")
        else:
            model = cast("Model", unwrapped(model))
        if model.input_spec is None:
            raise ValueError("the model has no input_spec; set model.input_spec = tpn.InputSpec(num_frames=..., ...)")
        if model.in_chans != 3:
            raise ValueError(
                f"VideoClassifier reads RGB video, the model takes {model.in_chans} channels: give it clips yourself"
            )
        for name, value in (("batch_size", batch_size), ("workers", workers)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.device = _place(model).device if device is None else torch.device(device)
        on_cpu = self.device.type == "cpu"
        self.batch_size = batch_size or (1 if on_cpu else 30)
        self.workers = workers or (2 if on_cpu else min(os.cpu_count() or 1, 16))
        self.spec: InputSpec = model.input_spec
        self.labels = model.labels or tuple(f"class {i}" for i in range(model.num_classes or model.num_features))
        # On a CPU there is nothing to gain, and a result does not depend on what else is classified.
        self._mix_videos = not on_cpu
        compiled = compile or (isinstance(model, OptimizedClassifier) and model.report.compiled)
        self._whole_batches = compiled  # it is compiled anew for every size
        if precision not in (None, "auto", *DTYPES):
            raise ValueError(f"precision must be one of {', '.join(DTYPES)} or auto, got {precision!r}")
        if precision is None and not compile:
            self.model: Model = model.to(self.device)
        elif not isinstance(model, TPNClassifier):
            raise ValueError(f"precision and compile are for a TPNClassifier; a {type(model).__name__} runs as it is")
        else:
            dtype = None if precision == "auto" else precision or "float32"
            sample = self._sample() if compile else None
            self.model = optimize(model, dtype, compile=compile, device=self.device, sample=sample)

    @overload
    def __call__(
        self,
        source: Source,
        *,
        num_clips: int | None = None,
        num_crops: int | None = None,
        progress: Progress | None = None,
    ) -> Prediction: ...

    @overload
    def __call__(
        self,
        source: list[Source] | tuple[Source, ...],
        *,
        num_clips: int | None = None,
        num_crops: int | None = None,
        progress: Progress | None = None,
    ) -> list[Prediction]: ...

    def __call__(
        self,
        source: Source | list[Source] | tuple[Source, ...],
        *,
        num_clips: int | None = None,
        num_crops: int | None = None,
        progress: Progress | None = None,
    ) -> Prediction | list[Prediction]:
        """Classify one source, or each of a list.

        Args:
            source: a path; or frames, uint8 RGB 0..255, (T, H, W, 3) or (T, 3, H, W), array or tensor, any T >= 1; or
                a list of these.
            num_clips, num_crops: views: clips along time, and crops of each, 3 or 1. If neither is given, the
                published protocol of the weights (`.spec`), mirrored views included.
            progress: called with (views done, views of this source).

        Raises:
            VideoError, FileNotFoundError, IsADirectoryError, PermissionError: a file cannot be read. In a list it
                stops the rest; `predict_each` does not.
            TypeError, ValueError: frames of another type or shape.
        """
        sources = source if isinstance(source, list | tuple) else [source]
        results = []
        for result in self.predict_each(sources, num_clips=num_clips, num_crops=num_crops, progress=progress):
            if isinstance(result, Exception):
                raise result
            results.append(result)
        return results if sources is source else results[0]

    def predict_each(
        self,
        sources: Iterable[Source],
        *,
        num_clips: int | None = None,
        num_crops: int | None = None,
        progress: Progress | None = None,
    ) -> Generator[Prediction | Unreadable]:
        """Classify sources in order; a file that cannot be read gives its error in place of a prediction.

        `workers` threads read ahead, so that the model does not wait; on a GPU, batches hold views of several videos, and
        frames are resized there. However many sources there are, only those few videos are in memory. Whoever stops early
        leaves nothing running.
        """
        spec = self.spec_for(num_clips, num_crops)

        def read(source: Source) -> Clips | Unreadable:
            try:
                return read_clips(source, spec, self.device)
            except (VideoError, OSError) as error:
                return error

        workers = 1 if isinstance(sources, Sized) and len(sources) == 1 else self.workers
        names: deque[str | None] = deque()  # not the sources, which may be large arrays

        def named() -> Iterator[Source]:
            for source in sources:
                names.append(os.fspath(source) if isinstance(source, str | os.PathLike) else None)
                yield source

        with closing(read_ahead(read, named(), workers=workers)) as clips:
            for result in self.classify_each(clips, spec=spec, progress=progress):
                name = names.popleft()
                yield replace(result, source=name) if isinstance(result, Prediction) else result

    def spec_for(self, num_clips: int | None = None, num_crops: int | None = None) -> InputSpec:
        """Return the views that a call with these arguments sees, as part of an input spec."""
        if num_clips is None and num_crops is None:
            return self.spec
        clips = self.spec.num_clips if num_clips is None else num_clips
        crops = self.spec.num_crops if num_crops is None else num_crops
        return replace(self.spec, num_clips=clips, num_crops=crops, flip=False)

    def _sample(self) -> Tensor:
        """Clips of the size that is most often seen, to compile for."""
        size = self.spec.three_crop_size if self.spec.num_crops == 3 else self.spec.crop_size
        shape = (self.batch_size, 3, self.spec.num_frames, size, size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def classify_each(
        self, videos: Iterable[Clips | Unreadable], *, spec: InputSpec | None = None, progress: Progress | None = None
    ) -> Generator[Prediction | Unreadable]:
        """Classify clips that were read already, `spec.num_crops` crops of each; hand errors on, in their place.

        Args:
            videos: for each its distinct frames, uint8 RGB (N, 3, H, W), and the clips as places among them, int64
                (clips, T), as `VideoDataset.read` returns them; or an exception.
            spec: what the clips are. Default: `self.spec`.
        """
        spec = self.spec if spec is None else spec
        waiting: deque[_Views | Unreadable] = deque()  # in order; the last ones may have views in the batch
        batch: list[tuple[_Views, Tensor]] = []
        batches = 0

        def run() -> None:
            nonlocal batches
            batches += 1
            self._run(batch, batches, spec, progress)
            batch.clear()

        for video in videos:
            if isinstance(video, Exception):
                waiting.append(video)
            else:
                frames, clips = video
                frames = frames.to(self.device)
                if self.device.type == "cuda":
                    frames.record_stream(torch.cuda.current_stream(self.device))  # it may come from a reading thread's
                    clips = clips.pin_memory()  # else its upload would wait for the batch under way
                crops = spec.crop_views(frames)
                views = _Views(len(crops) * len(clips))
                waiting.append(views)
                for crop in crops:
                    for clip in clips.to(self.device, non_blocking=True):
                        batch.append((views, crop.index_select(0, clip)))
                        if len(batch) == self.batch_size:
                            run()
            enough = not self._mix_videos or len(waiting) > self.batch_size
            if batch and enough:
                run()
            # A device is still at its last batch; to wait for that now would leave it idle afterwards.
            yield from self._finished(waiting, batches if enough else batches - 1)
        if batch:
            run()
        yield from self._finished(waiting, batches)

    def _finished(self, waiting: "deque[_Views | Unreadable]", batches: int) -> Generator[Prediction | Unreadable]:
        """Take from the front what is complete after so many batches."""
        while waiting:
            first = waiting[0]
            if isinstance(first, _Views):
                if len(first.logits) < first.count or first.last_batch > batches:
                    return
                logits = torch.stack(first.logits).cpu()
                probs = logits.softmax(dim=1).mean(dim=0)
                if not probs.isfinite().all():  # minus infinity, for classes that cannot be, is a logit
                    half = _place(self.model).dtype != torch.float32
                    remedy = ", or it needs precision='float32'" if half else ""
                    raise ValueError(f"the model gives values that are NaN or infinite; its weights are damaged{remedy}")
                yield Prediction(probs, logits, self.labels)
            else:
                yield first
            waiting.popleft()

    def _run(self, batch: "list[tuple[_Views, Tensor]]", number: int, spec: InputSpec, progress: Progress | None) -> None:
        """Put a batch of views, uint8 (T, 3, S, S), through the model. number: of the batch."""
        clips = torch.stack([clip for _, clip in batch])
        if self._whole_batches:
            clips = torch.cat((clips, clips[:1].expand(self.batch_size - len(batch), *clips.shape[1:])))
        mode = evaluating(self.model) if any(part.training for part in self.model.modules()) else nullcontext()
        with mode, torch.inference_mode():
            x = spec.normalize(clips).to(_place(self.model).dtype)
            logits = self.model(x).float()
        for (views, _), row in zip(batch, logits, strict=False):
            views.logits.append(row)
            views.last_batch = number
        if progress is not None:
            for views in dict.fromkeys(views for views, _ in batch):
                progress(len(views.logits), views.count)


def _place(model: nn.Module) -> Tensor:
    """A tensor on the device and in the dtype of a model; the weights of an ONNX file are not PyTorch's."""
    return next(model.parameters(), torch.empty(0))


def parse_views(text: str) -> tuple[int, int]:
    """Read "10x3" as (num_clips, num_crops)."""
    clips, _, crops = text.partition("x")
    if not (clips.isdecimal() and crops.isdecimal() and int(clips) >= 1 and int(crops) in (1, 3)):
        raise ValueError(f"views must be CLIPSxCROPS with 1 or 3 crops, such as 10x3 or 1x1, got {text!r}")
    return int(clips), int(crops)


class _Streams(threading.local):
    """Those of each thread, by device. Freed memory stays with the stream that it was used on, so they are few."""

    def __init__(self) -> None:
        self.of: dict[torch.device, torch.cuda.Stream] = {}


_streams = _Streams()


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, let what a reading thread uploads and resizes not wait for the model's work, which was queued before."""
    if device.type != "cuda":
        yield
        return
    if device not in _streams.of:
        _streams.of[device] = torch.cuda.Stream(device)
    stream = _streams.of[device]
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def read_clips(source: Source, spec: InputSpec, device: torch.device) -> Clips:
    """Return the distinct frames that the views of a source need, and each clip as places among them."""
    if isinstance(source, str | os.PathLike):
        with _side_stream(device):
            frames, place = decode.sample_frames(source, spec.indices, short_side=spec.short_side, device=device)
        return frames, torch.from_numpy(place)
    video = channels_first(source)
    wanted, place = np.unique(spec.indices(len(video)), return_inverse=True)
    frames = video[torch.from_numpy(wanted)]
    return frames, torch.from_numpy(place).view(spec.num_clips, spec.num_frames)


def channels_first(frames: np.ndarray[Any, Any] | Tensor) -> Tensor:
    """(T, H, W, 3) or (T, 3, H, W) → (T, 3, H, W)."""
    if not isinstance(frames, np.ndarray | Tensor):
        raise TypeError(f"expected a path or an array of frames, got {type(frames).__name__}")
    video = torch.as_tensor(frames)
    if video.dtype != torch.uint8:
        raise TypeError(f"frames must be uint8, 0..255, got {video.dtype}")
    last, second = video.ndim == 4 and video.shape[3] == 3, video.ndim == 4 and video.shape[1] == 3
    if last == second or 0 in video.shape:
        what = "it could be both" if last else "it is neither"
        raise ValueError(f"frames must be (T, H, W, 3) or (T, 3, H, W), got {tuple(video.shape)}: {what}")
    return video.permute(0, 3, 1, 2) if last else video
