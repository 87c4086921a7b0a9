"""Put tensors into models, strictly: checkpoints of any layout, and ImageNet weights into the backbone."""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import timm
from timm.models import adapt_input_conv
from torch import Tensor, nn

from tpn.models.classifier import TPNClassifier
from tpn.models.neck import TemporalPyramid
from tpn.models.resnet import ResNet
from tpn.models.resnet_tsm import ResNetTSM
from tpn.zoo.checkpoint import read_checkpoint
from tpn.zoo.convert import CheckpointError, Layout, convert_state_dict, load_strict

STEM = "backbone.conv1.weight"
CLASSIFIERS = ("head.fc", "aux_head.fc")

_logger = logging.getLogger(__name__)


def load_checkpoint(model: TPNClassifier, path: str | PathLike[str]) -> None:
    """Load a `.safetensors` or `.pth` file in our, mmaction2's or the original layout; see `load_state_dict`.

    Raises CheckpointError, and FileNotFoundError, IsADirectoryError or PermissionError.
    """
    tensors, metadata = read_checkpoint(path)
    load_state_dict(model, tensors, metadata=metadata, name=str(path))


def load_state_dict(
    model: TPNClassifier,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    name: str = "the state dict",
) -> None:
    """Load tensors in our, mmaction2's or the original layout, strictly. They may have any floating-point precision.

    With another number of classes than the model's, exactly the two classifiers (`head.fc` and `aux_head.fc`) keep their
    untrained values; with another number of input channels than the model's, an RGB stem is adapted as timm does for
    images. One log line says each. Everything else must fit.

    Args:
        metadata: that of the safetensors file.
        name: what to call the source in messages.

    Raises CheckpointError.
    """
    try:
        renamed, layout = convert_state_dict(tensors)
        _check_arguments(model, layout, metadata or {})
        _warn_of_backbone_args(model, metadata or {}, name)
        classes = num_classes_of(renamed, metadata or {})
        other_classes = classes is not None and classes != model.num_classes
        stem_adapted = adapt_stem(renamed, STEM, model.in_chans)
        load_strict(model, renamed, classifiers=CLASSIFIERS if other_classes else ())
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    if other_classes:
        new = " and ".join(c for c in CLASSIFIERS if f"{c}.weight" in dict(model.named_parameters())) or "nothing"
        _logger.info("%s is for %s classes, the model has %s: new and untrained: %s", name, classes, model.num_classes, new)
    if stem_adapted:
        _logger.info("%s takes RGB, the model %s channels: the stem's weights were adapted", name, model.in_chans)


def num_classes_of(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int | None:
    """Return the number of classes of a state dict in our layout; 0 if it was saved without, None if they are missing."""
    weight = state_dict.get("head.fc.weight")
    if weight is not None:
        return weight.shape[0]
    return 0 if "model" in metadata else None


def inspect_checkpoint(path: str | PathLike[str]) -> tuple[Layout, int | None]:
    """Return the layout of a checkpoint file, and its number of classes; see `num_classes_of`."""
    tensors, metadata = read_checkpoint(path)
    try:
        renamed, layout = convert_state_dict(tensors)
        return layout, num_classes_of(renamed, metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def adapt_stem(state_dict: dict[str, Tensor], name: str, in_chans: int) -> bool:
    """Make the RGB convolution `name` one for `in_chans` channels: their sum for one channel, else repeated and scaled."""
    weight = state_dict.get(name)
    if weight is None or weight.ndim < 4 or weight.shape[1] != 3 or in_chans == 3:
        return False
    flat = adapt_input_conv(in_chans, weight.flatten(2, -2))  # timm knows 2D kernels: (O, I, T*H, W)
    state_dict[name] = flat.reshape(weight.shape[0], in_chans, *weight.shape[2:])
    return True


def imagenet_repo(model: TPNClassifier) -> str:
    """Return the Hub repository of the timm weights that the model's backbone can start from."""
    backbone = model.backbone
    if not isinstance(backbone, ResNet):
        raise ValueError(f"there are no ImageNet weights for a {type(backbone).__name__}")
    cfg = timm.get_pretrained_cfg(f"resnet{backbone.depth}.tv_in1k")
    assert cfg is not None
    return str(cfg.hf_hub_id)


def load_imagenet(model: TPNClassifier, path: Path) -> None:
    """Load a timm (or torchvision) ImageNet ResNet of the backbone's depth into the backbone, strictly.

    A 2D kernel that becomes 3D is repeated along time and divided by its length (inflation, Carreira and Zisserman 2017),
    so that a video of one repeated image gives the features of that image. Only the ImageNet classifier is left out.

    Raises CheckpointError.
    """
    tensors, _ = read_checkpoint(path)
    source = {f"backbone.{name}": tensor for name, tensor in tensors.items() if name not in ("fc.weight", "fc.bias")}
    adapt_stem(source, STEM, model.in_chans)
    holder = nn.ModuleDict({"backbone": model.backbone})
    for name, target in holder.state_dict().items():
        if name.endswith(".num_batches_tracked"):  # absent from the oldest of these files
            source.setdefault(name, target)
        elif name in source and target.ndim == 5 and source[name].ndim == 4:
            source[name] = source[name].unsqueeze(2).expand(-1, -1, target.shape[2], -1, -1) / target.shape[2]
    try:
        load_strict(holder, source)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _check_arguments(model: TPNClassifier, layout: Layout, metadata: Mapping[str, str]) -> None:
    """Refuse weights that were trained with arguments which change what a network computes, but no name and no shape."""
    ours = layout == "tpn"
    if ours and "model" not in metadata:
        return  # nothing is known of these
    saved, built_with = _model_args(metadata), model.model_args or {}
    arguments: dict[str, tuple[Any, Any]] = {}
    if isinstance(model.backbone, ResNetTSM):
        trained = saved.get("shift_shortcut", False) if ours else layout == "original"
        arguments["shift_shortcut"] = (trained, model.backbone.shift_shortcut)
    if ours and isinstance(model.neck, TemporalPyramid):
        arguments["flow_order"] = (saved.get("flow_order", "cascade"), model.neck.flow_order)
        # Where training kept to the default, other scales are the caller's wish.
        if saved.get("temporal_scales") and saved.get("num_frames") == built_with.get("num_frames"):
            arguments["temporal_scales"] = (tuple(saved["temporal_scales"]), model.neck.temporal_scales)
    for name, (trained, built) in arguments.items():
        if trained != built:
            raise CheckpointError(
                f"the weights were trained with {name}={trained}, the model was built with {name}={built}; "
                f"pass {name}={trained!r} to create_model"
            )


def _warn_of_backbone_args(model: TPNClassifier, metadata: Mapping[str, str], name: str) -> None:
    """Some arguments of other people's networks change what weights compute, others do not; no name tells which."""
    saved, built_with = _model_args(metadata), model.model_args or {}
    if saved.get("backbone") != built_with.get("backbone"):
        return
    trained, built = (json.loads(json.dumps(args.get("backbone_args") or {})) for args in (saved, built_with))
    if trained != built:
        _logger.warning("%s was trained with backbone_args=%s, the model was built with %s", name, trained, built)


def _model_args(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the model arguments that `save_pretrained` wrote into a safetensors file; none in files of others."""
    with suppress(ValueError, AttributeError):
        return dict(json.loads(metadata["model"]).get("model_args", {})) if "model" in metadata else {}
    return {}
