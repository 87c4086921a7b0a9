"""Exceptions that this package raises, and the words of their messages."""

import difflib
import re
from collections.abc import Iterable

BUNDLED_MODEL = "tpn_slowonly_tiny_motion"
"""Model whose weights ship with tpn."""

_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Control characters, line breaks, changes of direction, and bytes of a file name that are not UTF-8."""


def printable(text: object) -> str:
    """Return a text, such as a path, with unprintable characters written as escapes."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, such as "1 video" and "1,200 videos"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the three names that are most like a name, for a message."""
    return ", ".join(map(repr, difflib.get_close_matches(name, names, n=3, cutoff=0.0)))


class UnknownModelError(ValueError):
    """No model, checkpoint, backbone, or neck has this name."""


class CheckpointError(ValueError):
    """A checkpoint or a saved model cannot be read, or does not fit the model."""


class WeightsUnavailableError(RuntimeError):
    """Weights cannot be fetched now, or only by hand; the message names the next step."""


class OfflineError(WeightsUnavailableError):
    """Weights are not in the cache, and their server cannot be reached."""

    def __str__(self) -> str:
        return (
            f"{self.args[0]}. Offline, use the folder of a saved model, a weights file, or {BUNDLED_MODEL}, "
            "which recognizes rendered motion only"
        )


class NoRepositoryError(WeightsUnavailableError):
    """A Hub repository does not exist, or is private."""


class HubUnreachableError(WeightsUnavailableError):
    """The Hub is down, blocked, or switched off by $HF_HUB_OFFLINE."""


class UploadError(RuntimeError):
    """A model cannot be uploaded to the Hub; the message gives the reason."""
