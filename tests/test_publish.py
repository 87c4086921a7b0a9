"""Models are uploaded to a Hub and loaded from it, also in another process."""

import hashlib
import logging
import re
import shutil

import pytest
import small
import timm
import torch
import yaml
from huggingface_hub import constants
from servers import ROOT, run_python
from small import BY_HAND, SLOWONLY, TSM, same
from test_cli import run

import tpn
from tpn.zoo import checkpoints, fetch, publish
from tpn.zoo.checkpoints import HubFiles, Page
from tpn.zoo.saved import CONFIG_FILE, WEIGHTS_FILE

pytestmark = pytest.mark.usefixtures("cache")

SCRATCH = "tpn_slowonly_r50_k400.scratch"

SHOW = """
import timm, torch, tpn
def show(model):
    x = torch.linspace(-1, 1, 8 * 3 * 32 * 32).view(1, model.in_chans, -1, 32, 32)
    print(repr(model.eval()(x).sum().item()), model.num_classes, model.labels, model.input_spec)
"""
exec(SHOW)


@pytest.fixture(autouse=True)
def _signed_in(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)


@pytest.fixture
def table(monkeypatch):
    """Reduce the table to some entries."""

    def table(*names):
        monkeypatch.setattr(checkpoints, "CHECKPOINTS", {name: checkpoints.CHECKPOINTS[name] for name in names})

    return table


@pytest.fixture(scope="module")
def model():
    return tpn.create_model("tsm_r50_sthv2", base_channels=4, num_classes=9)


def card_of(hub, repo_id):
    text = hub.repos[repo_id][-1]["README.md"].decode()
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


@pytest.mark.slow
def test_models_load_in_another_process(hub, tmp_path, capsys):
    cases = [
        ("tpn_slowonly_r50_k400", {"num_classes": 3, "flow_order": "parallel"}),
        ("tpn_slowonly_r50_k400", {"num_frames": 4, "temporal_scales": (2, 4), "num_classes": 5, "in_chans": 6}),
        ("tpn_tsm_r50_sthv1", {"shift_shortcut": True, "num_classes": 2}),
        ("tsm_r50_sthv2", {}),
    ]
    script = SHOW
    for number, (name, args) in enumerate(cases):
        model, repo_id = tpn.create_model(name, base_channels=4, **args), f"me/model-{number}"
        if args:
            model.labels = tuple(f"ours {i}" for i in range(args["num_classes"]))
        assert tpn.push_to_hub(model, repo_id) == f"{hub.url}/{repo_id}"
        assert len(hub.repos[repo_id]) == 2  # the empty repository, and one commit
        assert sorted(hub.repos[repo_id][-1]) == ["README.md", CONFIG_FILE, WEIGHTS_FILE]
        for place in (f"hf-hub:{repo_id}", f"local-dir:{tpn.save_pretrained(model, tmp_path / str(number))}"):
            script += f"show(tpn.create_model({place!r}))\nshow(timm.create_model({place!r}, pretrained=True))\n"
            for _ in range(2):
                show(model)  # noqa: F821
    assert run_python(script, tmp_path, HF_HOME=str(tmp_path / "home"), HF_TOKEN="")[0] == capsys.readouterr().out


@pytest.mark.slow
def test_published_checkpoint_loads_in_every_way(hub, server, published, cache, table, monkeypatch, caplog):
    table(SLOWONLY)
    (done,) = publish.publish("us")
    assert (done.state, done.repo_id) == ("published", f"us/{SLOWONLY}")
    assert done.detail == hashlib.sha256(hub.repos[done.repo_id][-1][WEIGHTS_FILE]).hexdigest()
    expected = small.wanted(server)
    shutil.rmtree(cache)
    server.close()
    monkeypatch.setenv("TPN_HUB_NAMESPACE", "us")
    with caplog.at_level(logging.INFO, logger="tpn"):
        assert same(tpn.create_model(SLOWONLY, pretrained=True), expected)
    assert done.repo_id in small.one_line(caplog)
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        hub.requests.clear()
        assert same(tpn.create_model(SLOWONLY, pretrained=True), expected)
        assert same(timm.create_model(SLOWONLY, pretrained=True), expected)
        assert same(torch.hub.load(str(ROOT), published.model, source="local", pretrained=True), expected)
        assert hub.requests == []
        assert same(tpn.create_model(f"hf-hub:us/{SLOWONLY}"), expected)
        assert same(timm.create_model(f"hf-hub:us/{SLOWONLY}", pretrained=True), expected)


def test_cards(hub, published, table, model):
    table(SLOWONLY)
    list(publish.publish("us"))
    header, body = card_of(hub, f"us/{SLOWONLY}")
    assert (header["pipeline_tag"], header["library_name"]) == ("video-classification", "tpn")
    assert header["license"] == published.license
    accuracy = f"top-1 {published.reported_top1} %, top-5 {published.reported_top5} %"
    for fact in (accuracy, "10 clips x 3 crops of 256", published.source.url, f'"hf-hub:us/{SLOWONLY}"'):
        assert fact in body
    compile(re.search(r"```python\n(.*?)```", body, re.DOTALL)[1], "card", "exec")

    tpn.push_to_hub(model, "me/mine", license="mit")
    header, body = card_of(hub, "me/mine")
    assert header["license"] == "mit"
    assert "| classes | 9 |" in body
    assert "top-1" not in body


def test_existing_card_is_kept(hub, model):
    hub.repos["me/mine"] = [{"README.md": b"my words"}]
    assert tpn.push_to_hub(model, "mine") == f"{hub.url}/me/mine"  # without owner
    assert hub.repos["me/mine"][-1]["README.md"] == b"my words"
    assert WEIGHTS_FILE in hub.repos["me/mine"][-1]


def test_failed_uploads(hub, model):
    with pytest.raises(tpn.UploadError, match=rf"me/mine.*{hub.url}.*hf auth login"):
        tpn.push_to_hub(model, "me/mine", token="hf_wrong")
    hub.down = 404
    with pytest.raises(tpn.UploadError, match=rf"me/mine.*{hub.url}.*404"):
        tpn.push_to_hub(model, "me/mine")
    assert hub.repos == {}


def test_equal_models_give_equal_files(tmp_path, model):
    """The hash of a published file is that of a local conversion."""
    first, *others = (tpn.save_pretrained(model, tmp_path / name) for name in "abcd")
    for folder in others:
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            assert (folder / name).read_bytes() == (first / name).read_bytes()


def test_states(hub, server, cache, monkeypatch):
    """One checkpoint is in the cache; three have direct links, one of them a broken one; one is on the Hub already."""
    entries = {name: small.serve(server, name, monkeypatch.setattr) for name in (SLOWONLY, TSM)}
    small.change_entry(SCRATCH, monkeypatch.setattr, source=entries[TSM].source)  # not its file
    small.change_entry(SLOWONLY, monkeypatch.setattr, name="tpn_slowonly_r50_k400.hub", source=HubFiles("us/any"))
    cached = small.change_entry(BY_HAND, monkeypatch.setattr)
    tpn.save_pretrained(small.random_model(BY_HAND), fetch.weights_folder(cached))
    manual = {e.name for e in checkpoints.CHECKPOINTS.values() if isinstance(e.source, Page)} - {BY_HAND}

    dry = {done.repo_id[3:]: done for done in publish.publish("us", dry_run=True)}
    assert {name for name, done in dry.items() if done.state == "to fetch and publish"} == {SLOWONLY, TSM, SCRATCH}
    assert {name for name, done in dry.items() if done.state == "not here"} == manual
    assert all(f"tpn convert FILE --model {name}" in dry[name].detail for name in manual)
    assert dry.keys() == manual | {SLOWONLY, TSM, SCRATCH, BY_HAND}
    assert dry[BY_HAND].state == "to publish"
    assert hub.requests == server.requests == []

    done = {done.repo_id[3:]: done for done in publish.publish("us")}
    assert {name for name in done if done[name].state == "published"} == {SLOWONLY, TSM, BY_HAND}
    assert hub.repos.keys() == {f"us/{SLOWONLY}", f"us/{TSM}", f"us/{BY_HAND}"}
    assert done[BY_HAND].detail == dry[BY_HAND].detail
    assert done[SCRATCH].state == "failed"
    assert re.search("174 classes", done[SCRATCH].detail)
    assert {name for name in done if done[name].state == "not here"} == manual


def test_command(hub, cache, table, tmp_path):
    """It ends with status 1 if an upload failed."""
    table(BY_HAND)
    tpn.save_pretrained(small.random_model(BY_HAND), cache / BY_HAND)
    done = run("publish", "--namespace", "us", cwd=tmp_path, HF_TOKEN="hf_wrong")
    assert done.returncode == 1
    assert re.match(rf"failed +us/{BY_HAND} .*hf auth login", done.stdout)
    assert run("publish", "--namespace", "us", cwd=tmp_path).returncode == 0
    assert hub.repos.keys() == {f"us/{BY_HAND}"}
