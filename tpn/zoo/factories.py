"""The model zoo: one function per architecture, registered with timm under its name.

Each takes `pretrained` and, by keyword,

- `num_classes`, `in_chans`, `drop_rate` (of the heads), and timm's `pretrained_cfg` (a tag, e.g. "scratch");
- `num_frames`, `temporal_scales`, `flow_order` of the pyramid; `pyramid=False` leaves it out, auxiliary head included;
- `zero_init_last`, and for TSM `shift_shortcut`, of the backbone;
- `backbone_pretrained=True`, or "imagenet", to start the backbone from timm's ImageNet ResNet of its depth (`tv_in1k`);
- `cache_dir`, where weights are kept.
"""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    resolve_pretrained_cfg,
)
from torch import nn

from tpn.models.classifier import TPNClassifier
from tpn.models.neck import FlowOrder, TemporalPyramid
from tpn.models.resnet import ResNet
from tpn.models.resnet3d import ResNet3dSlowOnly
from tpn.models.resnet_tsm import ResNetTSM
from tpn.video.spec import InputSpec
from tpn.zoo import saved, sources
from tpn.zoo.assemble import assemble, check_num_frames, check_start, check_without_pyramid, describe, register, timm_cfg
from tpn.zoo.weights import WEIGHTS, Weights, get_weights


def _cfg(entry: Weights) -> dict[str, Any]:
    """Describe a weights entry in timm's terms."""
    return {
        **timm_cfg(entry.input),
        "url": entry.url or "",
        "file": None if entry.embedded is None else str(entry.embedded),
        "num_classes": entry.dataset.num_classes,
        "first_conv": "backbone.conv1",
        "classifier": ("head.fc", "aux_head.fc") if entry.model.startswith("tpn_") else "head.fc",
        "origin_url": entry.url,
    }


default_cfgs = generate_default_cfgs({entry.name: _cfg(entry) for entry in WEIGHTS.values()})


def _build(
    make_backbone: Callable[..., ResNet],
    *,
    num_classes: int,
    num_frames: int,
    pyramid: bool = True,
    lengths: tuple[int, int] = (1, 1),
    temporal_scales: Sequence[int] | None = None,
    flow_order: FlowOrder = "cascade",
    drop_rate: float = 0.5,
    **backbone_args: Any,
) -> TPNClassifier:
    """Put pyramid and heads on a backbone; `lengths` is what each level's temporal modulation leaves of the frames."""
    backbone = make_backbone(out_indices=(2, 3) if pyramid else (3,), **backbone_args)
    channels, neck = backbone.out_channels, None
    if pyramid:
        if temporal_scales is None:
            temporal_scales = [max(num_frames // length, 1) for length in lengths]
        neck = TemporalPyramid(channels, num_frames, temporal_scales=temporal_scales, flow_order=flow_order)
    return assemble(backbone, channels, neck, num_classes=num_classes, drop_rate=drop_rate)


def _create(
    name: str, pretrained: bool, make_backbone: Callable[..., ResNet], arch: dict[str, Any], args: dict[str, Any]
) -> nn.Module:
    """Build an architecture through timm, then add what timm does not know: frames, labels, strict loading.

    arch: what makes this architecture. args: what the caller passed, timm's own arguments among them.
    """
    args = dict(args)
    cache_dir = args.pop("cache_dir", None)
    backbone_pretrained = args.pop("backbone_pretrained", None)
    check_start(backbone_pretrained)
    if backbone_pretrained and pretrained:
        raise ValueError("pass one of pretrained=True, which loads the whole model, and backbone_pretrained=True")
    args.pop("pretrained_model_args", None)  # what timm read from a config.json; it is in `args` as well
    if args.pop("features_only", False):
        raise ValueError("features_only is timm's wrapper for images; model.backbone(x) returns the feature maps")
    cfg = resolve_pretrained_cfg(name, args.pop("pretrained_cfg", None), args.pop("pretrained_cfg_overlay", None))
    config = saved.saved_config(cfg, cache_dir)
    entry = get_weights(f"{name}.{cfg.tag}" if cfg.tag and config is None else name)
    spec, labels, entry_args = entry.input, entry.dataset.labels, dict(entry.model_args)
    if config is not None:
        spec, labels, entry_args = InputSpec.from_dict(config["input_spec"]), tuple(config.get("label_names", ())), {}
    model_args = {"num_frames": spec.num_frames, **entry_args, **args}
    check_num_frames(model_args["num_frames"])
    _check_names(name, make_backbone, args)
    from_file = {} if config is None else config.get("model_args", {})
    check_without_pyramid({**arch, **model_args}, ("temporal_scales", "flow_order"), from_file)
    build = partial(_build, make_backbone)
    model: TPNClassifier = build_model_with_cfg(build, name, False, pretrained_cfg=cfg.to_dict(), **{**arch, **model_args})
    num_classes = len(labels) if config is None else config.get("num_classes", len(labels))
    describe(model, model_args, spec=spec, labels=labels, num_classes=num_classes)
    if pretrained:
        sources.load_pretrained(model, cfg, entry, cache_dir)
    elif backbone_pretrained:
        sources.load_imagenet(model, cache_dir)
    return model


def _check_names(name: str, make_backbone: Callable[..., ResNet], args: dict[str, Any]) -> None:
    """Refuse arguments that do not exist."""
    known = [*signature(_build).parameters, *signature(make_backbone).parameters]
    known = [each for each in known if each not in ("make_backbone", "lengths", "backbone_args", "depth", "out_indices")]
    if unknown := sorted(args.keys() - {*known, *signature(build_model_with_cfg).parameters}):
        hint = '; create_model("tpn", backbone=...) takes a backbone of your choice' if "backbone" in unknown else ""
        raise TypeError(f"unknown arguments of {name}: {', '.join(unknown)}; there are {', '.join(known)}{hint}")


_R50, _R101, _TSM = partial(ResNet3dSlowOnly, 50), partial(ResNet3dSlowOnly, 101), partial(ResNetTSM, 50)
_TINY = partial(ResNet3dSlowOnly, 18)
_BASELINE: dict[str, Any] = {"pyramid": False}
_TPN: dict[str, Any] = {}
_TPN_R101: dict[str, Any] = {"lengths": (2, 1)}
"""The published R101 pyramids leave two frames of the finer level, all others one."""


@register
def slowonly_r50_k400(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SlowOnly ResNet-50, the baseline without pyramid: 8 frames, every 8th, Kinetics-400."""
    return _create("slowonly_r50_k400", pretrained, _R50, _BASELINE, kwargs)


@register
def tpn_slowonly_r50_k400(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TPN on SlowOnly ResNet-50: 8 frames, every 8th, Kinetics-400."""
    return _create("tpn_slowonly_r50_k400", pretrained, _R50, _TPN, kwargs)


@register
def slowonly_r50_16x4_k400(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SlowOnly ResNet-50, the baseline without pyramid: 16 frames, every 4th, Kinetics-400."""
    return _create("slowonly_r50_16x4_k400", pretrained, _R50, _BASELINE, kwargs)


@register
def tpn_slowonly_r50_16x4_k400(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TPN on SlowOnly ResNet-50: 16 frames, every 4th, Kinetics-400."""
    return _create("tpn_slowonly_r50_16x4_k400", pretrained, _R50, _TPN, kwargs)


@register
def slowonly_r50_32x2_k400(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SlowOnly ResNet-50, the baseline without pyramid: 32 frames, every 2nd, Kinetics-400."""
    return _create("slowonly_r50_32x2_k400", pretrained, _R50, _BASELINE, kwargs)


@register
def tpn_slowonly_r50_32x2_k400(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TPN on SlowOnly ResNet-50: 32 frames, every 2nd, Kinetics-400."""
    return _create("tpn_slowonly_r50_32x2_k400", pretrained, _R50, _TPN, kwargs)


@register
def slowonly_r101_k400(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SlowOnly ResNet-101, the baseline without pyramid: 8 frames, every 8th, Kinetics-400."""
    return _create("slowonly_r101_k400", pretrained, _R101, _BASELINE, kwargs)


@register
def tpn_slowonly_r101_k400(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TPN on SlowOnly ResNet-101: 8 frames, every 8th, Kinetics-400."""
    return _create("tpn_slowonly_r101_k400", pretrained, _R101, _TPN_R101, kwargs)


@register
def slowonly_r101_16x4_k400(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SlowOnly ResNet-101, the baseline without pyramid: 16 frames, every 4th, Kinetics-400."""
    return _create("slowonly_r101_16x4_k400", pretrained, _R101, _BASELINE, kwargs)


@register
def tpn_slowonly_r101_16x4_k400(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TPN on SlowOnly ResNet-101: 16 frames, every 4th, Kinetics-400."""
    return _create("tpn_slowonly_r101_16x4_k400", pretrained, _R101, _TPN_R101, kwargs)


@register
def slowonly_r101_32x2_k400(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SlowOnly ResNet-101, the baseline without pyramid: 32 frames, every 2nd, Kinetics-400."""
    return _create("slowonly_r101_32x2_k400", pretrained, _R101, _BASELINE, kwargs)


@register
def tpn_slowonly_r101_32x2_k400(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TPN on SlowOnly ResNet-101: 32 frames, every 2nd, Kinetics-400."""
    return _create("tpn_slowonly_r101_32x2_k400", pretrained, _R101, _TPN_R101, kwargs)


@register
def tsm_r50_sthv1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TSM ResNet-50, the baseline without pyramid: 8 frames, one per segment, Something-Something v1."""
    return _create("tsm_r50_sthv1", pretrained, _TSM, _BASELINE, kwargs)


@register
def tpn_tsm_r50_sthv1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TPN on TSM ResNet-50: 8 frames, one per segment, Something-Something v1."""
    return _create("tpn_tsm_r50_sthv1", pretrained, _TSM, _TPN, kwargs)


@register
def tsm_r50_sthv2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TSM ResNet-50, the baseline without pyramid: 8 frames, one per segment, Something-Something v2."""
    return _create("tsm_r50_sthv2", pretrained, _TSM, _BASELINE, kwargs)


@register
def tpn_tsm_r50_sthv2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TPN on TSM ResNet-50: 8 frames, one per segment, Something-Something v2."""
    return _create("tpn_tsm_r50_sthv2", pretrained, _TSM, _TPN, kwargs)


@register
def tpn_slowonly_tiny_motion(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TPN on a narrow SlowOnly ResNet-18: 16 frames, every 2nd, rendered motion. Its weights lie in this package."""
    return _create("tpn_slowonly_tiny_motion", pretrained, _TINY, {"base_channels": 16, "drop_rate": 0.2}, kwargs)
