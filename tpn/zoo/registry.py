"""Find, build and describe models by name."""

import copy
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models import PretrainedCfg
from torch.utils.flop_counter import FlopCounterMode

from tpn.models.classifier import TPNClassifier, unwrapped
from tpn.video.spec import InputSpec
from tpn.zoo import factories, load, saved
from tpn.zoo.weights import CUSTOM, UnknownModelError, Weights, get_weights

FOLDER_SCHEMES = ("hf-hub", "local-dir")


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    num_classes: int | None = None,
    checkpoint_path: str | PathLike[str] | None = None,
    backbone_pretrained: bool | Literal["imagenet"] | None = None,
    neck: Literal["tpn"] | None = "tpn",
    cache_dir: str | PathLike[str] | None = None,
    **kwargs: Any,
) -> TPNClassifier:
    """Build a model of the zoo, or the pyramid on a backbone of your choice.

    Args:
        name: "tpn_slowonly_r50_k400", with a tag "tpn_slowonly_r50_k400.scratch"; a saved model as
            "hf-hub:owner/repository" or "local-dir:folder", whose weights are always loaded; or "tpn", with the arguments
            of `tpn.zoo.custom.tpn`: `create_model("tpn", backbone="timm/convnext_tiny", num_frames=8, num_classes=12)`.
        pretrained: load the published weights, from where `tpn.zoo.sources` says.
        num_classes: K. Default: that of the weights. With another K than the weights', the classifiers of head
            and auxiliary head are new and untrained; everything else is loaded.
        checkpoint_path: load this file instead: safetensors or `.pth`, in our, mmaction2's or the original
            layout, which is found out.
        backbone_pretrained: True (or "imagenet") starts the backbone from timm's ImageNet weights of its depth (`tv_in1k`),
            inflated to 3D where need be; that of "tpn", from its own default weights. The rest is untrained.
        neck: None leaves the pyramid and the auxiliary head out: the paper's baseline.
        cache_dir: where downloaded weights are kept. Default: $TPN_CACHE, else among the Hub's caches.
        **kwargs: arguments of the model, see `tpn.zoo.factories`: `num_frames`, `flow_order`, `drop_rate`,
            `shift_shortcut`, `in_chans`, ... They are saved with it. With `in_chans` other than 3, RGB weights
            are adapted as timm does for images.

    Returns:
        A `TPNClassifier` in training mode, as timm returns it, with `input_spec` and `labels`.

    Raises:
        UnknownModelError: no such name; the message lists the nearest ones.
        CheckpointError: a file cannot be read, or does not fit the model tensor by tensor.
        WeightsUnavailableError: the published weights cannot be fetched; the message says what to do.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string such as 'tpn_slowonly_r50_k400', got {name!r}")
    # Before timm reads a saved model: a damaged configuration gets a message of its own.
    config = _saved_config(name, cache_dir)
    if config is not None:
        pretrained = checkpoint_path is None
    elif name != CUSTOM:
        get_weights(name)  # raises if unknown
    if neck not in ("tpn", None):
        raise ValueError(f"neck must be 'tpn' or None, got {neck!r}; for one of your own, TPNClassifier(backbone, neck, head)")
    if neck is None:
        _check_baseline(name, pretrained, config)
        kwargs["pyramid"] = False  # timm drops arguments that are None
    if sum((pretrained, checkpoint_path is not None, bool(backbone_pretrained))) > 1:
        raise ValueError(
            "pass one of pretrained=True (which a saved model's name implies), checkpoint_path and backbone_pretrained"
        )
    if checkpoint_path is not None and num_classes is None:
        _, num_classes = load.inspect_checkpoint(checkpoint_path)
    model = timm.create_model(
        name,
        pretrained=pretrained,
        num_classes=num_classes,
        backbone_pretrained=backbone_pretrained,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        **kwargs,
    )
    assert isinstance(model, TPNClassifier)
    if checkpoint_path is not None:
        load.load_checkpoint(model, checkpoint_path)
    return model


def _check_baseline(name: str, pretrained: bool, config: dict[str, Any] | None) -> None:
    """Weights of a pyramid do not fit a model without one."""
    if config is not None:
        name, has_pyramid = config["architecture"], config["model_args"].get("pyramid", True)
        pyramid = has_pyramid and (name == CUSTOM or name.startswith("tpn_"))
    else:
        pyramid = name.startswith("tpn_")
    if pretrained and pyramid:
        baseline = name.partition(".")[0].removeprefix("tpn_")
        other = f"create_model({baseline!r}), or " if baseline in list_models() else ""
        raise ValueError(f"these weights have a pyramid, which neck=None leaves out; use {other}start without them")


def list_models(filter: str = "", *, pretrained: bool = False) -> list[str]:
    """Return the names of tpn's architectures that match a wildcard such as `"tpn_*r101*"`; all by default.

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
    with torch.device("meta"):
        model = create_model(weights.name)
    return ModelInfo(weights, *count(model))


def count(model: TPNClassifier) -> tuple[int, float]:
    """Return the parameters of a model and its GMACs, as `ModelInfo` has them."""
    spec = model.input_spec
    shapes = copy.deepcopy(model).to("meta").eval()
    clip = torch.empty(1, model.in_chans, spec.num_frames, spec.crop_size, spec.crop_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shapes(clip)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2 / 1e9


def input_spec(model: TPNClassifier | str) -> InputSpec:
    """Return what a model, or the model of that name, expects to see: frames, sampling, size, normalisation, transforms.

    A name is anything that `create_model` takes, "hf-hub:owner/repository" and "local-dir:folder" included.
    """
    if not isinstance(model, str):
        spec: InputSpec = unwrapped(model).input_spec
        return spec
    config = _saved_config(model)
    return get_weights(model).input if config is None else InputSpec.from_dict(config["input_spec"])


def _saved_config(name: str, cache_dir: str | PathLike[str] | None = None) -> dict[str, Any] | None:
    """Return the configuration of "local-dir:folder" or "hf-hub:owner/repository", None for other names."""
    scheme, _, place = name.partition(":")
    if scheme not in FOLDER_SCHEMES or not place:
        if set(name) & set(":/"):
            raise UnknownModelError(
                f"unknown model {name!r}; a model on the Hub is 'hf-hub:owner/name', one in a folder 'local-dir:folder'"
            )
        return None
    return saved.saved_config(PretrainedCfg(source=scheme, file=place, hf_hub_id=place), cache_dir)
