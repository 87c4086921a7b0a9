"""Saved models: a folder with `model.safetensors`, and in `config.json` everything that is needed to build the model again.

`config.json` has timm's fields, for timm and the Hub, and under "model" the `ModelConfig`.
"""

import copy
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from tpn.config import MODULE, InputSpec, ModelConfig
from tpn.errors import CheckpointError
from tpn.files import atomic_write
from tpn.models.classifier import TPNClassifier, unwrapped
from tpn.models.layers import BATCH_NORMS
from tpn.version import __version__
from tpn.zoo.checkpoints import get_checkpoint
from tpn.zoo.overrides import custom_config, override
from tpn.zoo.reader import without_wrappers

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


def save_pretrained(model: nn.Module, folder: str | PathLike[str]) -> Path:
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
        "tpn_version": __version__,
    }
    # One key: safetensors writes several in random order, and equal models should give equal files.
    metadata = {"model": json.dumps({"model": values["model"]})}
    with atomic_write(folder / WEIGHTS_FILE) as unfinished:
        try:
            save_file(tensors, unfinished, metadata=metadata)
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{folder / WEIGHTS_FILE} could not be written: {error}") from error
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (unfinished.parent / CONFIG_FILE).write_text(text, encoding="utf-8")
    return folder


def read_config(folder: Path) -> ModelConfig:
    """Return the config of a saved model.

    Raises FileNotFoundError; CheckpointError if it is not a model that tpn saved, with the file and the reason.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a saved model has {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    try:
        return _config_of(values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a model that tpn.save_pretrained wrote: {error}") from error


def read_metadata(metadata: Mapping[str, str]) -> ModelConfig | None:
    """Return the config in the metadata of a safetensors file; None for files of others."""
    with suppress(AttributeError, KeyError, TypeError, ValueError):
        return _config_of(json.loads(metadata["model"]))
    return None


def _config_of(values: Mapping[str, Any]) -> ModelConfig:
    """Return the config under "model"; version 0.1.0 saved an entry point, "architecture", with "model_args" instead."""
    if "model" in values:
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
    return config if labels is None else replace(config, labels=tuple(labels))


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
