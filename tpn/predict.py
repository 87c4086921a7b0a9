"""A video in, class names out, with the test protocol of the weights."""

import logging
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast, overload

import torch
from torch import Tensor

from tpn.config import InputSpec
from tpn.devices import DTYPES, resolve_device
from tpn.exported import ExportedClassifier, load
from tpn.files import StrPath
from tpn.models.classifier import TPNClassifier, require_input_spec, unwrapped
from tpn.models.features import FeatureModel
from tpn.models.heads import change_temperature, class_probs
from tpn.models.layers import reference_tensor
from tpn.optimization import OptimizedClassifier, optimize
from tpn.video.ahead import read_ahead
from tpn.video.decode import VideoError
from tpn.video.sources import Array, File, FramesAndClips, Source, is_frame_list, read_clips
from tpn.video.tracks import TrackSource
from tpn.zoo.create import create_model
from tpn.zoo.names import is_exported, is_saved

Progress = Callable[[int, int], None]
"""Called with the number of finished items and with that of all."""
Unreadable = VideoError | OSError
"""Why a video cannot be read."""
Model = TPNClassifier | FeatureModel | ExportedClassifier

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Prediction:
    """The result for one video.

    Attributes:
        probs: (K,) float32 on the CPU, the mean over views of the softmax of their logits; of the sigmoid if the model is
            multi-label, whose classes do not exclude each other. The temperature of a calibrated model changes the mean, and not
            the order of the classes.
        view_logits: (V, K) float32 on the CPU; all clips of crop 0 first, then those of crop 1, ...
        labels: K class names, "class 0", ... if the model has none.
        source: the path, or None for frames.
    """

    probs: Tensor
    view_logits: Tensor
    labels: tuple[str, ...]
    source: str | None = None

    def top(self, k: int = 5, *, min_probability: float = 0.0) -> list[tuple[str, float]]:
        """Return the k most probable classes (all K if there are fewer) as (name, probability), best first.

        Classes below `min_probability`, 0..1, are left out: an empty list means none of the classes.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not 0 <= min_probability <= 1:
            raise ValueError(f"min_probability must be in 0..1, got {min_probability}")
        values, indices = self.probs.topk(min(k, len(self.labels)))
        best = zip(indices.tolist(), values.tolist(), strict=True)
        return [(self.labels[i], p) for i, p in best if p >= min_probability]


class _PendingVideo:
    """A video with the logits (K,) of the views that have been through the model, on the device."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.logits: list[Tensor] = []
        self.last_batch = 0


_is_forked = False
"""Whether this process was forked from one with a classifier."""


def _after_fork() -> None:
    """Let PyTorch use one thread. The parent's OpenMP threads do not exist here; an operation of several would wait forever."""
    global _is_forked
    _is_forked = True
    torch.set_num_threads(1)


def open_model(
    name: StrPath, pretrained: bool = True, *, precision: str | None = None, **kwargs: Any
) -> TPNClassifier | ExportedClassifier:
    """Return the model of a name: an exported file in a precision, see `tpn.export.load`, or a result of `create_model`."""
    if not is_exported(name):
        return create_model(name, pretrained, **kwargs)
    if given := [key for key, value in kwargs.items() if value is not None]:
        raise ValueError(f"{', '.join(given)} not valid here: {name} is an exported file, which is fixed")
    return load(name, precision=precision)


def _open_for_use(
    name: StrPath, pretrained: bool | None, device: torch.device | None, precision: str | None, compile: bool, **kwargs: Any
) -> TPNClassifier | ExportedClassifier:
    """Return the model of a name. Warn if its classes are random, and refuse what an exported file cannot do."""
    has_weights = kwargs.get("checkpoint_path") is not None
    trained = has_weights or is_saved(name) or is_exported(name)
    if pretrained is False and not trained:
        warnings.warn(f"{name} has random weights, and its classes are random: pass pretrained=True", stacklevel=3)
    model = open_model(name, not has_weights if pretrained is None else pretrained, precision=precision, **kwargs)
    if kwargs.get("num_classes") and not trained and model.labels is None:
        warnings.warn(f"num_classes={model.num_classes}: the classifier of {name} is untrained", stacklevel=3)
    if isinstance(model, ExportedClassifier):
        if compile:
            raise ValueError(f"{name} is an exported file, which is not compiled; leave compile out")
        if device is not None and device.type != "cpu" and not str(name).endswith(".pt2"):
            raise ValueError(f"{name} runs on the CPU, got device {str(device)!r}; leave device out")
    return model


@cache
def _prepare_forks() -> None:
    if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
        os.register_at_fork(after_in_child=_after_fork)


class VideoClassifier:
    """Classify video files or arrays of frames.

    The constructor puts the model in evaluation mode. After further training, call `model.eval()` before the classifier. Several
    threads may share a classifier, except a compiled one. In forked processes, PyTorch uses one thread. GPUs and compiled models
    need processes with the start method "spawn".

    Args:
        model: a name or folder for `create_model`, an exported file (`.onnx`, `.pt2`, or `.xml`), a model, or a `FeatureModel`.
        pretrained: for a name, load the published weights. Default: True, unless `checkpoint_path` is given. False gives a
            warning, because random weights predict random classes.
        device: where to run. Default: for a name, a GPU if there is one; for a model, its device; for an exported file, the CPU.
        batch_size: views per forward pass. Default: 30 on a GPU, and 1 on a CPU, where larger batches are not faster.
        precision: "float32", "float16", "bfloat16", or "auto" (float16 on CUDA, bfloat16 on CPUs with AMX or AVX512-BF16,
            otherwise float32): run the result of `tpn.optimize`. Default: "float32" for a name, which changes probabilities by
            less than 1e-5; a given model runs unchanged. For an OpenVINO file, see `tpn.export.load`.
        compile: also compile the model; see `tpn.optimize`.
        workers: videos that `predict_each` reads ahead, each in a thread. Default: 2 on a CPU; on a GPU one per core, at most 16.
        **kwargs: with a name, arguments of `create_model`.

    Attributes:
        model: the model that runs; an optimized one has a `report`.

    Example:
        >>> tpn.VideoClassifier("tpn_slowonly_r50_k400")("video.mp4").top(5)
    """

    def __init__(
        self,
        model: StrPath | Model,
        pretrained: bool | None = None,
        *,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        precision: str | None = None,
        compile: bool = False,
        workers: int | None = None,
        **kwargs: Any,
    ) -> None:
        for argument, value in (("batch_size", batch_size), ("workers", workers)):  # before a model is fetched
            if value is not None and value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}")
        if precision not in (None, "auto", *DTYPES):
            raise ValueError(f"precision must be one of {', '.join(DTYPES)} or auto, got {precision!r}")
        if device is not None:
            device = resolve_device(device)
        if isinstance(model, str | os.PathLike):
            model = _open_for_use(model, pretrained, device, precision, compile, **kwargs)
            if isinstance(model, ExportedClassifier):
                precision = None
            else:
                device = device or ("cuda" if torch.cuda.is_available() else "cpu")
                precision = precision or "float32"
        elif pretrained or kwargs:
            given = ", ".join([*kwargs, *["pretrained"] * bool(pretrained)])
            raise ValueError(f"{given} not valid here: these are for a model's name, got a model")
        else:
            model = cast("Model", unwrapped(model))
            if not isinstance(model, Model):
                raise TypeError(f"model must be a name or a TPNClassifier, got {type(model).__name__}")
        self.spec = require_input_spec(model)
        if model.in_chans != 3:
            raise ValueError(f"VideoClassifier reads RGB video, the model takes in_chans={model.in_chans}; pass it clips")
        if not model.num_classes and not isinstance(model, FeatureModel):
            raise ValueError("the model has no classes (num_classes=0); use tpn features or FeatureModel(model) for features")
        self.device = reference_tensor(model).device if device is None else torch.device(device)
        _prepare_forks()
        on_cpu = self.device.type == "cpu"
        self.batch_size = batch_size or (1 if on_cpu else 30)
        self.workers = workers or (2 if on_cpu else min(os.cpu_count() or 1, 16))
        # On a CPU, mixing gains nothing, and without it a result does not depend on the other videos.
        self._mix_videos = not on_cpu
        # A compiled model is compiled again for every size of a batch.
        self._pad_batches = compile or (isinstance(model, OptimizedClassifier) and model.report.compiled)
        if precision is None and not compile:
            if model.training:
                _logger.info("put the model in evaluation mode; call model.train() to train it further")
            self.model: Model = model.to(self.device).eval()
        elif not isinstance(model, TPNClassifier):
            raise ValueError(f"precision and compile are valid for a TPNClassifier, got a {type(model).__name__}")
        else:
            dtype = None if precision == "auto" else precision or "float32"
            size = self.spec.view_size
            shape = (self.batch_size, 3, self.spec.num_frames, size, size)
            sample = torch.randn(shape, generator=torch.Generator().manual_seed(0)) if compile else None
            self.model = optimize(model, dtype, compile=compile, device=self.device, sample=sample)

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names, "class 0", ... if the model has none."""
        return self.model.labels or tuple(f"class {i}" for i in range(self.model.num_classes or self.model.num_features))

    @property
    def multi_label(self) -> bool:
        """Whether a video may have several classes, each with its own probability."""
        return bool(getattr(self.model, "multi_label", False))  # a FeatureModel has no classes

    @property
    def temperature(self) -> float:
        """The temperature of the probabilities, 1 unless the model is calibrated."""
        return float(getattr(self.model, "temperature", 1.0))

    @overload
    def __call__(
        self,
        source: StrPath | File | Array,
        *,
        num_clips: int | None = None,
        num_crops: int | None = None,
        progress: Progress | None = None,
    ) -> Prediction: ...

    @overload
    def __call__(
        self,
        source: list[Any] | tuple[Any, ...],
        *,
        num_clips: int | None = None,
        num_crops: int | None = None,
        progress: Progress | None = None,
    ) -> Any: ...

    def __call__(
        self,
        source: Source | list[Any] | tuple[Any, ...],
        *,
        num_clips: int | None = None,
        num_crops: int | None = None,
        progress: Progress | None = None,
    ) -> Prediction | list[Prediction]:
        """Classify one video, or each of a list.

        Args:
            source: a path; bytes, or a file that is open in binary mode; or frames, uint8 RGB 0..255, an array or tensor
                (T, H, W, 3) or (T, 3, H, W), any T >= 1, or a list of T arrays of one frame each or of PIL images. A list of
                anything else is a list of videos. OpenCV's frames are BGR: pass `frame[..., ::-1]`.
            num_clips: clips along time. Default: the test protocol of the weights (`.spec`), flipped views included.
            num_crops: crops of each clip, 1 or 3. Default: as for `num_clips`.
            progress: called with (views done, views of this source).

        Raises:
            VideoError, FileNotFoundError, IsADirectoryError, PermissionError: a file cannot be read. The rest of a list is not
                classified; see `predict_each`.
            TypeError, ValueError: frames of another type or shape.
        """
        several = isinstance(source, list | tuple) and not is_frame_list(source)
        sources = cast("list[Source]", source if several else [source])
        results = []
        for result in self.predict_each(sources, num_clips=num_clips, num_crops=num_crops, progress=progress):
            if isinstance(result, Exception):
                raise result
            results.append(result)
        return results if several else results[0]

    def predict_each(
        self,
        sources: Iterable[Source],
        *,
        num_clips: int | None = None,
        num_crops: int | None = None,
        progress: Progress | None = None,
    ) -> Generator[Prediction | Unreadable]:
        """Classify sources in order; yield the error of a file that cannot be read in place of a prediction.

        `workers` threads read ahead, and only their videos are in memory. A GPU resizes the frames and runs batches of views of
        several videos. Closing the generator stops the threads.
        """
        if isinstance(sources, str | os.PathLike):
            raise TypeError(f"sources must be several, such as [{str(sources)!r}], got one path")
        spec = self.spec.with_views(num_clips, num_crops)

        def read(source: Source) -> FramesAndClips | Unreadable:
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

    def tracks(self, video: StrPath | Array, tracks: TrackSource, **options: Any) -> list[Prediction | Unreadable]:
        """Classify each person or object of a video, given its boxes over time. See `tpn.tracks.classify`."""
        from tpn.tracks import classify

        return classify(self, video, tracks, **options)

    def classify_each(
        self, videos: Iterable[FramesAndClips | Unreadable], *, spec: InputSpec | None = None, progress: Progress | None = None
    ) -> Generator[Prediction | Unreadable]:
        """Classify clips that were read already, `spec.num_crops` crops of each; pass errors on in their place.

        Args:
            videos: for each video its distinct frames, uint8 RGB (N, 3, H, W), and the clips as indices into them, int64
                (clips, T), as `VideoDataset.read` returns them; or an exception.
            spec: describes the clips. Default: `self.spec`.

        Raises:
            ValueError: the model is in training mode, or its logits are not finite.
            RuntimeError: the model is compiled or on a GPU, and the process was forked.
        """
        if _is_forked and self._pad_batches:
            raise RuntimeError("compiled models do not work in forked processes; use the start method 'spawn'")
        if any(part.training for part in self.model.modules()):
            raise ValueError("the model is in training mode; call model.eval() before the classifier, and model.train() after it")
        spec = self.spec if spec is None else spec
        waiting: deque[_PendingVideo | Unreadable] = deque()  # in order; the last ones may have views in the batch
        batch: list[tuple[_PendingVideo, Tensor]] = []
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
                    frames.record_stream(torch.cuda.current_stream(self.device))  # from a reading thread's stream
                    clips = clips.pin_memory()  # otherwise its upload waits for the running batch
                crops = spec.crop_views(frames)
                views = _PendingVideo(len(crops) * len(clips))
                waiting.append(views)
                for crop in crops:
                    for clip in clips.to(self.device, non_blocking=True):
                        batch.append((views, crop.index_select(0, clip)))
                        if len(batch) == self.batch_size:
                            run()
            enough = not self._mix_videos or len(waiting) > self.batch_size
            if batch and enough:
                run()
            # The device is still running the last batch; waiting for it now would leave the device idle afterwards.
            yield from self._finished(waiting, batches if enough else batches - 1)
        if batch:
            run()
        yield from self._finished(waiting, batches)

    def _finished(self, waiting: "deque[_PendingVideo | Unreadable]", batches: int) -> Generator[Prediction | Unreadable]:
        """Yield the videos at the front that are complete after so many batches."""
        while waiting:
            first = waiting[0]
            if isinstance(first, _PendingVideo):
                if len(first.logits) < first.count or first.last_batch > batches:
                    return
                logits = torch.stack(first.logits).cpu()
                mean = class_probs(logits, multi_label=self.multi_label).mean(dim=0)
                probs = change_temperature(mean, self.temperature, multi_label=self.multi_label)
                if not (probs.isfinite().all() and (logits < torch.inf).all()):  # minus infinity is a valid logit
                    half = reference_tensor(self.model).dtype != torch.float32
                    remedy = ", or pass precision='float32'" if half else ""
                    raise ValueError(f"the model returned NaN or infinite values; check its weights{remedy}")
                yield Prediction(probs, logits, self.labels)
            else:
                yield first
            waiting.popleft()

    def _run(self, batch: "list[tuple[_PendingVideo, Tensor]]", number: int, spec: InputSpec, progress: Progress | None) -> None:
        """Run the model on a batch of views, uint8 (T, 3, S, S); `number` counts the batches."""
        clips = torch.stack([clip for _, clip in batch])
        if self._pad_batches:
            clips = torch.cat((clips, clips[:1].expand(self.batch_size - len(batch), *clips.shape[1:])))
        with torch.inference_mode():
            x = spec.normalize(clips).to(reference_tensor(self.model).dtype)
            logits = self.model(x).float()
        for (views, _), row in zip(batch, logits, strict=False):
            views.logits.append(row)
            views.last_batch = number
        if progress is not None:
            for views in dict.fromkeys(views for views, _ in batch):
                progress(len(views.logits), views.count)
