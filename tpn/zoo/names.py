"""What a name stands for, without importing PyTorch: a published model with its recorded facts, or a folder of a saved model."""

import fnmatch
import os
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from tpn.errors import WeightsUnavailableError
from tpn.files import StrPath, cache_folder
from tpn.zoo import checkpoints
from tpn.zoo.checkpoints import Checkpoint, Page, get_checkpoint

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
"""The files of a saved model."""


def list_models(filter: str = "", *, pretrained: bool = False) -> list[str]:
    """Return the names of the models that match a wildcard such as `"tpn_*r101*"`; all by default.

    Args:
        filter: a pattern of `fnmatch`.
        pretrained: return every checkpoint, as "model.tag", instead.
    """
    names = {entry.name if pretrained else entry.model for entry in checkpoints.CHECKPOINTS.values()}
    return sorted(fnmatch.filter(names, filter or "*"), key=_natural_key)


@dataclass(frozen=True)
class ModelInfo:
    """A model of the zoo with one of its checkpoints.

    Attributes:
        checkpoint: the entry of the table.
        params: number of parameters, auxiliary head included.
        gmacs: 10**9 multiply-accumulate operations for one clip at crop_size, without the auxiliary head; two decimals.
    """

    checkpoint: Checkpoint
    params: int
    gmacs: float


def model_info(name: str) -> ModelInfo:
    """Return the entry, parameters, and operations of "model" or "model.tag", as recorded in the table of checkpoints."""
    entry = get_checkpoint(name)
    return ModelInfo(entry, entry.params, entry.gmacs)


def local_folder(name: StrPath) -> Path | None:
    """Return the folder that "local-dir:folder" or a path names; None for other names.

    A string without "/" is a path if the folder has a `config.json`, and no published model has this name.
    """
    if isinstance(name, PathLike):
        return Path(name)
    if not isinstance(name, str):
        raise TypeError(f"name must be a string such as 'tpn_slowonly_r50_k400', or the path of a folder, got {name!r}")
    scheme, _, place = name.partition(":")
    if scheme == "local-dir" and place:
        return Path(place)
    if {"/", os.sep} & set(name):
        return Path(name) if os.path.isdir(name) else None
    published = any(name in (entry.model, entry.name) for entry in checkpoints.CHECKPOINTS.values())
    return Path(name) if Path(name, CONFIG_FILE).is_file() and not published else None


def is_saved(name: StrPath) -> bool:
    """Return whether a name stands for a saved model, whose weights are always loaded."""
    return local_folder(name) is not None or str(name).startswith("hf-hub:")


def is_exported(name: StrPath) -> bool:
    """Return whether a name is that of a file of `tpn.export`, which `VideoClassifier` and `evaluate` take."""
    has_scheme = str(name).startswith(("local-dir:", "hf-hub:"))
    return str(name).endswith((".onnx", ".pt2", ".xml")) and not has_scheme and not os.path.isdir(name)


def weights_folder(entry: Checkpoint, cache_dir: StrPath | None = None) -> Path:
    """Return the folder that holds, or will hold, an entry's converted weights."""
    from huggingface_hub import constants

    return (cache_folder(cache_dir) or Path(constants.HF_ASSETS_CACHE, "tpn").expanduser()) / entry.name


def convert_command(entry: Checkpoint) -> str:
    """Return the command that stores a downloaded file in the cache."""
    return f"tpn convert FILE --model {entry.name}"


def by_hand(entry: Checkpoint) -> str:
    """Return what to do about an entry that needs a manual download."""
    return (
        f"The weights of {entry.name} need a manual download: open {entry.source.url} in a browser, save the file, "
        f"then run: {convert_command(entry)}"
    )


def refuse_manual_download(entry: Checkpoint) -> None:
    """Raise WeightsUnavailableError if a manual download is the only way to the weights of an entry."""
    if isinstance(entry.source, Page) and not entry.mirror and not (weights_folder(entry) / WEIGHTS_FILE).is_file():
        raise WeightsUnavailableError(by_hand(entry))


def _natural_key(name: str) -> list[str | int]:
    """Sort by numbers, not digits, as timm does: "r50" before "r101"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]
