"""Read tensors from a checkpoint file without running anything that is in it."""

import pickle
import pickletools
import re
import sys
import threading
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tpn.zoo.convert import CheckpointError

STANDARD_LIBRARY = sys.stdlib_module_names | IMPORT_MAPPING.keys()
"""Roots of the standard library, and the Python 2 names under which pickles still refer to it."""

_SAFE_GLOBALS = threading.Lock()

REMEDY = "in the environment that wrote it, save the bare weights: torch.save(model.state_dict(), 'weights.pth')"


def read_checkpoint(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a `.safetensors` or `.pth` file, under the names they have there, and its metadata.

    A `.pth` may wrap them in "state_dict" beside other things, and may prefix every name with "module.". What else
    it holds is not looked at: objects of libraries that are not installed become empty placeholders. A file
    that would call a function is refused. The metadata is that of a safetensors file, else empty.

    Raises FileNotFoundError, IsADirectoryError, PermissionError, or CheckpointError, whose message starts with the path.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"{path}: the file is empty")
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _tensors_of(path, _read_torch(path)), {}
    start = head.decode("latin-1").strip()[:30]
    if start.startswith("<"):
        raise CheckpointError(f"{path}: a web page, not a checkpoint; save the file that the page offers")
    raise CheckpointError(f"{path}: neither a safetensors nor a PyTorch file; it starts with {start!r}")


def is_whole(path: Path) -> bool:
    """Whether a safetensors file has the length that its header promises. OSError if it cannot be opened."""
    path.open("rb").close()  # safetensors calls every failure "no such file"
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or damaged safetensors file ({error})") from error


def _read_torch(path: Path) -> Any:
    try:
        names = sorted(set(_globals(path)))
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or damaged PyTorch file ({error})") from error
    placeholders = [(type(name, (_Placeholder,), {}), name) for name in names if _is_foreign_class(name)]
    try:
        # The list of what is harmless belongs to the whole process: one reader at a time, and nobody's entries are removed.
        with _SAFE_GLOBALS:
            known = torch.serialization.get_safe_globals()
            ours = [entry for entry in (*_numpy_globals(), *placeholders) if entry not in known]
            # Opened here: given a path, torch goes by the suffix.
            with torch.serialization.safe_globals(ours), path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        called = re.search(r"(?:GLOBAL|function) (?:<[\w ]*function )?([\w.]+)", str(error))
        foreign = ", ".join(name for _, name in placeholders) or "an unknown kind"
        what = f"reading it would call {called[1]}" if called else f"objects of {foreign}"
        raise CheckpointError(f"{path}: refused, it holds more than tensors: {what}; {REMEDY}") from error
    except (RuntimeError, EOFError, OSError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{path}: truncated or damaged PyTorch file ({str(error).partition('. ')[0] or 'it ends early'})"
        ) from error


def _tensors_of(path: Path, loaded: Any) -> dict[str, Tensor]:
    tensors = loaded
    for wrapper in ("state_dict", "model"):
        if isinstance(tensors, Mapping) and isinstance(tensors.get(wrapper), Mapping):
            tensors = tensors[wrapper]
    if not isinstance(tensors, Mapping) or not tensors:
        raise CheckpointError(f"{path}: no tensors in it, but a {type(tensors).__name__}")
    strange = [name for name, value in tensors.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(f"{path}: {len(strange)} of its entries are not tensors, the first is {strange[0]!r}")
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): value for name, value in tensors.items()}
    return dict(tensors)


class _Placeholder:
    """Stands for an object of a library that need not be installed: accepts any content, keeps none of it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()  # the one mutable thing that torch's reader fills and sets attributes on


def _globals(path: Path) -> Iterator[str]:
    """Yield the dotted names of the classes and functions that the pickles of a file refer to."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if len(pickles) != 1:
                raise ValueError("a zip file, but not one that torch.save wrote")
            with archive.open(pickles[0]) as file:
                yield from _globals_of_pickle(file.read())
    else:  # files of PyTorch < 1.6: magic number, version, system and then the object, one pickle each
        with path.open("rb") as file:
            for _ in range(4):
                with suppress(ValueError):  # fewer pickles, or none: for torch to judge
                    yield from _globals_of_pickle(file)


def _globals_of_pickle(data: Any) -> Iterator[str]:
    for op, arg, _ in pickletools.genops(data):
        if op.name == "GLOBAL":
            yield str(arg).replace(" ", ".")


def _is_foreign_class(name: str) -> bool:
    """Whether a name is that of a class, by its spelling, of a third-party library, as opposed to a function.

    Functions and the standard library get no placeholder: a file that refers to them is refused unless torch
    itself knows them to be harmless.
    """
    root, leaf = name.split(".")[0], name.rsplit(".", 1)[-1]
    return root not in STANDARD_LIBRARY | {"torch", "numpy"} and leaf.lstrip("_")[:1].isupper()


def _numpy_globals() -> list[Any]:
    """numpy's own reconstructors of arrays and scalars, under the module names of numpy 1 and 2."""
    reconstructors: list[Any] = [np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]]
    dtypes = [type(np.dtype(code)) for code in "?bBhHiIlLqQefdgSUO"]
    functions = [(f, f"numpy.{core}.multiarray.{f.__name__}") for core in ("core", "_core") for f in reconstructors]
    return [np.dtype, np.ndarray, *dtypes, *functions]
