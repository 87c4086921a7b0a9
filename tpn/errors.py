"""Exceptions that this package raises, and how their messages stay one line."""

import re


def one_line(text: str) -> str:
    """Return a text, such as a path, with line breaks and control characters escaped."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: ascii(match[0])[1:-1], text)


class UnknownModelError(ValueError):
    """No model, checkpoint, backbone, or neck has this name."""


class CheckpointError(ValueError):
    """A checkpoint or a saved model cannot be read, or does not fit the model."""


class WeightsUnavailableError(RuntimeError):
    """Weights cannot be fetched now, or only by hand; the message names the next step."""


class NoRepositoryError(WeightsUnavailableError):
    """A Hub repository does not exist, or is private."""


class HubUnreachableError(WeightsUnavailableError):
    """The Hub is down, blocked, or switched off by $HF_HUB_OFFLINE."""


class UploadError(RuntimeError):
    """A model cannot be uploaded to the Hub; the message gives the reason."""
