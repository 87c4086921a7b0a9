"""Change a model's config with the arguments of `create_model`."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from tpn.config import HeadConfig, InputDefaults, InputSpec, ModelConfig, PartConfig
from tpn.errors import nearest
from tpn.models.registry import BACKBONES, NECKS, part_of
from tpn.validation import check_int

CLIP_SPAN = 64
"""Frames that a clip spans by default, as in the published models."""


def custom_config(
    backbone: str | nn.Module, num_frames: int | None = None, backbone_args: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Return the config of the pyramid on a backbone, without classes; the input is what the backbone expects."""
    if isinstance(backbone, nn.Module):
        part, defaults = part_of(backbone), getattr(backbone, "input_defaults", InputDefaults())
    elif isinstance(backbone, str):
        part = PartConfig(backbone, backbone_args or {})
        defaults = InputDefaults() if part.is_module else BACKBONES.input_defaults(part)
    else:
        raise TypeError(f"backbone must be a name, such as 'timm/resnet50', or a module, got {backbone!r}")
    num_frames = 8 if num_frames is None else num_frames
    check_int("num_frames", num_frames, minimum=1)
    interval = max(CLIP_SPAN // num_frames, 1)
    spec = InputSpec(num_frames, interval, three_crop_size=defaults.crop_size, **vars(defaults))
    return ModelConfig(part, PartConfig("tpn"), HeadConfig(0), spec, HeadConfig(0))


def override(
    config: ModelConfig,
    *,
    num_classes: int | None = None,
    drop_rate: float | None = None,
    multi_label: bool | None = None,
    num_frames: int | None = None,
    in_chans: int | None = None,
    input_spec: InputSpec | None = None,
    neck: str | nn.Module | None = "auto",
    aux_head: bool = True,
    backbone_args: Mapping[str, Any] | None = None,
    neck_args: Mapping[str, Any] | None = None,
    **part_args: Any,
) -> ModelConfig:
    """Return a config with changes; None keeps a value.

    With another number of frames, the pyramid's temporal scales change in proportion. With another number of classes, labels are
    dropped.

    Args:
        multi_label: whether a video may have several classes.
        neck: "auto" for that of the config; None for none; a registered name; or a module.
        aux_head: False leaves the auxiliary head out.
        **part_args: arguments of the neck, or of the backbone if the neck does not have them.

    Raises TypeError, ValueError.
    """
    spec = _changed_spec(config.input_spec, input_spec, num_frames, in_chans)
    backbone, neck_part = config.backbone, _neck_part(config, neck)
    of_neck, of_backbone = _route(backbone, neck_part, {k: v for k, v in part_args.items() if v is not None})
    if neck_args and (neck_part is None or isinstance(neck, nn.Module)):
        raise ValueError(f"neck_args is valid with a registered neck, got neck={neck_part and 'a module'}")
    if backbone_args and backbone.is_module:
        raise ValueError("backbone_args is valid with a registered backbone, got a module")
    if neck_part is not None:
        scales, old = neck_part.args.get("temporal_scales"), config.input_spec.num_frames
        if scales and spec.num_frames != old:
            of_neck = {"temporal_scales": [max(s * spec.num_frames // old, 1) for s in scales], **of_neck}
        neck_part = replace(neck_part, args={**neck_part.args, **of_neck, **(neck_args or {})})
    if not isinstance(multi_label, bool | None):
        raise TypeError(f"multi_label must be True or False, got {multi_label!r}")
    given = {"num_classes": num_classes, "drop_rate": drop_rate, "multi_label": multi_label}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    aux = config.head if config.neck is None else config.aux_head  # a baseline that gets a neck gets both
    return replace(
        config,
        backbone=replace(backbone, args={**backbone.args, **of_backbone, **(backbone_args or {})}),
        neck=neck_part,
        head=replace(config.head, **changes),
        aux_head=replace(aux, **changes) if aux and aux_head and neck_part else None,
        input_spec=spec,
        labels=config.labels if num_classes in (None, config.num_classes) else None,
    )


def _changed_spec(old: InputSpec, new: InputSpec | None, num_frames: int | None, in_chans: int | None) -> InputSpec:
    spec = old if new is None else new
    if not isinstance(spec, InputSpec):
        raise TypeError(f"input_spec must be a tpn.InputSpec, got {type(spec).__name__}")
    if new is not None and num_frames not in (None, new.num_frames):
        raise ValueError(f"num_frames must be input_spec.num_frames={new.num_frames}, got {num_frames}; pass one of them")
    spec = spec if num_frames is None else replace(spec, num_frames=num_frames)
    return spec if in_chans is None else spec.for_channels(in_chans)


def _neck_part(config: ModelConfig, neck: str | nn.Module | None) -> PartConfig | None:
    if isinstance(neck, nn.Module):
        return part_of(neck)
    if neck is None or neck == "auto":
        return config.neck if neck else None
    if not isinstance(neck, str):
        raise TypeError(f"neck must be a registered name, a module, or None, got {neck!r}")
    return config.neck if config.neck is not None and config.neck.name == neck else PartConfig(neck)


def _route(backbone: PartConfig, neck: PartConfig | None, args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide arguments among neck and backbone. TypeError for those that neither has."""
    neck_names, backbone_names = NECKS.arguments(neck) if neck else {}, BACKBONES.arguments(backbone)
    unknown = sorted(args.keys() - {*neck_names, *backbone_names})
    if unknown and neck is None and set(unknown) <= NECKS.arguments(PartConfig("tpn")).keys():
        raise ValueError(f"{', '.join(unknown)} not valid here: the model has no neck (neck=None, or a baseline)")
    if unknown:
        common = list(inspect.signature(override).parameters)[1:-1]
        near = nearest(unknown[0], ["pretrained", *common, *backbone_names, *neck_names])
        raise TypeError(
            f"unknown argument {', '.join(unknown)}; the nearest are {near}. "
            f"{backbone.name} takes {', '.join(backbone_names) or 'none'}, the neck {', '.join(neck_names) or 'none'}; "
            "further arguments of a network go into backbone_args={...}"
        )
    of_neck = {name: value for name, value in args.items() if name in neck_names}
    return of_neck, {name: value for name, value in args.items() if name not in neck_names}
