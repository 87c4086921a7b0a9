"""What all factories share: heads around backbone and neck, and what a model knows of itself."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from timm.models import is_model, model_entrypoint, register_model
from torch import nn

from tpn.models.classifier import TPNClassifier
from tpn.models.heads import AuxHead, ClassificationHead
from tpn.models.neck import TemporalPyramid
from tpn.video.spec import InputSpec


def register(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register a factory with timm; a second import of its module replaces its own entries without timm's warning."""
    name = function.__name__
    if is_model(name) and model_entrypoint(name).__module__ == function.__module__:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return register_model(function)
    return register_model(function)


def assemble(
    backbone: nn.Module, channels: Sequence[int], neck: TemporalPyramid | None, *, num_classes: int, drop_rate: float
) -> TPNClassifier:
    """Put the heads on. channels: of the backbone's maps, finest first; the auxiliary head reads the last but one."""
    if neck is None:
        return TPNClassifier(backbone, None, ClassificationHead(channels[-1], num_classes, drop_rate))
    head = ClassificationHead(neck.out_channels, num_classes, drop_rate)
    return TPNClassifier(backbone, neck, head, AuxHead(channels[-2], neck.out_channels, num_classes, drop_rate))


def describe(
    model: TPNClassifier, model_args: Mapping[str, Any], *, spec: InputSpec, labels: Sequence[str] = (), num_classes: int
) -> None:
    """Tell a model how it was built, what its clips look like, and what its classes are called.

    spec, labels, num_classes: of the weights; what they say of the classes holds for as many classes only.
    """
    model.model_args = {name: value for name, value in model_args.items() if name != "num_classes"}
    model.labels = tuple(labels) if len(labels) == model.num_classes else None
    mirrored = spec.mirrored if model.num_classes == num_classes else ()
    if any(label >= model.num_classes for pair in mirrored for label in pair):
        raise ValueError(
            f"input_spec.mirrored names classes beyond the model's {model.num_classes}: {mirrored}; pass pairs of your own "
            "classes that change places when a clip is flipped, or ()"
        )
    spec = replace(spec, num_frames=model_args["num_frames"], mirrored=mirrored)
    model.input_spec = spec.for_channels(model.in_chans)


def check_start(backbone_pretrained: Any) -> None:
    if backbone_pretrained not in (None, False, True, "imagenet"):
        raise ValueError(f"backbone_pretrained must be True, False or 'imagenet', got {backbone_pretrained!r}")


def check_without_pyramid(kwargs: Mapping[str, Any], of_neck: Iterable[str], from_file: Mapping[str, Any]) -> None:
    """Refuse arguments of a pyramid that is left out. from_file: arguments of a saved model, which are not the caller's."""
    given = [name for name in of_neck if kwargs.get(name) is not None and name not in from_file]
    if given and not kwargs.get("pyramid", True):
        raise ValueError(f"{', '.join(given)}: of the pyramid, which this model has not (neck=None, or a baseline)")


def check_num_frames(num_frames: Any) -> None:
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise ValueError(f"num_frames must be an integer >= 1, got {num_frames!r}")


def timm_cfg(spec: InputSpec) -> dict[str, Any]:
    """Say in timm's terms what clips look like, as far as timm knows of that."""
    return {
        "input_size": (len(spec.mean), spec.crop_size, spec.crop_size),
        "test_input_size": (len(spec.mean), spec.three_crop_size, spec.three_crop_size),
        "interpolation": "bilinear",
        "crop_pct": spec.crop_size / spec.short_side,
        "mean": tuple(round(v / 255, 6) for v in spec.mean),
        "std": tuple(round(v / 255, 6) for v in spec.std),
        "paper_name": "Temporal Pyramid Network for Action Recognition",
        "paper_ids": "arXiv:2004.03548",
    }
