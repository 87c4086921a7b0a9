"""Read the pickle of a `.pth` file. Nothing that it names is imported, built, or called.

A pickle is a program for a small stack machine. The machine here has no instruction that leads out of it: it has strings,
numbers, tuples, lists, dictionaries, and tensors. Every other object becomes a `Placeholder`, which is only a description.
"""

import pickletools
import sys
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple, cast

import torch

from tpn.errors import CheckpointError
from tpn.validation import clipped

STORAGES = {
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
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
"""The types of numbers that are read, by PyTorch's names for their storages, without "Storage"."""

MAX_INSTRUCTIONS = 2_000_000
"""Limit on the instructions of a pickle, about 400 MB and 5 s. A checkpoint of 700 tensors with optimizer has under 100,000."""


class Storage(NamedTuple):
    """Numbers of one type; their bytes are elsewhere in the file, under a key."""

    dtype: torch.dtype
    key: str


class Entry(NamedTuple):
    """A tensor in a pickle: a part of a storage. Only the type of the storage has been checked."""

    storage: Storage
    offset: Any
    size: Any
    stride: Any


class Name(NamedTuple):
    """A class or a function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return clipped(f"{self.module}.{self.name}")


class Placeholder:
    """Takes the place of every object that is not read."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind


_STORAGE_TYPES = {Name("torch", f"{name}Storage"): dtype for name, dtype in STORAGES.items()}
_TENSORS = {Name("torch._utils", name) for name in ("_rebuild_tensor", "_rebuild_tensor_v2")}
_PARAMETERS = {Name("torch._utils", name) for name in ("_rebuild_parameter", "_rebuild_parameter_with_state")}
_WITH_ATTRIBUTES = Name("torch._tensor", "_rebuild_from_type_v2")
_ORDERED_DICT = Name("collections", "OrderedDict")
# The standard library, also under the Python 2 names that pickles still use.
_STANDARD_LIBRARY = sys.stdlib_module_names | IMPORT_MAPPING.keys()
_DATA = {
    **dict.fromkeys(
        ("builtins", "__builtin__"), "bool bytearray complex dict float frozenset int list long set slice str tuple unicode"
    ),
    "collections": "OrderedDict defaultdict deque Counter",
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "datetime": "date datetime timedelta timezone",
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",  # Python 3.13
    "_codecs": "encode",  # of bytes, in protocol 2
}
"""Names of the standard library that training scripts save as metadata, such as their arguments."""

# Instructions by what they do; `_step` has the others. Those of protocol 0, which torch.save cannot use, are missing.
_PUSH_ARGUMENT = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "BINFLOAT"),
    *("BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_PUSH_NEW: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: Placeholder("a set"),
}
_PUT, _GET = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Unpickler:
    """Reads one pickle.

    Attributes:
        storages: types of the storages that it refers to, by their keys.
    """

    def __init__(self) -> None:
        self.storages: dict[str, torch.dtype] = {}
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stack below each mark
        self._memo: dict[int, Any] = {}

    def load(self, file: IO[bytes]) -> Any:
        """Return the object of the pickle that begins at the present position of a file.

        Raises CheckpointError if it names a function of the standard library, and any error for a damaged pickle.
        """
        for number, (code, argument, _) in enumerate(pickletools.genops(file)):
            if number >= MAX_INSTRUCTIONS:
                raise ValueError(f"its pickle has more than {MAX_INSTRUCTIONS} instructions")
            if code.name in _PUSH_ARGUMENT:
                self._stack.append(argument)
            elif code.name in _PUSH_NEW:
                self._stack.append(_PUSH_NEW[code.name]())
            elif code.name in _PUT:
                self._memo[cast("int", argument)] = self._stack[-1]
            elif code.name in _GET:
                self._stack.append(self._memo[cast("int", argument)])
            elif code.name != "STOP":
                self._step(code.name, argument)
        return self._stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        """Execute an instruction that does more than push a value."""
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._below.append(stack)
                self._stack = []
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "DUP":
                stack.append(stack[-1])
            case "POP" | "BUILD":  # BUILD would set the attributes of an object
                stack.pop()
            case "POP_MARK" | "ADDITEMS":
                self._pop_to_mark()
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
            case "TUPLE":
                values = self._pop_to_mark()
                self._stack.append(tuple(values))
            case "LIST" | "DICT" | "FROZENSET":
                values = self._pop_to_mark()
                self._stack.append(values if name == "LIST" else _dict_of(values) if name == "DICT" else Placeholder("a set"))
            case "APPEND" | "APPENDS":
                values = [stack.pop()] if name == "APPEND" else self._pop_to_mark()
                if type(self._stack[-1]) is list:
                    self._stack[-1].extend(values)
            case "SETITEM" | "SETITEMS":
                values = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._pop_to_mark()
                if type(self._stack[-1]) is dict:
                    self._stack[-1].update(_dict_of(values))
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(stack.pop(-2), stack.pop()))
            case "REDUCE" | "NEWOBJ":
                stack.append(_result(stack.pop(-2), stack.pop()))
            case "NEWOBJ_EX":
                stack[-3:] = [_result(stack[-3], ())]
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case _:
                raise ValueError(f"its pickle has the instruction {name}")

    def _pop_to_mark(self) -> list[Any]:
        """Remove and return the values above the last mark."""
        values, self._stack = self._stack, self._below.pop()
        return values

    def _storage(self, identifier: Any) -> Storage | Placeholder:
        """Return what an identifier stands for: ("storage", type, key, location, number of values), and None in old files.

        The earliest files have a view in place of None: a part of another storage, which is not read.
        """
        match identifier:
            case ("storage", Name() as kind, str(key), _, _) | ("storage", Name() as kind, str(key), _, _, None) if (
                kind in _STORAGE_TYPES
            ):
                self.storages[key] = _STORAGE_TYPES[kind]
                return Storage(_STORAGE_TYPES[kind], key)
            case ("storage", Name() as kind, *_):
                return Placeholder(f"a {kind}")
        return Placeholder("an object outside the pickle")


def _name(module: Any, name: Any) -> Name:
    """Return what a pickle names; CheckpointError for the standard library, of which a checkpoint needs nothing."""
    if type(module) is not str or type(name) is not str:
        raise ValueError("a name that is not a string")
    found = Name(module, name)
    if module.partition(".")[0] in _STANDARD_LIBRARY and name not in _DATA.get(module, "").split():
        raise CheckpointError(
            f"refused, it holds more than tensors: it refers to {found}; in the environment that wrote it, save the bare "
            "weights: torch.save(model.state_dict(), 'weights.pth')"
        )
    return found


def _result(function: Any, arguments: Any) -> Any:
    """Return what takes the place of the result of a call."""
    if not isinstance(function, Name) or type(arguments) is not tuple:
        return Placeholder("an object")
    if function == _ORDERED_DICT:  # Python 2 passes [[key, value], ...]
        pairs = arguments[0] if arguments and type(arguments[0]) is list else []
        return _dict_of([value for pair in pairs if type(pair) is list for value in pair])
    if function in _PARAMETERS and arguments:
        return arguments[0]
    if function == _WITH_ATTRIBUTES and len(arguments) == 4:  # the function, the class, the arguments, and the attributes
        return _result(arguments[0], arguments[2])
    if function in _TENSORS and len(arguments) >= 4:
        storage = arguments[0]
        return Entry(*arguments[:4]) if isinstance(storage, Storage) else Placeholder(f"a tensor in {kind_of(storage)}")
    return Placeholder(f"an object of {function}")


def _dict_of(items: list[Any]) -> dict[str, Any]:
    """Return the dictionary of [key, value, key, value, ...]. Only strings are hashed: hashing other keys could take forever."""
    found: dict[str, Any] = {}
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is str:
            found[key] = value
        else:
            name = clipped(str(key)) if type(key) is int else kind_of(key)
            found[name] = Placeholder(f"an entry with the key {name}, which is no string")
    return found


def kind_of(value: Any) -> str:
    """Return what a value of a pickle is, for messages."""
    return value.kind if isinstance(value, Placeholder) else "Tensor" if isinstance(value, Entry) else type(value).__name__
