"""Downloads over bad networks and onto bad disks: what arrives is right, or nothing stands under its name."""

import hashlib
import logging
import os
import signal
import time

import numpy as np
import pytest
from huggingface_hub import constants
from servers import Server, run_python, start_python

from tpn.zoo import download as module
from tpn.zoo.download import DownloadError, download, file_sha256

DATA = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def _hasty(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF", 0.001)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)


@pytest.fixture
def fetch(server, tmp_path):
    """Fetch the file from the server; afterwards it is whole, or nothing stands under its name."""
    server.files["/file.pth"] = DATA
    path = tmp_path / "file.pth"

    def fetch(digits=SHA256[:8]):
        try:
            download(f"{server.url}/file.pth", path, digits)
        except DownloadError:
            assert not path.exists()
            raise
        assert path.read_bytes() == DATA
        assert os.listdir(tmp_path) == ["file.pth"]

    return fetch


def test_plain(server, fetch):
    fetch()
    assert server.requests == [("GET", "/file.pth", None)]
    fetch()
    assert len(server.requests) == 1


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_cut_connection_is_resumed(server, fetch, share, ranges):
    server.faults, server.ranges = [{"cut": share}, {"cut": share}], ranges
    fetch()
    starts = [int(r[6:-1]) for _, _, r in server.requests if r]
    assert len(server.requests) == 3
    if share > 0.05:
        assert starts[0] > len(DATA) * share - 200_000
        assert starts == sorted(starts)


def test_connection_that_always_breaks(server, fetch):
    server.faults, server.forever = [{"cut": 0.0}], True
    with pytest.raises(DownloadError, match=r"connection to 127.* broke.*, 5 times in a row"):
        fetch()
    assert len(server.requests) == module.ATTEMPTS
    server.faults = []
    fetch()


def test_progress_starts_the_count_of_failures_anew(server, fetch):
    server.faults = [{"cut": 0.2}] * (module.ATTEMPTS + 3)
    fetch()
    assert len(server.requests) == module.ATTEMPTS + 4


def test_next_process_goes_on(server, fetch, tmp_path):
    (tmp_path / "file.pth.incomplete").write_bytes(DATA[:1_000_000])
    fetch()
    assert server.requests == [("GET", "/file.pth", "bytes=1000000-")]


@pytest.mark.parametrize("left", [DATA, DATA + b"more"], ids=["complete", "too long"])
def test_nothing_left_to_fetch(server, fetch, tmp_path, left):
    (tmp_path / "file.pth.incomplete").write_bytes(left)
    fetch()


def test_part_of_another_file_is_thrown_away(server, fetch, tmp_path, caplog):
    (tmp_path / "file.pth.incomplete").write_bytes(b"x" * 1_000_000)
    fetch()
    assert "do not fit together" in caplog.text
    assert [r for _, _, r in server.requests] == ["bytes=1000000-", None]


@pytest.mark.parametrize("body", [bytes(len(DATA)), DATA[:-1], b""], ids=["right length", "too short", "empty"])
def test_wrong_bytes(server, fetch, tmp_path, body):
    server.faults = [{"body": body}]
    with pytest.raises(DownloadError, match=rf"is not file.pth: its SHA-256 starts with \w{{8}} instead of {SHA256[:8]}"):
        fetch()
    assert os.listdir(tmp_path) == []
    fetch()


def test_right_bytes_under_a_wrong_name(fetch):
    with pytest.raises(DownloadError, match=f"starts with {SHA256[:8]} instead of 0123abcd"):
        fetch("0123abcd")


def test_file_that_is_there_but_wrong(server, fetch, tmp_path, caplog):
    (tmp_path / "file.pth").write_bytes(b"old")
    fetch()
    assert "is not the file it should be" in caplog.text


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_refusals_are_final(server, fetch, status):
    server.faults = [{"status": status}]
    with pytest.raises(DownloadError, match=f"^127.0.0.1:\\d+ answered {status} "):
        fetch()
    assert len(server.requests) == 1
    fetch()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_passing_answers_are_tried_again(server, fetch, status):
    server.faults = [{"status": status}] * 3
    fetch()
    assert len(server.requests) == 4


def test_500_forever(server, fetch):
    server.faults, server.forever = [{"status": 500}], True
    with pytest.raises(DownloadError, match=r"answered 500 .*, 5 times in a row"):
        fetch()
    assert len(server.requests) == module.ATTEMPTS


def test_pauses_grow(server, fetch, monkeypatch):
    pauses = []
    monkeypatch.setattr(module, "BACKOFF", 1.0)
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.faults = [{"status": 500}] * 4
    fetch()
    assert [p for p in pauses if p] == [1, 2, 4, 8]


def test_the_server_may_name_the_pause(server, fetch, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.faults = [{"status": 429, "headers": {"Retry-After": "7"}}]
    fetch()
    assert [p for p in pauses if p] == [7]


def test_too_long_a_pause_is_an_error(server, fetch):
    server.faults = [{"status": 429, "headers": {"Retry-After": "3600"}}]
    with pytest.raises(DownloadError, match="answered 429 .* asks to wait 3600 s"):
        fetch()


def test_redirect(server, fetch):
    server.faults = [{"redirect": "/file.pth"}]
    fetch()


def test_redirect_in_a_circle(server, fetch):
    server.faults, server.forever = [{"redirect": "/file.pth"}], True
    with pytest.raises(DownloadError, match="30 redirects"):
        fetch()


def test_hang(server, fetch):
    server.faults, server.forever = [{"hang": 0.6}], True
    with pytest.raises(DownloadError, match=r"127.0.0.1:\d+ sent nothing for 0.3 s"):
        fetch()


def test_hang_in_the_middle(server, fetch, monkeypatch):
    whole = Server.reply

    def stall(self, request, status, data, headers, cut=None):
        if len(self.requests) == 1:
            request.send_response(200)
            request.send_header("Content-Length", str(len(data)))
            request.end_headers()
            request.wfile.write(data[:1_000_000])
            request.wfile.flush()
            time.sleep(1)
            request.close_connection = True
        else:
            whole(self, request, status, data, headers, cut)

    monkeypatch.setattr(Server, "reply", stall)
    fetch()
    assert int(server.requests[1][2][6:-1]) > 800_000


@pytest.mark.parametrize(
    "fault",
    [
        {"body": b"<!DOCTYPE html><html><head><title> Hotel WiFi </title></head></html>"},
        {"body": b"\n <html><title>Hotel WiFi</title>", "headers": {"Content-Type": "application/octet-stream"}},
        {"body": b"Log in <title>Hotel WiFi</title>", "headers": {"Content-Type": "text/html; charset=utf-8"}},
    ],
)
def test_web_page_instead_of_the_file(server, fetch, tmp_path, fault):
    server.faults = [fault]
    with pytest.raises(DownloadError, match="sent a web page, titled 'Hotel WiFi', instead of the file"):
        fetch()
    assert os.listdir(tmp_path) == []
    fetch()


def test_web_page_while_resuming_costs_nothing(server, fetch, tmp_path):
    (tmp_path / "file.pth.incomplete").write_bytes(DATA[:1_000_000])
    server.faults, server.ranges = [{"body": b"<html>"}], False
    with pytest.raises(DownloadError, match="sent a web page instead"):
        fetch()
    server.ranges = True
    fetch()
    assert server.requests[-1][2] == "bytes=1000000-"


def test_no_server(tmp_path):
    with pytest.raises(DownloadError, match=r"no connection to 127.0.0.1:9 \(.*refused"):
        download("http://127.0.0.1:9/file.pth", tmp_path / "file.pth", SHA256)


def test_no_such_protocol(tmp_path):
    with pytest.raises(DownloadError, match="No connection adapters"):
        download("gopher://127.0.0.1/file.pth", tmp_path / "file.pth", SHA256)


def test_proxy_is_used(server, tmp_path, monkeypatch):
    server.files["http://weights.example/file.pth"] = DATA
    monkeypatch.setenv("http_proxy", server.url)
    download("http://weights.example/file.pth", tmp_path / "file.pth", SHA256)
    assert server.requests == [("GET", "http://weights.example/file.pth", None)]


def test_every_retry_is_logged(server, fetch, caplog):
    server.faults = [{"status": 503}]
    with caplog.at_level(logging.INFO, logger="tpn"):
        fetch()
    assert "answered 503 Service Unavailable; trying again in 0.0 s" in caplog.text


def test_full_disk_by_the_numbers(server, fetch, monkeypatch):
    usage = module.shutil.disk_usage("/")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(DownloadError, match=r"no room for it in .*3 MB are needed, 1 MB are free.*TPN_CACHE"):
        fetch()
    monkeypatch.undo()
    fetch()


def test_full_disk_on_the_way(server, tmp_path):
    """A limit on the size of files stands for a disk that fills up."""
    server.files["/file.pth"] = DATA
    script = f"""
import pathlib, resource, signal, sys
from tpn.zoo.download import download
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, resource.RLIM_INFINITY))
try:
    download("{server.url}/file.pth", pathlib.Path("file.pth"), "{SHA256}")
except Exception as error:
    print(type(error).__name__, error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
download("{server.url}/file.pth", pathlib.Path("file.pth"), "{SHA256}")
"""
    said, _ = run_python(script, tmp_path)
    assert (
        said
        == "DownloadError no room for it in . (File too large): free some, or choose another place with TPN_CACHE or cache_dir\n"
    )
    assert (tmp_path / "file.pth").read_bytes() == DATA
    assert server.requests[1][2] == "bytes=1500000-"


def test_killed_half_way(server, tmp_path):
    server.files["/file.pth"] = DATA
    slow = Server.reply

    def drip(self, request, status, data, headers, cut=None):
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data[:1_000_000])
        request.wfile.flush()
        time.sleep(5)

    server.reply = drip.__get__(server)
    script = f"import pathlib; from tpn.zoo.download import download as d; d('{server.url}/file.pth', pathlib.Path('file.pth'), '{SHA256}')"
    process = start_python(script, tmp_path)
    partial = tmp_path / "file.pth.incomplete"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size > 500_000):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "file.pth").exists()
    server.reply = slow.__get__(server)
    download(f"{server.url}/file.pth", tmp_path / "file.pth", SHA256)
    assert file_sha256(tmp_path / "file.pth") == SHA256
    assert int(server.requests[-1][2][6:-1]) > 500_000


def test_progress_is_shown_unless_switched_off(server, tmp_path):
    server.files["/file.pth"] = DATA
    script = f"import pathlib; from tpn.zoo.download import download as d; d('{server.url}/file.pth', pathlib.Path('file.pth'), '{SHA256}')"
    _, shown = run_python(script, tmp_path, HF_HUB_DISABLE_PROGRESS_BARS="0")
    assert "file.pth: 100%" in shown
    assert "3.00M/3.00M" in shown
    (tmp_path / "file.pth").unlink()
    _, shown = run_python(script, tmp_path, HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert shown == ""
