"""Downloads from servers that send too much, too little, too slowly, or ask to wait."""

import gzip
import hashlib
import re
import shutil
import socket
import time
import zlib
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import constants
from servers import flood, trickle
from test_fetch import max_file_size

from tpn import transfer
from tpn.transfer import TransferError

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
GZIP = OK + b"Content-Encoding: gzip\r\n\r\n"
CHUNK = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
DATA = np.random.default_rng(0).bytes(100_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
LIMIT = 1 << 20
TIMEOUT = 0.1


def endless_zeros(wbits=31):
    """The beginning of a compressed stream, and a block that may follow any number of times."""
    packer = zlib.compressobj(wbits=wbits)
    return [packer.compress(bytes(1 << 16)) + packer.flush(zlib.Z_SYNC_FLUSH) for _ in range(2)]


@pytest.fixture
def timeout(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", TIMEOUT)


@pytest.fixture
def download(server, tmp_path):
    """Download /file from the server; return its content."""
    server.files["/file"] = DATA

    def download(**kwargs):
        kwargs = {"pauses": (0.001, 0.001), "sha256": SHA256} | kwargs
        sha256 = transfer.download(f"{server.url}/file", tmp_path / "file", **kwargs)
        assert sha256 == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
        return (tmp_path / "file").read_bytes()

    return download


def always(server, raw=None, **fault):
    server.faults, server.forever = [{"raw": raw} if raw else fault], True


# No more bytes than announced


@pytest.mark.parametrize(
    "raw",
    [
        flood(CHUNKED, CHUNK),
        flood(OK + b"\r\n", bytes(1 << 16)),
        flood(GZIP + endless_zeros()[0], endless_zeros()[1]),
        flood(GZIP + gzip.compress(b""), b"more"),
        flood(GZIP + endless_zeros()[0], b"\0\0\0\xff\xff" * 10000),
    ],
    ids=["chunked", "until closed", "gzip", "after gzip", "empty blocks"],
)
def test_stated_ceiling_for_unknown_sizes(server, download, monkeypatch, raw):
    monkeypatch.setattr(transfer, "MAX_UNKNOWN_SIZE", LIMIT)
    always(server, raw)
    with max_file_size(LIMIT), pytest.raises(TransferError, match=r"127.0.0.1:\d+ sent more .*tries: 1,"):
        download()
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"raw": flood(CHUNKED, CHUNK)},
        {"raw": flood(GZIP + endless_zeros()[0], endless_zeros()[1])},
        {"body": DATA + b"x"},
        {"body": DATA[:-1]},
    ],
    ids=["chunked", "gzip", "longer", "shorter"],
)
def test_known_size(server, download, fault):
    always(server, **fault)
    with max_file_size(len(DATA)), pytest.raises(TransferError, match=rf"{len(DATA)}.*tries: 3,"):
        download(size=len(DATA))
    server.faults = server.faults[:1]
    server.forever = False
    assert download(size=len(DATA)) == DATA


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("size", [None, len(DATA)])
def test_compressed_response(server, download, encoding, size):
    packed = {"gzip": gzip, "deflate": zlib}[encoding].compress(DATA)
    server.faults = [
        {"body": packed, "headers": {"Content-Encoding": encoding}, "cut": 0.5},
        {"body": packed[:-20], "headers": {"Content-Encoding": encoding}},
        {"body": packed, "headers": {"Content-Encoding": encoding}},
    ]
    assert download(size=size) == DATA


@pytest.mark.parametrize("headers", [{"Content-Encoding": "br"}, {"Content-Encoding": "gzip"}], ids=str)
def test_compression_that_cannot_be_undone(server, download, headers):
    always(server, headers=headers)
    with pytest.raises(TransferError, match="compress|'br'"):
        download()


@pytest.mark.parametrize("value", ["abc", "-1", "1e6", "9" * 40])
def test_length_that_is_not_a_number(server, download, value):
    server.headers = {"Content-Length": value}
    with pytest.raises(TransferError, match=r"127.0.0.1:\d+.*Content-Length.*tries"):
        download()


def test_disk_that_is_too_small(server, download, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, len(DATA) - 1))
    for size in (None, len(DATA)):
        with pytest.raises(OSError, match=rf"{len(DATA)} bytes needed, {len(DATA) - 1} free.*{tmp_path}/file"):
            download(size=size)
        assert (tmp_path / "file").read_bytes() == b""
    assert len(server.requests) == 2  # no retries


# Not too slow


@pytest.mark.parametrize(
    "raw",
    [
        trickle(OK + b"Content-Length: 100000\r\n\r\n"),
        trickle(CHUNKED + b"1;"),
        trickle(OK + b"X: "),
        trickle(b""),
    ],
    ids=["body", "head of a chunk", "header", "first line"],
)
def test_slow_server(server, download, timeout, raw):
    """A byte every now and then is not silence; the time is said. The second try may be another server of the same name."""
    always(server, raw)
    start = time.monotonic()
    with pytest.raises(
        TransferError, match=rf"sent \d+ bytes in {2 * TIMEOUT:g} s, less than {transfer.MIN_SPEED}.*tries: 2,"
    ) as caught:
        download()
    said = float(re.search(r"([\d.]+) s\)$", str(caught.value))[1])
    assert 4 * TIMEOUT - 0.1 <= said <= time.monotonic() - start + 0.1
    assert len(server.requests) == 2


def test_slow_start(server, download, timeout):
    server.faults = [{"raw": trickle(OK + b"X: ")}]
    assert download() == DATA


def test_slow_server_that_makes_progress(server, download, timeout):
    """It is given another try."""
    slow = {"raw": trickle(OK + b"X: ")}
    server.faults = [slow, {"raw": trickle(OK + b"Content-Length: 100000\r\n\r\n" + DATA[:90_000])}, slow]
    with pytest.raises(TransferError, match=r"sent 0 bytes.*tries: 3,"):
        download()


def test_server_that_takes_connections_only(timeout, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/file"
        with pytest.raises(TransferError, match=rf"sent nothing for {TIMEOUT:g} s.*tries: 2,"):
            transfer.download(url, tmp_path / "file", pauses=(0.001,))


def test_slow_disk(server, download, timeout, monkeypatch):
    """Only the server's time counts."""
    monkeypatch.setattr(transfer, "MIN_SPEED", 1e9)
    store = transfer._Download._store
    monkeypatch.setattr(transfer._Download, "_store", lambda part, chunk: (time.sleep(3 * TIMEOUT), store(part, chunk)))
    assert download() == DATA


def test_call_that_takes_too_long():
    assert transfer.call_with_timeout(10, lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        transfer.call_with_timeout(10, lambda: 1 / 0)
    with pytest.raises(TimeoutError, match="0.05 s"):
        transfer.call_with_timeout(0.05, lambda: time.sleep(2))


# No longer waits than allowed


@pytest.fixture
def waits(monkeypatch):
    waits = []
    monkeypatch.setattr(transfer, "time", SimpleNamespace(monotonic=time.monotonic, sleep=waits.append))
    return waits


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("7", [7, 7]),
        ("0", [0.001, 0.001]),
        ("soon", [0.001, 0.001]),
        ("-5", [0.001, 0.001]),
        ("1000000000", []),
        ("9" * 300, [0.001, 0.001]),
    ],
)
def test_retry_after(server, download, waits, asked, expected):
    always(server, status=429, headers={"Retry-After": asked})
    says = rf"429 Too Many Requests.*{asked} s, more than the limit of 60 s" if not expected else "429 Too Many Requests"
    with pytest.raises(TransferError, match=rf"{says} \(tries: {len(expected) + 1},"):
        download()
    assert waits == expected


# Parts


def test_resume(server, download):
    server.faults = [{"cut": 0.5}, {"cut": 0.5}]
    assert download() == DATA
    assert server.ranges == [None, "bytes=50000-", "bytes=75000-"]


def test_server_that_sends_parts_only(server, download):
    """It may limit the size of a response."""
    for start in (0, 40_000, 80_000):
        end = min(start + 40_000, len(DATA))
        head = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes %d-%d/100000\r\n" % (start, end - 1)
        body = b"Content-Length: %d\r\n\r\n" % (end - start) + DATA[start:end]
        server.faults.append({"raw": lambda write, response=head + body: write(response)})
    assert download(sha256="") == DATA
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "second",
    [
        {"raw": lambda write: write(OK + b"Content-Length: 100000\r\n\r\n" + DATA)},
        {"headers": {"Content-Range": "bytes 0-99999/100000"}},
        {"status": 416},
        {"body": bytes(len(DATA))},
    ],
    ids=["ignores ranges", "another range", "416", "another file"],
)
def test_server_that_cannot_resume(server, download, second):
    server.faults = [{"cut": 0.5}, second]
    assert download() == DATA


def test_only_the_end_of_the_response_is_missing(server, download):
    server.faults = [{"raw": lambda write: write(CHUNKED + b"186a0\r\n" + DATA + b"\r\n")}]
    assert download(size=len(DATA)) == DATA
    assert len(server.requests) == 1


def test_redirects(server, download):
    server.files["/elsewhere"] = DATA
    server.faults = [{"status": 302, "headers": {"Location": "/elsewhere"}}]
    assert download() == DATA
    for target in ("/file", "file:///etc/hostname", "ftp://127.0.0.1/x"):
        always(server, status=302, headers={"Location": target})
        with pytest.raises(TransferError, match="redirect|protocol|adapters"):
            download()
