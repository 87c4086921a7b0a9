"""A Hub that must not be believed: names, sizes, lengths, speeds, and waits of its choice."""

import pytest
from huggingface_hub import constants
from servers import flood, trickle
from test_fetch import max_file_size
from test_hub import REPO, load
from test_transfer import CHUNK, CHUNKED, GZIP, OK, endless_zeros

from tpn import WeightsUnavailableError
from tpn.errors import HubUnreachableError
from tpn.zoo.saved import CONFIG_FILE, WEIGHTS_FILE

pytestmark = pytest.mark.usefixtures("hub", "cache")


@pytest.mark.parametrize("name", ["ETag", "X-Repo-Commit"])
@pytest.mark.parametrize("value", ["../../../evil", "/evil", "..", ".", "a/b", "a\\b", "", " ", "x" * 300, None])
def test_names_that_leave_the_cache(hub, commit, tmp_path, name, value):
    commit("a")
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    quoted = value if name == "X-Repo-Commit" or value is None else f'"{value}"'
    hub.headers = {name: quoted and quoted.replace("/evil", f"{tmp_path}/evil") if value == "/evil" else quoted}
    with pytest.raises(WeightsUnavailableError, match=rf"{REPO}.*{name.replace('X-Repo-Commit', 'commit hash')}"):
        load()
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_retry_after(hub, commit, cached, status, method):
    """A server's wish to wait has a limit; for metadata nobody waits with a copy in the cache."""
    commit("a")
    if cached:
        assert load() == "a"
        commit("b")
        hub.requests.clear()
    asked = "30" if cached and method == "HEAD" else "1000000000"
    if method == "HEAD":
        hub.down, hub.headers = status, {"Retry-After": asked}
    else:
        hub.faults, hub.forever = [{"status": status, "headers": {"Retry-After": asked}}], True
    if cached:
        assert load() == "a"
    else:
        with pytest.raises(HubUnreachableError, match=rf"{REPO}.*{status}.* {asked} s.*60 s.*tries: 1, [\d.]+ s"):
            load()
    assert len(hub.requests) == (1 if method == "HEAD" else 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        {"raw": flood(CHUNKED, CHUNK)},
        {"raw": flood(GZIP + endless_zeros()[0], endless_zeros()[1])},
        {"body": bytes(10**6)},
        {"body": b"{}"},
    ],
    ids=["chunked", "gzip", "longer", "shorter"],
)
@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_no_more_than_announced(hub, commit, cache, fault, name):
    commit("a")
    size = len(hub.repos[REPO][-1][name])
    hub.before_reply = lambda sent: (
        vars(hub).update(faults=[fault], forever=True) if sent == (2, 4)[name == WEIGHTS_FILE] else None
    )
    says = rf"{name}.*{REPO}.*{size}.*tries: 3, [\d.]+ s"
    with max_file_size(len(hub.repos[REPO][-1][WEIGHTS_FILE])), pytest.raises(HubUnreachableError, match=says):
        load()
    assert not list(cache.rglob(".incomplete*/*"))
    hub.clear()
    commit("a")
    assert load() == "a"


def test_config_that_announces_too_much(hub, commit):
    commit("a")
    hub.headers = {"Content-Length": None, "X-Linked-Size": str(10**12)}
    with pytest.raises(WeightsUnavailableError, match=rf"{CONFIG_FILE}.*{REPO}.*{10**12}"):
        load()
    assert {method for method, _ in hub.requests} == {"HEAD"}


@pytest.mark.parametrize("head", [OK + b"X: ", b"", OK + b"Content-Length: "], ids=["header", "first line", "length"])
def test_slow_metadata(hub, commit, monkeypatch, head):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    commit("a")
    hub.raw_head = trickle(head)
    with pytest.raises(HubUnreachableError, match=rf"{REPO}.*timed out after 0.2 s; tries: 1, 0.\d s"):
        load()


def test_slow_files(hub, commit, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    commit("a")
    hub.faults, hub.forever = [{"raw": trickle(CHUNKED + b"1;")}], True
    with pytest.raises(HubUnreachableError, match=rf"{CONFIG_FILE}.*{REPO}.*bytes per second.*tries: 2, [\d.]+ s"):
        load()


@pytest.mark.parametrize("value", ["abc", "-1", "1.5"])
def test_length_that_is_not_a_number(hub, commit, value):
    commit("a")
    hub.headers = {"Content-Length": value}
    with pytest.raises(HubUnreachableError, match=rf"{REPO}.*Content-Length"):
        load()
