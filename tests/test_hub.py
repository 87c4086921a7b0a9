"""Models on the Hub: requests, revisions, caches, failures; and entries of the table with their weights there."""

import copy
import hashlib
import itertools
import json
import logging
import re
import urllib.error

import pytest
import small
import timm
from huggingface_hub import constants
from scripts import call
from servers import run_python
from small import BY_HAND, SLOWONLY, one_line, put_on_hub, same, wanted
from test_fetch import max_file_size

import tpn
from tpn import WeightsUnavailableError
from tpn.cli import main
from tpn.errors import HubUnreachableError, NoRepositoryError
from tpn.hub import translate_errors
from tpn.transfer import TransferError
from tpn.zoo.checkpoints import HubFiles
from tpn.zoo.saved import CONFIG_FILE, WEIGHTS_FILE

pytestmark = pytest.mark.usefixtures("hub", "cache")

REPO = "me/x"
MIRROR = f"us/{SLOWONLY}"


def load(name=f"hf-hub:{REPO}", create_model=tpn.create_model, **kwargs):
    """Load a model that `commit` made; return its label. Its config and its weights are of the same commit."""
    model = create_model(name, **kwargs)
    (label,) = model.labels
    assert chr(int(model.head.fc.bias.item())) == label
    return label


# hf-hub: names


def test_requests(hub, commit, cache):
    newest = commit("a")
    assert load() == "a"
    assert len(hub.requests) <= 5
    hub.requests.clear()
    assert load() == "a"
    assert len(hub.requests) == 1
    hub.requests.clear()
    assert load(f"hf-hub:{REPO}@{newest}") == "a"
    assert hub.requests == []
    assert tpn.input_spec(f"hf-hub:{REPO}@{newest}").num_frames == 8
    assert hub.requests == []


def test_info_fetches_no_weights(hub, commit):
    commit("a")
    done = call(main, "tpn", "info", f"hf-hub:{REPO}", "--json")
    assert done.returncode == 0, done.stderr
    model = tpn.create_model("tsm_r50_sthv2", base_channels=4, num_classes=1)
    assert json.loads(done.stdout)["params"] == sum(parameter.numel() for parameter in model.parameters())
    assert not any(WEIGHTS_FILE in str(request) for request in hub.requests)


def test_revisions(hub, commit, cache):
    first = commit("a")
    second = commit("b")
    commit("c")
    hub.branches["v2"] = 2
    for create_model, kwargs in ((tpn.create_model, {}), (timm.create_model, {"pretrained": True})):
        names = {f"{REPO}@{first}": "a", f"{REPO}@{second}": "b", f"{REPO}@v2": "b", f"{REPO}@main": "c", REPO: "c"}
        for name, label in names.items():
            assert load(f"hf-hub:{name}", create_model, cache_dir=cache / create_model.__module__, **kwargs) == label
    hub.branches["v2"] = 1
    assert load(f"hf-hub:{REPO}@v2") == "a"
    with pytest.raises(WeightsUnavailableError, match=f"revision.*{REPO}@v3"):
        load(f"hf-hub:{REPO}@v3")


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE])
def test_incomplete_repository(hub, commit, missing):
    commit("a")
    del hub.repos[REPO][-1][missing]
    with pytest.raises(WeightsUnavailableError, match=f"{missing}.*{REPO}"):
        load()


@pytest.mark.slow
@pytest.mark.parametrize("warm", [False, True])
def test_main_moves_between_two_requests(hub, commit, cache, warm):
    """Also after several of them, to commits whose files have equal lengths."""
    for label in "abcdef":
        commit(label)
    commits = hub.repos[REPO]
    for moves in itertools.product((False, True), repeat=4):
        hub.clear()
        hub.repos[REPO] = commits[:2]
        folder = cache / f"{warm}{moves}"
        if warm:
            assert load(cache_dir=folder) == "a"
            hub.requests.clear()
            hub.repos[REPO] = commits[:3]

        def move(sent, moves=moves):
            if sent <= 4 and moves[sent - 1]:
                hub.repos[REPO] = commits[: len(hub.repos[REPO]) + 1]

        hub.before_reply = move
        assert load(cache_dir=folder) in "abcdef"
        assert len(hub.requests) <= 5
        snapshots = [sorted(path.name for path in snapshot.iterdir()) for snapshot in folder.glob("models--*/snapshots/*")]
        assert snapshots == [[CONFIG_FILE, WEIGHTS_FILE]] * (1 + warm)
        hub.before_reply = lambda sent: None
        assert load(cache_dir=folder) == "abcdef"[len(hub.repos[REPO]) - 2]


def test_response_for_another_commit(hub, commit, cache):
    """To a request for the files of one commit."""
    first = commit("a")
    hub.before_reply = lambda sent: hub.headers.update({"X-Repo-Commit": "f" * 40} if sent > 1 else {})
    with pytest.raises(WeightsUnavailableError, match=rf"{REPO}.*{'f' * 40} instead of {first}"):
        load()
    assert not list(cache.rglob(CONFIG_FILE))


@pytest.mark.parametrize(
    "name", ["a/b/c", "a b", "me/x--y", "me/x@", "@v1", "me/x@a b", "me/x@../y", "me/x@/y", "me/x@y/", "me/x@a//b", "me/x@y\0"]
)
def test_malformed_name(hub, name):
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        tpn.create_model(f"hf-hub:{name}")
    assert hub.requests == []


@pytest.mark.slow
def test_caches(hub, commit, tmp_path, monkeypatch):
    """HF_HOME, TPN_CACHE and cache_dir each determine where both files are, and other processes need no network."""
    commit("a")
    (hf_home, tpn_cache, cache_dir) = places = [tmp_path / name for name in ("HF_HOME", "TPN_CACHE", "cache_dir")]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hf_home / "hub"))

    def load_from(place):
        monkeypatch.setenv("TPN_CACHE", "" if place == hf_home else str(tpn_cache))
        return load(cache_dir=cache_dir if place == cache_dir else None)

    for number, place in enumerate(places, start=1):
        assert load_from(place) == "a"
        assert len(list(tmp_path.rglob("snapshots"))) == number
        assert sorted(path.name for path in place.rglob("snapshots/*/*")) == [CONFIG_FILE, WEIGHTS_FILE]

    commit("b")
    hub.requests.clear()
    script = f"""
import os, shutil, tpn
from pathlib import Path
for damaged in (False, True):
    if damaged:
        os.truncate(next(Path("HF_HOME").rglob("snapshots/*/{WEIGHTS_FILE}")), 1000)
        next(Path("TPN_CACHE").rglob("snapshots/*/{CONFIG_FILE}")).unlink()
        shutil.rmtree("cache_dir")
    for variable, cache_dir in (("", None), ("TPN_CACHE", None), ("TPN_CACHE", "cache_dir")):
        os.environ["TPN_CACHE"] = variable
        try:
            print(*tpn.create_model("hf-hub:{REPO}", cache_dir=cache_dir).labels)
        except tpn.WeightsUnavailableError as error:
            print(error)
"""
    output, errors = run_python(script, tmp_path, HF_HOME=str(hf_home), HF_HUB_OFFLINE="1")
    labels, messages = output.splitlines()[:3], output.splitlines()[3:]
    assert labels == ["a"] * 3
    assert len(messages) == 3
    assert all(re.search(rf"{REPO}.*HF_HUB_OFFLINE", message) for message in messages)
    assert errors == ""
    assert hub.requests == []


def test_hub_is_down(hub, commit, caplog):
    """The cached pair is used, with a warning."""
    commit("a")
    hub.down = 503
    with pytest.raises(HubUnreachableError, match=rf"{REPO}.*{hub.url}.*503.*HF_ENDPOINT"):
        load()
    hub.down = None
    assert load() == "a"
    commit("b")
    hub.down = 500
    assert load() == "a"
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert re.search(rf"{REPO}.*{hub.url}.*500.*cache", warning)
    hub.down = None
    assert load() == "b"


@pytest.mark.parametrize("fault", [{"down": [429, 503]}, {"down": [500, 500]}, {"faults": [{"cut": 0.5}, {"cut": 0.5}]}], ids=str)
def test_passing_failures_are_retried(hub, commit, fault):
    commit("a")
    vars(hub).update(copy.deepcopy(fault))
    assert load() == "a"


def test_hub_that_hangs(hub, commit, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    commit("a")
    hub.hang = 0.5
    with pytest.raises(HubUnreachableError, match=rf"{REPO}.*timed out"):
        load()
    assert len(hub.requests) == 1


def test_new_commit_that_cannot_be_completed(hub, commit, caplog):
    """The cached pair is used whole."""
    commit("a")
    assert load() == "a"
    hub.requests.clear()
    commit("b")
    hub.before_reply = lambda sent: setattr(hub, "down", 503) if sent == 3 else None  # after the new config
    assert load() == "a"
    assert ("GET", f"/{REPO}/resolve/{hub.commit_of(2)}/{CONFIG_FILE}") in hub.requests
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert re.search(rf"{REPO}.*503.*cache", warning)
    hub.clear()
    for label in "ab":
        commit(label)
    assert load() == "b"


def test_cache_that_cannot_be_written(commit, tmp_path):
    commit("a")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WeightsUnavailableError, match=rf"{REPO}: {tmp_path}/file.*HF_HOME, TPN_CACHE or cache_dir"):
        load(cache_dir=tmp_path / "file")
    with (
        max_file_size(100_000),
        pytest.raises(WeightsUnavailableError, match=rf"{REPO}.*too large.*HF_HOME, TPN_CACHE or cache_dir"),
    ):
        load()
    assert load() == "a"


@pytest.mark.parametrize(
    ("status", "code", "token", "error", "says"),
    [
        (401, "RepoNotFound", None, NoRepositoryError, "hf auth login"),
        (401, None, None, NoRepositoryError, "hf auth login"),
        (401, None, "hf_expired", WeightsUnavailableError, "token.*hf auth login"),
        (403, None, None, WeightsUnavailableError, "access.*hf auth login"),
        (403, "GatedRepo", None, WeightsUnavailableError, "access.*hf auth login"),
        (404, "RepoNotFound", None, NoRepositoryError, "no repository"),
        (404, None, None, NoRepositoryError, CONFIG_FILE),
        (404, "RevisionNotFound", None, WeightsUnavailableError, "revision"),
        (404, "EntryNotFound", None, WeightsUnavailableError, CONFIG_FILE),
    ],
)
def test_refusals_are_final(hub, monkeypatch, status, code, token, error, says):
    hub.deny[REPO] = status, code
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(error, match=says) as caught:
        load()
    assert type(caught.value) is error
    assert f"{REPO} on the Hub ({hub.url})" in str(caught.value)
    assert len(hub.requests) == 1


def test_private_repository(hub, commit, monkeypatch):
    commit("a")
    hub.private.add(REPO)
    with pytest.raises(NoRepositoryError, match="private"):
        load()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert load() == "a"


def test_errors_that_the_caller_handles_do_not_matter(hub, commit):
    hub.down = 500
    try:
        raise OSError(28, "No space left on device", "/somewhere/else")
    except OSError:
        with pytest.raises(HubUnreachableError, match="500"):
            load()


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("refused"), ConnectionResetError("refused"), TransferError("refused")], ids=repr
)
def test_network_errors_of_other_libraries(error):
    with pytest.raises(WeightsUnavailableError, match="the weights.*refused"), translate_errors("the weights"):
        raise error


@pytest.mark.parametrize("error", [TypeError("img_size"), FileNotFoundError("x.pth")], ids=repr)
def test_other_errors_of_other_libraries(error):
    with pytest.raises(type(error)), translate_errors("the weights"):
        raise error


# Entries of the table


@pytest.fixture
def on_hub(hub, monkeypatch):
    """Add an entry with weights on the Hub to the table, each call another one; return its name."""

    def on_hub(tag, **source):
        name = f"tpn_slowonly_r50_k400.{tag}"
        small.change_entry(SLOWONLY, monkeypatch.setattr, name=name, source=HubFiles(REPO, **source))
        return name

    return on_hub


def test_entry(hub, on_hub, cache, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="tpn")
    expected, first = put_on_hub(hub, REPO, seed=1)
    put_on_hub(hub, REPO, seed=2)
    name = on_hub("pinned", commit=first, sha256=hashlib.sha256(hub.repos[REPO][1][WEIGHTS_FILE]).hexdigest())
    model = tpn.create_model(name, pretrained=True)
    assert same(model, expected)
    assert model.labels == tpn.create_model(SLOWONLY).labels
    assert REPO in one_line(caplog)
    hub.requests.clear()
    assert same(tpn.create_model(name, pretrained=True, num_classes=3), {k: v for k, v in expected.items() if "fc." not in k})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(tpn.create_model(name, pretrained=True), expected)
    assert hub.requests == []


def test_entry_with_another_hash(hub, on_hub, cache):
    _, first = put_on_hub(hub, REPO)
    name = on_hub("wrong", commit=first, sha256="0" * 64)
    for _ in range(2):
        with pytest.raises(WeightsUnavailableError, match=rf"{cache}.*{REPO}@{first}.*{'0' * 64}"):
            tpn.create_model(name, pretrained=True)


def test_entry_without_a_commit(hub, on_hub):
    with pytest.raises(NoRepositoryError, match=REPO):
        tpn.create_model(on_hub("missing"), pretrained=True)
    put_on_hub(hub, REPO, seed=1)
    expected, _ = put_on_hub(hub, REPO, seed=2)
    assert same(tpn.create_model(on_hub("newest"), pretrained=True), expected)


def test_overlay(hub, cache, monkeypatch):
    small.change_entry(SLOWONLY, monkeypatch.setattr)
    first, commit = put_on_hub(hub, REPO, seed=1)
    second, _ = put_on_hub(hub, REPO, seed=2)
    for repo, expected in ((REPO, second), (f"{REPO}@{commit}", first)):
        for create_model in (tpn.create_model, timm.create_model):
            assert same(create_model(SLOWONLY, pretrained=True, pretrained_cfg_overlay={"hf_hub_id": repo}), expected)


# Mirrors


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setenv("TPN_HUB_NAMESPACE", "us")


def test_mirror_is_not_asked(server, published, hub, mirror, monkeypatch, tmp_path):
    """For another link, or unless the user names one."""
    mirrored, _ = put_on_hub(hub, MIRROR)
    (path,) = server.files
    server.files[f"/other{path}"] = server.files[path]
    overlay = {"url": f"{server.url}/other{path}"}
    model = tpn.create_model(SLOWONLY, pretrained=True, pretrained_cfg_overlay=overlay)
    del server.files[f"/other{path}"]
    assert same(model, wanted(server))
    monkeypatch.setenv("TPN_HUB_NAMESPACE", "")
    assert same(tpn.create_model(SLOWONLY, pretrained=True, cache_dir=tmp_path / "1"), wanted(server))
    assert hub.requests == []
    monkeypatch.setenv("TPN_HUB_NAMESPACE", MIRROR.partition("/")[0])  # the table's own link is not another one
    own = {"url": published.source.url}
    assert same(tpn.create_model(SLOWONLY, pretrained=True, cache_dir=tmp_path / "2", pretrained_cfg_overlay=own), mirrored)


@pytest.mark.parametrize("denial", [(404, "RepoNotFound"), (401, "RepoNotFound"), (401, None), (404, None)])
def test_mirror_without_this_entry(server, published, hub, mirror, denial, caplog):
    hub.deny[MIRROR] = denial
    assert same(tpn.create_model(SLOWONLY, pretrained=True), wanted(server))
    assert not [r for r in caplog.records if r.name.startswith("tpn") and r.levelname == "WARNING"]


@pytest.mark.parametrize("denial", [(403, None), (404, "EntryNotFound"), (404, "RevisionNotFound")])
def test_mirror_that_refuses_is_not_passed_over(server, published, hub, mirror, denial):
    hub.deny[MIRROR] = denial
    with pytest.raises(WeightsUnavailableError, match=MIRROR):
        tpn.create_model(SLOWONLY, pretrained=True)
    assert server.requests == []


def test_mirror_that_is_down(server, published, hub, mirror, caplog):
    hub.down = 500
    assert same(tpn.create_model(SLOWONLY, pretrained=True), wanted(server))
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("tpn") and r.levelname == "WARNING"]
    assert re.search(rf"{MIRROR}.*500.*publisher", warning)
    with pytest.raises(WeightsUnavailableError, match=rf"500.*tpn convert FILE --model {BY_HAND}"):
        tpn.create_model(BY_HAND, pretrained=True)
