"""Read tensors from a checkpoint file. Nothing that a file names is called, and nothing but tensors is kept."""

import io
import pickle
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tpn.errors import CheckpointError

DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
"""The types of numbers that are read, by the names of PyTorch's storages."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# The standard library, also under the Python 2 names that pickles still use.
_STANDARD_LIBRARY = sys.stdlib_module_names | IMPORT_MAPPING.keys()


def read_checkpoint(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a `.safetensors` or `.pth` file, under the names they have there, and its metadata.

    A `.pth` may hold the tensors under "state_dict" or "model", and their names may have the prefixes of torch.compile
    ("_orig_mod.") and DistributedDataParallel ("module."), which are removed. All other objects in it are ignored, and none is
    built. A file that asks to call a function of the standard library is refused. The metadata is that of a safetensors file,
    otherwise empty.

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
        return _tensors_of(path, head[:2] == b"PK"), {}
    start = head.decode("latin-1").strip()[:30]
    if start.startswith("<"):
        raise CheckpointError(f"{path}: a web page, not a checkpoint; save the file that the page offers")
    raise CheckpointError(f"{path}: neither a safetensors nor a PyTorch file; it starts with {start!r}")


def without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of torch.compile and DistributedDataParallel from the names of a state dict."""
    names = {name: name.replace("_orig_mod.", "") for name in tensors}
    if all(name.startswith("module.") for name in names.values()):
        names = {name: short.removeprefix("module.") for name, short in names.items()}
    return {names[name]: tensor for name, tensor in tensors.items()}


def _tensors_of(path: Path, zipped: bool) -> dict[str, Tensor]:
    """Return the tensors of a file that torch.save wrote."""
    try:
        with path.open("rb") as file:
            loaded, storages = _read_zip(file) if zipped else _read_legacy(file)
            return without_wrappers({name: entry.tensor(storages) for name, entry in _entries(loaded).items()})
    except _RefusedError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # a damaged file can raise any error of the unpickler and of zipfile
        reason = str(error).partition(". ")[0] or "it ends early"
        raise CheckpointError(f"{path}: truncated or damaged PyTorch file, or another zip file ({reason})") from error


def _entries(loaded: Any) -> dict[str, "_Entry"]:
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not loaded:
        raise _RefusedError(f"holds no tensors, but a {_kind(loaded)}")
    strange = [name for name, value in loaded.items() if not isinstance(name, str) or not isinstance(value, _Entry)]
    if strange:
        name = strange[0]
        raise _RefusedError(f"{len(strange)} of its entries are not tensors, the first is {name!r}, {_kind(loaded[name])}")
    return loaded


class _RefusedError(Exception):
    """The file is in order, but it does not hold what a checkpoint holds."""


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str


class _Entry(NamedTuple):
    """A tensor in a pickle: a part of a storage, whose bytes are elsewhere in the file."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self, storages: "Callable[[_Storage], Tensor]") -> Tensor:
        numbers = [self.offset, *self.size, *self.stride]
        if not all(type(number) is int and 0 <= number < 2**62 for number in numbers) or len(self.size) != len(self.stride):
            raise ValueError(f"a tensor of size {self.size} and stride {self.stride}")
        values = storages(self.storage)
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        if 0 not in self.size and last >= len(values):
            raise ValueError(f"a tensor of size {self.size} in {len(values)} stored numbers")
        return values.as_strided(self.size, self.stride, self.offset)


def _entry(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> "_Entry":
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor without storage, size, or stride")
    return _Entry(storage, offset, size, stride)


class _Ignored:
    """Takes the place of every object that is not a tensor: any arguments, any state, any items, and no effect."""

    kind = "an object"

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> "_Ignored":
        return self

    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, item: Any) -> None: ...
    def extend(self, items: Any) -> None: ...
    def add(self, item: Any) -> None: ...


class _Mapping(dict[Any, Any]):
    """Takes the place of an OrderedDict, without the attributes that torch attaches to it."""

    def __setstate__(self, state: Any) -> None: ...


_NAMES: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Mapping,
    ("torch._utils", "_rebuild_tensor"): _entry,
    ("torch._utils", "_rebuild_tensor_v2"): _entry,
    ("torch._utils", "_rebuild_parameter"): lambda entry, *rest: entry,
    **{("torch", f"{name}Storage"): dtype for name, dtype in DTYPES.items()},
}
"""What the names in a pickle stand for. All others are ignored, or refused."""


class _Unpickler(pickle._Unpickler):
    """Python's unpickler, in Python: that in C can be made to allocate a list of any length."""

    dispatch: ClassVar = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code not in (*pickle.BYTEARRAY8, *pickle.NEXT_BUFFER, *pickle.EXT1, *pickle.EXT2, *pickle.EXT4)
    }

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin-1")
        self.storages: dict[str, torch.dtype] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = _NAMES.get((module, name))
        if known is not None:
            return known
        full_name = f"{module}.{name}"
        if module.partition(".")[0] in _STANDARD_LIBRARY and full_name not in _HARMLESS:
            raise _RefusedError(
                f"refused, it holds more than tensors: reading it would call {full_name}; in the environment that wrote it, save "
                "the bare weights: torch.save(model.state_dict(), 'weights.pth')"
            )
        return type("_Ignored", (_Ignored,), {"kind": f"an object of {full_name}"})

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and pid[:1] == ("storage",) and pid[5:] in ((), (None,)):
            _, dtype, key, *_ = pid
            if isinstance(dtype, torch.dtype) and isinstance(key, str):
                self.storages[key] = dtype
                return _Storage(dtype, key)
        return _Ignored()


_HARMLESS = {"_codecs.encode", "collections.defaultdict", "collections.deque", "collections.Counter", "builtins.set"}
"""Names of the standard library in metadata that libraries write, such as numpy's scalars."""


def _kind(value: Any) -> str:
    if isinstance(value, _Ignored):
        return value.kind
    return {"_Entry": "Tensor", "_Mapping": "dict"}.get(type(value).__name__, type(value).__name__)


def _read_zip(file: IO[bytes]) -> tuple[Any, Callable[[_Storage], Tensor]]:
    """Return the object of a file of PyTorch 1.6 or later, and a function that reads a storage."""
    archive = zipfile.ZipFile(file)
    members = {info.filename: info for info in archive.infolist()}
    (pickled,) = (name for name in members if name.endswith("data.pkl"))
    folder = pickled.removesuffix("data.pkl")
    left = file.seek(0, io.SEEK_END)  # bytes that records may have together

    def read(name: str) -> bytes:
        nonlocal left
        info = members[name]
        left -= info.file_size
        if info.compress_type != zipfile.ZIP_STORED or left < 0:
            raise ValueError(f"{name} is compressed, which torch.save never does")
        return archive.read(info)  # compares the checksum

    if f"{folder}byteorder" in members and read(f"{folder}byteorder") != b"little":
        raise ValueError("its numbers are in big-endian order")
    loaded = _Unpickler(io.BytesIO(read(pickled))).load()
    cache: dict[str, bytearray] = {}

    def storage(wanted: _Storage) -> Tensor:
        if wanted.key not in cache:
            cache[wanted.key] = bytearray(read(f"{folder}data/{wanted.key}"))
        return _numbers(cache[wanted.key], wanted.dtype)

    return loaded, storage


def _read_legacy(file: IO[bytes]) -> tuple[Any, Callable[[_Storage], Tensor]]:
    """Return the object of a file of an earlier PyTorch, and a function that returns a storage."""
    for expected in (_LEGACY_MAGIC, _LEGACY_PROTOCOL, None):  # the last one is about the system
        if expected not in (_Unpickler(file).load(), None):
            raise ValueError("another kind of pickle")
    unpickler = _Unpickler(file)
    loaded, keys = unpickler.load(), _Unpickler(file).load()
    content, found = memoryview(file.read()), dict[str, bytearray]()
    for key in keys:  # after each count come that many numbers
        (count,) = struct.unpack("<q", content[:8])
        length = count * unpickler.storages[key].itemsize
        if not 0 <= length <= len(content) - 8:
            raise ValueError("it ends early")
        found[key], content = bytearray(content[8 : 8 + length]), content[8 + length :]
    return loaded, lambda wanted: _numbers(found[wanted.key], wanted.dtype)


def _numbers(content: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
