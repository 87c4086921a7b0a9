"""A video in, class names out, by the protocol that the weights' accuracy was measured with."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from tpn.models.classifier import TPNClassifier
from tpn.video import decode
from tpn.video.decode import VideoError
from tpn.video.spec import InputSpec
from tpn.zoo.registry import create_model

Path = str | os.PathLike[str]
Source = Path | np.ndarray[Any, Any] | Tensor
Progress = Callable[[int, int], None]


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


class VideoClassifier:
    """Classify video files or arrays of frames.

    Args:
        model: a name for `create_model`, or a model that it made. A model is put in evaluation mode for each
            call and back afterwards.
        pretrained, **kwargs: for `create_model`, with a name.
        device: where to run. Default: a GPU if there is one, for a name; where the model is, for a model.
        batch_size: views at once. Default: 30 on a GPU, 2 on a CPU.

    Example:
        >>> tpn.VideoClassifier("tpn_slowonly_r50_k400", pretrained=True)("video.mp4").top(5)
    """

    def __init__(
        self,
        model: str | TPNClassifier,
        pretrained: bool = False,
        *,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(model, str):
            model = create_model(model, pretrained, **kwargs)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        elif pretrained or kwargs:
            raise ValueError(f"pretrained and {sorted(kwargs)} go with a model's name; a built model was given")
        if model.input_spec is None:
            raise ValueError("the model has no input_spec; set model.input_spec = tpn.InputSpec(num_frames=..., ...)")
        if model.in_chans != 3:
            raise ValueError(
                f"VideoClassifier reads RGB video, the model takes {model.in_chans} channels: give it clips yourself"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model if device is None else model.to(device)
        self.device = next(model.parameters()).device
        self.batch_size = batch_size or (2 if self.device.type == "cpu" else 30)
        self.spec: InputSpec = model.input_spec
        self.labels = model.labels or tuple(f"class {i}" for i in range(model.num_classes or model.num_features))

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
        if isinstance(source, list | tuple):
            return [self._classify(item, num_clips, num_crops, progress) for item in source]
        return self._classify(source, num_clips, num_crops, progress)

    def predict_each(
        self,
        sources: Iterable[Source],
        *,
        num_clips: int | None = None,
        num_crops: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Prediction | VideoError | OSError]:
        """Classify sources one by one; a file that cannot be read gives its error in place of a prediction."""
        for source in sources:
            try:
                yield self._classify(source, num_clips, num_crops, progress)
            except (VideoError, OSError) as error:
                yield error

    def classify_clips(self, frames: Tensor, clips: Tensor, *, progress: Progress | None = None) -> Prediction:
        """Classify clips that were read already, `spec.num_crops` crops of each.

        Args:
            frames: the distinct frames, uint8 RGB (N, 3, H, W).
            clips: their places in the clips, int64 (clips, T), as `VideoDataset.read` returns them.
        """
        logits = self._view_logits(self.spec.crops(frames), clips, self.spec, progress)
        return Prediction(logits.softmax(dim=1).mean(dim=0), logits, self.labels)

    def _classify(self, source: Source, num_clips: int | None, num_crops: int | None, progress: Progress | None) -> Prediction:
        spec = self._spec_for(num_clips, num_crops)
        frames, clips = _read(source, spec)
        logits = self._view_logits(spec.crops(frames), clips, spec, progress)
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else None
        return Prediction(logits.softmax(dim=1).mean(dim=0), logits, self.labels, name)

    def _spec_for(self, num_clips: int | None, num_crops: int | None) -> InputSpec:
        if num_clips is None and num_crops is None:
            return self.spec
        clips = self.spec.num_clips if num_clips is None else num_clips
        crops = self.spec.num_crops if num_crops is None else num_crops
        return replace(self.spec, num_clips=clips, num_crops=crops, flip=False)

    def _view_logits(self, crops: Tensor, clips: Tensor, spec: InputSpec, progress: Progress | None) -> Tensor:
        """crops: uint8 (crops, N, 3, S, S); clips: (clips, T) places among the N frames → float32 (V, K), crop-major."""
        views = [(crop, clip) for crop in crops for clip in clips]
        like = next(self.model.parameters())
        logits = []
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(views), self.batch_size):
                batch = torch.stack([crop.index_select(0, clip) for crop, clip in views[start : start + self.batch_size]])
                with torch.inference_mode():
                    x = spec.normalize(batch.to(like.device)).to(like.dtype)
                    logits.append(self.model(x).float().cpu())
                if progress is not None:
                    progress(min(start + self.batch_size, len(views)), len(views))
        finally:
            self.model.train(was_training)
        return torch.cat(logits)


def parse_views(text: str) -> tuple[int, int]:
    """Read "10x3" as (num_clips, num_crops)."""
    clips, _, crops = text.partition("x")
    if not (clips.isdecimal() and crops.isdecimal() and int(clips) >= 1 and int(crops) in (1, 3)):
        raise ValueError(f"views must be CLIPSxCROPS with 1 or 3 crops, such as 10x3 or 1x1, got {text!r}")
    return int(clips), int(crops)


def _read(source: Source, spec: InputSpec) -> tuple[Tensor, Tensor]:
    """Return the distinct frames, uint8 (N, 3, H, W), resized, and the clips (num_clips, T) as places among them."""
    if isinstance(source, str | os.PathLike):
        frames, place = decode.sample_frames(source, spec.indices, short_side=spec.short_side)
        return frames, torch.from_numpy(place)
    video = _channels_first(source)
    wanted, place = np.unique(spec.indices(len(video)), return_inverse=True)
    frames = video[torch.from_numpy(wanted)]
    return frames, torch.from_numpy(place).view(spec.num_clips, spec.num_frames)


def _channels_first(frames: np.ndarray[Any, Any] | Tensor) -> Tensor:
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
