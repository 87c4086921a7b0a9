"""Backbones by name.

"timm/NAME" is any of timm's networks for images that gives feature maps, "torchvision/NAME" one of `STAGES`, for video.
"""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torchvision
from torch import nn

from tpn.models.backbones import FoldedBackbone, StagedBackbone
from tpn.video.spec import IMAGENET_MEAN, IMAGENET_STD
from tpn.zoo import hub
from tpn.zoo.weights import UnknownModelError

NOT_OF_THE_NETWORK = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights"),
    *("features_only", "out_indices", "in_chans"),
}
"""Arguments of timm's and torchvision's builders that say what to load from where, or what is ours to say. They must not come
from a saved model's file, which may be anybody's."""

TIMM, TORCHVISION = "timm/", "torchvision/"


@dataclass(frozen=True)
class Looks:
    """What a backbone expects its frames to look like: pixels of a crop's side and of the resized frame's short side, and
    normalisation on the 0..255 scale."""

    crop_size: int = 224
    short_side: int = 256
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


@dataclass(frozen=True)
class Wanted:
    """How a backbone is to be made; see `tpn.zoo.custom.tpn`."""

    out_indices: tuple[int, ...]
    in_chans: int
    pretrained: bool
    args: Mapping[str, Any]
    cache_dir: Path | None


def make_backbone(name: str, wanted: Wanted) -> tuple[nn.Module, Looks]:
    """Return the backbone of that name, and what its frames look like.

    Raises UnknownModelError; ValueError if it has no feature maps, or not these; WeightsUnavailableError.
    """
    indices = wanted.out_indices
    if list(indices) != sorted(set(indices)) or len({i < 0 for i in indices}) > 1:
        raise ValueError(
            f"out_indices must be increasing indices of stages, from fine to coarse, all of them >= 0 or all < 0, got {indices}"
        )
    if elsewhere := sorted(NOT_OF_THE_NETWORK & wanted.args.keys()):
        raise ValueError(
            f"backbone_args are arguments of the network itself, without {', '.join(elsewhere)}; out_indices, in_chans, "
            "cache_dir and backbone_pretrained are arguments of the model"
        )
    for prefix, make in ((TIMM, _from_timm), (TORCHVISION, _from_torchvision)):
        if name.startswith(prefix):
            return make(name.removeprefix(prefix), wanted)
    raise UnknownModelError(
        f"backbone must be 'timm/NAME' of timm.list_models(), 'torchvision/NAME' of {', '.join(STAGES)}, or a module, "
        f"got {name!r}"
    )


def _from_timm(name: str, wanted: Wanted) -> tuple[nn.Module, Looks]:
    if not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.0)
        raise UnknownModelError(f"timm has no model {name!r}; the nearest are {', '.join(near)}; timm.list_models() lists all")
    if "." in name and name not in (tags := timm.list_pretrained(f"{name.partition('.')[0]}.*")):
        raise UnknownModelError(f"timm has no weights {name!r}; it has {', '.join(tags) or 'none of this model'}")
    args = {"features_only": True, "out_indices": wanted.out_indices, "in_chans": wanted.in_chans, **wanted.args}
    if wanted.pretrained:
        args |= _weights_file(name, wanted)
    try:
        with hub.fetching(f"the weights of timm/{name}"):
            net = timm.create_model(name, wanted.pretrained, cache_dir=_cache(wanted), **args)
    except hub.WeightsUnavailableError:
        raise
    except Exception as error:  # each family of networks has its own way to say so
        raise ValueError(
            f"timm cannot build {name} with feature maps {wanted.out_indices} and backbone_args={dict(wanted.args)} "
            f"({type(error).__name__}: {error}); choose other out_indices or backbone_args, another backbone, or wrap it in a "
            "module that returns maps (B, C, T, H, W)"
        ) from error
    channels_last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")
    return FoldedBackbone(net, channels_last=channels_last), looks_of(net, wanted.args.get("img_size"))


def looks_of(net: Any, img_size: int | Sequence[int] | None = None) -> Looks:
    """Return what a network of timm says of its frames; `Looks()` of any other. img_size: that it was built for, if given."""
    cfg = getattr(net, "pretrained_cfg", None)
    if not cfg:
        return Looks()
    size = cfg["input_size"][-1] if img_size is None else img_size
    size = size if isinstance(size, int) else min(size)
    mean, std = (tuple(round(255 * v, 3) for v in cfg[key]) for key in ("mean", "std"))
    return Looks(size, round(size / 0.875), mean, std)


def _weights_file(name: str, wanted: Wanted) -> dict[str, Any]:
    """Fetch the weights as those of the zoo are, with a word if they cannot be; return what makes timm take the file."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id or cfg.custom_load:
        return {}
    file = cfg.hf_hub_filename or "model.safetensors"
    path = hub.hub_file(cfg.hf_hub_id, file, cache_dir=_cache(wanted), prefer_cached=True)
    return {"pretrained_cfg_overlay": {"file": str(path)}}


def _from_torchvision(name: str, wanted: Wanted) -> tuple[nn.Module, Looks]:
    if name not in STAGES:
        raise UnknownModelError(f"of torchvision's models, {', '.join(STAGES)} can be backbones, got {name!r}")
    if wanted.in_chans != 3:
        raise ValueError(f"torchvision/{name} takes 3 channels, got in_chans={wanted.in_chans}; timm's networks take any number")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    net = torchvision.models.get_model(name, weights=None, **wanted.args)
    if wanted.pretrained:
        with hub.fetching(f"the weights of torchvision/{name}"):
            state = weights.get_state_dict(progress=False, check_hash=True, model_dir=_cache(wanted))
        net.load_state_dict(state)
    looks = weights.transforms()
    mean, std = (tuple(round(255 * v, 3) for v in values) for values in (looks.mean, looks.std))
    backbone = StagedBackbone(STAGES[name](net), wanted.out_indices, channels_last=name.startswith("swin"))
    return backbone, Looks(looks.crop_size[0], min(looks.resize_size), mean, std)


def _cache(wanted: Wanted) -> Path | None:
    """None: that of the library which fetches."""
    folder = wanted.cache_dir or os.environ.get("TPN_CACHE")
    return Path(folder).expanduser() if folder else None


def _residual(net: Any) -> Sequence[nn.Module]:
    return nn.Sequential(net.stem, net.layer1), net.layer2, net.layer3, net.layer4


def _s3d(net: Any) -> Sequence[nn.Module]:
    return [net.features[a:b] for a, b in ((0, 1), (1, 4), (4, 7), (7, 13), (13, 16))]


def _swin3d(net: Any) -> Sequence[nn.Module]:
    parts = net.features
    return nn.Sequential(net.patch_embed, net.pos_drop, parts[0]), parts[1:3], parts[3:5], nn.Sequential(*parts[5:7], net.norm)


STAGES: dict[str, Callable[[Any], Sequence[nn.Module]]] = {
    "r3d_18": _residual,
    "mc3_18": _residual,
    "r2plus1d_18": _residual,
    "s3d": _s3d,
    "swin3d_t": _swin3d,
    "swin3d_s": _swin3d,
    "swin3d_b": _swin3d,
}
"""How each of torchvision's networks for video falls into stages, from fine to coarse."""
