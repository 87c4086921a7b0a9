"""Downloads with limits on size, speed, and the delay that a server may request.

Requests are made by the HTTP session of the Hub's client, with its proxies and certificates, in a thread of their own. A server
that sends nothing, or a header byte by byte, can therefore hold up the thread, but not its caller. `torch.hub` and the client
itself write what comes until the disk is full, and obey any `Retry-After`.
"""

import errno
import hashlib
import http.client
import logging
import os
import re
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, BinaryIO, Generic, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import get_session, tqdm

from tpn.version import __version__

T = TypeVar("T")

MIN_SPEED = 10_000
"""Bytes per second that a server must send, on average over twice $HF_HUB_DOWNLOAD_TIMEOUT (20 s by default)."""
MAX_UNKNOWN_SIZE = 2 << 30
"""Bytes of a file whose size nobody announces, such as a compressed one."""
MAX_WAIT = 60.0
"""Seconds that a server may ask to wait with `Retry-After`; a longer wait is an error."""
_COMPRESSION_OVERHEAD = 1 << 20
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
"""Responses that may differ a moment later."""

_logger = logging.getLogger(__name__)


class TransferError(Exception):
    """A download failed; the message gives the reason.

    Attributes:
        retryable: whether a retry may succeed.
        response: of the server, if it refused.
    """

    def __init__(self, reason: str, *, retryable: bool = True, response: Any = None) -> None:
        super().__init__(reason)
        self.retryable = retryable
        self.response = response


def download(
    url: str,
    path: Path,
    *,
    pauses: Sequence[float],
    size: int | None = None,
    sha256: str = "",
    headers: Mapping[str, str] | None = None,
    name: str | None = None,
) -> str:
    """Download a file, and check its size and its SHA-256, which is computed meanwhile; return the latter.

    After failures that may pass, the rest of the file is requested again. No more bytes are written than announced.

    Args:
        pauses: seconds before each further try; a server may ask for up to `MAX_WAIT`.
        size: in bytes, if known. Otherwise the server should announce it; if it does not, `MAX_UNKNOWN_SIZE` is the limit.
        sha256: leading hexadecimal digits.
        headers: of the request.
        name: for messages. Default: that of `path`.

    Raises TransferError, with the tries and the seconds they took; OSError, with `path`, if it cannot be stored.
    """
    start = time.monotonic()
    try:
        with path.open("wb") as file, _bar(name or path.name, size) as bar:
            part = _Download(url, path, file, bar, size, sha256, headers or {"User-Agent": f"tpn/{__version__}"})
            for tries, pause in enumerate((*pauses, None), start=1):
                try:
                    part.request_rest()
                    file.flush()
                    return part.digest.hexdigest()
                except TransferError as error:
                    wait, problem = retry_delay(pause, error.response, MAX_WAIT)
                    if wait is None or not error.retryable:
                        spent = f"(tries: {tries}, {time.monotonic() - start:.1f} s)"
                        raise TransferError(f"{error}{problem} {spent}", response=error.response) from error
                    _logger.warning("%s; trying again in %g s", error, wait)
                    time.sleep(wait)
    except OSError as error:  # those of the network are TransferErrors
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    raise AssertionError("unreachable")


def _bar(name: str, size: int | None) -> Any:
    """Return a progress bar that leaves room for its numbers, and appears only if a download takes a while."""
    return tqdm(desc=name if len(name) <= 40 else f"…{name[-39:]}", total=size, unit="B", unit_scale=True, delay=0.5)


def retry_delay(pause: float | None, response: Any, limit: float) -> tuple[float | None, str]:
    """Return the seconds to wait before another try, at least `pause`, or None and why there is none."""
    asked = getattr(response, "headers", {}).get("Retry-After", "").strip()
    seconds = int(asked) if re.fullmatch(r"[0-9]{1,18}", asked) else 0  # dates are ignored
    if seconds > limit:
        return None, f"; it requested a delay of {seconds} s, more than the limit of {limit:g} s"
    return (None, "") if pause is None else (max(pause, seconds), "")


def call_with_timeout(seconds: float, call: Callable[[], T]) -> T:
    """Return what a call returns. After TimeoutError, the call continues in a thread, which ends with the process."""
    results = _Background(lambda: iter([call()]))
    try:
        return results.get(seconds)
    except Empty:
        raise TimeoutError(f"timed out after {seconds:g} s") from None


class _Background(Generic[T]):
    """An iterator that runs in a thread of its own, and is left behind when its user closes it."""

    def __init__(self, items: Callable[[], Iterator[T]]) -> None:
        self._items = items
        self._results: Queue[tuple[Any, BaseException | None]] = Queue(maxsize=16)
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="tpn-transfer", daemon=True).start()

    def get(self, seconds: float) -> Any:
        """Return the next item, None after the last one; raise the iterator's own error, or Empty if it takes longer."""
        item, error = self._results.get(timeout=max(seconds, 0))
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        try:
            for item in self._items():
                if not self._put(item):
                    return
            self._put(None)
        except BaseException as error:  # for the thread that waits
            self._put(None, error)

    def _put(self, item: Any, error: BaseException | None = None) -> bool:
        while not self._closed.is_set():
            with suppress(Full):
                self._results.put((item, error), timeout=0.1)
                return True
        return False


class _Download:
    """The part of a file that has been received, in one try or in several."""

    def __init__(
        self, url: str, path: Path, file: BinaryIO, bar: Any, size: int | None, sha256: str, headers: Mapping[str, str]
    ) -> None:
        self.url, self.path, self.file, self.bar, self.size, self.sha256 = url, path, file, bar, size, sha256
        self.host = urlsplit(url).netloc
        self.headers = {**headers, "Accept-Encoding": "identity"}
        self.timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        self.received, self.digest = 0, hashlib.sha256()
        self._waited, self._arrived, self._slow = 0.0, 0, False

    def request_rest(self) -> None:
        """Request what is missing, and check the whole. TransferError if it is not complete, or not the expected file."""
        if constants.HF_HUB_OFFLINE:
            raise TransferError("HF_HUB_OFFLINE forbids requests", retryable=False)
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise TransferError(f"the address must start with http:// or https://, got {self.url}", retryable=False)
        if self.received != self.size:  # it is equal where only the end of the response was missing
            self._receive()
        if not self.digest.hexdigest().startswith(self.sha256):
            self._restart()
            raise TransferError(f"{self.host} sent another file or part of it: its SHA-256 does not start with {self.sha256}")

    def _receive(self) -> None:
        """Request the rest of the file, or all of it, and store no more than is announced."""
        headers = {**self.headers, **({"Range": f"bytes={self.received}-"} if self.received else {})}
        self._waited, self._arrived, compressed = 0.0, 0, 0
        with closing(_Background(lambda: _response_and_chunks(self.url, headers, self.timeout))) as body:
            total, unpacker = self._announced(self._next(body))
            limit = MAX_UNKNOWN_SIZE if total is None else total
            while (chunk := self._next(body)) is not None:
                self._arrived += len(chunk)
                self._slow &= self._arrived < MIN_SPEED * 2 * self.timeout
                if unpacker:
                    compressed += len(chunk)
                    chunk = self._unpack(unpacker, chunk, limit) if compressed <= limit + _COMPRESSION_OVERHEAD else None
                if chunk is None or self.received + len(chunk) > limit:
                    self._restart()
                    raise TransferError(f"{self.host} sent more than {limit} bytes", retryable=total is not None)
                self._store(chunk)
        if self.received < (total or 0) or (unpacker and not unpacker.eof):
            raise TransferError(f"{self.host} sent {self.received} of {total or 'an unknown number of'} bytes")

    def _next(self, body: _Background[Any]) -> Any:
        """Return the response or the next chunk, None at the end. Only waiting counts: a slow disk is not a slow server."""
        window = 2 * self.timeout
        while True:
            start = time.monotonic()
            try:
                return body.get(window - self._waited)
            except Empty:
                pass
            except Exception as error:  # of the HTTP library of this version of the client
                raise _failure(error, self.host, self.timeout) from error
            finally:
                self._waited += time.monotonic() - start
            if self._arrived < MIN_SPEED * window:
                speed = f"{self._arrived} bytes in {window:g} s, less than {MIN_SPEED} bytes per second"
                again, self._slow = not self._slow, True  # a slow server is asked twice in succession, another error more often
                raise TransferError(f"{self.host} sent {speed}", retryable=again)
            self._waited, self._arrived = 0.0, 0

    def _announced(self, response: Any) -> tuple[int | None, Any]:
        """Check the head of a response; return the size of the whole file, if known, and a decompressor, if needed."""
        status = response.status_code
        if status not in (200, 206):
            if status == 416:
                self._restart()
            phrase, retryable = http.client.responses.get(status, ""), status in {416, *TRANSIENT_STATUS}
            raise TransferError(f"{self.host} responded {status} {phrase}".rstrip(), retryable=retryable, response=response)
        encoding = (response.headers.get("Content-Encoding") or "identity").lower()
        if encoding not in ("identity", "gzip", "deflate"):
            raise TransferError(f"{self.host} sent a Content-Encoding that was not asked for: {encoding!r}", retryable=False)
        announced = response.headers.get("Content-Length") if encoding == "identity" else None
        part = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/(.*)", response.headers.get("Content-Range", "")) if status == 206 else None
        if part and encoding == "identity" and int(part[1]) == self.received:
            announced = None if part[2] == "*" else part[2]
        else:
            self._restart()
            if status == 206:
                raise TransferError(f"{self.host} sent another part of the file than was asked for")
        if announced is not None and not re.fullmatch("[0-9]{1,18}", announced):
            raise TransferError(
                f"{self.host} sent a Content-Length that is not a number of bytes: {announced!r}", retryable=False
            )
        if self.size is not None and announced is not None and int(announced) != self.size:
            raise TransferError(f"{self.host} announced {announced} bytes instead of {self.size}")
        total = int(announced) if self.size is None and announced is not None else self.size
        free = shutil.disk_usage(self.path.parent).free
        if total is not None and total - self.received > free:
            raise OSError(errno.ENOSPC, f"{total - self.received} bytes needed, {free} free")
        self.bar.total = total
        return total, None if encoding == "identity" else zlib.decompressobj(wbits=47)  # gzip or zlib

    def _unpack(self, unpacker: Any, chunk: bytes, limit: int) -> Any:
        """Return unpacked data, no more than a byte beyond the limit."""
        try:
            data = unpacker.decompress(chunk, limit - self.received + 1)
        except zlib.error as error:
            raise TransferError(f"{self.host} sent damaged compressed data ({error})") from error
        if unpacker.unused_data:
            raise TransferError(f"{self.host} sent more after the end of compressed data", retryable=False)
        return data

    def _store(self, chunk: bytes) -> None:
        self.file.write(chunk)
        self.digest.update(chunk)
        self.received += len(chunk)
        self.bar.update(len(chunk))

    def _restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.received, self.digest = 0, hashlib.sha256()
        self.bar.n = 0


def _response_and_chunks(url: str, headers: Mapping[str, str], timeout: float) -> Iterator[Any]:
    """Request a file; yield the response, then its content as it was sent."""
    session: Any = get_session()
    if hasattr(session, "build_request"):  # httpx, of version 1.0 and later of the client
        request = session.build_request("GET", url, headers=headers, timeout=timeout)
        response = session.send(request, stream=True, follow_redirects=True)
        chunks = response.iter_raw
    else:
        certificates = os.environ.get("SSL_CERT_FILE")  # requests itself has another variable
        response = session.get(url, headers=headers, timeout=timeout, stream=True, verify=certificates)
        chunks = partial(response.raw.stream, 1 << 16, decode_content=False)
    with closing(response):
        yield response
        yield from chunks()


def _failure(error: Exception, host: str, timeout: float) -> TransferError:
    """Translate an error of an HTTP library."""
    cause: BaseException = error
    while following := cause.__cause__ or cause.__context__:
        cause = following
    kind = type(error).__name__
    if re.search(r"\[SSL|SSLError", f"{kind} {error}") and "Read" not in kind:
        hint = "name that of your network in SSL_CERT_FILE"
        return TransferError(f"the certificate of {host} was not accepted ({error}); {hint}", retryable=False)
    if isinstance(cause, TimeoutError) or "Timeout" in kind:
        return TransferError(f"{host} sent nothing for {timeout:g} s")
    if "Protocol" in kind:
        return TransferError(f"{host} did not send a complete, valid response ({error})")
    reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or kind
    return TransferError(f"the connection to {host} failed ({reason})", retryable="Redirect" not in kind)
