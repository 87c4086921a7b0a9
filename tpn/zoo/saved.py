"""Folders of `model.safetensors` and `config.json`: a model with everything that is needed to build it again.

The format is the one that timm and the Hugging Face Hub use, with one more section, "input_spec".
"""

import json
import os
import shutil
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import PretrainedCfg
from torch import nn

from tpn.models.classifier import TPNClassifier, unwrapped
from tpn.video.spec import InputSpec
from tpn.zoo.assemble import timm_cfg
from tpn.zoo.convert import CheckpointError
from tpn.zoo.hub import hub_file
from tpn.zoo.weights import CUSTOM, get_weights

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
NOT_SAVED = {"backbone_pretrained", "cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
"""Arguments that say what to load from where: the caller's, never those of a file, which may be anybody's."""
INCOMPLETE = ".incomplete-"
"""How the names of folders begin in which files are being written."""


def save_pretrained(model: nn.Module, folder: str | PathLike[str]) -> Path:
    """Write `model.safetensors` and `config.json`, which `create_model("local-dir:FOLDER")` reads back.

    model: a model that `create_model` or a factory function made, also inside torch.compile or DistributedDataParallel.

    Each file appears under its name only when it is complete. Returns the folder, created if need be.
    """
    model = unwrapped(model, compiled=True)
    if not isinstance(model, TPNClassifier):
        raise TypeError(f"only a TPNClassifier can be saved, got {type(model).__name__}")
    if model.labels is not None and len(model.labels) != model.num_classes:
        raise ValueError(f"model.labels has {len(model.labels)} names, the model has {model.num_classes} classes")
    if model.model_args is None:
        raise ValueError(
            "only models made by tpn.create_model or a factory function know how to be built again; "
            "of an optimized model, save the one that it was made of"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    # One key: safetensors writes several in random order, and equal models are to give equal files.
    metadata = {"model": json.dumps({key: config[key] for key in ("architecture", "model_args")})}
    with tempfile.TemporaryDirectory(dir=folder, prefix=INCOMPLETE) as temporary:
        try:
            save_file(tensors, Path(temporary, WEIGHTS_FILE), metadata=metadata)
        except SafetensorError as error:  # a full disk, for one
            raise OSError(f"{folder / WEIGHTS_FILE} could not be written: {error}") from error
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        Path(temporary, CONFIG_FILE).write_text(text, encoding="utf-8")
        shutil.copymode(Path(temporary, CONFIG_FILE), Path(temporary, WEIGHTS_FILE))  # safetensors keeps others from reading
        # Weights go first and come last: where they are, the configuration is theirs.
        (folder / WEIGHTS_FILE).unlink(missing_ok=True)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            os.replace(Path(temporary, name), folder / name)
    return folder


def saved_config(cfg: PretrainedCfg, cache_dir: str | PathLike[str] | None = None) -> dict[str, Any] | None:
    """Return the config.json of the folder or Hub repository that `cfg` comes from, None if it is the zoo's own.

    Raises CheckpointError if it does not describe a model of tpn.
    """
    if cfg.source not in ("local-dir", "hf-hub"):
        return None
    return read_config(saved_file(cfg, CONFIG_FILE, cache_dir).parent)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a folder; CheckpointError if it does not describe a model of tpn."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    known: dict[str, Any] = config if isinstance(config, dict) else {}
    missing = [key for key in ("architecture", "pretrained_cfg", "input_spec") if key not in known]
    if missing:
        raise CheckpointError(f"{path}: not a model that tpn.save_pretrained wrote, it has no {', '.join(missing)}")
    try:
        if forbidden := sorted(NOT_SAVED & known.get("model_args", {}).keys()):
            raise ValueError(f"model_args must not say what to load, got {', '.join(forbidden)}")
        if known["architecture"] != CUSTOM:
            get_weights(known["architecture"])
        InputSpec.from_dict(known["input_spec"])
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return known


def saved_file(cfg: PretrainedCfg, name: str, cache_dir: str | PathLike[str] | None = None) -> Path:
    """Return one file of the folder or Hub repository that `cfg` names, fetched if need be.

    Raises FileNotFoundError, WeightsUnavailableError.
    """
    if cfg.source == "local-dir":
        path = Path(str(cfg.file), name)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a model folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
        return path
    return hub_file(str(cfg.hf_hub_id), name, cache_dir=cache_dir)


def config_of(model: TPNClassifier) -> dict[str, Any]:
    """Return what config.json says of a model."""
    published: dict[str, Any] = cast("Any", model).pretrained_cfg
    elsewhere = ("url", "file", "hf_hub_id", "source", "architecture", "state_dict")
    cfg = {k: v for k, v in published.items() if k not in elsewhere} | timm_cfg(model.input_spec)
    cfg["num_classes"] = model.num_classes
    cfg.pop("label_names", None)
    config = {
        "architecture": published["architecture"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": model.model_args,
        "input_spec": model.input_spec.to_dict(),
        "pretrained_cfg": cfg,
    }
    if model.labels is not None:
        config["label_names"] = list(model.labels)
    return config
