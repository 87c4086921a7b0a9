"""The Hugging Face Hub: files of one commit, and the errors of its client in one sentence.

Names, addresses, tokens, metadata, locks and the layout of the cache are those of `huggingface_hub`, and so are $HF_ENDPOINT,
$HF_TOKEN, $HF_HUB_OFFLINE, $HF_HOME and proxies. Files themselves are downloaded by `tpn.transfer`, which has limits.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import WeakFileLock, build_hf_headers, validate_repo_id
from safetensors import SafetensorError, safe_open

from tpn.errors import HubUnreachableError, NoRepositoryError, WeightsUnavailableError
from tpn.files import StrPath, atomic_write, cache_folder, file_sha256, is_intact, remember_sha256
from tpn.transfer import MAX_WAIT, TRANSIENT_STATUS, TransferError, call_with_timeout, download, retry_delay

PAUSES = (1.0, 2.0)
"""Seconds before the second and the third try."""
MAX_JSON_SIZE = 16 << 20
"""Bytes of a JSON file that is still read."""

_NETWORK_PACKAGES = {"huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "urllib"}
_SHA256 = re.compile("[0-9a-f]{64}")
_FILE_NAME = re.compile(r"(?!\.)[^\s/\\:*?\"<>|\x00-\x1f\x7f]{1,200}")
"""Valid on all systems, and in the folder that it is joined to."""
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

_logger = logging.getLogger(__name__)


def snapshot(repo: str, *files: str, cache_dir: StrPath | None = None, prefer_cached: bool = False, verify: bool = False) -> Path:
    """Return a folder with files of one commit of a Hub repository, from the cache or downloaded into it.

    The Hub is asked for the newest commit. If it does not send all files of that commit, those in the cache are used with a
    warning, if they are complete. A commit hash, or `prefer_cached`, needs no request for files in the cache.

    Files are compared with the SHA-256 that the Hub states, which it does for all weights: while they are downloaded, or at their
    first use if another program put them in the cache (see `is_intact`). A damaged file is downloaded again.

    Args:
        repo: "owner/name", or "owner/name@revision" with a branch, a tag, or a commit hash.
        files: names of the files.
        cache_dir: see `cache_folder`.
        prefer_cached: do not ask for a newer commit.
        verify: compare files in the cache with their SHA-256 again.

    Raises:
        ValueError: a malformed name.
        WeightsUnavailableError: NoRepositoryError, HubUnreachableError, no access, no such revision or file, no space.
    """
    repo_id, revision = _parse(repo)
    store = Path(cache_folder(cache_dir) or constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    try:
        cached, damaged = _cached(store, revision, files, verify)
        if cached is not None and (prefer_cached or constants.HF_HUB_OFFLINE or cached.name == revision):
            return cached
        source = _Repository(repo, repo_id, store, patient=cached is None)
        try:
            return source.fetch(revision, files, cached, damaged)
        except WeightsUnavailableError as error:
            if damaged:
                raise type(error)(f"{error}. The copy in the cache is damaged: {damaged[0]}") from error
            if cached is None:
                raise
            _logger.warning("%s; using the copy in the cache", error)
            return cached
    except OSError as error:
        raise WeightsUnavailableError(
            f"cannot use the cache for {repo}: {error.filename or store}: {error.strerror or error}; "
            "choose another folder with HF_HOME, TPN_CACHE or cache_dir"
        ) from error


def is_whole(path: Path, name: str | None = None) -> bool:
    """Return False for a truncated file: safetensors without the length that its header states, or JSON that does not end.

    Args:
        path: the file. OSError if it cannot be opened.
        name: of the file, if that of the path has no suffix.
    """
    suffix = Path(name or path.name).suffix
    with path.open("rb") as file:  # safetensors calls every failure "no such file"
        if suffix == ".json":
            try:
                json.loads(file.read(MAX_JSON_SIZE))
            except (ValueError, RecursionError):
                return False
    if suffix != ".safetensors":
        return True
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def has_sha256(path: Path, sha256: str) -> bool:
    """Return whether a file in a folder of `snapshot` has this SHA-256; see `is_intact` for the cost."""
    return is_intact(path, _record(path, path.parents[2]), sha256)


class _Repository:
    """A repository, and the folder with its files in the cache: snapshots/COMMIT/NAME is a link to blobs/ETAG."""

    def __init__(self, repo: str, repo_id: str, store: Path, patient: bool) -> None:
        self.repo, self.repo_id, self.store, self.patient = repo, repo_id, store, patient

    def fetch(self, revision: str, files: tuple[str, ...], cached: Path | None, damaged: list[Path]) -> Path:
        """Return the folder of the commit that a revision is now, with files that are downloaded unless they are there."""
        if constants.HF_HUB_OFFLINE:
            raise HubUnreachableError(f"{self.repo} is not complete in the cache, and HF_HUB_OFFLINE forbids requests; unset it")
        commit = self._metadata(revision, files[0]).commit_hash
        if cached is not None and cached.name == commit:
            return cached
        for path in damaged:
            _logger.warning("%s is truncated or damaged: it is not used", path)
        folder = self.store / "snapshots" / commit
        for name in files:
            if not _is_sound(folder / name, self.store):
                self._download(commit, name, folder / name)
        if revision != commit:  # for offline use, as the client does when it downloads by branch
            with atomic_write(self.store / "refs" / revision) as ref:
                ref.write_text(commit)
        return folder

    def _download(self, commit: str, name: str, path: Path) -> None:
        """Download a file of a commit unless another commit has the same, and link `path` to it."""
        about = self._metadata(commit, name)
        if about.commit_hash != commit:
            raise WeightsUnavailableError(
                f"{self.repo} on the Hub ({constants.ENDPOINT}) responded with commit {about.commit_hash} instead of {commit}"
            )
        if name.endswith(".json") and (about.size or 0) > MAX_JSON_SIZE:
            raise WeightsUnavailableError(f"{name} of {self.repo} has {about.size} bytes, more than the {MAX_JSON_SIZE} allowed")
        blob, sha256 = self.store / "blobs" / about.etag, about.etag if _SHA256.fullmatch(about.etag) else ""
        lock = self.store.parent / ".locks" / self.store.name / f"{about.etag}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not _is_sound(blob, self.store, name):
                url, ours = hf_hub_url(self.repo_id, name, revision=commit), build_hf_headers(library_name="tpn")
                with atomic_write(blob) as file:
                    try:
                        sha256 = download(url, file, pauses=PAUSES, size=about.size, sha256=sha256, headers=ours, name=name)
                    except TransferError as error:
                        raise _hub_error(error, self.repo, name) from error
                remember_sha256(blob, _record(blob, self.store), sha256)
            _link(blob, path, self.store)

    def _metadata(self, revision: str, name: str) -> Any:
        """Ask for commit, ETag and size of a file; try again after responses that may differ a moment later.

        With a copy in the cache, do not wait for as long as a server may ask. Raises WeightsUnavailableError.
        """
        start, timeout = time.monotonic(), constants.HF_HUB_ETAG_TIMEOUT
        ask = partial(get_hf_file_metadata, hf_hub_url(self.repo_id, name, revision=revision), timeout=timeout)
        for tries, pause in enumerate((*PAUSES, None), start=1):
            try:
                about = call_with_timeout(2 * timeout, ask)
                break
            except Exception as error:  # of the HTTP library of this version of the client
                limit = MAX_WAIT if self.patient else PAUSES[-1]
                wait, problem = retry_delay(pause, _response(error), limit)
                spent = f"{problem}; tries: {tries}, {time.monotonic() - start:.1f} s"
                if wait is None or _status(error) not in TRANSIENT_STATUS:
                    raise _hub_error(error, self.repo, name, spent) from error
                _logger.info("%s; trying again in %g s", _hub_error(error, self.repo, name, spent), wait)
                time.sleep(wait)
        for kind, value in (("commit hash", about.commit_hash), ("ETag", about.etag)):  # they become names of files
            if not _FILE_NAME.fullmatch(value or ""):
                raise WeightsUnavailableError(
                    f"{self.repo} on the Hub ({constants.ENDPOINT}) responded without a usable {kind}, got {value!r}; "
                    "check HF_ENDPOINT if set"
                )
        return about


def _parse(repo: str) -> tuple[str, str]:
    """Return the name of a repository, and a revision."""
    repo_id, at, revision = repo.partition("@")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"a model on the Hub is 'owner/name' or 'owner/name@revision', got {repo!r}: {error}") from None
    if at and not all(_FILE_NAME.fullmatch(part) for part in revision.split("/")):
        raise ValueError(f"the revision after @ must be a branch, a tag, or a commit hash, got {repo!r}")
    return repo_id, revision or "main"


def _cached(store: Path, revision: str, files: tuple[str, ...], verify: bool) -> tuple[Path | None, list[Path]]:
    """Return the folder of a revision in the cache if it has all files, and those that are damaged."""
    ref = store / "refs" / revision
    commit = ref.read_text(encoding="utf-8", errors="replace") if ref.is_file() else revision
    if not _FILE_NAME.fullmatch(commit):
        return None, []
    folder = store / "snapshots" / commit
    unusable = [folder / name for name in files if not _is_sound(folder / name, store, verify=verify)]
    return None if unusable else folder, [path for path in unusable if path.exists()]


def _is_sound(path: Path, store: Path, name: str | None = None, *, verify: bool = False) -> bool:
    """Return whether a file is there, complete, and has the SHA-256 that is its name in the cache, or that was recorded."""
    if not path.is_file() or not is_whole(path, name):
        return False
    etag = Path(os.readlink(path)).name if path.is_symlink() and path.parent.name != "blobs" else path.name
    return is_intact(path, _record(path, store), etag if _SHA256.fullmatch(etag) else None, verify=verify)


def _record(file: Path, store: Path) -> Path:
    """Return the place of a file's record for `is_intact`; links have that of their target."""
    file, store = file.resolve(), store.resolve()
    return store / ".verified" / (file.relative_to(store) if file.is_relative_to(store) else file.name)


def _link(blob: Path, path: Path, store: Path) -> None:
    """Make `path` a relative link to a blob, or a copy of it where links are not allowed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.unlink(missing_ok=True)
        new.symlink_to(os.path.relpath(blob, path.parent))
        os.replace(new, path)
    except OSError:
        with atomic_write(path) as unfinished:
            shutil.copyfile(blob, unfinished)
        remember_sha256(path, _record(path, store), file_sha256(path))


@contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """Raise WeightsUnavailableError for a network error of another library that downloads `what`."""
    try:
        yield
    except Exception as error:  # of any HTTP library
        local = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
        for cause in _causes(error):
            package = type(cause).__module__.partition(".")[0]
            if (
                package in _NETWORK_PACKAGES
                or isinstance(cause, TransferError)
                or (isinstance(cause, OSError) and not isinstance(cause, local))
            ):
                raise WeightsUnavailableError(
                    f"cannot download {what} ({reason(error)}); check the network, and HF_ENDPOINT and HF_HUB_OFFLINE if set"
                ) from error
        raise


def reason(error: BaseException) -> str:
    """Return why a request failed, in a few words."""
    status, last = _status(error), _causes(error)[-1]
    if isinstance(error, TransferError):
        return str(error)
    if status in (401, 403):
        return f"no permission: {_LOG_IN}, with a token that may do this"
    return f"status {status}" if status else next(iter(str(last).splitlines()), type(last).__name__)


def _hub_error(error: BaseException, repo: str, name: str, spent: str = "") -> WeightsUnavailableError:
    """Translate an error of the Hub's client, or of a download; `spent` says what was tried."""
    causes, status, where = _causes(error), _status(error), f"{repo} on the Hub ({constants.ENDPOINT})"

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(GatedRepoError) or status == 403:
        return WeightsUnavailableError(f"no access to {where}: {_LOG_IN}, with an account that may read it")
    if caused_by(RevisionNotFoundError):
        return WeightsUnavailableError(f"no such revision: {where}")
    if caused_by(RepositoryNotFoundError) or (status == 401 and get_token() is None):
        return NoRepositoryError(f"no repository {where}, or it is private: {_LOG_IN} if it is yours")
    if caused_by(EntryNotFoundError):
        return WeightsUnavailableError(f"no {name} in {where}: it is not a model that tpn saved")
    if status == 401:
        return WeightsUnavailableError(f"the token was not accepted for {where}: {_LOG_IN}")
    if status == 404:
        return NoRepositoryError(f"no {name} in {where}")
    if isinstance(error, TransferError):
        return HubUnreachableError(f"cannot download {name} of {where}: {error}; check the network, and HF_ENDPOINT if set")
    return HubUnreachableError(f"cannot reach {where} ({reason(error)}{spent}); check the network, and HF_ENDPOINT if set")


def _response(error: BaseException) -> Any:
    """Return the HTTP response behind an error, if there was one."""
    return next((r for cause in _causes(error) if (r := getattr(cause, "response", None)) is not None), None)


def _status(error: BaseException) -> int | None:
    return getattr(_response(error), "status_code", None)


def _causes(error: BaseException) -> list[BaseException]:
    return [error, *(_causes(error.__cause__) if error.__cause__ else ())]
