"""Load tensors into models, strictly: checkpoints of any layout, and ImageNet weights into the backbone."""

import inspect
import logging
from collections.abc import Mapping
from os import PathLike
from typing import Any, cast

from timm.models import adapt_input_conv
from torch import Tensor, nn

from tpn import hub
from tpn.errors import CheckpointError
from tpn.models.classifier import TPNClassifier
from tpn.models.registry import attached_config
from tpn.zoo.convert import Layout, convert_state_dict, load_strict
from tpn.zoo.reader import read_checkpoint, without_wrappers
from tpn.zoo.saved import WEIGHTS_FILE, read_metadata

STEM = "backbone.conv1.weight"
CLASSIFIERS = ("head.fc", "aux_head.fc")

_logger = logging.getLogger(__name__)


def load_checkpoint(model: TPNClassifier, path: str | PathLike[str], *, new_classifiers: bool = True) -> None:
    """Load a `.safetensors` or `.pth` file in our, mmaction2's or the original layout; see `load_state_dict`.

    Raises CheckpointError, and FileNotFoundError, IsADirectoryError or PermissionError.
    """
    tensors, metadata = read_checkpoint(path)
    load_state_dict(model, tensors, new_classifiers=new_classifiers, metadata=metadata, name=str(path))


def load_state_dict(
    model: TPNClassifier,
    tensors: Mapping[str, Tensor],
    *,
    new_classifiers: bool = True,
    metadata: Mapping[str, str] | None = None,
    name: str = "the state dict",
) -> None:
    """Load tensors in our, mmaction2's or the original layout, strictly. They may have any floating-point precision.

    With `new_classifiers`, classifiers (`head.fc` and `aux_head.fc`) with another number of classes keep their untrained values.
    If the number of input channels differs from three, an RGB stem is adapted as timm does for images. One log line says so.
    Everything else must match.

    Args:
        metadata: of the safetensors file.
        name: of the source, for messages.

    Raises CheckpointError.
    """
    metadata = metadata or {}
    built = dict(model.named_parameters())
    other: list[str] = []  # classifiers with another number of classes
    try:
        renamed, layout = convert_state_dict(without_wrappers(tensors))
        _check_trained_args(model, layout, metadata, name)
        classes = _num_classes(renamed, metadata)
        if classes is not None and new_classifiers:
            rows = [{c: t[f"{c}.weight"].shape[:1] for c in CLASSIFIERS if f"{c}.weight" in t} for t in (renamed, built)]
            other = [c for c in CLASSIFIERS if rows[0].get(c) != rows[1].get(c)]
        stem_adapted = adapt_stem(renamed, STEM, model.in_chans)
        load_strict(model, renamed, classifiers=other)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    if other:
        new = " and ".join(c for c in other if f"{c}.weight" in built) or "nothing"
        _logger.info("%s is for %s classes, the model has %s: new and untrained: %s", name, classes, model.num_classes, new)
    if stem_adapted:
        _logger.info("%s takes RGB, the model %s channels: adapted the weights of the stem", name, model.in_chans)


def inspect_checkpoint(path: str | PathLike[str]) -> tuple[Layout, int | None]:
    """Return the layout of a checkpoint file and its number of classes: 0 if it was saved without, None if unknown."""
    tensors, metadata = read_checkpoint(path)
    try:
        renamed, layout = convert_state_dict(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return layout, _num_classes(renamed, metadata)


def _num_classes(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int | None:
    weight = state_dict.get("head.fc.weight")
    return len(weight) if weight is not None and weight.ndim else 0 if weight is None and "model" in metadata else None


def adapt_stem(state_dict: dict[str, Tensor], name: str, in_chans: int) -> bool:
    """Adapt the RGB convolution `name` to `in_chans` channels: the sum for one channel, otherwise repeated and scaled."""
    weight = state_dict.get(name)
    if weight is None or weight.ndim < 4 or weight.shape[1] != 3 or in_chans == 3:
        return False
    flat = adapt_input_conv(in_chans, weight.flatten(2, -2))  # timm takes 2D kernels: (O, I, T*H, W)
    state_dict[name] = flat.reshape(weight.shape[0], in_chans, *weight.shape[2:])
    return True


def load_imagenet(model: TPNClassifier, cache_dir: hub.CacheDir = None) -> None:
    """Load the ImageNet weights that the backbone names, a ResNet of timm or torchvision, into it, strictly.

    A 2D kernel that becomes 3D is repeated along time and divided by its length (inflation, Carreira and Zisserman 2017): a video
    of one repeated image then gives the features of that image. Only the ImageNet classifier and stages that are not built are
    skipped.

    Raises ValueError: the backbone has no such weights. CheckpointError, WeightsUnavailableError.
    """
    repo = getattr(model.backbone, "imagenet_repo", None)
    if repo is None:
        raise ValueError(f"backbone_pretrained is not valid here: {type(model.backbone).__name__} has no pretrained weights")
    path = hub.snapshot(repo, WEIGHTS_FILE, cache_dir=cache_dir, prefer_cached=True) / WEIGHTS_FILE
    tensors, _ = read_checkpoint(path)
    unused = ("fc.", *(f"layer{i}." for i in range(max(cast("Any", model.backbone).out_indices) + 2, 5)))
    source = {f"backbone.{name}": tensor for name, tensor in tensors.items() if not name.startswith(unused)}
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


def _check_trained_args(model: TPNClassifier, layout: Layout, metadata: Mapping[str, str], name: str) -> None:
    """Refuse weights that were trained with other arguments that change a network's result, but no name and no shape.

    Parts of tpn name these arguments, `silent_args`. For other networks they are unknown: any difference is a warning.
    """
    trained = read_metadata(metadata)
    for kind in ("backbone", "neck"):
        module, part = getattr(model, kind), getattr(trained, kind, None)
        built = None if module is None else attached_config(module)
        if part and built and part.name != built.name:
            continue  # the names of the tensors tell
        silent = getattr(module, "silent_args", ())
        for arg in silent:
            if part:
                value: Any = part.args.get(arg, inspect.signature(type(module)).parameters[arg].default)
            elif layout != "tpn" and arg == "shift_shortcut":  # the one argument in which the two code bases differ
                value = layout == "original"
            else:
                continue
            same_frames = trained is None or trained.input_spec.num_frames == model.input_spec.num_frames
            if arg == "temporal_scales" and (value is None or not same_frames):
                continue  # by default all frames are pooled, whatever their number
            if value != getattr(module, arg):
                raise CheckpointError(
                    f"the weights were trained with {arg}={value}, the model was built with {arg}={getattr(module, arg)}; "
                    f"pass {arg}={value!r} to create_model"
                )
        if not silent and part and built and part.args != built.args:
            _logger.warning("%s was trained with %s arguments %s, the model has %s", name, kind, part.args, built.args)
