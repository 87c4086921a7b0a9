"""Damaged files in the caches: noticed by their SHA-256, downloaded again, or named."""

import itertools
import json
import os
from pathlib import Path

import pytest
import small
from huggingface_hub import constants, hf_hub_download
from scripts import call
from small import BY_HAND, SLOWONLY, same, wanted
from test_hub import REPO, load

import tpn
from tpn import WeightsUnavailableError, cli, files
from tpn import hub as hub_files
from tpn.errors import HubUnreachableError
from tpn.zoo import fetch
from tpn.zoo.saved import CONFIG_FILE, WEIGHTS_FILE

pytestmark = pytest.mark.usefixtures("hub", "cache")

DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "flipped bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
}


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that are read to compare their SHA-256."""
    hashed, file_sha256 = [], files.file_sha256
    monkeypatch.setattr(files, "file_sha256", lambda path: hashed.append(path.name) or file_sha256(path))
    return hashed


# The Hub's cache


@pytest.mark.slow
@pytest.mark.parametrize(("name", "damage"), [*itertools.product([CONFIG_FILE, WEIGHTS_FILE], DAMAGES), (CONFIG_FILE, "nested")])
def test_damaged_copy(hub, commit, cache, caplog, monkeypatch, name, damage):
    """It is named where it cannot be downloaded again."""
    commit("a")
    load()
    (path,) = cache.glob(f"models--*/snapshots/*/{name}")
    good = path.read_bytes()
    path.resolve().write_bytes(b"[" * 10**6 if damage == "nested" else DAMAGES[damage](good))
    for change in ({"down": 503}, {"down": None, "deny": {REPO: (404, "RepoNotFound")}}):
        vars(hub).update(change)
        with pytest.raises(WeightsUnavailableError, match=rf"{REPO}.*damaged.*{path}"):
            load()
    hub.deny, hub.requests = {}, []
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(WeightsUnavailableError, match=rf"{REPO}.*HF_HUB_OFFLINE.*damaged.*{path}"):
            load()
    assert hub.requests == []
    assert load() == "a"
    assert path.read_bytes() == good
    assert f"{path} is truncated or damaged" in caplog.text
    assert [request[1] for request in hub.requests if request[0] == "GET"] == [f"/{REPO}/resolve/{hub.commit_of(1)}/{name}"]


def test_files_are_compared_once(hub, commit, cache, hashed):
    newest = commit("a")
    for name in (f"hf-hub:{REPO}", f"hf-hub:{REPO}@{newest}", f"hf-hub:{REPO}"):
        assert load(name) == "a"
    assert hashed == []  # they were compared while they were downloaded
    (path,) = cache.glob(f"models--*/snapshots/*/{WEIGHTS_FILE}")
    os.utime(path)
    for _ in range(2):
        assert load() == "a"
    assert hashed == [WEIGHTS_FILE]


def test_damage_without_a_trace(hub, commit, cache, hashed):
    """A disk that loses a bit does not change the time of the file."""
    commit("a")
    folder = hub_files.snapshot(REPO, CONFIG_FILE, WEIGHTS_FILE)
    path = folder / WEIGHTS_FILE
    good, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.resolve().write_bytes(DAMAGES["flipped bit"](good))
    os.utime(path, ns=times)
    assert hub_files.snapshot(REPO, CONFIG_FILE, WEIGHTS_FILE) == folder
    assert hashed == []
    hub.down = 503
    with pytest.raises(HubUnreachableError, match=f"damaged: {path}"):
        hub_files.snapshot(REPO, CONFIG_FILE, WEIGHTS_FILE, verify=True)
    with pytest.raises(HubUnreachableError, match=f"damaged: {path}"):  # it is remembered
        hub_files.snapshot(REPO, CONFIG_FILE, WEIGHTS_FILE)
    hub.down = None
    assert hub_files.snapshot(REPO, CONFIG_FILE, WEIGHTS_FILE) == folder
    assert path.read_bytes() == good


@pytest.mark.parametrize("damaged", [False, True])
def test_files_of_another_program(hub, commit, cache, hashed, damaged):
    commit("a")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        path = Path(hf_hub_download(REPO, name, cache_dir=cache))
    good = path.read_bytes()
    if damaged:
        path.resolve().write_bytes(DAMAGES["flipped bit"](good))
    hub.requests.clear()
    assert load() == "a"
    assert WEIGHTS_FILE in hashed
    hashed.clear()
    assert load() == "a"
    assert hashed == []
    assert path.read_bytes() == good
    assert [request[0] for request in hub.requests].count("GET") == damaged


def test_cache_without_links(hub, commit, cache, monkeypatch):
    def refuse(*args):
        raise OSError("a privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    commit("a")
    for _ in range(2):
        assert load() == "a"
        (path,) = cache.glob(f"models--*/snapshots/*/{WEIGHTS_FILE}")
        assert not path.is_symlink()
        good = path.read_bytes()
        path.write_bytes(DAMAGES["flipped bit"](good))
    assert load() == "a"
    assert path.read_bytes() == good
    assert hub.requests.count(("GET", f"/{REPO}/resolve/{hub.commit_of(1)}/{WEIGHTS_FILE}")) == 1  # the blob is still right


# The cache of published weights


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights(server, published, cache, caplog, monkeypatch, damage):
    tpn.create_model(SLOWONLY, pretrained=True)
    path = cache / SLOWONLY / WEIGHTS_FILE
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(
            WeightsUnavailableError, match=rf"{path}.*damaged.*HF_HUB_OFFLINE.*tpn convert FILE --model {SLOWONLY}"
        ):
            tpn.create_model(SLOWONLY, pretrained=True)
    for _ in range(2):
        assert same(tpn.create_model(SLOWONLY, pretrained=True), wanted(server))
    assert len(server.requests) == 2
    assert f"{path} is truncated or damaged" in caplog.text


def test_weights_are_compared_once(published, cache, hashed):
    tpn.create_model(SLOWONLY, pretrained=True)
    path, hashed[:] = cache / SLOWONLY / WEIGHTS_FILE, []
    for _ in range(2):
        tpn.create_model(SLOWONLY, pretrained=True)
    assert hashed == [WEIGHTS_FILE]
    assert fetch.weights_file(published, verify=True) == path
    os.utime(path)
    for _ in range(2):
        tpn.create_model(SLOWONLY, pretrained=True)
    assert hashed == [WEIGHTS_FILE] * 3


def test_converted_weights(cache, tmp_path, monkeypatch):
    """Only a person can fetch them again: the message names the file."""
    entry = small.change_entry(BY_HAND, monkeypatch.setattr)
    (tmp_path / "FILE").write_bytes(small.upstream_file(BY_HAND)[0])
    path = fetch.convert(entry, tmp_path / "FILE")
    path.write_bytes(DAMAGES["flipped bit"](path.read_bytes()))
    with pytest.raises(WeightsUnavailableError, match=rf"{path} is truncated or damaged.*tpn convert FILE --model {BY_HAND}"):
        tpn.create_model(BY_HAND, pretrained=True)
    fetch.store(entry, fetch.load.read_weights(tmp_path / "FILE"), tmp_path / "elsewhere" / "output")
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["output"]


@pytest.mark.slow
@pytest.mark.parametrize("record", [b"", b"\xff", b"[]", b"{", b'{"sha256": null}', b'{"size": 1}'])
def test_damaged_record(server, published, cache, record):
    """It is as good as none."""
    for _ in range(2):
        tpn.create_model(SLOWONLY, pretrained=True)
    (path,) = cache.glob(".*.sha256")
    assert json.loads(path.read_bytes())["sha256"] == files.file_sha256(cache / SLOWONLY / WEIGHTS_FILE)
    path.write_bytes(record)
    assert same(tpn.create_model(SLOWONLY, pretrained=True), wanted(server))
    assert len(server.requests) == 1


def test_weights_that_were_copied_without_their_record(server, published, cache):
    for _ in range(2):
        tpn.create_model(SLOWONLY, pretrained=True)
    (record,) = cache.glob(".*.sha256")
    record.unlink()
    path = cache / SLOWONLY / WEIGHTS_FILE
    path.write_bytes(DAMAGES["flipped bit"](path.read_bytes()))
    assert same(tpn.create_model(SLOWONLY, pretrained=True), wanted(server))
    assert len(server.requests) == 2


def test_check_model_downloads_damaged_files_again(hub, commit, server, published, cache):
    """Also those whose damage left no trace."""
    commit("a")
    load()
    tpn.create_model(SLOWONLY, pretrained=True)
    (copy,) = cache.glob(f"models--*/snapshots/*/{WEIGHTS_FILE}")
    for name, path in ((f"hf-hub:{REPO}", copy), (SLOWONLY, cache / SLOWONLY / WEIGHTS_FILE)):
        good, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        path.resolve().write_bytes(DAMAGES["flipped bit"](good))
        os.utime(path, ns=times)
        done = call(cli.main, "tpn", "check-model", name)
        assert (done.returncode, path.read_bytes()) == (0, good)
        assert done.stdout.endswith(f" tensors, SHA-256 {files.file_sha256(path)}, verified\n")


def test_record_that_cannot_be_written(tmp_path, hashed):
    """The process remembers the comparison."""
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "no folder").write_bytes(b"")
    record, sha256 = tmp_path / "no folder" / "record", files.file_sha256(tmp_path / "file")
    hashed.clear()
    for _ in range(2):
        assert files.is_intact(tmp_path / "file", record, sha256)
    assert hashed == ["file"]
    (tmp_path / "file").write_bytes(b"yy")
    for _ in range(2):
        assert not files.is_intact(tmp_path / "file", record, sha256)
