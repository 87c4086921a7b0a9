"""Where weights come from and where they go: folders of `model.safetensors` and `config.json`, the cache, the sources.

A folder is in the format that timm and the Hugging Face Hub use, with one more section, "input_spec".
"""

import json
import logging
import os
import tempfile
import urllib.error
from os import PathLike
from pathlib import Path
from typing import Any, cast

from huggingface_hub import constants, hf_hub_download
from safetensors.torch import save_file
from timm.models import PretrainedCfg
from torch import Tensor
from torch.hub import download_url_to_file

from tpn.models.classifier import TPNClassifier
from tpn.models.resnet_tsm import ResNetTSM
from tpn.video.spec import InputSpec
from tpn.zoo.checkpoint import read_checkpoint
from tpn.zoo.convert import CheckpointError, convert_state_dict, load_strict
from tpn.zoo.weights import Weights, get_weights

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"

_logger = logging.getLogger(__name__)


class WeightsUnavailableError(RuntimeError):
    """Weights that cannot be fetched now, or only by hand; the message says how."""


def load_checkpoint(model: TPNClassifier, path: str | PathLike[str]) -> None:
    """Load a `.safetensors` or `.pth` file in our, mmaction2's or the original layout, strictly.

    If the checkpoint has another number of classes than the model, exactly the two classifiers (`head.fc` and
    `aux_head.fc`) keep their untrained values, and one log line says so. Everything else must fit.

    Raises CheckpointError, and FileNotFoundError, IsADirectoryError or PermissionError.
    """
    tensors, metadata = read_checkpoint(path)
    try:
        renamed, layout = convert_state_dict(tensors)
        _check_shift(model, layout, metadata)
        source_classes = num_classes_of(renamed)
        classifiers: tuple[str, ...] = ()
        if source_classes is not None and source_classes != model.num_classes:
            classifiers = ("head.fc", "aux_head.fc")
        load_strict(model, renamed, classifiers=classifiers)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if classifiers:
        _logger.info(
            "%s was trained for %s classes, the model has %s: head.fc and aux_head.fc are new and untrained",
            path,
            source_classes,
            model.num_classes,
        )


def num_classes_of(state_dict: dict[str, Tensor]) -> int | None:
    """Return the number of classes of a state dict in our layout; None if it has no classifier."""
    weight = state_dict.get("head.fc.weight")
    return None if weight is None else weight.shape[0]


def save_pretrained(model: TPNClassifier, folder: str | PathLike[str]) -> Path:
    """Write `model.safetensors` and `config.json`, which `create_model("local-dir:FOLDER")` reads back.

    model: a model that `create_model` or a factory function made. Each file appears under its name only when it is
    complete. Returns the folder, created if need be.
    """
    if model.model_args is None:
        raise ValueError("only models made by tpn.create_model or a factory function know how to be built again")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = _config_of(model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt", "architecture": config["architecture"], "model_args": json.dumps(config["model_args"])}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".incomplete-") as temporary:
        save_file(tensors, Path(temporary, WEIGHTS_FILE), metadata=metadata)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        Path(temporary, CONFIG_FILE).write_text(text, encoding="utf-8")
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(Path(temporary, name), folder / name)
    return folder


def saved_config(cfg: PretrainedCfg, cache_dir: str | PathLike[str] | None = None) -> dict[str, Any] | None:
    """Return the config.json of the folder or Hub repository that `cfg` comes from, None if it is the zoo's own.

    Raises CheckpointError if it does not describe a model of tpn.
    """
    if cfg.source not in ("local-dir", "hf-hub"):
        return None
    path = _file_of(cfg, CONFIG_FILE, cache_dir)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    known: dict[str, Any] = config if isinstance(config, dict) else {}
    missing = [key for key in ("architecture", "pretrained_cfg", "input_spec") if key not in known]
    if missing:
        raise CheckpointError(f"{path}: not a model that tpn.save_pretrained wrote, it has no {', '.join(missing)}")
    try:
        get_weights(known["architecture"])
        InputSpec.from_dict(known["input_spec"])
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return known


def load_pretrained(
    model: TPNClassifier, cfg: PretrainedCfg, entry: Weights | None, cache_dir: str | PathLike[str] | None = None
) -> None:
    """Load the weights that `cfg` (a saved folder, a Hub repository, a file) or else the table's `entry` names."""
    if cfg.source in ("local-dir", "hf-hub"):
        load_checkpoint(model, _file_of(cfg, WEIGHTS_FILE, cache_dir))
    elif cfg.file:
        load_checkpoint(model, cfg.file)
    elif entry is not None:
        load_checkpoint(model, fetch(entry, cache_dir))
    else:
        raise WeightsUnavailableError(f"there are no published weights for {cfg.architecture}")


def cache_folder(entry: Weights, cache_dir: str | PathLike[str] | None = None) -> Path:
    """Return where an entry's weights are kept: under cache_dir, else $TPN_CACHE, else the Hub's home."""
    root = cache_dir or os.environ.get("TPN_CACHE") or Path(constants.HF_HOME, "tpn")
    return Path(root) / entry.name


def fetch(entry: Weights, cache_dir: str | PathLike[str] | None = None) -> Path:
    """Return the path of an entry's weights: from the cache, else downloaded from the publisher into it.

    Raises WeightsUnavailableError where a person has to fetch them, or the download fails.
    """
    folder = cache_folder(entry, cache_dir)
    converted = folder / WEIGHTS_FILE
    if converted.is_file():
        return converted
    original = folder / entry.url.rpartition("/")[2]
    by_hand = f"tpn convert FILE --model {entry.name}"
    if entry.manual:
        raise WeightsUnavailableError(
            f"the weights of {entry.name} have to be fetched by hand: open {entry.url} in a browser, "
            f"save the file, then run: {by_hand}"
        )
    if not original.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _logger.info("downloading %s to %s", entry.url, original)
        try:
            # Verified against the hash in its name, and renamed only then.
            download_url_to_file(entry.url, str(original), hash_prefix=entry.sha256)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            raise WeightsUnavailableError(
                f"could not download {entry.url} ({error}); try again, or fetch it by other means and run: {by_hand}"
            ) from error
    return original


def _config_of(model: TPNClassifier) -> dict[str, Any]:
    published: dict[str, Any] = cast("Any", model).pretrained_cfg
    cfg = {k: v for k, v in published.items() if k not in ("url", "file", "hf_hub_id", "source", "architecture")}
    cfg["num_classes"] = model.num_classes
    for size in ("input_size", "test_input_size"):
        cfg[size] = (model.in_chans, *cfg[size][1:])
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


def _file_of(cfg: PretrainedCfg, name: str, cache_dir: str | PathLike[str] | None = None) -> Path:
    if cfg.source == "local-dir":
        path = Path(str(cfg.file), name)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a model folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
        return path
    repo_id, _, revision = str(cfg.hf_hub_id).partition("@")
    return Path(
        hf_hub_download(
            repo_id, name, revision=revision or None, cache_dir=None if cache_dir is None else Path(cache_dir), library_name="tpn"
        )
    )


def _check_shift(model: TPNClassifier, layout: str, metadata: dict[str, str]) -> None:
    """Refuse TSM weights of the other shift variant, which have the same names and shapes but other meaning."""
    if not isinstance(model.backbone, ResNetTSM):
        return
    if layout == "tpn":
        trained = json.loads(metadata.get("model_args", "{}")).get("shift_shortcut", model.backbone.shift_shortcut)
    else:
        trained = layout == "original"
    if trained != model.backbone.shift_shortcut:
        raise CheckpointError(
            f"the weights were trained with shift_shortcut={trained}, the model was built with "
            f"shift_shortcut={model.backbone.shift_shortcut}; pass shift_shortcut={trained} to create_model"
        )
