"""The pyramid on any backbone: `create_model("tpn", backbone=..., num_classes=K)`, and `build(module, num_classes=K)`."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, resolve_pretrained_cfg
from torch import nn

from tpn.models.backbones import FoldedBackbone, measure
from tpn.models.classifier import TPNClassifier
from tpn.models.neck import FlowOrder, TemporalPyramid, slack
from tpn.video.spec import InputSpec
from tpn.zoo import saved, sources
from tpn.zoo.assemble import assemble, check_num_frames, check_start, check_without_pyramid, describe, register, timm_cfg
from tpn.zoo.backbones import Looks, Wanted, looks_of, make_backbone
from tpn.zoo.weights import CUSTOM

_logger = logging.getLogger(__name__)

OWN = "own/"
"""How the name of somebody's own module begins in a saved model's arguments."""

FRAMES_SEEN = 64
"""Frames over which a clip reaches unless told otherwise, as those of the published models do."""

default_cfgs = generate_default_cfgs({CUSTOM: {"classifier": ("head.fc", "aux_head.fc")}})


def build(backbone: nn.Module, *, num_classes: int, **kwargs: Any) -> TPNClassifier:
    """Put the pyramid on a module of your own; the same as `create_model("tpn", backbone=backbone, ...)`.

    Args:
        backbone: clips (B, C, T, H, W) float → two or more maps (B, C_i, T_i, H_i, W_i), finest first, as a sequence or a
            dictionary. Channels, lengths and sizes are found out by showing it one clip of zeros.
        num_classes: K; 0 for a model that returns features.
        **kwargs: `num_frames`, `input_spec`, `flow_order`, ...; see `tpn.zoo.custom.tpn`.

    Returns a model like the zoo's. `create_model("local-dir:FOLDER", backbone=backbone)` reads what `tpn.save_pretrained` writes.
    """
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"build puts the pyramid on a module, got {backbone!r}; create_model('tpn', backbone=NAME) takes names")
    model = timm.create_model(CUSTOM, backbone=backbone, num_classes=num_classes, **kwargs)
    assert isinstance(model, TPNClassifier)
    return model


@register
def tpn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TPN on a backbone of your choice.

    Args:
        backbone: "timm/NAME", "torchvision/NAME", or a module as `build` takes it.
        num_classes, in_chans, drop_rate: K, input channels, dropout before the classifiers.
        num_frames: T, 8 by default.
        input_spec: what clips look like. Default: crops of the backbone's own size, normalised by its mean and standard
            deviation; frames so far apart that a clip reaches over about 64.
        out_indices: which of the backbone's stages are levels, finest first, (-2, -1) by default; not for modules.
        temporal_shift: let the residual blocks of a timm network see their neighbours in time, as TSM does.
        backbone_args: further arguments of the timm or torchvision network, such as {"img_size": 128}.
        backbone_pretrained: start the backbone from its own default weights, or those of its tag ("timm/convnext_tiny.fb_in22k").
        temporal_scales, out_channels, mid_channels, groups, flow_order: of the `TemporalPyramid`.
        pyramid: False leaves it out, auxiliary head included; `tpn.create_model` calls that `neck=None`.
        cache_dir: where weights are kept.
    """
    cfg = resolve_pretrained_cfg(CUSTOM, kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None))
    kwargs.pop("pretrained_model_args", None)  # what timm read from a config.json; it is in `kwargs` as well
    cache_dir = kwargs.pop("cache_dir", None)
    config = saved.saved_config(cfg, cache_dir)
    _check(pretrained and config is None and not (cfg.state_dict or cfg.file), kwargs, config)
    num_classes, labels = kwargs.get("num_classes", cfg.num_classes), []
    if config is not None:
        num_classes, labels = cfg.num_classes, config.get("label_names", [])
        spec = InputSpec.from_dict(config["input_spec"])
        if kwargs.get("in_chans", 3) != len(spec.mean):
            raise ValueError(f"the saved model takes {len(spec.mean)} channels, got in_chans={kwargs.get('in_chans', 3)}")
        kwargs.setdefault("input_spec", replace(spec, num_frames=kwargs.get("num_frames", spec.num_frames)))
    cfg_dict = {name: value for name, value in cfg.to_dict().items() if name != "state_dict"}
    make = partial(_build, cache_dir=cache_dir)  # timm keeps an argument of that name for itself
    model: TPNClassifier = build_model_with_cfg(make, CUSTOM, False, pretrained_cfg=cfg_dict, **kwargs)
    cast("Any", model).pretrained_cfg.update(timm_cfg(model.input_spec))
    describe(model, _to_save(model, kwargs), spec=model.input_spec, labels=labels, num_classes=num_classes)
    if pretrained:
        sources.load_pretrained(model, cfg, None, cache_dir)
    return model


def _check(without_weights: bool, kwargs: Mapping[str, Any], config: Mapping[str, Any] | None) -> None:
    """Refuse what cannot be, or would be without effect. config: of a saved model."""
    backbone, from_folder = kwargs.get("backbone"), config is not None
    if kwargs.get("features_only"):
        raise ValueError("features_only is timm's wrapper for images; model.backbone(x) returns the feature maps")
    _check_names(kwargs, {} if config is None else config.get("model_args", {}))
    if without_weights:
        raise ValueError(
            "there are no published weights of TPN on a backbone of your choice; backbone_pretrained=True starts from those "
            "of the backbone, checkpoint_path=FILE loads yours"
        )
    if not isinstance(backbone, str | nn.Module):
        raise ValueError(
            "backbone is needed: 'timm/NAME', 'torchvision/NAME' or a module; create_model('tpn', backbone=..., num_classes=K)"
        )
    if "num_classes" not in kwargs and not from_folder:
        raise ValueError("num_classes is needed, the number of your classes; 0 gives a model that returns features")
    check_start(kwargs.get("backbone_pretrained"))
    if not isinstance(kwargs.get("temporal_shift", False), bool):
        raise TypeError(f"temporal_shift must be True or False, got {kwargs['temporal_shift']!r}")
    spec, num_frames = kwargs.get("input_spec"), kwargs.get("num_frames")
    if spec is not None and not isinstance(spec, InputSpec):
        raise TypeError(f"input_spec must be a tpn.InputSpec, got {type(spec).__name__}")
    if spec is not None and num_frames not in (None, spec.num_frames):
        raise ValueError(
            f"num_frames={num_frames} and input_spec.num_frames={spec.num_frames} disagree; pass both alike, or one of them"
        )
    without_effect = {"out_indices", "backbone_args", "backbone_pretrained"} & {name for name, value in kwargs.items() if value}
    if isinstance(backbone, nn.Module) and without_effect and not from_folder:
        raise ValueError(f"{', '.join(sorted(without_effect))} go with a backbone's name; a module was given")
    if isinstance(backbone, str) and backbone.startswith(OWN):
        raise ValueError(
            f"the model was built on a module of its maker's own, {backbone.removeprefix(OWN)}; pass such a module, "
            "create_model('local-dir:FOLDER', backbone=MODULE)"
        )


def _check_names(kwargs: Mapping[str, Any], from_file: Mapping[str, Any]) -> None:
    """Refuse arguments that do not exist, and those of a pyramid that is left out."""
    of_model, of_neck = ([*signature(function).parameters] for function in (_build, _make_neck))
    of_model.remove("neck_args")
    of_neck.remove("shapes")
    if unknown := sorted(kwargs.keys() - {*of_model, *of_neck, *signature(build_model_with_cfg).parameters}):
        raise TypeError(
            f"unknown arguments {', '.join(unknown)}; those of the backbone go into backbone_args={{...}}, "
            f"tpn's are {', '.join([*of_model, *of_neck])}"
        )
    check_without_pyramid(kwargs, of_neck, from_file)


def _build(
    *,
    backbone: str | nn.Module,
    num_classes: int,
    num_frames: int | None = None,
    in_chans: int = 3,
    drop_rate: float = 0.5,
    input_spec: InputSpec | None = None,
    out_indices: Sequence[int] = (-2, -1),
    temporal_shift: bool = False,
    backbone_args: Mapping[str, Any] | None = None,
    backbone_pretrained: bool | str | None = None,
    pyramid: bool = True,
    cache_dir: str | PathLike[str] | None = None,
    **neck_args: Any,
) -> TPNClassifier:
    if num_frames is None:
        num_frames = 8 if input_spec is None else input_spec.num_frames
    check_num_frames(num_frames)
    looks = Looks()
    if isinstance(backbone, FoldedBackbone):
        own = looks_of(backbone.net)  # but for its size, which may have been changed
        looks = Looks(mean=own.mean, std=own.std)
    if isinstance(backbone, str):
        indices = tuple(out_indices if pyramid else out_indices[-1:])
        folder = None if cache_dir is None else Path(cache_dir)
        wanted = Wanted(indices, in_chans, bool(backbone_pretrained), backbone_args or {}, folder)
        backbone, looks = make_backbone(backbone, wanted)
    if temporal_shift and not isinstance(backbone, FoldedBackbone):
        raise ValueError("temporal_shift is for networks that see one frame at a time, those of timm or in a FoldedBackbone")
    spec = _default_spec(num_frames, looks) if input_spec is None else replace(input_spec, num_frames=num_frames)
    shapes = _shapes(backbone, in_chans, spec)
    _check_views(backbone, in_chans, spec)
    neck = _make_neck(shapes, **neck_args) if pyramid else None
    if temporal_shift:
        cast("FoldedBackbone", backbone).add_temporal_shift(num_frames)
    model = assemble(backbone, [shape[0] for shape in shapes], neck, num_classes=num_classes, drop_rate=drop_rate)
    like = next(backbone.parameters(), torch.empty(0))
    for part in filter(None, (model.neck, model.head, model.aux_head)):
        part.to(device=like.device, dtype=like.dtype)
    model.in_chans, model.input_spec = in_chans, spec
    return model


def _shapes(backbone: nn.Module, in_chans: int, spec: InputSpec) -> list[tuple[int, int, int, int]]:
    """Return (C, T, H, W) of each level."""
    frames = spec.num_frames
    if isinstance(backbone, FoldedBackbone):  # one frame tells all, unless shifts want their number
        frames = backbone.num_frames or 1
    like = next(backbone.parameters(), torch.empty(0))
    clip = torch.zeros(1, in_chans, frames, spec.crop_size, spec.crop_size, dtype=like.dtype, device=like.device)
    shapes = measure(backbone, clip)
    if isinstance(backbone, FoldedBackbone):
        shapes = [(channels, spec.num_frames, height, width) for channels, _, height, width in shapes]
    return shapes


def _check_views(backbone: nn.Module, in_chans: int, spec: InputSpec) -> None:
    """Warn of a backbone that takes training crops only, before somebody has trained on it."""
    if spec.num_crops == 1 or spec.three_crop_size == spec.crop_size:
        return
    try:
        _shapes(backbone, in_chans, replace(spec, crop_size=spec.three_crop_size))
    except ValueError as error:
        reason = str(error).partition("; choose another")[0]
        _logger.warning(
            "input_spec asks for tests on crops of three_crop_size=%s, but %s; give it three_crop_size=%s, or num_crops=1",
            *(spec.three_crop_size, reason, spec.crop_size),
        )


def _make_neck(
    shapes: Sequence[tuple[int, int, int, int]],
    *,
    temporal_scales: Sequence[int] | None = None,
    out_channels: int | None = None,
    mid_channels: int | None = None,
    groups: int = 32,
    flow_order: FlowOrder = "cascade",
) -> TemporalPyramid:
    channels, frames, *_ = zip(*shapes, strict=True)
    return TemporalPyramid(
        channels,
        frames,
        temporal_scales=temporal_scales,
        spatial_scales=_spatial_scales([shape[2:] for shape in shapes]),
        out_channels=out_channels,
        mid_channels=mid_channels,
        groups=groups,
        flow_order=flow_order,
    )


def _default_spec(num_frames: int, looks: Looks) -> InputSpec:
    return InputSpec(
        num_frames,
        max(FRAMES_SEEN // num_frames, 1),
        short_side=looks.short_side,
        crop_size=looks.crop_size,
        three_crop_size=looks.crop_size,
        mean=looks.mean,
        std=looks.std,
    )


def _spatial_scales(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Return the powers of two by which the levels, (H, W) each, are finer than the last; the neck cuts a little."""
    scales, last = [1], sizes[-1]
    for level in reversed(range(len(sizes) - 1)):
        fine = sizes[level]
        # Of a map and the next one, since small sizes, rounded again and again, say less and less; without padding, the last may.
        candidates = (_ratio(fine, sizes[level + 1]) * scales[0], _ratio(fine, last))
        scale = next((scale for scale in candidates if scale and _fits(fine, last, scale)), None)
        if scale is None:
            raise ValueError(
                f"level {level} is {fine[0]} x {fine[1]}, the last one {last[0]} x {last[1]}; the pyramid needs sizes that "
                "differ by a power of two, a pixel or so aside: choose other levels (out_indices), or another crop_size in "
                "input_spec"
            )
        scales.insert(0, scale)
    return scales


def _ratio(fine: tuple[int, int], coarse: tuple[int, int]) -> int:
    """Return the power of two by which one map is larger than another, rounded either way, else with `slack`; 0 for none."""
    pairs = list(zip(fine, coarse, strict=True))
    scales = [2**i for i in range(max(fine).bit_length())]
    for scale in scales:
        if all(c in (f // scale, -(-f // scale)) for f, c in pairs):
            return scale
    for scale in scales:  # networks without padding lose more
        if all(c <= -(-f // scale) <= c + slack(c) for f, c in pairs):
            return scale
    return 0


def _fits(fine: tuple[int, int], coarse: tuple[int, int], scale: int) -> bool:
    """Whether the neck can make a map as large as the coarsest, by halving, rounded up, and cutting."""
    return all(c <= -(-f // scale) <= c + slack(c) for f, c in zip(fine, coarse, strict=True))


def _to_save(model: TPNClassifier, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that build the model again, as JSON knows them."""
    args = {name: value for name, value in kwargs.items() if name not in ("input_spec", *saved.NOT_SAVED)}
    if isinstance(args["backbone"], nn.Module):
        own = type(args["backbone"])
        args["backbone"] = f"{OWN}{own.__module__}.{own.__qualname__}"
    args["num_frames"] = model.input_spec.num_frames
    try:
        json.dumps(args)
    except TypeError as error:
        raise TypeError(f"arguments must be what JSON can hold, so that the model can be saved: {error}") from error
    return args
