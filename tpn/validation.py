"""Checks of the fields of a configuration: types, ranges, and relations between fields."""

import importlib.util
import math
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MAX_CLIP_VALUES = 2**27
"""Limit on the values of a resized clip, `in_chans * num_frames * short_side**2`: half a gigabyte as float32."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100


def check_int(name: str, value: Any, *, minimum: int, maximum: int | None = None) -> None:
    """Raise TypeError if a value is not an integer, ValueError if it is out of range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {brief(value)}")
    if value < minimum or (maximum is not None and value > maximum):
        limit = "" if maximum is None else f" and at most {maximum}"
        raise ValueError(f"{name} must be at least {minimum}{limit}, got {brief(value)}")


def check_number(name: str, value: Any, *, minimum: float, maximum: float) -> None:
    """Raise TypeError if a value is not a finite number, ValueError if it is out of range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise TypeError(f"{name} must be a finite number, got {brief(value)}")
    if not minimum <= value <= maximum:
        raise ValueError(f"{name} must be at least {minimum} and at most {maximum}, got {brief(value)}")


def check_bool(name: str, value: Any) -> None:
    """Raise TypeError if a value is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {brief(value)}")


def check_temperature(value: Any) -> None:
    """Raise TypeError or ValueError unless a value is a temperature of probabilities."""
    check_number("temperature", value, minimum=MIN_TEMPERATURE, maximum=MAX_TEMPERATURE)


def check_labels(labels: Any, num_classes: int) -> None:
    """Raise TypeError if labels are not names, ValueError if there is not one per class."""
    if isinstance(labels, str) or not all(is_text(name) for name in labels):
        raise TypeError(f"labels must be a tuple of names, got {brief(labels)}")
    if len(labels) != num_classes:
        raise ValueError(f"labels must have num_classes={num_classes} names, one per class, got {len(labels)}")


def check_input_spec(spec: Any) -> None:
    """Raise TypeError or ValueError if an `InputSpec` describes no clips, or clips that no memory holds."""
    for name, maximum in (("num_frames", 4096), ("frame_interval", 10_000), ("num_clips", 1000), ("num_crops", 3)):
        check_int(name, getattr(spec, name), minimum=1, maximum=maximum)
    three_crop_size = spec.short_side if spec.three_crop_size is None else spec.three_crop_size
    sizes = {"short_side": spec.short_side, "crop_size": spec.crop_size, "three_crop_size": three_crop_size}
    for name, size in sizes.items():
        check_int(name, size, minimum=1, maximum=8192)
    for name, minimum in (("mean", -1000), ("std", 0.001)):
        if not isinstance(getattr(spec, name), tuple):
            raise TypeError(f"{name} must be a tuple of finite numbers, one per channel, got {brief(getattr(spec, name))}")
        for value in getattr(spec, name):
            check_number(name, value, minimum=minimum, maximum=1000)
    if spec.target_fps is not None:
        check_number("target_fps", spec.target_fps, minimum=0.01, maximum=1000)
    check_bool("flip", spec.flip)
    if spec.sampling not in ("dense", "segments"):
        raise ValueError(f"sampling must be 'dense' or 'segments', got {brief(spec.sampling)}")
    if spec.num_crops == 2:
        raise ValueError("num_crops must be 1 (center) or 3 (along the longer side), got 2")
    for name in ("crop_size", *["three_crop_size"] * (spec.num_crops == 3)):
        if sizes[name] > spec.short_side:
            raise ValueError(f"{name} must be at most short_side={spec.short_side}, got {sizes[name]}")
    channels = len(spec.mean)
    if channels != len(spec.std) or not 1 <= channels <= 1024:
        raise ValueError(f"mean and std must have one value per channel, 1 to 1024, got {channels} and {len(spec.std)}")
    if (values := channels * spec.num_frames * spec.short_side**2) > MAX_CLIP_VALUES:
        raise ValueError(
            f"num_frames={spec.num_frames} and short_side={spec.short_side} with {channels} channels are {values} values per "
            f"clip; the limit is {MAX_CLIP_VALUES}. Reduce num_frames or short_side"
        )


def check_label_pairs(pairs: Any) -> None:
    """Raise TypeError or ValueError if `flip_label_pairs` are not pairs of names, or a name is in two of them."""
    if not isinstance(pairs, tuple) or not all(isinstance(p, tuple) and [*map(is_text, p)] == [True] * 2 for p in pairs):
        raise TypeError(f"flip_label_pairs must be a tuple of pairs of class names, got {brief(pairs)}")
    if len({name for pair in pairs for name in pair}) < 2 * len(pairs):
        raise ValueError(f"flip_label_pairs must name each class once, got {brief(pairs)}")


def is_text(value: Any) -> bool:
    """Return whether a value is a string that can be printed and saved. JSON also has halves of characters, surrogates."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def brief(value: Any) -> str:
    """Return `repr(value)` for a message, shortened."""
    return _REPR.repr(value)


def clipped(text: str) -> str:
    """Return a text of a file for a message, whatever its length."""
    return text if len(text) <= 100 else f"{text[:97]}..."


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def need_packages(*packages: str, extra: str = "export") -> None:
    """Raise ModuleNotFoundError if optional packages are missing. Do not import them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f'{" and ".join(missing)} missing: pip install "tpn[{extra}]"')


@contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Put the name of a part before the message of an error."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from error
