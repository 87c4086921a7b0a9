"""From a name to a model: name → config → model → weights."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tpn import hub
from tpn.config import InputSpec, ModelConfig
from tpn.files import StrPath
from tpn.models.classifier import TPNClassifier, build_backbone, require_input_spec, unwrapped
from tpn.models.feature_maps import feature_shapes
from tpn.models.registry import BACKBONES, part_of
from tpn.zoo import fetch, load
from tpn.zoo.checkpoints import Checkpoint, get_checkpoint, unknown_model
from tpn.zoo.names import CONFIG_FILE, WEIGHTS_FILE, is_exported, local_folder
from tpn.zoo.overrides import custom_config, override
from tpn.zoo.saved import open_saved, read_config

_logger = logging.getLogger(__name__)


def create_model(
    name: StrPath,
    pretrained: bool = False,
    *,
    num_classes: int | None = None,
    checkpoint_path: StrPath | None = None,
    backbone: str | nn.Module | None = None,
    neck: str | nn.Module | None = "auto",
    backbone_pretrained: bool | Literal["imagenet"] = False,
    cache_dir: StrPath | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> TPNClassifier:
    """Build a model of the zoo, a saved model, or a neck on a backbone of your choice, in training mode.

    Args:
        name: one of:

            - a published model, "tpn_slowonly_r50_k400", or one of its checkpoints, "tpn_slowonly_r50_k400.scratch";
            - a saved model, whose weights are always loaded: its folder ("local-dir:FOLDER" if the folder has the name of a
              published model), "hf-hub:owner/repository", or "hf-hub:owner/repository@revision";
            - "tpn", with a `backbone`.
        pretrained: load the published weights; see `tpn.zoo.fetch`.
        num_classes: K. Default: that of the weights. With another K, the classifiers of head and auxiliary head are new.
        checkpoint_path: load this file instead: safetensors or `.pth`, in the layout of tpn, MMAction2, or the original code.
        backbone: for "tpn": "timm/NAME", "torchvision/NAME", a name of `tpn.register_backbone`, or a module that maps clips
            (B, C, T, H, W) to feature maps. For a saved model: the module that it was built with.
        neck: a name of `tpn.register_neck`, or a module; None for the baseline without neck and auxiliary head. Default: the neck
            of the model; for "tpn", the pyramid.
        backbone_pretrained: start the backbone from its own weights: ImageNet weights of timm, inflated to 3D, for SlowOnly and
            TSM; otherwise the default weights of timm or torchvision, or those of a tag ("timm/convnext_tiny.fb_in22k").
        cache_dir: where downloads are stored. Default: $TPN_CACHE, otherwise the Hub's caches.
        pretrained_cfg_overlay: another source of the weights, as in timm: {"url": LINK}, {"file": PATH},
            {"hf_hub_id": "owner/repository"} or {"state_dict": TENSORS}.
        **kwargs: changes of the config, saved with the model:

            - `num_frames`, `drop_rate`, `input_spec`;
            - `in_chans`: RGB weights of SlowOnly and TSM are adapted as in timm;
            - `multi_label`: a video may have several classes;
            - `aux_head=False`: the weights of the auxiliary head are not loaded;
            - `backbone_args` and `neck_args`, mappings, or single arguments of backbone or neck, such as `flow_order`,
              `temporal_scales`, `spatial_modulation`, `shift_shortcut`, and `out_indices`.

            Arguments that change the network cannot be combined with published weights. They are refused before the download.

    Raises:
        UnknownModelError: no such name; the message lists the nearest ones.
        TypeError, ValueError: an argument is not valid.
        CheckpointError: a file cannot be read, or does not fit the model tensor by tensor.
        WeightsUnavailableError: the weights cannot be fetched; the message says what to do.

    Example:
        >>> model = tpn.create_model("tpn_slowonly_r50_k400", pretrained=True, num_classes=12)
        >>> model = tpn.create_model("tpn", backbone="timm/convnext_tiny", num_frames=8, num_classes=12)
    """
    overlay = pretrained_cfg_overlay or {}
    elsewhere = checkpoint_path is not None or any(overlay.get(key) for key in ("state_dict", "file", "hf_hub_id"))
    config, source = _find(name, backbone, kwargs, cache_dir, with_weights=not elsewhere)
    if isinstance(source, Path):
        pretrained = checkpoint_path is None
    _check_start(config, neck, pretrained, checkpoint_path, backbone_pretrained)
    weights = None if checkpoint_path is None else load.read_weights(checkpoint_path)
    if kwargs.get("multi_label") is None and weights is not None and weights.trained is not None:
        kwargs["multi_label"] = weights.trained.head.multi_label
    if num_classes is None and weights is not None:
        num_classes = weights.num_classes
    elif num_classes is None and name == "tpn":
        raise ValueError("num_classes is needed, the number of your classes; 0 builds a model that returns features")
    config = override(config, num_classes=num_classes, neck=neck, **kwargs)
    model = _build(config, backbone, neck, backbone_pretrained, cache_dir)
    if name == "tpn":
        _check_view_size(model)
    if pretrained:
        if isinstance(source, Checkpoint) and not elsewhere:
            load.check_published(model, source)
        weights = load.read_weights(_published_weights(overlay, source, cache_dir))
    if weights is not None:
        load.load_weights(model, weights, new_classifiers=num_classes is not None)
    return model


def build(backbone: nn.Module, *, num_classes: int, **kwargs: Any) -> TPNClassifier:
    """Put the pyramid on a module: `create_model("tpn", backbone=backbone, num_classes=num_classes, ...)`.

    Args:
        backbone: clips (B, C, T, H, W) float → two or more maps (B, C_i, T_i, H_i, W_i), finest first, as a sequence or a
            dictionary. `build` runs it on one clip of zeros to find channels, lengths, and sizes.
        num_classes: K; 0 for a model that returns features.
        **kwargs: `num_frames`, `input_spec`, `flow_order`, ...; see `create_model`.

    Returns a model that `tpn.save_pretrained` saves and `create_model("local-dir:FOLDER", backbone=backbone)` loads.
    """
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone must be a module, got {backbone!r}; create_model('tpn', backbone=NAME) takes names")
    return create_model("tpn", backbone=backbone, num_classes=num_classes, **kwargs)


def count(model: TPNClassifier) -> tuple[int, float]:
    """Return the parameters of a model and its GMACs, counted on PyTorch's meta device; see `ModelInfo`."""
    shapes = copy.deepcopy(model).to("meta").eval()
    clip = torch.empty(1, *require_input_spec(model).clip_shape, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shapes(clip)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2 / 1e9


def input_spec(model: TPNClassifier | StrPath) -> InputSpec:
    """Return the clips that a model takes: frames, sampling, size, normalization, transforms.

    Args:
        model: a model, or any name that `create_model` takes.
    """
    if not isinstance(model, str | PathLike):
        return require_input_spec(unwrapped(model))
    folder = saved_folder(model, weights=False)
    return (read_config(folder) if folder else get_checkpoint(str(model)).config).input_spec


def saved_folder(name: StrPath, cache_dir: StrPath | None = None, *, weights: bool = True, verify: bool = False) -> Path | None:
    """Return the folder of a saved model, downloaded if necessary; None for the name of a published model.

    With `verify`, files in the cache are compared with their SHA-256 again.
    """
    if is_exported(name):
        raise unknown_model(str(name))
    if folder := local_folder(name):
        return folder
    name = str(name)
    scheme, _, place = name.partition(":")
    if scheme == "hf-hub" and place:
        files = [CONFIG_FILE, WEIGHTS_FILE] if weights else [CONFIG_FILE]
        return hub.snapshot(place, *files, cache_dir=cache_dir, verify=verify)
    if set(name) & set(":/"):
        raise unknown_model(name)
    return None


def _find(
    name: StrPath, backbone: Any, kwargs: Mapping[str, Any], cache_dir: StrPath | None, *, with_weights: bool
) -> tuple[ModelConfig, Checkpoint | Path | None]:
    """Return the config that a name stands for, and the source of its weights: an entry, the file of a saved model, or None."""
    if name == "tpn":
        if backbone is None:
            raise ValueError("backbone is needed: create_model('tpn', backbone='timm/NAME' or MODULE, num_classes=K)")
        return custom_config(backbone, kwargs.get("num_frames"), kwargs.get("backbone_args")), None
    if folder := saved_folder(name, cache_dir, weights=with_weights):
        if not isinstance(backbone, nn.Module | None):
            raise TypeError(f"backbone must be a module for a saved model, got {backbone!r}")
        config = open_saved(folder, weights=with_weights)
        return config if backbone is None else replace(config, backbone=part_of(backbone)), folder / WEIGHTS_FILE
    if backbone is not None:
        raise TypeError(f"backbone is not valid for {name}; create_model('tpn', backbone=...) takes any backbone")
    entry = get_checkpoint(str(name))
    return entry.config, entry


def _check_start(config: ModelConfig, neck: Any, pretrained: Any, checkpoint_path: Any, backbone_pretrained: Any) -> None:
    """Raise TypeError or ValueError for arguments that contradict each other about the weights to start from."""
    if not isinstance(pretrained, bool):
        raise TypeError(f"pretrained must be True or False, got {pretrained!r}")
    if backbone_pretrained not in (None, False, True, "imagenet"):
        raise ValueError(f"backbone_pretrained must be True, False or 'imagenet', got {backbone_pretrained!r}")
    if pretrained and neck is None and config.neck is not None:
        raise ValueError("neck=None is not valid with weights that have a neck; load a baseline such as 'slowonly_r50_k400'")
    if sum((pretrained, checkpoint_path is not None, bool(backbone_pretrained))) > 1:
        raise ValueError("pass one of pretrained=True (implied for a saved model), checkpoint_path and backbone_pretrained")


def _build(config: ModelConfig, backbone: Any, neck: Any, backbone_pretrained: Any, cache_dir: StrPath | None) -> TPNClassifier:
    """Build a model from its config, with modules of the caller and weights of the backbone, if any."""
    modules = {kind: m for kind, m in (("backbone", backbone), ("neck", neck)) if isinstance(m, nn.Module)}
    loads_itself = "backbone" not in modules and BACKBONES.takes(config.backbone, "pretrained")
    if backbone_pretrained and loads_itself:
        modules["backbone"] = build_backbone(config, pretrained=True, cache_dir=cache_dir)
    model = TPNClassifier.from_config(config, **modules)
    if backbone_pretrained and not loads_itself:
        load.load_imagenet(model, cache_dir)
    return model


def _check_view_size(model: TPNClassifier) -> None:
    """Warn about a backbone that accepts training crops only, before anybody trains it."""
    spec = model.input_spec
    if spec.view_size == spec.crop_size:
        return
    try:
        feature_shapes(model.backbone, spec, crop_size=spec.view_size)
    except ValueError as error:
        _logger.warning(
            "input_spec asks for test crops of three_crop_size=%s, but %s; pass three_crop_size=%s, or num_crops=1",
            *(spec.view_size, str(error).partition(". Choose another")[0], spec.crop_size),
        )


def _published_weights(overlay: Mapping[str, Any], source: Checkpoint | Path | None, cache_dir: StrPath | None) -> Any:
    """Return the tensors or the file that an overlay names, otherwise the file of the source."""
    if overlay.get("state_dict") or overlay.get("file"):
        return overlay.get("state_dict") or overlay["file"]
    if overlay.get("hf_hub_id"):
        return hub.snapshot(overlay["hf_hub_id"], WEIGHTS_FILE, cache_dir=cache_dir) / WEIGHTS_FILE
    if isinstance(source, Checkpoint):
        return fetch.weights_file(source, cache_dir, url=overlay.get("url"))
    if overlay.get("url"):
        raise ValueError("url is valid with a model of the zoo; pass checkpoint_path=FILE")
    if source is None:
        raise ValueError(
            "pretrained is not valid here: a backbone of your choice has no published weights with a neck; "
            "backbone_pretrained=True starts from its own, checkpoint_path=FILE loads yours"
        )
    return source
