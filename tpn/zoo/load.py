"""Load tensors into models, strictly: checkpoints of any layout, and ImageNet weights into the backbone."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tpn import hub
from tpn.config import ModelConfig
from tpn.errors import CheckpointError
from tpn.files import StrPath
from tpn.models.classifier import TPNClassifier
from tpn.models.registry import BACKBONES, NECKS, attached_config
from tpn.zoo.checkpoints import Checkpoint
from tpn.zoo.convert import Layout, check_fit, convert_state_dict, load_strict
from tpn.zoo.names import WEIGHTS_FILE
from tpn.zoo.reader import read_checkpoint, without_wrappers
from tpn.zoo.saved import read_metadata
from tpn.zoo.unpickle import STORAGES

STEM = "backbone.conv1.weight"
CLASSIFIERS = ("head.fc", "aux_head.fc")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Tensors under our names, with the facts that their file gives.

    Attributes:
        tensors: in our layout.
        layout: of the file.
        trained: the config of the saved model; None for files of others.
        name: of the file, for messages.
    """

    tensors: Mapping[str, Tensor]
    layout: Layout
    trained: ModelConfig | None
    name: str

    @property
    def num_classes(self) -> int | None:
        """The number of classes: 0 if the model was saved without, None if unknown."""
        weight = self.tensors.get("head.fc.weight")
        if weight is None:
            return None if self.trained is None else 0
        return len(weight) if weight.ndim else None


def read_weights(source: StrPath | Mapping[str, Tensor]) -> Weights:
    """Read a `.safetensors` or `.pth` file, or a state dict, in our, mmaction2's or the original layout.

    Raises CheckpointError, and FileNotFoundError, IsADirectoryError or PermissionError.
    """
    if isinstance(source, Mapping):
        name, tensors, metadata = "the state dict", dict(source), dict[str, str]()
    else:
        name, (tensors, metadata) = str(source), read_checkpoint(source)
    try:
        _check_dense(tensors)
        return Weights(*convert_state_dict(without_wrappers(tensors)), read_metadata(metadata), name)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None


def _check_dense(tensors: Mapping[str, Any]) -> None:
    """Raise CheckpointError for an entry of a state dict that is not a tensor with values of a type that files have."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            problem = type(tensor).__name__
        elif tensor.is_nested or tensor.layout != torch.strided:
            problem = "nested tensor" if tensor.is_nested else f"{tensor.layout} tensor"
        elif tensor.is_meta or tensor.is_complex() or tensor.dtype not in STORAGES.values():
            problem = f"{'meta ' if tensor.is_meta else ''}tensor of {tensor.dtype}"
        else:
            continue
        raise CheckpointError(f"{name} is a {problem}, expected a dense tensor with values of a common type")


def load_weights(model: TPNClassifier, weights: Weights, *, new_classifiers: bool = True) -> None:
    """Load weights into a model, strictly. They may have any floating-point precision.

    With `new_classifiers`, classifiers (`head.fc` and `aux_head.fc`) with another number of classes keep their untrained values.
    The model gets the temperature that was saved with the classifier; a new classifier has 1. If the number of input channels
    differs from three, an RGB stem is adapted as timm does for images. One log line says so. The weights of the auxiliary head
    are dropped if the model has none. Everything else must match.

    Raises CheckpointError.
    """
    tensors, stem_adapted = _adapted(model, weights)
    built = dict(model.named_parameters())
    other: list[str] = []  # classifiers with another number of classes
    if new_classifiers and weights.num_classes is not None:
        rows = [{c: t[f"{c}.weight"].shape[:1] for c in CLASSIFIERS if f"{c}.weight" in t} for t in (tensors, built)]
        other = [c for c in CLASSIFIERS if rows[0].get(c) != rows[1].get(c)]
    try:
        _check_trained_args(model, weights)
        load_strict(model, tensors, classifiers=other)
    except CheckpointError as error:
        chans = model.in_chans if weights.trained is None else weights.trained.input_spec.in_chans
        hint = "" if chans == model.in_chans else f"; pass in_chans={chans}: only RGB weights of SlowOnly and TSM can be adapted"
        raise CheckpointError(f"{weights.name}: {error}{hint}") from None
    trained = None if weights.trained is None or "head.fc" in other else weights.trained.head
    model.temperature = trained.temperature if trained and trained.multi_label == model.multi_label else 1.0
    if other:
        new = " and ".join(c for c in other if f"{c}.weight" in built) or "nothing"
        numbers = weights.name, weights.num_classes, model.num_classes
        _logger.info("%s is for %s classes, the model has %s: new and untrained: %s", *numbers, new)
    if stem_adapted:
        _logger.info("%s takes RGB, the model %s channels: adapted the weights of the stem", weights.name, model.in_chans)


def check_published(model: TPNClassifier, entry: Checkpoint) -> None:
    """Raise CheckpointError if the weights of an entry cannot fit a model, whatever their classes, before they are fetched."""
    with torch.device("meta"):
        weights = Weights(TPNClassifier.from_config(entry.config).state_dict(), "tpn", entry.config, entry.name)
    state_dicts = model.state_dict(), _adapted(model, weights)[0]
    target, source = ({n: t for n, t in tensors.items() if not n.startswith(CLASSIFIERS)} for tensors in state_dicts)
    try:
        _check_trained_args(model, weights)
        check_fit(target, source)
    except CheckpointError as error:
        raise CheckpointError(
            f"the published weights {entry.name} do not fit these arguments: {error}. "
            "Leave out the arguments that change the network, or pretrained=True"
        ) from None


def _adapted(model: TPNClassifier, weights: Weights) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors for a model that may have other channels or no auxiliary head, and whether the stem changed."""
    tensors, built = dict(weights.tensors), dict(model.named_parameters())
    if model.aux_head is None:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("aux_head.")}
    # Of any other shape, a tensor that repeats a stored number could take terabytes.
    kernels = [t[STEM].shape[:1] + t[STEM].shape[2:] if STEM in t else None for t in (tensors, built)]
    return tensors, kernels[0] == kernels[1] and adapt_stem(tensors, STEM, model.in_chans)


def adapt_stem(state_dict: dict[str, Tensor], name: str, in_chans: int) -> bool:
    """Adapt the RGB convolution `name` to `in_chans` channels: the sum for one channel, otherwise repeated and scaled."""
    weight = state_dict.get(name)
    if weight is None or weight.ndim < 4 or weight.shape[1] != 3 or in_chans == 3:
        return False
    from timm.models import adapt_input_conv  # not at the top, see `tpn.models.backbones.timm`

    flat = adapt_input_conv(in_chans, weight.flatten(2, -2))  # timm takes 2D kernels: (O, I, T*H, W)
    state_dict[name] = flat.reshape(weight.shape[0], in_chans, *weight.shape[2:])
    return True


def load_imagenet(model: TPNClassifier, cache_dir: StrPath | None = None) -> None:
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


def _check_trained_args(model: TPNClassifier, weights: Weights) -> None:
    """Refuse weights that were trained with other arguments that change a network's result, but no name and no shape.

    Parts of tpn name these arguments, `silent_args`. For other networks they are unknown: any difference is a warning.
    """
    for kind, registry in (("backbone", BACKBONES), ("neck", NECKS)):
        module, part = getattr(model, kind), getattr(weights.trained, kind, None)
        built = None if module is None else attached_config(module)
        silent, args = getattr(module, "silent_args", None), {}
        if part is not None and built is not None and part.name == built.name:  # otherwise, the names of the tensors differ
            args = {**registry.arguments(part), **part.args}
            if silent is None and part.args != built.args:
                difference = kind, part.args, built.args
                _logger.warning("%s was trained with %s arguments %s, the model has %s", weights.name, *difference)
        elif weights.layout != "tpn":  # the one argument in which the two code bases differ
            args = {"shift_shortcut": weights.layout == "original"}
        same_frames = weights.trained and weights.trained.input_spec.num_frames == model.input_spec.num_frames
        if args.get("temporal_scales", ()) is None:
            args["temporal_scales"] = getattr(module, "default_scales", None)
        if not same_frames:  # the scales change with them
            args.pop("temporal_scales", None)
        for arg in args.keys() & set(silent or ()):
            if args[arg] != (own := getattr(module, arg)):
                raise CheckpointError(
                    f"the weights were trained with {arg}={args[arg]}, the model was built with {arg}={own}; "
                    f"pass {arg}={args[arg]!r} to create_model"
                )
