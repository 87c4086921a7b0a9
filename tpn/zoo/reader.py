"""Read tensors from a checkpoint file without executing its contents."""

import pickle
import pickletools
import re
import sys
import threading
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tpn.errors import CheckpointError

# The standard library, also under the Python 2 names that pickles still use.
_NO_PLACEHOLDER = sys.stdlib_module_names | IMPORT_MAPPING.keys() | {"torch", "numpy"}
_SAFE_GLOBALS = threading.Lock()


def read_checkpoint(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a `.safetensors` or `.pth` file, under the names they have there, and its metadata.

    A `.pth` may hold the tensors under "state_dict" or "model", and their names may have the prefixes of torch.compile
    ("_orig_mod.") and DistributedDataParallel ("module."), which are removed. Other objects are ignored: those of libraries that
    are not installed become empty placeholders. A file that would call a function is refused. The metadata is that of a
    safetensors file, otherwise empty.

    Raises FileNotFoundError, IsADirectoryError, PermissionError, or CheckpointError, whose message starts with the path.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"{path}: the file is empty")
    if head[8:9] == b"{":
        try:
            with safe_open(path, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                return without_wrappers(tensors), opened.metadata() or {}
        except SafetensorError as error:
            raise CheckpointError(f"{path}: truncated or damaged safetensors file ({error})") from error
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _tensors_of(path, _read_torch(path)), {}
    start = head.decode("latin-1").strip()[:30]
    if start.startswith("<"):
        raise CheckpointError(f"{path}: a web page, not a checkpoint; save the file that the page offers")
    raise CheckpointError(f"{path}: neither a safetensors nor a PyTorch file; it starts with {start!r}")


def _read_torch(path: Path) -> Any:
    names = _foreign_classes(path)
    placeholders = [(type(name, (_Placeholder,), {}), name) for name in names]
    try:
        # The list of safe globals belongs to the whole process: one reader at a time, and entries of others stay.
        with _SAFE_GLOBALS:
            known = torch.serialization.get_safe_globals()
            ours = [entry for entry in (*_numpy_globals(), *placeholders) if entry not in known]
            # Opened here: given a path, torch decides by the suffix.
            with torch.serialization.safe_globals(ours), path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        called = re.search(r"(?:GLOBAL|function) (?:<[\w ]*function )?([\w.]+)", str(error))
        what = f"reading it would call {called[1]}" if called else f"objects of {', '.join(names) or 'an unknown kind'}"
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors: {what}; in the environment that wrote it, save the bare weights: "
            "torch.save(model.state_dict(), 'weights.pth')"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, AttributeError, TypeError, IndexError) as error:
        reason = str(error).partition(". ")[0] or "it ends early"
        raise CheckpointError(f"{path}: truncated or damaged PyTorch file ({reason})") from error


def _tensors_of(path: Path, loaded: Any) -> dict[str, Tensor]:
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded:
        raise CheckpointError(f"{path}: holds no tensors, but a {type(loaded).__name__}")
    strange = [name for name, value in loaded.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(f"{path}: {len(strange)} of its entries are not tensors, the first is {strange[0]!r}")
    return without_wrappers(loaded)


def without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of torch.compile and DistributedDataParallel from the names of a state dict."""
    names = {name: name.replace("_orig_mod.", "") for name in tensors}
    if all(name.startswith("module.") for name in names.values()):
        names = {name: short.removeprefix("module.") for name, short in names.items()}
    return {names[name]: tensor for name, tensor in tensors.items()}


class _Placeholder:
    """Replaces an object of a library that may not be installed: accepts any content and ignores it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()  # torch's reader fills it and sets attributes on it


def _foreign_classes(path: Path) -> list[str]:
    """Return the names in the pickles of a file that are spelled like classes of third-party libraries.

    Functions and the standard library get no placeholder: a file that refers to them is refused, except for those that torch
    itself considers safe.
    """
    names = set()
    try:
        with path.open("rb") as file:
            pickles: IO[bytes] = file
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    (member,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
                    pickles = BytesIO(archive.read(member))
            for _ in range(4):  # files of PyTorch < 1.6: magic number, version, system, and the object
                with suppress(ValueError):  # fewer pickles, or a damaged one: torch reports it
                    for op, arg, _ in pickletools.genops(pickles):
                        if op.name == "GLOBAL":
                            names.add(str(arg).replace(" ", "."))
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: truncated or damaged PyTorch file, or another zip file ({error})") from error
    parts = {name: name.split(".") for name in sorted(names)}
    return [n for n, p in parts.items() if p[0] not in _NO_PLACEHOLDER and p[-1].lstrip("_")[:1].isupper()]


def _numpy_globals() -> list[Any]:
    """Return numpy's constructors of arrays and scalars, under the module names of numpy 1 and 2."""
    reconstructors: list[Any] = [np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]]
    dtypes = [type(np.dtype(code)) for code in "?bBhHiIlLqQefdgSUO"]
    functions = [(f, f"numpy.{core}.multiarray.{f.__name__}") for core in ("core", "_core") for f in reconstructors]
    return [np.dtype, np.ndarray, *dtypes, *functions]
