"""Read tensors from a checkpoint file: safetensors, or what torch.save writes.

Nothing that a file names is imported, built, or called. Reading takes memory in proportion to the size of the file: records are
never decompressed, each is read once, and no tensor has more values than are stored.
"""

import io
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

from tpn.errors import CheckpointError
from tpn.files import StrPath
from tpn.validation import clipped
from tpn.zoo.unpickle import Entry, Storage, Unpickler, kind_of

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def read_checkpoint(path: StrPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a `.safetensors` or `.pth` file, under the names they have there, and its metadata.

    A `.pth` may hold the tensors under "state_dict" or "model", and their names may have the prefixes of torch.compile
    ("_orig_mod.") and DistributedDataParallel ("module."), which are removed. All other objects in it are ignored, and a file
    that asks to call a function of the standard library is refused. The checksums in files of PyTorch 1.6 and later are compared.
    The metadata is that of a safetensors file, otherwise empty.

    Raises FileNotFoundError, IsADirectoryError, PermissionError, or CheckpointError, whose message starts with the path.
    """
    path = Path(path)
    kind = _kind_of_file(path)
    try:
        if kind == "safetensors":
            with safe_open(path, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                return without_wrappers(tensors), opened.metadata() or {}
        with path.open("rb") as file:
            entries, storages = _read_zip(file) if kind == "zip" else _read_legacy(file)
            return without_wrappers({name: _tensor(name, entry, storages) for name, entry in entries.items()}), {}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # a damaged file can raise any error of zipfile, pickletools, and safetensors
        raise _damaged(path, kind, error) from error


def read_header(path: StrPath) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shapes and the metadata of a safetensors file, without reading a tensor; errors as `read_checkpoint`."""
    path = Path(path)
    if (kind := _kind_of_file(path)) != "safetensors":
        raise CheckpointError(f"{path}: a {kind} PyTorch file, expected safetensors")
    try:
        with safe_open(path, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            return shapes, opened.metadata() or {}
    except Exception as error:
        raise _damaged(path, kind, error) from error


def without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of torch.compile and DistributedDataParallel from the names of a state dict."""
    names = {name: name.replace("_orig_mod.", "") for name in tensors}
    if all(name.startswith("module.") for name in names.values()):
        names = {name: short.removeprefix("module.") for name, short in names.items()}
    return {names[name]: tensor for name, tensor in tensors.items()}


def _kind_of_file(path: Path) -> str:
    """Return "safetensors", "zip" (PyTorch 1.6 or later), or "legacy"; CheckpointError for other files."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"{path}: the file is empty")
    for kind, found in (("safetensors", head[8:9] == b"{"), ("zip", head[:2] == b"PK"), ("legacy", head[:1] == b"\x80")):
        if found:
            return kind
    start = head.decode("latin-1").strip()[:30]
    if start.startswith("<"):
        raise CheckpointError(f"{path}: a web page, not a checkpoint; save the file that the page offers")
    raise CheckpointError(f"{path}: neither a safetensors nor a PyTorch file; it starts with {start!r}")


def _damaged(path: Path, kind: str, error: Exception) -> CheckpointError:
    what = "safetensors file" if kind == "safetensors" else "PyTorch file, or another zip file"
    reason = clipped(str(error).partition(". ")[0]) or type(error).__name__
    return CheckpointError(f"{path}: truncated or damaged {what} ({reason})")


def _entries(loaded: Any) -> dict[str, Entry]:
    """Return the tensors in the object of a file; CheckpointError if there are none, or other objects among them."""
    for wrapper in ("state_dict", "model"):
        if type(loaded) is dict and type(loaded.get(wrapper)) is dict:
            loaded = loaded[wrapper]
    if type(loaded) is not dict or not loaded:
        raise CheckpointError(f"holds no tensors, but a {kind_of(loaded)}")
    if strange := [name for name, value in loaded.items() if not isinstance(value, Entry)]:
        first = f"{clipped(strange[0])!r}, {kind_of(loaded[strange[0]])}"
        raise CheckpointError(f"{len(strange)} of its entries are not tensors with values, the first is {first}")
    return loaded


def _tensor(name: str, entry: Entry, storages: Callable[[Storage], Tensor]) -> Tensor:
    """Return the tensor of an entry; ValueError if it is not a part of its storage."""
    values = storages(entry.storage)
    _, offset, size, stride = entry
    numbers = (offset, *size, *stride)
    if not len(size) == len(stride) <= 16 or not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise ValueError(f"{clipped(name)} has no valid size")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and last >= len(values):
        raise ValueError(f"{clipped(name)} is of size {size}, with {len(values)} stored numbers")
    return values.new_empty(size) if 0 in size else values.as_strided(size, stride, offset)


def _read_zip(file: IO[bytes]) -> tuple[dict[str, Entry], Callable[[Storage], Tensor]]:
    """Return the tensors in a file of PyTorch 1.6 or later, and a function that reads a storage."""
    archive = zipfile.ZipFile(file)
    members = {info.filename: info for info in archive.infolist()}
    if not any(info.CRC for info in members.values()):  # after torch.serialization.set_crc32_options(False)
        for info in members.values():
            del info.CRC
    pickles = [name for name in members if name.endswith("data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it has {len(pickles)} records data.pkl instead of one")
    folder = pickles[0].removesuffix("data.pkl")
    left = file.seek(0, io.SEEK_END)  # bytes that records may have together

    def read(name: str) -> bytes:
        nonlocal left
        if name not in members:
            raise ValueError(f"it has no record {clipped(name)}")
        info = members[name]
        left -= info.file_size
        if info.compress_type != zipfile.ZIP_STORED or left < 0:
            raise ValueError(f"its record {clipped(name)} is compressed, which torch.save never does, or larger than the file")
        return archive.read(info)  # compares the checksum

    if f"{folder}byteorder" in members and read(f"{folder}byteorder") != b"little":
        raise ValueError("its numbers are in big-endian order")
    entries = _entries(Unpickler().load(io.BytesIO(read(pickles[0]))))
    cache: dict[str, bytearray] = {}

    def storage(wanted: Storage) -> Tensor:
        if wanted.key not in cache:
            cache[wanted.key] = bytearray(read(f"{folder}data/{wanted.key}"))
        return _numbers(cache[wanted.key], wanted.dtype)

    return entries, storage


def _read_legacy(file: IO[bytes]) -> tuple[dict[str, Entry], Callable[[Storage], Tensor]]:
    """Return the tensors in a file of an earlier PyTorch, which has no checksums, and a function that returns a storage."""
    file = io.BytesIO(file.read())  # unlike a file, it does not take memory for all bytes that it is asked for
    if Unpickler().load(file) != _LEGACY_MAGIC or Unpickler().load(file) != _LEGACY_PROTOCOL:
        raise ValueError("another kind of pickle")
    Unpickler().load(file)  # about the system
    unpickler = Unpickler()
    entries, keys = _entries(unpickler.load(file)), Unpickler().load(file)
    found: dict[str, bytearray] = {}
    for key in keys:
        if type(key) is not str:
            raise ValueError("another kind of pickle")
        (count,) = struct.unpack("<q", file.read(8))  # of the numbers that follow
        length = count * unpickler.storages[key].itemsize
        found[key] = bytearray(file.read(max(length, 0)))
        if len(found[key]) != length:
            raise ValueError("it ends early")
    return entries, lambda wanted: _numbers(found[wanted.key], wanted.dtype)


def _numbers(content: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
