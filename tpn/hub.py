"""The Hugging Face Hub, through its own client: files of one commit, and one translation of the client's errors.

$HF_ENDPOINT, $HF_TOKEN, $HF_HUB_OFFLINE, $HF_HOME, proxies, resumed downloads and locks are the client's.
"""

import errno
import logging
import os
import re
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
from safetensors import SafetensorError, safe_open

from tpn.errors import HubUnreachableError, NoRepositoryError, UploadError, WeightsUnavailableError
from tpn.files import atomic_write

CacheDir = str | PathLike[str] | None

TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
"""Responses that may differ a moment later."""
PAUSES = (1.0, 2.0)
"""Seconds before the second and the third try."""

LOCAL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
_NETWORK_PACKAGES = {"huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "urllib"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
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
    validate_repo_id(repo_id)
    get = partial(hf_hub_download, repo_id, cache_dir=cache_folder(cache_dir), library_name="tpn")
    folder = _cached(get, revision, files)
    if folder is not None and (prefer_cached or constants.HF_HUB_OFFLINE or _COMMIT.fullmatch(revision)):
        return folder
    try:
        with translate_errors(repo, files[0]):
            commit = _commit_of(hf_hub_url(repo_id, files[0], revision=revision or None))
    except WeightsUnavailableError as error:
        if folder is None:
            raise
        _logger.warning("%s; using the copy in the cache", error)
        return folder
    if folder is not None and folder.name == commit:
        return folder
    for name in files:
        path = _download(get, repo, name, commit)
        if not _usable(path):
            _logger.warning("%s is truncated or damaged: downloading it again", path)
            path = _download(partial(get, force_download=True), repo, name, commit)
    if not _COMMIT.fullmatch(revision):  # for offline use, as the client does when it downloads by branch
        with atomic_write(path.parents[2] / "refs" / (revision or "main")) as ref:
            ref.write_text(commit)
    return path.parent


def is_whole(path: Path) -> bool:
    """Whether a safetensors file has the length that its header states. OSError if it cannot be opened."""
    path.open("rb").close()  # safetensors calls every failure "no such file"
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def _cached(get: "partial[str]", revision: str, files: tuple[str, ...]) -> Path | None:
    """Return the folder of a commit that has all files, none of them damaged."""
    try:
        for name in files:
            path = Path(get(name, revision=revision or None, local_files_only=True))
            revision = path.parent.name
            if not _usable(path):
                return None
    except LocalEntryNotFoundError:
        return None
    return path.parent


def _usable(path: Path) -> bool:
    return path.suffix != ".safetensors" or is_whole(path)


def _commit_of(url: str) -> str:
    """Return the commit of a file on the Hub; retry after responses that may differ a moment later.

    The client retries a download by itself, but for minutes where a network drops packets.
    """
    for pause in (*PAUSES, None):
        try:
            return get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT).commit_hash or ""
        except Exception as error:  # of the HTTP library of this version of the client
            if pause is None or _status(_causes(error, None)) not in TRANSIENT_STATUS:
                raise
            time.sleep(pause)
    raise AssertionError("unreachable")


def _download(get: "partial[str]", repo: str, name: str, revision: str) -> Path:
    """Download a file; resume broken transfers, which old versions of the client do not."""
    for pause in (*PAUSES, None):
        try:
            with translate_errors(repo, name):
                return Path(get(name, revision=revision or None))
        except HubUnreachableError as error:
            if pause is None or isinstance(error.__cause__, LocalEntryNotFoundError | ValueError):
                raise
            _logger.warning("%s; resuming", error)
            time.sleep(pause)
    raise AssertionError("unreachable")


@contextmanager
def translate_errors(repo: str, name: str = "", *, uploading: bool = False) -> Iterator[None]:
    """Turn an error of the Hub's client, or of another library that downloads, into one sentence for the user.

    Args:
        repo: "owner/name" of a Hub repository; or, without `name`, a phrase for what is downloaded from elsewhere.
        name: of the file.
        uploading: raise UploadError instead of WeightsUnavailableError.
    """
    outer = sys.exc_info()[1]
    try:
        yield
    except WeightsUnavailableError:
        raise
    except Exception as error:  # of the HTTP library of this version of the client
        causes = _causes(error, outer)
        if uploading:
            where, denied = f"{repo} on the Hub ({constants.ENDPOINT})", _status(causes) in (401, 403)
            reason = f"no permission: {_LOG_IN}, with a token that may write there" if denied else _reason(causes)
            raise UploadError(f"cannot upload to {where}: {reason}") from error
        if name:
            raise _hub_error(causes, repo, name) from error
        local = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
        packages = {type(cause).__module__.partition(".")[0] for cause in causes}
        if not packages & _NETWORK_PACKAGES and not any(isinstance(c, OSError) and not isinstance(c, local) for c in causes):
            raise
        raise WeightsUnavailableError(
            f"cannot download {repo} ({_reason(causes)}); check the network, and HF_ENDPOINT and HF_HUB_OFFLINE if set"
        ) from error


def _hub_error(causes: list[BaseException], repo: str, name: str) -> WeightsUnavailableError:
    status, where = _status(causes), f"{repo} on the Hub ({constants.ENDPOINT})"

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
    return HubUnreachableError(f"cannot reach {where} ({_reason(causes)}); check the network, and HF_ENDPOINT if set")


def _status(causes: list[BaseException]) -> int | None:
    """Return the HTTP status behind an error, if there was a response."""
    found = (getattr(getattr(error, "response", None), "status_code", None) for error in causes)
    return next((status for status in found if status), None)


def _reason(causes: list[BaseException]) -> str:
    status, last = _status(causes), causes[-1]
    return f"status {status}" if status else next(iter(str(last).splitlines()), type(last).__name__)


def _causes(error: BaseException | None, outer: BaseException | None) -> list[BaseException]:
    """Return an error and its causes, up to `outer`, which the caller was already handling."""
    found = []
    while error is not None and error is not outer:
        found.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found
