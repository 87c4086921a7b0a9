"""What a model expects to see: frames, sampling, size, normalisation, and the views its accuracy was measured with."""

import logging
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpn.video import augment, sampling, transforms

_logger = logging.getLogger(__name__)

Sampling = Literal["dense", "segments"]

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class InputSpec:
    """The input of a set of weights.

    Attributes:
        num_frames: frames of a clip, T.
        frame_interval: index step between them; 1 = consecutive. Unused by "segments".
        sampling: "dense" (clips of consecutive steps) or "segments" (one frame per segment of the whole video).
        num_clips, num_crops, flip: views of the published test protocol; crops per clip 3 or 1; `flip` adds
            every view mirrored.
        short_side: pixels of the shorter side after resizing.
        crop_size: side of the single centre crop, and of training crops.
        three_crop_size: side of the three crops along the longer side.
        mean, std: per channel, on the 0..255 scale.
        mirrored: pairs of classes that change places when a clip is flipped, such as "left to right" and "right
            to left"; for `train_transform`.
    """

    num_frames: int
    frame_interval: int = 1
    sampling: Sampling = "dense"
    num_clips: int = 10
    num_crops: int = 3
    flip: bool = False
    short_side: int = 256
    crop_size: int = 224
    three_crop_size: int = 256
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    mirrored: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.sampling not in get_args(Sampling):
            raise ValueError(f"sampling must be 'dense' or 'segments', got {self.sampling!r}")
        if self.num_crops not in (1, 3):
            raise ValueError(f"num_crops must be 1 (centre) or 3 (along the longer side), got {self.num_crops}")

    @property
    def clip_span(self) -> int:
        """Consecutive frames that one clip reaches over (dense sampling)."""
        return sampling.clip_span(self.num_frames, self.frame_interval)

    @property
    def num_views(self) -> int:
        return self.num_clips * self.num_crops * (2 if self.flip else 1)

    def indices(self, total_frames: int) -> NDArray[np.int64]:
        """Return the frame indices (num_clips, num_frames) to read from a video of `total_frames` frames."""
        if self.sampling == "segments":
            return sampling.segment_indices(total_frames, num_segments=self.num_frames, num_clips=self.num_clips)
        return sampling.dense_indices(
            total_frames, num_frames=self.num_frames, frame_interval=self.frame_interval, num_clips=self.num_clips
        )

    def random_indices(self, total_frames: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return the frame indices (1, num_frames) of a random training clip."""
        if self.sampling == "segments":
            return sampling.random_segment_indices(total_frames, num_segments=self.num_frames, rng=rng)
        return sampling.random_dense_indices(
            total_frames, num_frames=self.num_frames, frame_interval=self.frame_interval, rng=rng
        )

    def crops(self, frames: Tensor) -> Tensor:
        """Resize and crop: uint8 (..., 3, H, W) → uint8 (num_crops, ..., 3, S, S), mirrored crops last (x2 with `flip`)."""
        return torch.stack(self.crop_views(frames))

    def crop_views(self, frames: Tensor) -> list[Tensor]:
        """Return what `crops` does, one by one; those that are not mirrored are views of the resized frames."""
        frames = transforms.resize_short_side(frames, self.short_side)
        if self.num_crops == 3:
            size = self.three_crop_size
            crops = transforms.three_crop_views(transforms.resize_short_side(frames, size), size)
        else:
            crops = [transforms.center_crop(frames, self.crop_size)]
        return crops + [crop.flip(-1) for crop in crops] if self.flip else crops

    def normalize(self, frames: Tensor) -> Tensor:
        """uint8 RGB frames (..., T, 3, H, W) → float32 model input (..., 3, T, H, W)."""
        return transforms.normalize(frames, self.mean, self.std)

    def train_transform(
        self,
        *,
        crop_area: tuple[float, float] = (0.08, 1.0),
        flip_prob: float = 0.5,
        color_jitter: bool = True,
        normalize: bool = True,
    ) -> augment.TrainTransform:
        """Return the published training transform: clip uint8 (T, 3, H, W) [, label] → model input [, label]."""
        return augment.TrainTransform(
            self, crop_area=crop_area, flip_prob=flip_prob, color_jitter=color_jitter, normalize=normalize
        )

    def eval_transform(self, crops: int = 1, *, normalize: bool = True) -> augment.EvalTransform:
        """Return the test transform, clip uint8 (T, 3, H, W) → model input, with one centre crop or three crops."""
        return augment.EvalTransform(replace(self, num_crops=crops, flip=False), normalize=normalize)

    def for_channels(self, in_chans: int) -> "InputSpec":
        """Return the spec for clips of another number of channels, each with the average mean and std."""
        if in_chans == len(self.mean):
            return self
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return replace(self, mean=(mean,) * in_chans, std=(std,) * in_chans)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON knows them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "InputSpec":
        """Read what `to_dict` returned; fields of a later version are passed over with a warning."""
        unknown = values.keys() - {f.name for f in fields(cls)}
        if unknown:
            _logger.warning("unknown fields of an input spec are passed over: %s", ", ".join(sorted(unknown)))
        return cls(**{name: _as_tuple(value) for name, value in values.items() if name not in unknown})


def _as_tuple(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
