"""Find, build and describe models by name."""

from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch.utils.flop_counter import FlopCounterMode

from tpn.models.classifier import TPNClassifier
from tpn.video.spec import InputSpec
from tpn.zoo import factories, load, saved
from tpn.zoo.checkpoint import read_checkpoint
from tpn.zoo.convert import CheckpointError, convert_state_dict
from tpn.zoo.weights import Weights, get_weights

FOLDER_SCHEMES = ("hf-hub", "local-dir")


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    num_classes: int | None = None,
    checkpoint_path: str | PathLike[str] | None = None,
    cache_dir: str | PathLike[str] | None = None,
    **kwargs: Any,
) -> TPNClassifier:
    """Build a model of the zoo.

    Args:
        name: "tpn_slowonly_r50_k400", with a tag "tpn_slowonly_r50_k400.scratch", or a saved model as
            "hf-hub:owner/repository" or "local-dir:folder", whose weights are always loaded.
        pretrained: load the published weights.
        num_classes: K. Default: that of the weights. With another K than the weights', the classifiers of head
            and auxiliary head are new and untrained; everything else is loaded.
        checkpoint_path: load this file instead: safetensors or `.pth`, in our, mmaction2's or the original
            layout, which is found out.
        cache_dir: where downloaded weights are kept. Default: $TPN_CACHE, else "tpn" in the Hub's home.
        **kwargs: arguments of the model, see `tpn.zoo.factories`: `num_frames`, `flow_order`, `drop_rate`,
            `shift_shortcut`, ... They are saved with it.

    Returns:
        A `TPNClassifier` in training mode, as timm returns it, with `input_spec` and `labels`.

    Raises:
        UnknownModelError: no such name; the message lists the nearest ones.
        CheckpointError: a file cannot be read, or does not fit the model tensor by tensor.
        WeightsUnavailableError: the published weights cannot be fetched; the message says what to do.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string such as 'tpn_slowonly_r50_k400', got {name!r}")
    scheme, _, place = name.partition(":")
    if scheme in FOLDER_SCHEMES and place:
        # Before timm reads it: a damaged configuration gets a message of its own.
        saved.saved_config(PretrainedCfg(source=scheme, file=place, hf_hub_id=place), cache_dir)
        pretrained = checkpoint_path is None
    else:
        get_weights(name)  # raises if unknown
    if checkpoint_path is not None:
        if pretrained:
            raise ValueError("pass either pretrained=True or checkpoint_path, not both")
        if num_classes is None:
            num_classes = _num_classes_in(checkpoint_path)
    model = timm.create_model(
        name,
        pretrained=pretrained,
        num_classes=num_classes,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        **kwargs,
    )
    assert isinstance(model, TPNClassifier)
    if checkpoint_path is not None:
        load.load_checkpoint(model, checkpoint_path)
    return model


def list_models(filter: str = "", *, pretrained: bool = False) -> list[str]:
    """Return the names of tpn's architectures that match a wildcard such as "tpn_*r101*"; all by default.

    pretrained: return every checkpoint, as "model.tag", instead.
    """
    return timm.list_models(filter, module=factories.__name__.rpartition(".")[2], pretrained=pretrained)


@dataclass(frozen=True)
class ModelInfo:
    """An architecture with one of its checkpoints.

    params: number of parameters, auxiliary head included. gmacs: 10**9 multiply-accumulate operations for one
    clip at crop_size, without the auxiliary head.
    """

    weights: Weights
    params: int
    gmacs: float


@cache
def model_info(name: str) -> ModelInfo:
    """Describe "model" or "model.tag": its weights entry, parameters and operations (counted, on no memory)."""
    weights = get_weights(name)
    spec = weights.input
    with torch.device("meta"):
        model = create_model(weights.name).eval()
        clip = torch.empty(1, 3, spec.num_frames, spec.crop_size, spec.crop_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(clip)
    params = sum(p.numel() for p in model.parameters())
    return ModelInfo(weights, params, counter.get_total_flops() / 2 / 1e9)


def input_spec(model: TPNClassifier | str) -> InputSpec:
    """Return what a model, or the model of that name, expects to see."""
    return get_weights(model).input if isinstance(model, str) else model.input_spec


def _num_classes_in(checkpoint_path: str | PathLike[str]) -> int | None:
    tensors, _ = read_checkpoint(checkpoint_path)
    try:
        return load.num_classes_of(convert_state_dict(tensors)[0])
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint_path}: {error}") from None
