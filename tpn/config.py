"""The description of a model: what `from_config` builds, `model.config` returns, and `config.json` stores."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tpn.video import augment, sampling, transforms

_logger = logging.getLogger(__name__)

Sampling = Literal["dense", "segments"]

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class InputSpec:
    """The clips that a model takes, and the views that its accuracy is measured with.

    Attributes:
        num_frames: frames of a clip, T.
        frame_interval: index step between them; 1 = consecutive. Unused by "segments".
        target_fps: frame rate at which every video is sampled; None: the video's own. Frames without a rate, such as arrays and
            extracted frames, are taken as they are.
        sampling: "dense" (clips of equally spaced frames) or "segments" (one frame per segment of the whole video).
        num_clips, num_crops, flip: views of the test protocol; 1 or 3 crops per clip; `flip` adds every view mirrored.
        short_side: pixels of the shorter side after resizing.
        crop_size: side of the single center crop, and of training crops, in pixels.
        three_crop_size: side of the three crops along the longer side, in pixels. Default: `short_side`.
        mean, std: per channel, on the 0..255 scale.
        flip_label_pairs: pairs of class names that a horizontal flip exchanges, such as ("moving left", "moving right"). They
            apply to data that has these classes, in any order.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range.
    """

    num_frames: int
    frame_interval: int = 1
    sampling: Sampling = "dense"
    num_clips: int = 10
    num_crops: int = 3
    flip: bool = False
    short_side: int = 256
    crop_size: int = 224
    three_crop_size: int = 0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    flip_label_pairs: tuple[tuple[str, str], ...] = ()
    target_fps: float | None = None

    def __post_init__(self) -> None:
        check_int("three_crop_size", self.three_crop_size, minimum=0)
        if not self.three_crop_size:
            object.__setattr__(self, "three_crop_size", self.short_side)
        for name in ("num_frames", "frame_interval", "num_clips", "num_crops", "short_side", "crop_size"):
            check_int(name, getattr(self, name), minimum=1)
        fps = self.target_fps
        if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf):
            raise ValueError(f"target_fps must be a number greater than 0, got {fps!r}")
        if self.sampling not in get_args(Sampling):
            raise ValueError(f"sampling must be 'dense' or 'segments', got {self.sampling!r}")
        if self.num_crops not in (1, 3):
            raise ValueError(f"num_crops must be 1 (center) or 3 (along the longer side), got {self.num_crops!r}")
        if not isinstance(self.flip, bool):
            raise TypeError(f"flip must be True or False, got {self.flip!r}")
        if self.crop_size > self.short_side:
            raise ValueError(f"crop_size must be at most short_side={self.short_side}, got {self.crop_size}")
        if self.num_crops == 3 and self.three_crop_size > self.short_side:
            raise ValueError(f"three_crop_size must be at most short_side={self.short_side}, got {self.three_crop_size}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
                raise TypeError(f"{name} must be a tuple of finite numbers, one per channel, got {values!r}")
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must have one value per channel, got {len(self.mean)} and {len(self.std)}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be greater than 0, got {self.std}")
        pairs = self.flip_label_pairs
        if not isinstance(pairs, tuple) or not all(isinstance(p, tuple) and [*map(type, p)] == [str, str] for p in pairs):
            raise TypeError(f"flip_label_pairs must be a tuple of pairs of class names, got {pairs!r}")
        names = [name for pair in pairs for name in pair]
        if len(set(names)) < len(names):
            raise ValueError(f"flip_label_pairs must name each class once, got {pairs}")

    @property
    def in_chans(self) -> int:
        """Channels of a frame, 3 for RGB."""
        return len(self.mean)

    @property
    def clip_span(self) -> int:
        """Consecutive frames from the first to the last of a clip (dense sampling)."""
        return sampling.clip_span(self.num_frames, self.frame_interval)

    @property
    def num_views(self) -> int:
        return self.num_clips * self.num_crops * (2 if self.flip else 1)

    @property
    def view_size(self) -> int:
        """Side of the crops of the test protocol, in pixels."""
        return self.three_crop_size if self.num_crops == 3 else self.crop_size

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
        """Resize and crop: uint8 (..., 3, H, W) → uint8 (num_crops, ..., 3, S, S), with `flip` the mirrored crops last."""
        return torch.stack(self.crop_views(frames))

    def crop_views(self, frames: Tensor) -> list[Tensor]:
        """Return the crops of `crops` one by one; those that are not mirrored are views of the resized frames."""
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
        classes: Sequence[str] | None = None,
        crop_area: tuple[float, float] = (0.08, 1.0),
        flip_prob: float = 0.5,
        color_jitter: bool = True,
        rand_augment: int = 0,
        random_erasing: float = 0.0,
        normalize: bool = True,
    ) -> augment.TrainTransform:
        """Return the published training transform: clip uint8 (T, 3, H, W) [, label] → model input [, label].

        Args:
            classes: class names of the data in the order of its labels, such as `model.labels`. Needed if the spec has
                `flip_label_pairs`, unless `flip_prob` is 0.
            flip_prob: probability of a horizontal flip, which exchanges the labels of `flip_label_pairs`. A clip is not flipped
                if the flip would give it a class that is not in `classes`.
            crop_area, color_jitter, rand_augment, random_erasing: see `TrainTransform`.
            normalize: return the model's input; otherwise uint8 (T, 3, S, S), for `normalize` on the device.
        """
        self._check_rgb()
        return augment.TrainTransform(
            self.crop_size,
            crop_area=crop_area,
            flip_prob=flip_prob,
            flip_label_pairs=augment.index_pairs(self.flip_label_pairs, classes) if flip_prob else (),
            color_jitter=color_jitter,
            rand_augment=rand_augment,
            random_erasing=random_erasing,
            fill=self.mean,
            normalize=self.normalize if normalize else None,
        )

    def eval_transform(self, crops: int = 1, *, normalize: bool = True) -> augment.EvalTransform:
        """Return the test transform, clip uint8 (T, 3, H, W) → model input, with one center crop or three crops."""
        self._check_rgb()
        spec = replace(self, num_crops=crops, flip=False)
        return augment.EvalTransform(spec.crops, normalize=spec.normalize if normalize else None)

    def _check_rgb(self) -> None:
        if self.in_chans != 3:
            raise ValueError(f"the transforms take RGB clips; mean and std are for {self.in_chans} channels")

    def with_views(self, num_clips: int | None = None, num_crops: int | None = None) -> "InputSpec":
        """Return the spec with other views, without mirrored ones; a number that is not given stays. See `parse_views`."""
        if num_clips is None and num_crops is None:
            return self
        clips = self.num_clips if num_clips is None else num_clips
        return replace(self, num_clips=clips, num_crops=self.num_crops if num_crops is None else num_crops, flip=False)

    def for_channels(self, in_chans: int) -> "InputSpec":
        """Return the spec for clips of another number of channels, each with the average mean and std."""
        check_int("in_chans", in_chans, minimum=1)
        if in_chans == self.in_chans:
            return self
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return replace(self, mean=(mean,) * in_chans, std=(std,) * in_chans)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in types that JSON has."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], labels: Sequence[str] | None = None) -> "InputSpec":
        """Read the result of `to_dict`; fields of a later version are skipped with a warning.

        Earlier versions stored `flip_label_pairs` as class indices: `labels`, the class names, convert them. Without labels they
        are dropped with a warning.
        """
        return cls(**_known_fields(cls, _upgrade_fields(dict(values), labels) if isinstance(values, Mapping) else values))


def parse_views(text: str) -> tuple[int, int]:
    """Read "10x3" as (num_clips, num_crops)."""
    clips, _, crops = text.partition("x")
    if not (clips.isdecimal() and crops.isdecimal() and int(clips) >= 1 and int(crops) in (1, 3)):
        raise ValueError(f"views must be CLIPSxCROPS with 1 or 3 crops, such as 10x3 or 1x1, got {text!r}")
    return int(clips), int(crops)


class FrozenDict(dict[str, Any]):
    """A dictionary that cannot be changed, with a hash."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a config cannot be changed; make another one with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = setdefault = clear = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> Any:
        return FrozenDict, (dict(self),)


@dataclass(frozen=True)
class PartConfig:
    """A backbone or a neck: its registered name and the arguments that it is built with.

    Attributes:
        name: registered with `tpn.register_backbone` or `tpn.register_neck`; "module:package.Class" for a module that is not.
        args: keyword arguments, in types that JSON has.
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"the name of a part must be a string, got {self.name!r}")
        if not isinstance(self.args, Mapping):
            raise TypeError(f"the arguments of {self.name} must be a mapping, got {self.args!r}")
        try:
            args = json.loads(json.dumps(dict(self.args)), object_hook=_frozen)
        except TypeError as error:
            raise TypeError(f"the arguments of {self.name} must be values that JSON has: {error}") from error
        object.__setattr__(self, "args", args)

    @classmethod
    def of_module(cls, module: nn.Module) -> "PartConfig":
        """Describe a module that no registered name builds."""
        return cls(f"{MODULE}{type(module).__module__}.{type(module).__qualname__}")

    @property
    def is_module(self) -> bool:
        return self.name.startswith(MODULE)


MODULE = "module:"


@dataclass(frozen=True)
class HeadConfig:
    """A classifier: K classes (0 for none) behind dropout; with `multi_label`, a video may have several classes, or none."""

    num_classes: int
    drop_rate: float = 0.5
    multi_label: bool = False

    def __post_init__(self) -> None:
        check_int("num_classes", self.num_classes, minimum=0)
        if isinstance(self.drop_rate, bool) or not isinstance(self.drop_rate, int | float) or not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate must be in [0, 1), got {self.drop_rate!r}")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that is needed to build a model, except its weights.

    Attributes:
        backbone: maps a clip to feature maps.
        neck: fuses the feature maps into one; None for the baseline, which classifies the last map.
        head: the classifier.
        aux_head: the auxiliary classifier on the last feature map but one, used in training; None for none.
        input_spec: the clips that the model takes.
        labels: the K class names in the order of the logits; None if unknown.
        architecture: the entry point that the model started from, such as "tpn_slowonly_r50_k400". It is a name for people and
            for timm; building does not read it.

    Raises:
        TypeError, ValueError: a field has the wrong type, or two fields contradict each other.

    Example:
        >>> config = tpn.ModelConfig(
        ...     backbone=tpn.PartConfig("slowonly", {"depth": 50}),
        ...     neck=tpn.PartConfig("tpn"),
        ...     head=tpn.HeadConfig(num_classes=12),
        ...     input_spec=tpn.InputSpec(num_frames=8, frame_interval=8),
        ... )
        >>> model = tpn.TPNClassifier.from_config(config)
    """

    backbone: PartConfig
    neck: PartConfig | None
    head: HeadConfig
    input_spec: InputSpec
    aux_head: HeadConfig | None = None
    labels: tuple[str, ...] | None = None
    architecture: str = "tpn"

    def __post_init__(self) -> None:
        types = (("backbone", PartConfig), ("head", HeadConfig), ("input_spec", InputSpec), ("architecture", str))
        optional = (("neck", PartConfig), ("aux_head", HeadConfig), ("labels", tuple))
        for name, kind in (*types, *optional):
            value = getattr(self, name)
            if not isinstance(value, kind) and not (value is None and (name, kind) in optional):
                raise TypeError(f"{name} must be a {kind.__name__}, got {value!r}")
        if self.labels is not None:
            check_labels(self.labels, self.num_classes)
        if self.aux_head is not None and self.neck is None:
            raise ValueError("aux_head must be None for a model without neck (neck=None)")

    @property
    def num_classes(self) -> int:
        return self.head.num_classes

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in types that JSON has."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Read the result of `to_dict`; fields of a later version are skipped with a warning.

        Raises TypeError or ValueError: a field is missing or not valid.
        """
        known = _known_fields(cls, values)
        for name, kind in (("backbone", PartConfig), ("neck", PartConfig), ("head", HeadConfig), ("aux_head", HeadConfig)):
            if isinstance(known.get(name), Mapping):
                known[name] = kind(**_known_fields(kind, known[name]))
        if isinstance(known.get("input_spec"), Mapping):
            known["input_spec"] = InputSpec.from_dict(known["input_spec"], known.get("labels"))
        return cls(**known)


@dataclass(frozen=True)
class InputDefaults:
    """The frames that a backbone expects: crop and short side in pixels, mean and std on the 0..255 scale."""

    crop_size: int = 224
    short_side: int = 256
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def check_labels(labels: Any, num_classes: int) -> None:
    """Raise TypeError if labels are not names, ValueError if there is not one per class."""
    if isinstance(labels, str) or not all(isinstance(name, str) for name in labels):
        raise TypeError(f"labels must be a tuple of names, got {labels!r}")
    if len(labels) != num_classes:
        raise ValueError(f"labels must have {num_classes} names, one per class, got {len(labels)}")


def check_int(name: str, value: Any, *, minimum: int) -> None:
    """Raise TypeError if a value is not an integer, ValueError if it is below the minimum."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _known_fields(cls: type, values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise TypeError(f"{cls.__name__}.from_dict takes a mapping, got {values!r}")
    names = {f.name for f in fields(cls)}
    if unknown := sorted(values.keys() - names):
        _logger.warning("skipped unknown fields of %s: %s", cls.__name__, ", ".join(unknown))
    return {name: value if name in ("backbone", "neck") else _as_tuple(value) for name, value in values.items() if name in names}


def _upgrade_fields(values: dict[str, Any], labels: Sequence[str] | None) -> dict[str, Any]:
    """Read the fields of an input spec that an earlier version wrote."""
    if "mirrored" in values:  # the first version, which had no limit for `three_crop_size`
        values["flip_label_pairs"] = values.pop("mirrored")
        values["three_crop_size"] = min(values["three_crop_size"], values["short_side"])
    pairs = values.get("flip_label_pairs", ())
    if any(isinstance(label, int) for pair in pairs for label in pair):
        names = dict(enumerate(labels or ()))
        named = [(names[a], names[b]) for a, b in pairs if a in names and b in names]
        if len(named) < len(pairs):
            _logger.warning("dropped flip_label_pairs %s: they are indices of classes without names", pairs)
        values["flip_label_pairs"] = tuple(named)
    return values


def _frozen(values: dict[str, Any]) -> FrozenDict:
    return FrozenDict({name: _as_tuple(value) for name, value in values.items()})


def _as_tuple(value: Any) -> Any:
    """Return JSON's lists as the tuples that they were."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
