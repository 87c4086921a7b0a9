"""The Hugging Face Hub, by its own client; the client's many ways to fail become a few.

$HF_ENDPOINT, $HF_TOKEN, $HF_HUB_OFFLINE, $HF_HOME, proxies, resumed downloads, retries and locks are the client's.
"""

import errno
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from tpn.zoo.checkpoint import is_whole
from tpn.zoo.download import PASSING

NOT_STORED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
"""What goes wrong on this side: no room, or no right to write."""

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

PAUSES = (1.0, 2.0)
"""Seconds before the Hub is asked again, after an answer that may differ a moment later."""
NETWORK = {"huggingface_hub", "httpx", "httpcore", "requests", "urllib3"}
"""Packages whose exceptions mean that something could not be fetched; and any OSError does."""

TRANSFERS = 3
"""Tries of a transfer that broke; old versions of the client do not go on by themselves."""

_logger = logging.getLogger(__name__)


class WeightsUnavailableError(RuntimeError):
    """Weights that cannot be fetched now, or only by hand; the message says how."""


class NoRepositoryError(WeightsUnavailableError):
    """A Hub repository that does not exist, or that this user may not know of."""


class HubUnreachableError(WeightsUnavailableError):
    """No sensible answer from the Hub: it is down, blocked, or switched off by $HF_HUB_OFFLINE."""


class UploadError(RuntimeError):
    """A model that could not be put on the Hub; the message says why."""


def hub_file(repo: str, name: str, *, cache_dir: str | PathLike[str] | None = None, prefer_cached: bool = False) -> Path:
    """Return a file of a Hub repository, from the Hub's cache or downloaded into it.

    Args:
        repo: "owner/name", or "owner/name@revision".
        cache_dir: Default: $TPN_CACHE, else the Hub's, $HF_HUB_CACHE.
        prefer_cached: ask the Hub only for what is not in the cache. Otherwise the Hub is asked whether there is
            a newer one; if it does not say, the cached one is taken, with a warning.

    Raises WeightsUnavailableError, as NoRepositoryError or HubUnreachableError where it is one of these, and ValueError for
    a malformed name.
    """
    repo_id, _, revision = repo.partition("@")
    validate_repo_id(repo_id)
    cache_dir = cache_dir or os.environ.get("TPN_CACHE")
    get = partial(
        hf_hub_download,
        repo_id,
        name,
        revision=revision or None,
        cache_dir=Path(cache_dir).expanduser() if cache_dir else None,
        library_name="tpn",
    )
    path = _cached(get)
    if path is None or not prefer_cached:
        try:
            _ask(repo, name, hf_hub_url(repo_id, name, revision=revision or None))
        except WeightsUnavailableError as error:
            if path is None:
                raise
            if not constants.HF_HUB_OFFLINE:
                _logger.warning("%s; taking the copy in the cache", error)
        else:
            path = _transfer(get, repo, name)
    if path.suffix == ".safetensors" and not is_whole(path):
        _logger.warning("%s is truncated or damaged: fetching it again", path)
        path = _transfer(partial(get, force_download=True), repo, name)
    return path


def _ask(repo: str, name: str, url: str) -> None:
    """Make sure that the Hub has a file, or raise what `hub_file` raises.

    The client asks again by itself when it fetches, but for up to minutes where a network swallows its requests.
    """
    outer = sys.exc_info()[1]
    for pause in (*PAUSES, None):
        try:
            get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return
        except Exception as error:  # of whichever HTTP library the client uses
            if pause is None or _status(_causes(error, outer)) not in PASSING:
                raise _explain(_causes(error, outer), repo, name) from error
            time.sleep(pause)


def _transfer(get: "partial[str]", repo: str, name: str) -> Path:
    outer = sys.exc_info()[1]
    tries = 0
    while True:
        tries += 1
        try:
            return Path(get())
        except Exception as error:  # of whichever HTTP library the client uses
            explained = _explain(_causes(error, outer), repo, name)
            started = isinstance(explained, HubUnreachableError) and not isinstance(error, LocalEntryNotFoundError | ValueError)
            if not started or tries == TRANSFERS:
                raise explained from error
            _logger.warning("%s; going on with what has arrived", explained)


def _cached(get: "partial[str]") -> Path | None:
    try:
        return Path(get(local_files_only=True))
    except LocalEntryNotFoundError:
        return None


@contextmanager
def uploading(repo_id: str) -> Iterator[None]:
    """Turn what the client raises into an UploadError."""
    outer = sys.exc_info()[1]
    try:
        yield
    except Exception as error:  # of whichever HTTP library the client uses
        causes = _causes(error, outer)
        status = _status(causes)
        where = f"{repo_id} on the Hub ({constants.ENDPOINT})"
        if status in (401, 403):
            raise UploadError(f"no right to write to {where}: {LOG_IN}, with a token that may write there") from error
        raise UploadError(f"could not upload to {where}: {_reason(causes)}") from error


@contextmanager
def fetching(what: str) -> Iterator[None]:
    """Turn what another library raises when it cannot fetch something into a WeightsUnavailableError."""
    outer = sys.exc_info()[1]
    try:
        yield
    except Exception as error:  # of whichever HTTP library that library uses
        causes = _causes(error, outer)
        ours = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)  # of this machine's disk
        about_network = any(
            type(e).__module__.partition(".")[0] in NETWORK or (isinstance(e, OSError) and not isinstance(e, ours))
            for e in causes
        )
        if not about_network:
            raise
        raise WeightsUnavailableError(
            f"{what} could not be fetched ({_reason(causes)}); check the network, and HF_ENDPOINT and HF_HUB_OFFLINE if set"
        ) from error


def _status(causes: list[BaseException]) -> int | None:
    """The status of the answer behind an error, if there was an answer."""
    found = (getattr(getattr(error, "response", None), "status_code", None) for error in causes)
    return next((status for status in found if status), None)


def _reason(causes: list[BaseException]) -> str:
    status, last = _status(causes), causes[-1]
    return f"status {status}" if status else next(iter(str(last).splitlines()), type(last).__name__)


def _explain(causes: list[BaseException], repo: str, name: str) -> WeightsUnavailableError:
    """Say in one sentence what the client's error means for the user."""
    status = _status(causes)
    where = f"{repo} on the Hub ({constants.ENDPOINT})"
    if constants.HF_HUB_OFFLINE or any(isinstance(e, OfflineModeIsEnabled) for e in causes):
        return HubUnreachableError(
            f"{name} of {repo} is not in the Hub's cache, or damaged there, and HF_HUB_OFFLINE forbids to ask"
        )
    if any(isinstance(e, GatedRepoError) for e in causes) or status == 403:
        return WeightsUnavailableError(f"no access to {where}: {LOG_IN}, with an account that may read it")
    if any(isinstance(e, RevisionNotFoundError) for e in causes):
        return WeightsUnavailableError(f"{where} has no such revision")
    if any(isinstance(e, RepositoryNotFoundError) for e in causes) or (status == 401 and get_token() is None):
        return NoRepositoryError(f"there is no repository {where}, or it is private: {LOG_IN} if it is yours")
    if any(isinstance(e, EntryNotFoundError) and not isinstance(e, LocalEntryNotFoundError) for e in causes):
        return WeightsUnavailableError(f"{where} has no {name}: it is not a model that tpn saved")
    if status == 401:
        return WeightsUnavailableError(f"{where} does not accept the token that was sent: {LOG_IN}")
    if status == 404:
        return NoRepositoryError(f"there is no {name} in {where}")
    for e in causes:
        if isinstance(e, OSError) and e.errno in NOT_STORED:
            return WeightsUnavailableError(
                f"{name} of {repo} could not be stored: {e.filename or constants.HF_HUB_CACHE}: {e.strerror}; "
                "choose another place with HF_HOME, TPN_CACHE or cache_dir"
            )
    return HubUnreachableError(f"{where} could not be reached ({_reason(causes)}); check the network, and HF_ENDPOINT if set")


def _causes(error: BaseException | None, outer: BaseException | None) -> list[BaseException]:
    """Return an error and what led to it, but not `outer`, which the caller was handling already."""
    found = []
    while error is not None and error is not outer:
        found.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found
