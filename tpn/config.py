"""The description of a model: what `from_config` builds, `model.config` returns, and `config.json` stores.

The methods that need PyTorch import it: the command line reads the table of checkpoints without it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tpn.validation import (
    brief,
    check_bool,
    check_input_spec,
    check_int,
    check_label_pairs,
    check_labels,
    check_number,
    check_temperature,
    errors_of,
    is_text,
)
from tpn.video import sampling

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tpn.video import augment

_logger = logging.getLogger(__name__)

Sampling = Literal["dense", "segments"]

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class InputSpec:
    """The clips that a model takes, and the views with which its accuracy is measured.

    Each number has a limit, so that a damaged config cannot exhaust memory. A clip has at most 2**27 values
    after resizing, `in_chans * num_frames * short_side**2`: 64 frames of short side 836, for example.

    Attributes:
        num_frames: frames of a clip, T, up to 4,096.
        frame_interval: index step between them, up to 10,000; 1 = consecutive. Unused by "segments".
        target_fps: frame rate at which every video is sampled, from 0.01 to 1,000. None uses the video's own rate. Frames without
            a rate, such as arrays and extracted frames, are not resampled.
        sampling: "dense" (clips of equally spaced frames) or "segments" (one frame per segment of the whole video).
        num_clips: clips per video in the test protocol, up to 1,000.
        num_crops: crops per clip in the test protocol, 1 or 3.
        flip: whether the test protocol adds a flipped copy of every view.
        short_side: pixels of the shorter side after resizing, up to 8,192.
        crop_size: side of the single center crop, and of training crops, in pixels.
        three_crop_size: side of the three crops along the longer side, in pixels. None uses `short_side`.
        mean: of each channel, on the 0..255 scale, from -1,000 to 1,000. Up to 1,024 channels.
        std: of each channel, on the 0..255 scale, from 0.001 to 1,000.
        flip_label_pairs: pairs of class names that a horizontal flip exchanges, such as ("moving left", "moving right"). They
            apply to data that has these classes, in any order.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range, or two fields contradict each other.
    """

    num_frames: int
    frame_interval: int = 1
    sampling: Sampling = "dense"
    num_clips: int = 10
    num_crops: int = 3
    flip: bool = False
    short_side: int = 256
    crop_size: int = 224
    three_crop_size: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    flip_label_pairs: tuple[tuple[str, str], ...] = ()
    target_fps: float | None = None

    def __post_init__(self) -> None:
        check_input_spec(self)
        check_label_pairs(self.flip_label_pairs)

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
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(C, T, S, S) of a center crop."""
        return self.in_chans, self.num_frames, self.crop_size, self.crop_size

    @property
    def view_size(self) -> int:
        """Side of the crops of the test protocol, in pixels."""
        return (self.three_crop_size or self.short_side) if self.num_crops == 3 else self.crop_size

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
        """Resize and crop: uint8 (..., 3, H, W) → uint8 (num_crops, ..., 3, S, S), with `flip` the flipped crops last."""
        import torch

        return torch.stack(self.crop_views(frames))

    def crop_views(self, frames: Tensor) -> list[Tensor]:
        """Return the crops of `crops` one by one; those that are not flipped are views of the resized frames."""
        from tpn.video import transforms

        frames = transforms.resize_short_side(frames, self.short_side)
        if self.num_crops == 3:
            frames = transforms.resize_short_side(frames, self.view_size)
            crops = transforms.three_crop_views(frames, self.view_size)
        else:
            crops = [transforms.center_crop(frames, self.view_size)]
        return crops + [crop.flip(-1) for crop in crops] if self.flip else crops

    def normalize(self, frames: Tensor) -> Tensor:
        """uint8 RGB frames (..., T, 3, H, W) → float32 model input (..., 3, T, H, W)."""
        from tpn.video import transforms

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
            crop_area: see `TrainTransform`.
            color_jitter: see `TrainTransform`.
            rand_augment: see `TrainTransform`.
            random_erasing: see `TrainTransform`.
            normalize: return the model's input; otherwise uint8 (T, 3, S, S), for `normalize` on the device.
        """
        from tpn.video import augment

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
        from tpn.video import augment

        self._check_rgb()
        spec = replace(self, num_crops=crops, flip=False)
        return augment.EvalTransform(spec.crops, normalize=spec.normalize if normalize else None)

    def _check_rgb(self) -> None:
        if self.in_chans != 3:
            raise ValueError(f"the transforms take RGB clips; mean and std are for {self.in_chans} channels")

    def with_views(self, num_clips: int | None = None, num_crops: int | None = None) -> InputSpec:
        """Return the spec with other views, without flipped ones; a number that is not given stays. See `parse_views`."""
        if num_clips is None and num_crops is None:
            return self
        clips = self.num_clips if num_clips is None else num_clips
        return replace(self, num_clips=clips, num_crops=self.num_crops if num_crops is None else num_crops, flip=False)

    def for_channels(self, in_chans: int) -> InputSpec:
        """Return the spec for clips of another number of channels, each with the average mean and std."""
        check_int("in_chans", in_chans, minimum=1, maximum=1024)
        if in_chans == self.in_chans:
            return self
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return replace(self, mean=(mean,) * in_chans, std=(std,) * in_chans)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in types that JSON has."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], labels: Sequence[str] | None = None) -> InputSpec:
        """Read the result of `to_dict`; fields of a later version are skipped with a warning.

        Earlier versions stored `flip_label_pairs` as class indices: `labels`, the class names, convert them. Without labels they
        are dropped with a warning.
        """
        return cls(**_known_fields(cls, _upgrade_fields(dict(values), labels) if isinstance(values, Mapping) else values))


def parse_views(text: str) -> tuple[int, int]:
    """Read "10x3" as (num_clips, num_crops)."""
    clips, _, crops = str(text).partition("x")
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
        name: the registered name, or "module:package.Class" for a module that is not registered.
        args: keyword arguments, in types that JSON has.
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_text(self.name) or not self.name:
            raise TypeError(f"name must be a string, the registered name of a part, got {brief(self.name)}")
        if not isinstance(self.args, Mapping) or not all(is_text(name) for name in self.args):
            raise TypeError(f"args of {brief(self.name)} must be a mapping from names to values, got {brief(self.args)}")
        try:
            args = json.loads(json.dumps(dict(self.args), allow_nan=False), object_hook=_frozen)
        except (TypeError, ValueError, RecursionError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"args of {brief(self.name)} must be values that JSON has, got {brief(self.args)}: {error}") from error
        object.__setattr__(self, "args", args)

    @classmethod
    def of_module(cls, module: nn.Module) -> PartConfig:
        """Describe a module that no registered name builds."""
        return cls(f"{MODULE}{type(module).__module__}.{type(module).__qualname__}")

    @property
    def is_module(self) -> bool:
        return self.name.startswith(MODULE)


MODULE = "module:"


@dataclass(frozen=True)
class HeadConfig:
    """A classifier.

    Attributes:
        num_classes: K, up to 1,000,000; 0 for none.
        drop_rate: dropout before it, in [0, 1).
        multi_label: whether a video may have several classes, or none.
        temperature: of the probabilities, 0.01 to 100, as fitted by `tpn.evaluate(..., calibrate=True)`. 1 without calibration.
            Logits are not divided by it.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range.
    """

    num_classes: int
    drop_rate: float = 0.5
    multi_label: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_int("num_classes", self.num_classes, minimum=0, maximum=1_000_000)
        check_number("drop_rate", self.drop_rate, minimum=0, maximum=1)
        if self.drop_rate == 1:
            raise ValueError(f"drop_rate must be in [0, 1), got {self.drop_rate}")
        check_bool("multi_label", self.multi_label)
        check_temperature(self.temperature)


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
        architecture: the entry point that the model started from, such as "tpn_slowonly_r50_k400". For information only: it does
            not change the model.

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
                raise TypeError(f"{name} must be a {kind.__name__}, got {brief(value)}")
        if not is_text(self.architecture) or not self.architecture:
            raise ValueError(f"architecture must be a name, got {brief(self.architecture)}")
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
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Read the result of `to_dict`; fields of a later version are skipped with a warning.

        Raises TypeError or ValueError: a field is missing or not valid; the message names it.
        """
        known = _known_fields(cls, values)
        for name, kind in (("backbone", PartConfig), ("neck", PartConfig), ("head", HeadConfig), ("aux_head", HeadConfig)):
            if isinstance(known.get(name), Mapping):
                with errors_of(name):
                    known[name] = kind(**_known_fields(kind, known[name]))
        if isinstance(known.get("input_spec"), Mapping):
            with errors_of("input_spec"):
                known["input_spec"] = InputSpec.from_dict(known["input_spec"], known.get("labels"))
        return cls(**known)


@dataclass(frozen=True)
class InputDefaults:
    """The frames that a backbone expects: crop and short side in pixels, mean and std on the 0..255 scale."""

    crop_size: int = 224
    short_side: int = 256
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def _known_fields(cls: type, values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise TypeError(f"{cls.__name__}.from_dict takes a mapping, got {brief(values)}")
    names = {f.name for f in fields(cls)}
    if unknown := sorted(values.keys() - names):
        _logger.warning("skipped unknown fields of %s: %s", cls.__name__, ", ".join(unknown))
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in values]:
        raise TypeError(f"{', '.join(missing)}: missing in {cls.__name__}")
    return {name: value if name in ("backbone", "neck") else _as_tuple(value) for name, value in values.items() if name in names}


def _upgrade_fields(values: dict[str, Any], labels: Sequence[str] | None) -> dict[str, Any]:
    """Read the fields of an input spec that an earlier version wrote. Others are left to validation."""
    if "mirrored" in values:  # the first version, which had no limit for `three_crop_size`
        values["flip_label_pairs"] = values.pop("mirrored")
        sizes = [size for name in ("three_crop_size", "short_side") if isinstance(size := values.get(name), int)]
        values["three_crop_size"] = min(sizes) if len(sizes) == 2 else values.get("three_crop_size")
    pairs = values.get("flip_label_pairs")
    if isinstance(pairs, list | tuple) and pairs and all(_are_indices(pair) for pair in pairs):
        names = dict(enumerate(labels or ()))
        named = [(names[a], names[b]) for a, b in pairs if a in names and b in names]
        if len(named) < len(pairs):
            _logger.warning("dropped flip_label_pairs %s: they are indices of classes without names", pairs)
        values["flip_label_pairs"] = tuple(named)
    return values


def _are_indices(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and [*map(type, pair)] == [int, int]


def _frozen(values: dict[str, Any]) -> FrozenDict:
    return FrozenDict({name: _as_tuple(value) for name, value in values.items()})


def _as_tuple(value: Any) -> Any:
    """Return JSON's lists as the tuples that they were."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
