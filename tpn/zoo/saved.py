"""Saved models: a folder with `model.safetensors`, and in `config.json` everything that is needed to build the model again.

`config.json` has timm's fields, for timm and the Hub, under "model" the `ModelConfig`, and the SHA-256 of the weights: loading
notices damaged weights, and files of two different saves. `model.safetensors` has the same `ModelConfig` in its metadata: a field
of `config.json` that no shape shows, but that changes the results, is noticed, too.
"""

import copy
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from tpn.config import MODULE, InputSpec, ModelConfig
from tpn.errors import CheckpointError, UnknownModelError
from tpn.files import StrPath, atomic_write, file_sha256
from tpn.models.classifier import TPNClassifier, unwrapped
from tpn.models.layers import BATCH_NORMS
from tpn.validation import brief
from tpn.version import __version__
from tpn.zoo.checkpoints import get_checkpoint
from tpn.zoo.convert import check_fit
from tpn.zoo.names import CONFIG_FILE, WEIGHTS_FILE
from tpn.zoo.overrides import custom_config, override
from tpn.zoo.reader import read_checkpoint, read_header, without_wrappers

# What `_config_of` raises for values that no version saved.
_CONFIG_ERRORS = (AttributeError, KeyError, TypeError, ValueError, RecursionError, OverflowError)


def save_pretrained(model: nn.Module, folder: StrPath) -> Path:
    """Write `model.safetensors` and `config.json`, which `create_model("local-dir:FOLDER")` reads.

    Before a file appears, the model is compared with one built from its config: names, shapes, and types of modules.

    Args:
        model: a `TPNClassifier`, also inside torch.compile or DistributedDataParallel.
        folder: created if necessary.

    Returns:
        The folder.

    Raises:
        TypeError: not a `TPNClassifier`.
        ValueError: the model no longer matches its config; the message says what to do.
        OSError: a file cannot be written.
    """
    model = unwrapped(model, compiled=True)
    if not isinstance(model, TPNClassifier):
        raise TypeError(f"only a TPNClassifier can be saved, got {type(model).__name__}")
    folder, config = Path(folder), model.config
    tensors = _checked_tensors(model, config)
    values = {
        "architecture": config.architecture,
        "num_classes": config.num_classes,
        "pretrained_cfg": model.pretrained_cfg,
        "model": config.to_dict(),
    }
    return _write(folder, tensors, values)


def save_temperature(folder: Path, temperature: float) -> None:
    """Replace the temperature of a saved model. The weights keep their values and dtypes.

    Raises FileNotFoundError, CheckpointError; OSError if a file cannot be written.
    """
    config, values = _parse(folder / CONFIG_FILE)
    tensors, _ = read_checkpoint(folder / WEIGHTS_FILE)
    config = replace(config, head=replace(config.head, temperature=temperature))
    _write(folder, tensors, values | {"model": config.to_dict()})


def _write(folder: Path, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> Path:
    """Write the weights and config.json, which gets their SHA-256."""
    # One key: safetensors writes several in random order, and equal models should give equal files.
    metadata = {"model": json.dumps({"model": values["model"]})}
    with atomic_write(folder / WEIGHTS_FILE) as unfinished:
        try:
            save_file(dict(tensors), unfinished, metadata=metadata)
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{folder / WEIGHTS_FILE} could not be written: {error}") from error
        values |= {"tpn_version": __version__, "weights_sha256": file_sha256(unfinished)}
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (unfinished.parent / CONFIG_FILE).write_text(text, encoding="utf-8")
    return folder


def read_config(folder: Path) -> ModelConfig:
    """Return the config of a saved model.

    Raises FileNotFoundError; CheckpointError if it is not a model that tpn saved, with the file, the field and the reason.
    """
    return _parse(folder / CONFIG_FILE)[0]


def open_saved(folder: Path, *, weights: bool = True) -> ModelConfig:
    """Return the config of a saved model that can be built, and with `weights` fits the weights in the folder.

    The weights are compared with their SHA-256, at 300 to 1,500 MB/s on one core. The network is built on PyTorch's meta device:
    wrong sizes are found before they take memory.

    Raises FileNotFoundError; CheckpointError, which names the file and the field.
    """
    path, shapes = folder / CONFIG_FILE, None
    if weights:
        try:
            config, shapes = _read_pair(path)
        except CheckpointError:  # a save that is running replaces one file after the other
            config, shapes = _read_pair(path)
    else:
        config, _ = _parse(path)
    _check_network(path, config, shapes)
    return config


def saved_sha256(folder: Path) -> str | None:
    """Return the SHA-256 that `config.json` has of the weights; None for a model of an earlier version."""
    return _parse(folder / CONFIG_FILE)[1].get("weights_sha256")


def read_metadata(metadata: Mapping[str, str]) -> ModelConfig | None:
    """Return the config in the metadata of a safetensors file; None for files of others."""
    with suppress(*_CONFIG_ERRORS):
        return _config_of(json.loads(metadata["model"]))
    return None


def _parse(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the config in `config.json`, and all that is in it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a saved model has {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    try:
        return _config_of(values), values
    except _CONFIG_ERRORS as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path}: not a model that tpn.save_pretrained wrote: {reason}") from error


def _read_pair(path: Path) -> tuple[ModelConfig, dict[str, tuple[int, ...]]]:
    """Return the config of a saved model, and the shapes of its weights. CheckpointError unless both are of one save."""
    config, values = _parse(path)
    weights = path.with_name(WEIGHTS_FILE)
    shapes, metadata = read_header(weights)
    if "weights_sha256" in values and (actual := file_sha256(weights)) != values["weights_sha256"]:  # absent in earlier versions
        raise CheckpointError(
            f"{path}: {WEIGHTS_FILE} does not match weights_sha256 (got {actual}, expected {brief(values['weights_sha256'])}). "
            f"It is damaged, or from another save. Copy both files of one save, or pass {WEIGHTS_FILE} alone as checkpoint_path"
        )
    if "model" in values and (trained := read_metadata(metadata)):  # the first version saved a part of it
        _check_unchanged(path, config, trained)
    return config, shapes


def _check_unchanged(path: Path, config: ModelConfig, trained: ModelConfig) -> None:
    """Raise CheckpointError if a field that decides what the network computes differs from that in the weights."""
    own, saved = _network_fields(config), _network_fields(trained)
    for name in {**own, **saved}:
        got, expected = (brief(found[name]) if name in found else "missing" for found in (own, saved))
        if got != expected or own.get(name) != saved.get(name):
            raise CheckpointError(
                f"{path}: {name} is {got}, but {WEIGHTS_FILE} was saved with {expected}. "
                "Restore it; pass changes to create_model instead"
            )


def _network_fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields that decide what a network computes. Others may be edited: labels, sampling, views, and dropout."""
    spec, fields = config.input_spec, dict[str, Any]()
    for kind, part in (("backbone", config.backbone), ("neck", config.neck)):
        if part is not None:
            fields |= {f"{kind}.name": part.name, **{f"{kind}.args.{name}": value for name, value in part.args.items()}}
    for name, head in (("head", config.head), ("aux_head", config.aux_head)):
        if head is not None:
            fields |= {f"{name}.{field}": getattr(head, field) for field in ("num_classes", "multi_label", "temperature")}
    return fields | {f"input_spec.{name}": getattr(spec, name) for name in ("num_frames", "crop_size", "in_chans")}


def _check_network(path: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]] | None) -> None:
    """Raise CheckpointError if a network cannot be built, or has other tensors than the weights.

    A network that only its owner can build is not checked, nor one that needs values while it is built, which takes memory.
    """
    if any(part is not None and part.is_module for part in (config.backbone, config.neck)):
        return
    try:
        with torch.device("meta"):
            model = TPNClassifier.from_config(config)
            if shapes is not None:
                check_fit(model.state_dict(), without_wrappers({name: torch.empty(shape) for name, shape in shapes.items()}))
    except UnknownModelError:
        return
    except Exception as error:  # each network raises its own type
        if "meta" not in str(error).lower():  # operations that need values, or that PyTorch lacks on this device
            fields = ", ".join(f"{name}={brief(value)}" for name, value in _network_fields(config).items())
            raise CheckpointError(f"{path}: cannot build the network of {fields[:600]} ({str(error)[:600]})") from error


def _config_of(values: Mapping[str, Any]) -> ModelConfig:
    """Return the config under "model"; version 0.1.0 saved an entry point, "architecture", with "model_args" instead."""
    if "model" in values or "model_args" not in values:
        return ModelConfig.from_dict(values["model"])
    architecture, args = values["architecture"], dict(values["model_args"])
    neck = "auto" if args.pop("pyramid", True) else None
    labels = values.get("label_names")
    spec = InputSpec.from_dict(values["input_spec"], labels) if "input_spec" in values else None
    if architecture == "tpn":
        backbone = re.sub("^own/", MODULE, args.pop("backbone"))
        base = custom_config(backbone, args["num_frames"])
    else:
        base = get_checkpoint(architecture).config
        if base.backbone.name == "tsm":
            args.setdefault("shift_shortcut", False)
    config = override(base, num_classes=values.get("num_classes"), neck=neck, input_spec=spec, **args)
    return config if labels is None else replace(config, labels=tuple(labels) if isinstance(labels, list) else labels)


def _checked_tensors(model: TPNClassifier, config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors to save. ValueError if a model built from the config differs."""
    # Only their owner can build modules: copies, which building may move and convert, represent them.
    modules = {
        name: copy.deepcopy(unwrapped(getattr(model, name), compiled=True))
        for name in ("backbone", "neck")
        if (part := getattr(config, name)) and part.is_module
    }
    with torch.random.fork_rng(devices=[]):  # saving must not change the random numbers of a training
        expected, actual = _outline(TPNClassifier.from_config(config, **modules)), _outline(model)
    different = [name for name in {**expected, **actual} if expected.get(name) != actual.get(name)]
    if different:
        name = different[0]
        raise ValueError(
            f"the model no longer matches its config in {len(different)} place(s), the first is {name}: "
            f"{actual.get(name, 'nothing')} instead of {expected.get(name, 'nothing')}. Undo the change, or build the model with "
            "the changed part, create_model(..., backbone=MODULE) or neck=MODULE"
        )
    # Copies, because safetensors does not accept shared memory.
    return {
        name: tensor.cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in without_wrappers(model.state_dict()).items()
    }


def _outline(model: nn.Module) -> dict[str, str]:
    """Return what a config determines of a model: shapes of tensors, types and settings of modules, tied parameters."""
    outline = {name: str(tuple(tensor.shape)) for name, tensor in without_wrappers(model.state_dict()).items()}
    for name, module in model.named_modules():
        module = unwrapped(module, compiled=True)
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if isinstance(module, BATCH_NORMS):  # it may be converted to SyncBatchNorm, or get another momentum
            kind = f"BatchNorm(eps={module.eps})"
        elif "drop" not in kind.lower():  # dropout may change, too
            kind += f"({module.extra_repr()})"
        outline[f"module {_plain(name)}"] = kind
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), _plain(name))
        if owner != _plain(name):  # a tie that the config does not make would be lost
            outline[f"tied parameter {_plain(name)}"] = owner
    return outline


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")
