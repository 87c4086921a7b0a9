"""Fetch one file over HTTP, such that what stands under its name is always complete and the right one."""

import errno
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import requests
from huggingface_hub import constants
from huggingface_hub.utils import tqdm

ATTEMPTS = 5
"""Tries in a row that bring no new byte before giving up."""
BACKOFF = 1.0
"""Seconds before the second try; doubled before each further one."""
LONGEST_WAIT = 60.0
"""Seconds that a server may ask us to wait."""
CONNECT_TIMEOUT = 10.0
PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Answers that may differ a moment later."""

_CHUNK = 1 << 16
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_logger = logging.getLogger(__name__)


class DownloadError(RuntimeError):
    """Why a file could not be fetched; nothing stands under its name."""


class _PassingError(Exception):
    """A failure that may pass; `wait`: seconds the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def download(url: str, path: Path, sha256: str) -> None:
    """Fetch `url` to `path`, unless it is there already.

    The bytes go to `path` + ".incomplete", from which a later try goes on; they are renamed only when their hash fits.
    Passing failures (broken connections, time-outs, 429, 5xx) are tried again with growing pauses. A read may take
    $HF_HUB_DOWNLOAD_TIMEOUT seconds (10). Proxies and certificates: as `requests` reads them from the environment.

    sha256: the hash in hexadecimal, or its leading digits.

    Raises DownloadError. Not for several processes at once: the caller holds a lock.
    """
    if path.is_file():
        if file_sha256(path).startswith(sha256):
            return
        _logger.warning("%s is not the file it should be (its SHA-256 does not start with %s): fetching it again", path, sha256)
        path.unlink()
    partial = path.with_name(path.name + ".incomplete")
    while True:
        resumed = _size(partial) > 0
        _fetch(url, partial)
        digest = file_sha256(partial)
        if digest.startswith(sha256):
            os.replace(partial, path)
            return
        partial.unlink()
        if not resumed:
            raise DownloadError(
                f"what {_host(url)} sent is not {path.name}: its SHA-256 starts with {digest[: len(sha256)]} instead of {sha256}"
            )
        _logger.warning("the parts of %s do not fit together: fetching it from the start", path.name)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _fetch(url: str, partial: Path) -> None:
    """Bring `partial` to its full length, in as many tries as it takes."""
    failures = 0
    while True:
        before = _size(partial)
        try:
            _transfer(url, partial)
            return
        except _PassingError as error:
            failures = 1 if _size(partial) > before else failures + 1
            if failures >= ATTEMPTS:
                raise DownloadError(f"{error}, {failures} times in a row") from error
            wait = BACKOFF * 2 ** (failures - 1) if error.wait is None else error.wait
            if wait > LONGEST_WAIT:
                raise DownloadError(f"{error}, and asks to wait {wait:.0f} s") from error
            _logger.warning("%s: %s; trying again in %.1f s", url.rpartition("/")[2], error, wait)
            time.sleep(wait)


def _transfer(url: str, partial: Path) -> None:
    """Ask once for what `partial` lacks, and append it."""
    have = _size(partial)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    timeout = (CONNECT_TIMEOUT, float(constants.HF_HUB_DOWNLOAD_TIMEOUT))
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
            _check_status(response)
            if response.status_code == 416:  # nothing beyond what we have: complete, or not the same file any more
                if response.headers.get("Content-Range", "").rpartition("/")[2] != str(have):
                    partial.unlink()
                    raise _PassingError("the file there is shorter than the part that was fetched before")
                return
            if response.status_code != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                have = 0  # the server sends all of it
            total = have + int(response.headers.get("Content-Length") or 0)
            _append(response, partial, have, total)
    except requests.exceptions.SSLError as error:
        raise DownloadError(
            f"the certificate of {_host(url)} was not accepted ({_tail(error)}); "
            "if your network has its own, name it in REQUESTS_CA_BUNDLE"
        ) from error
    except requests.exceptions.ConnectTimeout as error:
        raise _PassingError(f"{_host(url)} did not answer within {timeout[0]:.0f} s") from error
    except requests.exceptions.ReadTimeout as error:
        raise _PassingError(f"{_host(url)} sent nothing for {timeout[1]:g} s") from error
    except requests.exceptions.ChunkedEncodingError as error:
        raise _PassingError(f"the connection to {_host(url)} broke") from error
    except requests.exceptions.ConnectionError as error:
        # Also how requests reports a read that times out while a body is streamed.
        if "Read timed out" in str(error):
            raise _PassingError(f"{_host(url)} sent nothing for {timeout[1]:g} s") from error
        raise _PassingError(f"no connection to {_host(url)} ({_tail(error)})") from error
    except requests.exceptions.RequestException as error:
        raise DownloadError(_tail(error)) from error


def _check_status(response: requests.Response) -> None:
    answer = f"{_host(response.url)} answered {response.status_code} {response.reason or ''}".rstrip()
    if response.status_code in PASSING:
        asked = response.headers.get("Retry-After", "")
        raise _PassingError(answer, float(asked) if asked.isdecimal() else None)
    if response.status_code not in (200, 206, 416):
        raise DownloadError(answer)


def _append(response: requests.Response, partial: Path, have: int, total: int) -> None:
    """Write the body behind the first `have` bytes of `partial`; total: its full length, where known."""
    body = _without_web_page(response)
    free = shutil.disk_usage(partial.parent).free
    if total - have > free:
        raise DownloadError(_no_room(partial, f"{(total - have) / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free"))
    name = partial.name.removesuffix(".incomplete")
    try:
        with (
            partial.open("ab" if have else "wb") as file,
            tqdm(total=total or None, initial=have, unit="B", unit_scale=True, desc=name) as bar,
        ):
            for chunk in body:
                file.write(chunk)
                bar.update(len(chunk))
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DownloadError(_no_room(partial, error.strerror or "disk full")) from error
        raise
    if _size(partial) < total:
        raise _PassingError(f"the connection to {_host(response.url)} broke after {_size(partial)} of {total} bytes")


def _without_web_page(response: requests.Response) -> Iterator[bytes]:
    """Return the body in chunks; a web page in its place is an error before anything is written."""
    chunks = response.iter_content(_CHUNK)
    first = next(chunks, b"")
    html = "text/html" in response.headers.get("Content-Type", "") or first[:256].lstrip()[:1] == b"<"
    if html and response.status_code != 206:
        title = re.search(rb"<title[^>]*>\s*(.*?)\s*</title>", first, re.DOTALL | re.IGNORECASE)
        named = f", titled {title[1].decode('utf-8', 'replace')[:80]!r}," if title else ""
        raise DownloadError(
            f"{_host(response.url)} sent a web page{named} instead of the file: "
            "the login page of this network, or the file has moved"
        )

    def body() -> Iterator[bytes]:
        yield first
        yield from chunks

    return body()


def _no_room(partial: Path, what: str) -> str:
    return f"no room for it in {partial.parent} ({what}): free some, or choose another place with TPN_CACHE or cache_dir"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _host(url: str) -> str:
    return url.partition("://")[2].partition("/")[0] or url


def _tail(error: Exception) -> str:
    """The last and most telling part of the messages that requests and urllib3 wrap around each other."""
    inner = error.args[0] if error.args else error
    text = str(getattr(inner, "reason", inner))
    return text.rpartition(": ")[2].strip() or type(error).__name__
