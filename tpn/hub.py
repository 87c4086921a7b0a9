"""The Hugging Face Hub, through its own client: files of one commit, and its errors in one sentence.

$HF_ENDPOINT, $HF_TOKEN, $HF_HUB_OFFLINE, $HF_HOME, proxies, resumed downloads and locks are the client's.
"""

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from tpn.errors import HubUnreachableError, NoRepositoryError, WeightsUnavailableError
from tpn.files import atomic_write

CacheDir = str | PathLike[str] | None
T = TypeVar("T")

TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
"""Responses that may differ a moment later."""
PAUSES = (1.0, 2.0)
"""Seconds before the second and the third try."""

LOCAL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
_NETWORK_PACKAGES = {"huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "urllib"}
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

_logger = logging.getLogger(__name__)


def cache_folder(cache_dir: CacheDir = None) -> Path | None:
    """Return the folder for downloads: `cache_dir`, else $TPN_CACHE, else None for that of the library that downloads."""
    folder = cache_dir or os.environ.get("TPN_CACHE")
    return Path(folder).expanduser() if folder else None


def snapshot(repo: str, *files: str, cache_dir: CacheDir = None, prefer_cached: bool = False) -> Path:
    """Return a folder with files of one commit of a Hub repository, from the cache or downloaded into it.

    The Hub is asked for the newest commit, and a copy in the cache is used with a warning if it does not respond. A commit hash,
    or `prefer_cached`, needs no request for files that are in the cache.

    Args:
        repo: "owner/name", or "owner/name@revision" with a branch, a tag, or a commit hash.
        files: names of the files.
        cache_dir: see `cache_folder`.
        prefer_cached: do not ask for a newer commit.

    Raises:
        ValueError: a malformed name.
        WeightsUnavailableError: NoRepositoryError, HubUnreachableError, no access, no such revision or file, no space.
    """
    repo_id, _, revision = repo.partition("@")
    revision, cache = revision or "main", cache_folder(cache_dir)
    first = try_to_load_from_cache(repo_id, files[0], cache, revision)
    cached = Path(first).parent if isinstance(first, str) else None
    if cached is not None and not all((cached / name).is_file() and is_whole(cached / name) for name in files):
        cached = None
    if cached is not None and (prefer_cached or constants.HF_HUB_OFFLINE or cached.name == revision):
        return cached
    url = hf_hub_url(repo_id, files[0], revision=revision)
    ask = partial(get_hf_file_metadata, url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    try:
        commit = _call(ask, repo, files[0]).commit_hash or revision
    except WeightsUnavailableError as error:
        if cached is None:
            raise
        _logger.warning("%s; using the copy in the cache", error)
        return cached
    if cached is not None and cached.name == commit:
        return cached
    for name in files:
        get = partial(hf_hub_download, repo_id, name, revision=commit, cache_dir=cache, library_name="tpn")
        path = Path(_call(get, repo, name, resume=True))
        if not is_whole(path):
            _logger.warning("%s is truncated or damaged: downloading it again", path)
            _call(partial(get, force_download=True), repo, name, resume=True)
    if revision != commit:  # for offline use, as the client does when it downloads by branch
        with atomic_write(path.parents[2] / "refs" / revision) as ref:
            ref.write_text(commit)
    return path.parent


def is_whole(path: Path) -> bool:
    """Return False for a safetensors file without the length that its header states. OSError if it cannot be opened."""
    if path.suffix != ".safetensors":
        return True
    path.open("rb").close()  # safetensors calls every failure "no such file"
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


@contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """Raise WeightsUnavailableError for a network error of another library that downloads `what`."""
    try:
        yield
    except Exception as error:  # of any HTTP library
        local = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
        for cause in _causes(error):
            package = type(cause).__module__.partition(".")[0]
            if package in _NETWORK_PACKAGES or (isinstance(cause, OSError) and not isinstance(cause, local)):
                raise WeightsUnavailableError(
                    f"cannot download {what} ({reason(error)}); check the network, and HF_ENDPOINT and HF_HUB_OFFLINE if set"
                ) from error
        raise


def reason(error: BaseException) -> str:
    """Return why a request failed, in a few words."""
    status, last = _status(error), _causes(error)[-1]
    if status in (401, 403):
        return f"no permission: {_LOG_IN}, with a token that may do this"
    return f"status {status}" if status else next(iter(str(last).splitlines()), type(last).__name__)


def _call(request: Callable[[], T], repo: str, name: str, *, resume: bool = False) -> T:
    """Call the client; try again after responses that may differ a moment later, and with `resume` after broken transfers.

    The client retries by itself, but not in all versions, and for minutes where a network drops packets.
    """
    for pause in (*PAUSES, None):
        try:
            return request()
        except Exception as error:  # of the HTTP library of this version of the client
            failure = _hub_error(error, repo, name)
            passing = _status(error) in TRANSIENT_STATUS or (resume and isinstance(failure, HubUnreachableError))
            if pause is None or not passing or isinstance(error, LocalEntryNotFoundError | ValueError):
                raise failure from error
            _logger.info("%s; trying again", failure)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _hub_error(error: BaseException, repo: str, name: str) -> WeightsUnavailableError:
    """Translate an error of the Hub's client while it reads a file."""
    causes, status, where = _causes(error), _status(error), f"{repo} on the Hub ({constants.ENDPOINT})"

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if constants.HF_HUB_OFFLINE or caused_by(OfflineModeIsEnabled):
        return HubUnreachableError(f"{repo} is not in the cache, incomplete, or damaged, and HF_HUB_OFFLINE forbids requests")
    if caused_by(GatedRepoError) or status == 403:
        return WeightsUnavailableError(f"no access to {where}: {_LOG_IN}, with an account that may read it")
    if caused_by(RevisionNotFoundError):
        return WeightsUnavailableError(f"no such revision: {where}")
    if caused_by(RepositoryNotFoundError) or (status == 401 and get_token() is None):
        return NoRepositoryError(f"no repository {where}, or it is private: {_LOG_IN} if it is yours")
    if caused_by(EntryNotFoundError) and not caused_by(LocalEntryNotFoundError):
        return WeightsUnavailableError(f"no {name} in {where}: it is not a model that tpn saved")
    if status == 401:
        return WeightsUnavailableError(f"the token was not accepted for {where}: {_LOG_IN}")
    if status == 404:
        return NoRepositoryError(f"no {name} in {where}")
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in LOCAL_ERRORS:
            return WeightsUnavailableError(
                f"cannot store {name} of {repo}: {cause.filename or constants.HF_HUB_CACHE}: {cause.strerror}; "
                "choose another folder with HF_HOME, TPN_CACHE or cache_dir"
            )
    return HubUnreachableError(f"cannot reach {where} ({reason(error)}); check the network, and HF_ENDPOINT if set")


def _status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, if there was a response."""
    found = (getattr(getattr(cause, "response", None), "status_code", None) for cause in _causes(error))
    return next(filter(None, found), None)


def _causes(error: BaseException) -> list[BaseException]:
    return [error, *(_causes(error.__cause__) if error.__cause__ else ())]
