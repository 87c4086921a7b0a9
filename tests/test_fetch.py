"""`pretrained=True` without the Hub: downloads over bad networks and onto bad disks, and the cache."""

import hashlib
import logging
import os
import re
import resource
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import small
import timm
import torch
from huggingface_hub import constants
from recipe import our_names
from safetensors.torch import load_file, save_file
from servers import ROOT, run_python, start_python
from small import BY_HAND, SLOWONLY, TSM, one_line, same, wanted
from tqdm import tqdm

import tpn
from tpn import CheckpointError, WeightsUnavailableError, transfer
from tpn.cli.script import error_message
from tpn.errors import BUNDLED_MODEL
from tpn.zoo import fetch
from tpn.zoo.checkpoints import Embedded, Link, get_checkpoint
from tpn.zoo.saved import WEIGHTS_FILE

pytestmark = pytest.mark.usefixtures("hub", "cache")

DATA = np.random.default_rng(0).bytes(1_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
TIMEOUT = 1


@contextmanager
def max_file_size(size):
    """A limit on the size of files, which behaves like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# One file


@pytest.fixture
def download(server, tmp_path, monkeypatch):
    """Download /file.pth from the server."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", TIMEOUT)
    server.files["/file.pth"] = DATA

    def download(url=server.url + "/file.pth"):
        fetch.download(Link(url, SHA256[:8]), tmp_path / "file.pth", get_checkpoint(SLOWONLY))
        assert (tmp_path / "file.pth").read_bytes() == DATA

    return download


@pytest.mark.parametrize(
    "fault",
    [
        *({"status": status} for status in (408, 429, 500, 503)),
        *({"cut": share} for share in (0.0, 0.5, 0.99)),
        {"hang": 2 * TIMEOUT},
        {"cut": 0.5, "hang": 2 * TIMEOUT},
        {"body": b"<html>log in</html>"},
        {"body": bytes(len(DATA))},
    ],
    ids=lambda value: str(value)[:40],
)
def test_passing_failures_are_retried(server, download, caplog, monkeypatch, fault):
    monkeypatch.setattr(fetch, "PAUSES", (0.001, 0.002))
    server.faults = [fault] * 2
    download()
    assert server.requests == [("GET", "/file.pth")] * 3
    assert re.findall(r"(?m)[^\s:]; trying again in (\S+) s$", caplog.text) == ["0.001", "0.002"]


@pytest.mark.parametrize(
    ("fault", "reason", "tries"),
    [
        ({"status": 503}, "127.0.0.1:.* 503 ", 5),
        ({"cut": 0.5}, "31250 bytes, expected 62500", 5),
        ({"hang": 2 * TIMEOUT}, f"{TIMEOUT} s", 5),
        ({"body": DATA[:-1]}, "SHA-256", 5),
        *(({"status": status}, f"127.0.0.1:.* {status} ", 1) for status in (400, 401, 403, 404, 410, 451)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_failures_that_stay(server, download, fault, reason, tries):
    server.faults, server.forever = [fault], True
    with pytest.raises(
        WeightsUnavailableError,
        match=rf"file.pth: .*{reason}.*tpn info {SLOWONLY} .*tpn convert FILE --model {SLOWONLY}.*{BUNDLED_MODEL}",
    ) as caught:
        download()
    assert re.search(rf"{reason}.*tpn convert FILE --model {SLOWONLY}.*tiny_motion", error_message(caught.value))
    assert len(server.requests) == tries
    server.faults = []
    download()


@pytest.mark.parametrize(
    ("url", "reason", "tries"),
    [("http://127.0.0.1:9", "127.0.0.1:9 .*refused", 5), ("https", "certificate.*SSL_CERT_FILE", 1), ("gopher://x", "gopher", 1)],
)
def test_no_connection(server, download, url, reason, tries):
    with pytest.raises(WeightsUnavailableError, match=rf"{reason}.*tries: {tries}"):
        download((server.url.replace("http", url) if url == "https" else url) + "/file.pth")


def test_proxy(server, download, monkeypatch):
    close_session = getattr(huggingface_hub, "close_session", lambda: None)  # it keeps the proxies of its first request
    monkeypatch.setenv("http_proxy", server.url)
    close_session()
    server.files["http://weights.example/file.pth"] = DATA
    try:
        download("http://weights.example/file.pth")
    finally:
        close_session()
    assert server.requests == [("GET", "http://weights.example/file.pth")]


def test_progress_bar(server, download, monkeypatch, capsys):
    download()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(transfer, "tqdm", tqdm)  # the client's own obeys $HF_HUB_DISABLE_PROGRESS_BARS
    download()
    assert capsys.readouterr().err == ""  # a file that is there at once needs none
    server.faults = [{"hang": 2 * TIMEOUT}] * 2
    download()
    assert "file.pth: 100%" in capsys.readouterr().err


# An entry with a direct link


@pytest.mark.parametrize(("name", "dtype"), [(SLOWONLY, torch.float32), (TSM, torch.float16)])
def test_downloaded_once_then_cached(server, cache, monkeypatch, caplog, name, dtype):
    caplog.set_level(logging.INFO, logger="tpn")
    entry = small.serve(server, name, monkeypatch.setattr, dtype=dtype)
    torch.manual_seed(0)
    expected = {k: v.to(dtype).float() if v.is_floating_point() else v for k, v in small.random_model(name).state_dict().items()}
    model = tpn.create_model(name, pretrained=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same(model, expected)
    assert [server.url + path for _, path in server.requests] == [entry.source.url]
    assert one_line(caplog) == f"weights of {name}: {cache / name / WEIGHTS_FILE}, from {entry.source.url}"
    assert sorted(os.listdir(cache / name)) == ["config.json", WEIGHTS_FILE]

    caplog.clear()
    server.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for load in (tpn.create_model, timm.create_model):
        assert same(load(name, pretrained=True), expected)
    assert "the cache" in caplog.text
    assert same(torch.hub.load(str(ROOT), entry.model, source="local", pretrained=True), expected)
    assert same(tpn.create_model(f"local-dir:{cache / name}"), expected)


def test_link_to_safetensors(server, cache, tmp_path, monkeypatch):
    """The downloaded file has the name of the one in the cache."""
    small.change_entry(SLOWONLY, monkeypatch.setattr)
    expected = small.random_model(SLOWONLY).state_dict()
    save_file(expected, tmp_path / "file")
    server.files["/model.safetensors"] = (tmp_path / "file").read_bytes()
    link = Link(f"{server.url}/model.safetensors", fetch.file_sha256(tmp_path / "file"))
    small.change_entry(SLOWONLY, monkeypatch.setattr, source=link)
    for _ in range(2):
        assert same(tpn.create_model(SLOWONLY, pretrained=True), expected)
    assert len(server.requests) == 1
    assert sorted(os.listdir(cache / SLOWONLY)) == ["config.json", WEIGHTS_FILE]


def test_entry_that_is_wrong_about_its_file(server, cache, monkeypatch):
    data, sha256 = small.upstream_file(TSM)
    server.files["/a.pth"] = data
    small.change_entry(SLOWONLY, monkeypatch.setattr, source=Link(f"{server.url}/a.pth", sha256))
    with pytest.raises(CheckpointError, match=rf"{SLOWONLY}.*174 classes.*does not fit"):
        tpn.create_model(SLOWONLY, pretrained=True)
    assert os.listdir(cache / SLOWONLY) == []


def test_other_number_of_classes(server, published, caplog):
    caplog.set_level(logging.INFO, logger="tpn")
    model = tpn.create_model(SLOWONLY, pretrained=True, num_classes=7)
    assert model.eval()(torch.randn(1, 3, 8, 32, 32)).shape == (1, 7)
    assert caplog.text.count("head.fc and aux_head.fc") == 1
    assert same(model, {k: v for k, v in wanted(server).items() if "fc." not in k})


def test_arguments_that_change_the_network_are_refused_before_the_download(server, published, caplog):
    for kwargs, says in (
        ({"flow_order": "isolation"}, "flow_order=isolation"),
        ({"flow_order": "parallel"}, "flow_order=parallel"),
        ({"spatial_modulation": False}, r"not in the model.*neck\.spatial_modulation"),
        ({"temporal_modulation": False}, r"neck\.temporal_modulation.*3, 1, 1\) instead of .*1, 1, 1\)"),
        ({"out_indices": (1, 2, 3)}, r"missing.*neck\.bottom_up\.1"),
        ({"out_indices": (3, 3), "num_classes": 3}, r"neck\.spatial_modulation"),
        ({"temporal_scales": (2, 8)}, r"temporal_scales=\(8, 8\).*temporal_scales=\(2, 8\)"),
        ({"mid_channels": 12, "in_chans": 1}, r"neck\.bottom_up"),
    ):
        with pytest.raises(CheckpointError, match=f"{SLOWONLY}.*{says}.*Leave out"):
            tpn.create_model(SLOWONLY, pretrained=True, **kwargs)
    assert server.requests == []
    assert not caplog.records


def test_the_auxiliary_head_may_be_left_out(server, published, tmp_path):
    model = tpn.create_model(SLOWONLY, pretrained=True, aux_head=False)
    expected = {name: tensor for name, tensor in wanted(server).items() if not name.startswith("aux_head.")}
    assert model.state_dict().keys() == expected.keys()
    assert same(model, expected)
    tpn.save_pretrained(model, tmp_path)
    assert tpn.create_model(f"local-dir:{tmp_path}").aux_head is None
    with pytest.raises(CheckpointError, match=r"missing.*aux_head\.conv"):
        tpn.create_model(SLOWONLY, checkpoint_path=tmp_path / WEIGHTS_FILE)


# Links of the caller


@pytest.mark.parametrize(("create_model", "query"), [(tpn.create_model, "?download=true"), (timm.create_model, "")])
def test_mirror_of_the_published_file(server, published, create_model, query):
    (path,) = server.files
    server.files[f"/mirror{path}{query}"] = server.files.pop(path)
    overlay = {"url": f"{server.url}/mirror{path}{query}"}
    assert same(create_model(SLOWONLY, pretrained=True, pretrained_cfg_overlay=overlay), wanted(server))
    assert same(create_model(SLOWONLY, pretrained=True), wanted(server))
    assert len(server.requests) == 1


@pytest.mark.parametrize("num_classes", [400, 12])
def test_another_file_does_not_replace_the_published_one(server, published, cache, num_classes):
    expected = wanted(server)
    data, sha256 = small.upstream_file(SLOWONLY, seed=1, num_classes=num_classes)
    server.files[f"/mine-{sha256[:10]}.pth"] = data
    overlay = {"url": f"{server.url}/mine-{sha256[:10]}.pth"}
    for _ in range(2):
        model = tpn.create_model(SLOWONLY, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay)
        torch.manual_seed(1)
        assert same(model, small.random_model(SLOWONLY, num_classes=num_classes).state_dict())
    assert len(server.requests) == 1
    assert (cache / f"{SLOWONLY}-{sha256[:10]}" / WEIGHTS_FILE).is_file()
    assert same(tpn.create_model(SLOWONLY, pretrained=True), expected)


def test_another_file_for_an_embedded_model(server, tmp_path):
    name = "tpn_slowonly_tiny_motion"
    tensors = {k: v + 1 for k, v in load_file(get_checkpoint(name).source.path).items()}
    save_file(tensors, tmp_path / "file")
    sha256 = fetch.file_sha256(tmp_path / "file")
    server.files[f"/mine-{sha256[:8]}.safetensors"] = (tmp_path / "file").read_bytes()
    overlay = {"url": f"{server.url}/mine-{sha256[:8]}.safetensors"}
    assert same(tpn.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay), tensors)
    assert not same(tpn.create_model(name, pretrained=True), tensors)
    assert len(server.requests) == 1


def test_link_without_a_hash():
    with torch.device("meta"), pytest.raises(ValueError, match=r"url .*SHA-256.*mine.pth.*checkpoint_path"):
        tpn.create_model(SLOWONLY, True, pretrained_cfg_overlay={"url": "http://127.0.0.1/mine.pth"})


@pytest.mark.parametrize("argument", ["pretrained_cfg", "pretrained_cfg_overlay"])
def test_files_and_state_dicts_through_timm(server, published, tmp_path, argument):
    expected, (path,) = wanted(server), server.files
    (tmp_path / "served.pth").write_bytes(server.files[path])
    for source in ({"file": str(tmp_path / "served.pth")}, {"state_dict": expected}, {"url": f"{server.url}{path}"}):
        assert same(timm.create_model(SLOWONLY, pretrained=True, **{argument: source}), expected)


# An entry with a manual download


def test_manual_download(monkeypatch, tmp_path, cache):
    entry = small.change_entry(BY_HAND, monkeypatch.setattr)
    data, _ = small.upstream_file(BY_HAND)
    (tmp_path / "FILE").write_bytes(data)
    torch.manual_seed(0)
    expected = small.random_model(BY_HAND).state_dict()
    for _ in range(2):
        with pytest.raises(WeightsUnavailableError) as caught:
            tpn.create_model(BY_HAND, pretrained=True)
        assert entry.source.url in str(caught.value)
        assert str(caught.value).endswith(f"tpn convert FILE --model {BY_HAND}")
        assert fetch.convert(entry, tmp_path / "FILE") == cache / BY_HAND / WEIGHTS_FILE
        assert same(tpn.create_model(BY_HAND, pretrained=True), expected)
        os.truncate(cache / BY_HAND / WEIGHTS_FILE, 1000)


def test_convert_refuses_another_training_run(published, cache, tmp_path, monkeypatch):
    data, digits = small.upstream_file(SLOWONLY, seed=9)
    (tmp_path / "other.pth").write_bytes(data)
    small.change_entry("tpn_slowonly_r50_k400.scratch", monkeypatch.setattr, source=Link("http://nowhere", digits[:8]))
    with pytest.raises(CheckpointError, match=rf"{digits[:8]}.*{published.source.sha256}.*--model tpn_slowonly_r50_k400.scratch"):
        fetch.convert(published, tmp_path / "other.pth")
    assert not (cache / SLOWONLY).exists()


def test_convert_refuses_another_code_base(cache, tmp_path, monkeypatch):
    entry = small.change_entry(BY_HAND, monkeypatch.setattr)
    upstream = {ours: up for up, ours in our_names(small.MANIFESTS[TSM]).items()}
    torch.save({upstream[k]: v for k, v in small.random_model(BY_HAND).state_dict().items()}, tmp_path / "mmaction2.pth")
    with pytest.raises(CheckpointError, match="mmaction2.*original"):
        fetch.convert(entry, tmp_path / "mmaction2.pth")
    assert not (cache / BY_HAND).exists()


def test_convert_refuses_embedded_models():
    with pytest.raises(ValueError, match="--output"):
        fetch.convert(get_checkpoint("tpn_slowonly_tiny_motion"), "any.pth")


# The cache


def test_cache_folder(tmp_path, monkeypatch):
    entry = get_checkpoint(SLOWONLY)
    assert fetch.weights_folder(entry, tmp_path) == tmp_path / SLOWONLY
    monkeypatch.setenv("TPN_CACHE", "~/x")
    assert fetch.weights_folder(entry) == Path.home() / "x" / SLOWONLY
    monkeypatch.delenv("TPN_CACHE")
    assert fetch.weights_folder(entry) == Path(constants.HF_HOME, "assets", "tpn", SLOWONLY)


def test_offline_without_a_copy(server, published, monkeypatch, cache):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsUnavailableError, match=rf"{cache}.*HF_HUB_OFFLINE.*tpn convert FILE"):
        tpn.create_model(SLOWONLY, pretrained=True)
    assert server.requests == []


def test_damaged_copy_is_downloaded_again(server, published, cache, caplog):
    tpn.create_model(SLOWONLY, pretrained=True)
    path = cache / SLOWONLY / WEIGHTS_FILE
    for size in (0, 3000, path.stat().st_size - 1):
        caplog.clear()
        os.truncate(path, size)
        assert same(tpn.create_model(SLOWONLY, pretrained=True), wanted(server))
        assert caplog.text.count(f"{path} is truncated or damaged") == 1
    assert len(server.requests) == 4


def test_cache_that_is_a_file(published, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WeightsUnavailableError, match=rf"{tmp_path}/file.*TPN_CACHE or cache_dir"):
        tpn.create_model(SLOWONLY, pretrained=True, cache_dir=tmp_path / "file")


def test_full_disk(server, monkeypatch, cache):
    """In half precision the downloaded file fits where the converted one does not."""
    small.serve(server, SLOWONLY, monkeypatch.setattr, dtype=torch.float16)
    (data,) = server.files.values()
    for size in (len(data) // 2, len(data) + 1000):
        with max_file_size(size), pytest.raises(WeightsUnavailableError, match=rf"{cache}.*TPN_CACHE or cache_dir") as caught:
            tpn.create_model(SLOWONLY, pretrained=True)
        assert "too large" in str(caught.value)
        assert os.listdir(cache / SLOWONLY) == []
    assert len(server.requests) == 2  # no retries
    tpn.create_model(SLOWONLY, pretrained=True)


@pytest.mark.slow
def test_read_only_cache(published, hub):
    """Weights that are in it load, from the table and from the Hub."""
    with tempfile.TemporaryDirectory(prefix="tpn-tests-") as folder:  # one that every user may enter, unlike pytest's
        empty, filled = Path(folder, "empty"), Path(folder, "filled")
        empty.mkdir()
        tpn.create_model(SLOWONLY, pretrained=True, cache_dir=filled)
        weights, config = ((filled / SLOWONLY / name).read_bytes() for name in (WEIGHTS_FILE, "config.json"))
        hub.add("me/x", weights=weights, config=config)
        tpn.create_model("hf-hub:me/x", cache_dir=filled)
        paths = [*Path(folder).rglob("*")]
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        os.chmod(folder, 0o755)
        script = small.script_of(published) + (
            "import encodings.idna, os, timm, tpn.zoo.create\n"  # a folder that only root may read can hold Python
            "if os.getuid() == 0: os.setuid(65534)  # permissions do not apply to root\n"
            f"for name, place in ({SLOWONLY!r}, {str(filled)!r}), ('hf-hub:me/x', {str(filled)!r}), ({SLOWONLY!r}, {str(empty)!r}):\n"
            "    try: print(tpn.create_model(name, True, cache_dir=place).num_classes)\n"
            "    except tpn.WeightsUnavailableError as error: print(error)\n"
        )
        output, errors = run_python(script, ROOT, HF_HOME=folder)
        assert errors == ""
        *loaded, error = output.splitlines()
        for path in paths:
            path.chmod(0o755)
    assert loaded == ["400", "400"]
    assert f"{empty / SLOWONLY}: Permission denied" in error
    assert "TPN_CACHE or cache_dir" in error


@pytest.mark.slow
def test_killed_while_converting(server, published, cache, tmp_path):
    script = small.script_of(published) + (
        "import os, signal, tpn\n"
        "from tpn.zoo import saved\n"
        "def half(tensors, path, metadata):\n"
        "    path.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "saved.save_file = half\n"
        f"tpn.create_model({SLOWONLY!r}, pretrained=True)\n"
    )
    process = start_python(script, tmp_path)
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL
    assert len(os.listdir(cache / SLOWONLY)) == 2  # the downloaded file and half of the converted one
    assert same(tpn.create_model(SLOWONLY, pretrained=True), wanted(server))
    assert sorted(os.listdir(cache / SLOWONLY)) == ["config.json", WEIGHTS_FILE]


@pytest.mark.slow
def test_one_of_two_processes_downloads(server, published, tmp_path):
    script = small.script_of(published) + (
        f"import tpn\nprint(flush=True)\nprint(tpn.create_model({SLOWONLY!r}, pretrained=True).head.fc.weight.sum().item())\n"
    )
    server.faults = [{"hang": 1}]
    process = start_python(script, tmp_path)
    process.stdout.readline()
    ours = tpn.create_model(SLOWONLY, pretrained=True).head.fc.weight.sum().item()
    out, errors = process.communicate(timeout=200)
    assert (out, ours) == (f"{ours}\n", wanted(server)["head.fc.weight"].sum().item()), errors
    assert len(server.requests) == 1


def test_an_error_without_network_says_what_works_offline(published, cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsUnavailableError, match=f"Offline, .*{BUNDLED_MODEL}") as caught:
        tpn.create_model(SLOWONLY, pretrained=True)
    assert error_message(caught.value) == str(caught.value)
    assert isinstance(get_checkpoint(BUNDLED_MODEL).source, Embedded)
