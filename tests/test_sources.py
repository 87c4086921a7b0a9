"""`pretrained=True`: every place that weights come from, in order, and what is said where one fails."""

import hashlib
import json
import logging
import os
import re
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
import timm
import torch
from huggingface_hub import constants
from recipe import FIXTURES, clip, our_names, upstream_state_dict
from servers import ROOT, run_python, start_python
from small import BY_HAND, SLOWONLY, TSM, one_line, same, wanted

import tpn
from tpn import WeightsUnavailableError
from tpn.zoo import saved, sources
from tpn.zoo.weights import get_weights

pytestmark = pytest.mark.usefixtures("hub", "cache")


# The publisher's file


@pytest.mark.parametrize("name", [SLOWONLY, TSM])
def test_publishers_file(server, cache, monkeypatch, caplog, name):
    entry = small.serve(server, name, monkeypatch.setattr)
    caplog.set_level(logging.INFO, logger="tpn")
    torch.manual_seed(0)
    reference = small.random_model(name)
    x = torch.randn(1, 3, 8, 64, 64)
    model = tpn.create_model(name, pretrained=True).eval()
    assert torch.equal(model(x), reference(x))
    assert [path for _, path, _ in server.requests] == [entry.url.removeprefix(server.url)]
    assert one_line(caplog) == f"weights of {name}: {cache / name / 'model.safetensors'}, from {entry.url}"
    assert sorted(os.listdir(cache / name)) == ["config.json", "model.safetensors"]

    caplog.clear()
    assert same(tpn.create_model(name, pretrained=True), reference.state_dict())
    assert len(server.requests) == 1
    assert one_line(caplog).endswith("from the cache")

    server.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(tpn.create_model(name, pretrained=True), reference.state_dict())
    assert same(tpn.create_model(f"local-dir:{cache / name}"), reference.state_dict())


def test_half_precision_file_is_loaded_in_single(server, monkeypatch):
    small.serve(server, SLOWONLY, monkeypatch.setattr, dtype=torch.float16)
    model = tpn.create_model(SLOWONLY, pretrained=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same(model, wanted(server))


def test_hash_of_another_file(server, published, cache):
    server.faults = [{"body": next(iter(server.files.values()))[::-1]}]
    with pytest.raises(WeightsUnavailableError) as caught:
        tpn.create_model(SLOWONLY, pretrained=True)
    assert re.fullmatch(
        rf"could not download {published.url}: what 127.0.0.1:\d+ sent is not {Path(published.url).name}: its SHA-256 starts with "
        rf"\w{{8}} instead of {published.sha256}. Try again later, or fetch the file by other means and run: "
        rf"tpn convert FILE --model {SLOWONLY}",
        str(caught.value),
    )
    assert os.listdir(cache / SLOWONLY) == []
    assert same(tpn.create_model(SLOWONLY, pretrained=True), wanted(server))


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_refused(server, published, status):
    server.faults = [{"status": status}] * (5 if status == 500 else 1)
    with pytest.raises(
        WeightsUnavailableError, match=rf"could not download .*answered {status} .*tpn convert FILE --model {SLOWONLY}"
    ):
        tpn.create_model(SLOWONLY, pretrained=True)
    assert same(tpn.create_model(SLOWONLY, pretrained=True), wanted(server))


def test_right_hash_wrong_network(server, cache, monkeypatch):
    """A table that is wrong about a file is found out, and the file is not fetched twice."""
    data, sha256 = small.upstream_file(TSM)
    server.files[f"/a-{sha256[:8]}.pth"] = data
    small.change_entry(SLOWONLY, monkeypatch.setattr, url=f"{server.url}/a-{sha256[:8]}.pth", sha256=sha256[:8])
    for _ in range(2):
        with pytest.raises(
            tpn.CheckpointError, match=r"a-\w+.pth is not the published checkpoint of .*: it has 174 classes, not 400"
        ):
            tpn.create_model(SLOWONLY, pretrained=True)
    assert len(server.requests) == 1
    assert not (cache / SLOWONLY / saved.WEIGHTS_FILE).exists()


def test_other_number_of_classes(server, published, caplog):
    caplog.set_level(logging.INFO, logger="tpn")
    model = tpn.create_model(SLOWONLY, pretrained=True, num_classes=7)
    assert model.eval()(torch.randn(1, 3, 8, 32, 32)).shape == (1, 7)
    lines = [r.getMessage() for r in caplog.records if "400 classes" in r.getMessage()]
    assert len(lines) == 1
    assert lines[0].endswith("is for 400 classes, the model has 7: new and untrained: head.fc and aux_head.fc")
    assert same(model, {k: v for k, v in wanted(server).items() if "fc." not in k})


# The other ways in


def test_through_timm(server, published):
    assert same(timm.create_model(SLOWONLY, pretrained=True), wanted(server))


def test_through_torch_hub(server, published):
    model = torch.hub.load(str(ROOT), "tpn_slowonly_r50_k400", source="local", pretrained=True)
    assert same(model, wanted(server))


def test_mirror(server, published, cache):
    """timm's own way to name another place."""
    (path,) = server.files
    server.files[f"/mirror{path}"] = server.files.pop(path)
    overlay = {"url": f"{server.url}/mirror{path}"}
    assert same(timm.create_model(SLOWONLY, pretrained=True, pretrained_cfg_overlay=overlay), wanted(server))
    assert same(tpn.create_model(SLOWONLY, pretrained=True), wanted(server))
    assert len(server.requests) == 1


def test_another_file_does_not_take_the_published_ones_place(server, published, cache):
    data, sha256 = small.upstream_file(SLOWONLY, seed=1)
    server.files[f"/mine-{sha256[:10]}.pth"] = data
    overlay = {"url": f"{server.url}/mine-{sha256[:10]}.pth"}
    model = tpn.create_model(SLOWONLY, pretrained=True, pretrained_cfg_overlay=overlay)
    assert (cache / f"{SLOWONLY}-{sha256[:10]}" / saved.WEIGHTS_FILE).is_file()
    del server.files[f"/mine-{sha256[:10]}.pth"]
    published_ones = tpn.create_model(SLOWONLY, pretrained=True)
    assert same(published_ones, wanted(server))
    assert not same(model, wanted(server))


def test_link_without_a_hash():
    overlay = {"url": "http://127.0.0.1/mine.pth"}
    with pytest.raises(ValueError, match=r"mine.pth does not end in digits of its SHA-256.*pass it as checkpoint_path"):
        tpn.create_model(SLOWONLY, pretrained=True, pretrained_cfg_overlay=overlay)


def test_overlays_with_files_and_state_dicts(server, published, tmp_path):
    expected = wanted(server)
    (tmp_path / "served.pth").write_bytes(next(iter(server.files.values())))
    file = {"file": str(tmp_path / "served.pth")}
    assert same(timm.create_model(SLOWONLY, pretrained=True, pretrained_cfg_overlay=file), expected)
    state_dict = {"state_dict": expected}
    assert same(timm.create_model(SLOWONLY, pretrained=True, pretrained_cfg_overlay=state_dict), expected)
    assert server.requests == []


# By hand


def test_by_hand(server, monkeypatch, tmp_path, cache):
    entry = small.change_entry(BY_HAND, monkeypatch.setattr)
    with pytest.raises(WeightsUnavailableError) as caught:
        tpn.create_model(BY_HAND, pretrained=True)
    assert str(caught.value) == (
        f"The weights of {BY_HAND} have to be fetched by hand: open {entry.url} in a browser, save the file, then run: "
        f"tpn convert FILE --model {BY_HAND}"
    )
    data, _ = small.upstream_file(BY_HAND)
    (tmp_path / "FILE").write_bytes(data)
    script = f"import small, sys; small.change_entry('{BY_HAND}'); from tpn.cli import main; sys.argv = ['tpn', 'convert', 'FILE', '--model', '{BY_HAND}']; main()"
    run_python(script, tmp_path)
    torch.manual_seed(0)
    reference = small.random_model(BY_HAND)
    assert same(tpn.create_model(BY_HAND, pretrained=True), reference.state_dict())
    os.truncate(cache / BY_HAND / saved.WEIGHTS_FILE, 1000)
    with pytest.raises(WeightsUnavailableError, match="have to be fetched by hand"):
        tpn.create_model(BY_HAND, pretrained=True)
    run_python(script, tmp_path)
    assert same(tpn.create_model(BY_HAND, pretrained=True), reference.state_dict())


@pytest.mark.parametrize("name", [SLOWONLY, BY_HAND])
def test_only_the_published_file_becomes_the_published_weights(server, monkeypatch, cache, tmp_path, name):
    """Files of the same shapes that are something else: another training run, another code base."""
    if name == SLOWONLY:
        small.serve(server, SLOWONLY, monkeypatch.setattr)
        data, digits = small.upstream_file(SLOWONLY, seed=9)
        small.change_entry("tpn_slowonly_r50_k400.scratch", monkeypatch.setattr, sha256=digits[:8])
        says = rf"SHA-256 starts with {digits[:8]}, as that of tpn_slowonly_r50_k400.scratch does: --model tpn_slowonly_r50_k400.scratch"
    else:
        small.change_entry(BY_HAND, monkeypatch.setattr)
        upstream = {ours: up for up, ours in our_names(small.MANIFESTS[TSM]).items()}
        torch.save({upstream[k]: v for k, v in small.random_model(BY_HAND).state_dict().items()}, tmp_path / "mmaction2.pth")
        data = (tmp_path / "mmaction2.pth").read_bytes()
        says = "its names are those of mmaction2, not of original"
    (tmp_path / "other.pth").write_bytes(data)
    with pytest.raises(tpn.CheckpointError, match=says):
        sources.convert(get_weights(name), tmp_path / "other.pth")
    assert not (cache / name / saved.WEIGHTS_FILE).exists()


def test_mirror_with_a_query(server, published):
    (path,) = server.files
    server.files[f"{path}?download=true"] = server.files.pop(path)
    overlay = {"url": f"{server.url}{path}?download=true"}
    assert same(tpn.create_model(SLOWONLY, pretrained=True, pretrained_cfg_overlay=overlay), wanted(server))


# This side


def test_cache_root(tmp_path, monkeypatch):
    entry = small.weights.get_weights(SLOWONLY)
    assert sources.cache_folder(entry, tmp_path) == tmp_path / SLOWONLY
    monkeypatch.setenv("TPN_CACHE", str(tmp_path / "x"))
    assert sources.cache_folder(entry) == tmp_path / "x" / SLOWONLY
    monkeypatch.delenv("TPN_CACHE")
    assert sources.cache_folder(entry) == Path(constants.HF_HOME, "assets", "tpn", SLOWONLY)


def test_offline_with_nothing(published, monkeypatch, cache):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsUnavailableError, match=rf"not in the cache \({cache}.*HF_HUB_OFFLINE forbids.*tpn convert FILE"):
        tpn.create_model(SLOWONLY, pretrained=True)


def test_truncated_cache(server, published, cache, caplog):
    tpn.create_model(SLOWONLY, pretrained=True)
    path = cache / SLOWONLY / saved.WEIGHTS_FILE
    for size in (0, 5, 3000, path.stat().st_size - 1):
        caplog.clear()
        os.truncate(path, size)
        assert same(tpn.create_model(SLOWONLY, pretrained=True), wanted(server))
        assert f"{path} is truncated or damaged: it is not used" in caplog.text
    assert len(server.requests) == 5


READ_ONLY = """
import os, small, tpn
small.change_entry({name!r}, url={url!r}, sha256={sha256!r})
if os.getuid() == 0:
    os.setuid(65534)  # permissions do not bind root
try:
    model = tpn.create_model({name!r}, pretrained=True)
    print("loaded", model.num_classes)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def open_folder():
    """A folder that every user may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="tpn-tests-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_read_only_cache(server, published, open_folder):
    cache = open_folder / "readonly"
    cache.mkdir(mode=0o555)
    script = READ_ONLY.format(name=SLOWONLY, url=published.url, sha256=published.sha256)
    environment = {"TPN_CACHE": str(cache), "TPN_HUB_NAMESPACE": "", "HF_HOME": str(open_folder / "hf")}
    said, _ = run_python(script, ROOT, **environment)
    name = Path(published.url).name
    assert said.startswith(
        f"WeightsUnavailableError could not keep {name} in {cache / SLOWONLY}: Permission denied; choose another place"
    )
    os.chmod(cache, 0o755)
    tpn.create_model(SLOWONLY, pretrained=True, cache_dir=cache)
    for path in (cache, cache / SLOWONLY):
        os.chmod(path, 0o555)
    for path in (cache / SLOWONLY).iterdir():
        os.chmod(path, 0o444)
    assert run_python(script, ROOT, **environment)[0] == "loaded 400\n"
    os.chmod(cache / SLOWONLY, 0o755)
    os.chmod(cache, 0o755)


FULL = """
import resource, signal, small, tpn
small.change_entry({name!r}, url={url!r}, sha256={sha256!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
no_limit = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, no_limit))
try:
    tpn.create_model({name!r}, pretrained=True)
except Exception as error:
    print(type(error).__name__, error)
resource.setrlimit(resource.RLIMIT_FSIZE, (no_limit, no_limit))
print(tpn.create_model({name!r}, pretrained=True).num_classes)
"""


def test_disk_that_fills_up_while_converting(server, monkeypatch, cache, tmp_path):
    """The file of half precision still fits, the converted one does not."""
    entry = small.serve(server, SLOWONLY, monkeypatch.setattr, dtype=torch.float16)
    (data,) = server.files.values()
    script = FULL.format(name=SLOWONLY, url=entry.url, sha256=entry.sha256, limit=len(data) + 1000)
    said, _ = run_python(script, tmp_path, TPN_HUB_NAMESPACE="")
    first, second = said.splitlines()
    assert first.startswith("WeightsUnavailableError could not keep")
    assert "model.safetensors could not be written" in first
    assert second == "400"
    assert len(server.requests) == 1
    assert sorted(os.listdir(cache / SLOWONLY)) == ["config.json", "model.safetensors"]


KILLED = """
import os, signal, small, tpn
from tpn.zoo import saved
small.change_entry({name!r}, url={url!r}, sha256={sha256!r})
def half(tensors, path, metadata):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
saved.save_file = half
tpn.create_model({name!r}, pretrained=True)
"""


def test_killed_while_converting(server, published, cache, tmp_path):
    script = KILLED.format(name=SLOWONLY, url=published.url, sha256=published.sha256)
    process = start_python(script, tmp_path, TPN_HUB_NAMESPACE="")
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL
    left = os.listdir(cache / SLOWONLY)
    assert len(left) == 2
    assert saved.WEIGHTS_FILE not in left
    assert same(tpn.create_model(SLOWONLY, pretrained=True), wanted(server))
    assert sorted(os.listdir(cache / SLOWONLY)) == ["config.json", "model.safetensors"]
    assert len(server.requests) == 1


@pytest.mark.slow
def test_eight_processes_fetch_once(server, published, cache, tmp_path):
    server.faults = [{"hang": 1}]
    script = (
        f"import small, tpn, torch; small.change_entry('{SLOWONLY}', url='{published.url}', sha256='{published.sha256}'); "
        f"print(tpn.create_model('{SLOWONLY}', pretrained=True).head.fc.weight.sum().item())"
    )
    processes = [start_python(script, tmp_path, TPN_HUB_NAMESPACE="") for _ in range(8)]
    results = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, results
    assert {out for out, _ in results} == {f"{wanted(server)['head.fc.weight'].sum().item()}\n"}
    assert len(server.requests) == 1


def test_link_to_a_checkpoint_with_other_classes(server, monkeypatch, cache):
    """Its classifiers come along: nothing is lost on the way through the cache."""
    torch.manual_seed(0)
    model = tpn.create_model(SLOWONLY, base_channels=4, num_classes=12)
    names = {ours: up for up, ours in our_names(small.MANIFESTS[SLOWONLY]).items()}
    torch.save({names[k]: v for k, v in model.state_dict().items()}, cache.parent / "mine.pth")
    data = (cache.parent / "mine.pth").read_bytes()
    path = f"/mine-{hashlib.sha256(data).hexdigest()}.pth"
    server.files[path] = data
    small.change_entry(SLOWONLY, monkeypatch.setattr)
    overlay = {"url": server.url + path}
    for _ in range(2):
        again = tpn.create_model(SLOWONLY, pretrained=True, num_classes=12, pretrained_cfg_overlay=overlay)
        assert same(again, model.state_dict())
    assert len(server.requests) == 1


def test_cache_that_is_a_file(published, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WeightsUnavailableError, match=r"could not keep .* in .*file/.*choose another place with TPN_CACHE"):
        tpn.create_model(SLOWONLY, pretrained=True, cache_dir=tmp_path / "file")


@pytest.mark.slow
@pytest.mark.parametrize("name", [SLOWONLY, TSM])
def test_real_size_gives_the_reference_logits(server, monkeypatch, cache, name):
    """The whole way of a published checkpoint, with the reference implementation's logits at its end."""
    manifest = small.MANIFESTS[name]
    torch.save({"meta": {}, "state_dict": upstream_state_dict(manifest)}, cache.parent / "file.pth")
    data = (cache.parent / "file.pth").read_bytes()
    digits = hashlib.sha256(data).hexdigest()[:8]
    entry = get_weights(name)
    path = f"/{Path(entry.url).name.rpartition('-')[0]}-{digits}.pth"
    server.files[path] = data
    changed = replace(entry, url=server.url + path, sha256=digits)
    monkeypatch.setattr(small.weights, "WEIGHTS", {**small.weights.WEIGHTS, name: changed})
    server.faults = [{"status": 503}, {"cut": 0.6}]
    expected = np.load(FIXTURES / f"{manifest}_s0_64x64.npz")
    meta = json.loads(str(expected["meta"]))
    x = torch.from_numpy(clip(tuple(meta["input"]), meta["seed"]))
    for attempt in ("from the publisher", "from the cache", "offline"):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", attempt == "offline")
        with torch.inference_mode():
            logits = tpn.create_model(name, pretrained=True).eval()(x)
        assert (logits - torch.from_numpy(expected["logits"])).abs().max() <= 2e-5 * np.abs(expected["logits"]).max(), attempt
        assert len(server.requests) == 3
