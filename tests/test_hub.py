"""The zoo's weights on the Hub: when it is asked, and what its answers mean."""

import hashlib
import logging
import os
import re
import threading
import time

import pytest
import small
import timm
from huggingface_hub import constants
from small import BY_HAND, SLOWONLY, one_line, put_on_hub, same, wanted

import tpn
from tpn import WeightsUnavailableError
from tpn.zoo.weights import HUB_NAMESPACE

pytestmark = pytest.mark.usefixtures("hub", "cache")


@pytest.fixture(autouse=True)
def _trusted(monkeypatch):
    """The user chose the namespace; without that, it is asked for known files only."""
    monkeypatch.setenv("TPN_HUB_NAMESPACE", HUB_NAMESPACE)


def test_hub_comes_first(server, published, hub, caplog, monkeypatch):
    repo_id = f"{HUB_NAMESPACE}/{SLOWONLY}"
    expected, _ = put_on_hub(hub, repo_id)
    caplog.set_level(logging.INFO, logger="tpn")
    assert same(tpn.create_model(SLOWONLY, pretrained=True), expected)
    assert server.requests == []
    assert one_line(caplog).endswith(f"from the Hub, {repo_id}")
    hub.requests.clear()
    assert same(tpn.create_model(SLOWONLY, pretrained=True), expected)
    assert hub.requests == []
    hub.down = 500
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(timm.create_model(SLOWONLY, pretrained=True), expected)


def test_hub_namespace(server, published, hub, monkeypatch, cache):
    expected, _ = put_on_hub(hub, f"somebody/{SLOWONLY}")
    assert same(tpn.create_model(SLOWONLY, pretrained=True, cache_dir=cache / "1"), wanted(server))
    monkeypatch.setenv("TPN_HUB_NAMESPACE", "somebody")
    assert same(tpn.create_model(SLOWONLY, pretrained=True, cache_dir=cache / "2"), expected)
    monkeypatch.setenv("TPN_HUB_NAMESPACE", "")
    hub.requests.clear()
    assert same(tpn.create_model(SLOWONLY, pretrained=True, cache_dir=cache / "3"), wanted(server))
    assert hub.requests == []


def test_revision_is_pinned(hub, monkeypatch, cache):
    repo_id = f"{HUB_NAMESPACE}/{SLOWONLY}"
    first, commit = put_on_hub(hub, repo_id, seed=1)
    second, _ = put_on_hub(hub, repo_id, seed=2)
    small.change_entry(SLOWONLY, monkeypatch.setattr, revision=commit)
    assert same(tpn.create_model(SLOWONLY, pretrained=True, cache_dir=cache / "1"), first)
    overlay = {"hf_hub_id": repo_id}
    assert same(timm.create_model(SLOWONLY, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache / "2"), second)
    overlay = {"hf_hub_id": f"{repo_id}@{commit}"}
    assert same(timm.create_model(SLOWONLY, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache / "2"), first)
    small.change_entry(SLOWONLY, monkeypatch.setattr, revision="v2")
    with pytest.raises(WeightsUnavailableError, match=rf"{repo_id}@v2 on the Hub \(http://127.*\) has no such revision"):
        tpn.create_model(SLOWONLY, pretrained=True, cache_dir=cache / "3")


def test_hub_is_not_asked_for_another_link(server, published, hub):
    put_on_hub(hub, f"{HUB_NAMESPACE}/{SLOWONLY}")
    (path,) = server.files
    server.files[f"/mirror{path}"] = server.files.pop(path)
    overlay = {"url": f"{server.url}/mirror{path}"}
    assert same(tpn.create_model(SLOWONLY, pretrained=True, pretrained_cfg_overlay=overlay), wanted(server))
    assert hub.requests == []


def test_nobody_can_take_the_projects_place(server, published, hub, monkeypatch, caplog):
    """Unless the user chose a namespace, only files with a known hash come from the Hub."""
    monkeypatch.delenv("TPN_HUB_NAMESPACE")
    repo_id = f"{HUB_NAMESPACE}/{SLOWONLY}"
    expected, _ = put_on_hub(hub, repo_id)
    assert same(tpn.create_model(SLOWONLY, pretrained=True), wanted(server))
    assert hub.requests == []
    monkeypatch.setenv("TPN_CACHE", f"{os.environ['TPN_CACHE']}-2")
    known = hashlib.sha256(hub.repos[repo_id][-1]["model.safetensors"]).hexdigest()
    small.change_entry(SLOWONLY, monkeypatch.setattr, converted_sha256=known)
    assert same(tpn.create_model(SLOWONLY, pretrained=True), expected)
    small.change_entry(SLOWONLY, monkeypatch.setattr, converted_sha256="0" * 64)
    with pytest.raises(WeightsUnavailableError, match="is not the file that this version of tpn knows.*remove it"):
        tpn.create_model(SLOWONLY, pretrained=True)


def test_errors_that_were_being_handled_already_do_not_matter(server, published, hub, monkeypatch):
    """What the caller was busy with when it asked for weights is not what went wrong with the Hub."""
    monkeypatch.setattr("tpn.zoo.hub.PAUSES", ())
    hub.down = 500
    unrelated = OSError(28, "No space left on device", "/somewhere/else")
    try:
        raise unrelated
    except OSError:
        with pytest.raises(WeightsUnavailableError, match=r"could not be reached \(status 500\)"):
            tpn.create_model("hf-hub:me/x")
        assert same(tpn.create_model(SLOWONLY, pretrained=True), wanted(server))


def test_malformed_name():
    with pytest.raises(ValueError, match="Repo id must be in the form"):
        tpn.create_model("hf-hub:a/b/c")


def test_hub_that_is_down_is_named(server, published, hub, caplog, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.down = 500
    model = tpn.create_model(SLOWONLY, pretrained=True)
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("tpn") and r.levelname == "WARNING"]
    assert re.fullmatch(
        rf"{HUB_NAMESPACE}/{SLOWONLY} on the Hub \({hub.url}\) could not be reached \(status 500\); check the network, and HF_ENDPOINT if set. Turning to the publisher's own "
        rf"file, which holds the same weights: {published.url}",
        warning,
    )
    assert same(model, wanted(server))


def test_hub_that_is_down_and_nobody_else_to_ask(hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.down = 503
    with pytest.raises(
        WeightsUnavailableError, match=r"could not be reached \(status 503\).* if set\. The weights of .* by hand: open https"
    ):
        tpn.create_model(BY_HAND, pretrained=True)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((403, None), "no access to .*hf auth login"),
        ((403, "GatedRepo"), "no access to .*hf auth login"),
        ((404, "EntryNotFound"), "has no model.safetensors"),
        ((404, "RevisionNotFound"), "no such revision"),
    ],
)
def test_hub_that_says_no_is_not_passed_over(server, published, hub, answer, says):
    hub.deny[f"{HUB_NAMESPACE}/{SLOWONLY}"] = answer
    with pytest.raises(WeightsUnavailableError, match=says):
        tpn.create_model(SLOWONLY, pretrained=True)
    assert server.requests == []


@pytest.mark.parametrize("answer", [(404, "RepoNotFound"), (401, "RepoNotFound"), (401, None), (404, None)])
def test_repository_that_does_not_exist_is(server, published, hub, answer, caplog):
    hub.deny[f"{HUB_NAMESPACE}/{SLOWONLY}"] = answer
    assert same(tpn.create_model(SLOWONLY, pretrained=True), wanted(server))
    assert not [r for r in caplog.records if r.name.startswith("tpn") and r.levelname == "WARNING"]


def test_hub_connection_that_breaks(hub, published):
    repo_id = f"{HUB_NAMESPACE}/{SLOWONLY}"
    expected, _ = put_on_hub(hub, repo_id)
    hub.faults = [{"cut": 0.5}]
    assert same(tpn.create_model(SLOWONLY, pretrained=True), expected)


def test_damaged_copy_of_the_hub(hub, published, cache, caplog):
    expected, _ = put_on_hub(hub, f"{HUB_NAMESPACE}/{SLOWONLY}")
    tpn.create_model(SLOWONLY, pretrained=True)
    (blob,) = cache.glob("models--*/blobs/*")
    os.truncate(blob, blob.stat().st_size // 2)
    assert same(tpn.create_model(SLOWONLY, pretrained=True), expected)
    assert "truncated or damaged: fetching it again" in caplog.text


def test_token_that_is_refused(server, published, hub, monkeypatch):
    hub.deny[f"{HUB_NAMESPACE}/{SLOWONLY}"] = (401, None)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(WeightsUnavailableError, match="does not accept the token that was sent: log in with"):
        tpn.create_model(SLOWONLY, pretrained=True)
    assert server.requests == []


def test_hf_hub_names_that_fail(hub, monkeypatch):
    with pytest.raises(WeightsUnavailableError, match=r"there is no repository me/nothing on the Hub \(http.*hf auth login"):
        tpn.create_model("hf-hub:me/nothing")
    hub.repos["me/empty"] = [{}]
    with pytest.raises(WeightsUnavailableError, match=r"has no config.json: it is not a model that tpn saved"):
        tpn.create_model("hf-hub:me/empty")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsUnavailableError, match="HF_HUB_OFFLINE"):
        tpn.create_model("hf-hub:me/nothing")


def test_hub_that_hangs(server, published, hub, caplog, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.hang = 0.5
    assert same(tpn.create_model(SLOWONLY, pretrained=True), wanted(server))
    assert re.search(
        r"on the Hub \(http.*\) could not be reached \(.*timed out.*\).* Turning to the publisher's own file", caplog.text
    )


@pytest.mark.parametrize("status", [429, 503])
def test_passing_answers_of_the_hub(hub, published, monkeypatch, status):
    expected, _ = put_on_hub(hub, f"{HUB_NAMESPACE}/{SLOWONLY}")
    monkeypatch.setattr("tpn.zoo.hub.PAUSES", (0.3, 0.3))
    hub.down = status
    threading.Timer(0.2, lambda: setattr(hub, "down", None)).start()
    assert same(tpn.create_model(SLOWONLY, pretrained=True), expected)


def test_copy_in_the_cache_when_the_hub_does_not_answer(hub, cache, caplog, monkeypatch):
    model = tpn.create_model("tsm_r50_sthv2", base_channels=4, num_classes=3)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    tpn.push_to_hub(model, "me/tsm")
    tpn.create_model("hf-hub:me/tsm", cache_dir=cache)
    monkeypatch.setattr("tpn.zoo.hub.PAUSES", ())
    hub.down = 500
    assert same(tpn.create_model("hf-hub:me/tsm", cache_dir=cache), model.state_dict())
    assert (
        "could not be reached (status 500); check the network, and HF_ENDPOINT if set; taking the copy in the cache"
        in caplog.text
    )
    hub.down = None
    newer = tpn.create_model("tsm_r50_sthv2", base_channels=4, num_classes=3)
    tpn.push_to_hub(newer, "me/tsm")
    assert same(tpn.create_model("hf-hub:me/tsm", cache_dir=cache), newer.state_dict())


def test_private_repository(server, published, hub, monkeypatch, cache):
    expected, _ = put_on_hub(hub, f"{HUB_NAMESPACE}/{SLOWONLY}")
    hub.private.add(f"{HUB_NAMESPACE}/{SLOWONLY}")
    assert same(tpn.create_model(SLOWONLY, pretrained=True, cache_dir=cache / "1"), wanted(server))
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert same(tpn.create_model(SLOWONLY, pretrained=True, cache_dir=cache / "2"), expected)
