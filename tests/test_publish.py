"""Models go up to a Hub and come back, in a fresh process, through every way in."""

import hashlib
import re
import shutil

import pytest
import small
import torch
import yaml
from servers import ROOT, run_python
from small import BY_HAND, SLOWONLY, TSM

import tpn
from tpn.zoo import publish, saved
from tpn.zoo.weights import WEIGHTS

LOGITS = """
import timm, torch, tpn
torch.manual_seed(0)
def show(model):
    model = model.eval()
    x = torch.linspace(-1, 1, 8 * 3 * 32 * 32).view(1, model.in_chans, -1, 32, 32)
    print(repr(model(x).sum().item()), model.num_classes, model.labels and model.labels[0], model.input_spec)
"""


@pytest.fixture(autouse=True)
def _signed_in(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("TPN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(small.weights, "WEIGHTS", dict(WEIGHTS))


def shown(model):
    """What the fresh process prints of it."""
    x = torch.linspace(-1, 1, 8 * 3 * 32 * 32).view(1, model.in_chans, -1, 32, 32)
    total = model.eval()(x).sum().item()
    return f"{total!r} {model.num_classes} {model.labels and model.labels[0]} {model.input_spec}\n"


def card_of(hub, repo_id):
    text = hub.repos[repo_id][-1]["README.md"].decode()
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("tpn_slowonly_r50_k400", {"num_classes": 3}),
        ("tpn_slowonly_r50_k400", {"flow_order": "parallel"}),
        ("tpn_slowonly_r50_k400", {"num_frames": 4, "temporal_scales": (2, 4), "num_classes": 5, "in_chans": 6}),
        ("tpn_tsm_r50_sthv1", {"shift_shortcut": True, "num_classes": 2}),
        ("tsm_r50_sthv2", {}),
    ],
)
def test_fine_tuned_models_come_back(hub, tmp_path, name, args):
    torch.manual_seed(0)
    model = tpn.create_model(name, base_channels=4, **args)
    if "num_classes" in args:
        model.labels = tuple(f"ours {i}" for i in range(args["num_classes"]))
    address = tpn.push_to_hub(model, "me/my-tpn", license="mit")
    assert address == f"{hub.url}/me/my-tpn"
    assert len(hub.repos["me/my-tpn"]) == 2
    assert sorted(hub.repos["me/my-tpn"][-1]) == ["README.md", "config.json", "model.safetensors"]
    folder = saved.save_pretrained(model, tmp_path / "folder")
    script = LOGITS + (
        "show(tpn.create_model('hf-hub:me/my-tpn'))\n"
        "show(timm.create_model('hf-hub:me/my-tpn', pretrained=True))\n"
        f"show(tpn.create_model('local-dir:{folder}'))\n"
        f"show(timm.create_model('local-dir:{folder}', pretrained=True))\n"
    )
    said, _ = run_python(script, tmp_path, HF_HOME=str(tmp_path / "fresh"), HF_TOKEN="")
    assert said == shown(model) * 4


def test_published_model_comes_back_through_every_way_in(hub, server, tmp_path, monkeypatch):
    entry = small.serve(server, SLOWONLY, monkeypatch.setattr)
    for name in WEIGHTS:
        if name != SLOWONLY:
            monkeypatch.delitem(publish.WEIGHTS, name)
    (done,) = publish.publish("us")
    assert (done.state, done.repo_id) == ("published", f"us/{SLOWONLY}")
    assert len(server.requests) == 1
    model = tpn.create_model(SLOWONLY, pretrained=True)
    shutil.rmtree(tmp_path / "cache")
    server.files.clear()
    patch = f"import small; small.change_entry('{SLOWONLY}', url='{entry.url}', sha256='{entry.sha256}')\n"
    script = (
        LOGITS
        + patch
        + f"""
show(tpn.create_model('{SLOWONLY}', pretrained=True))
show(timm.create_model('{SLOWONLY}', pretrained=True))
show(torch.hub.load('{ROOT}', 'tpn_slowonly_r50_k400', source='local', pretrained=True))
show(tpn.create_model('hf-hub:us/{SLOWONLY}'))
show(timm.create_model('hf-hub:us/{SLOWONLY}', pretrained=True))
"""
    )
    env = {"HF_HOME": str(tmp_path / "fresh"), "HF_TOKEN": "", "TPN_HUB_NAMESPACE": "us"}
    said, _ = run_python(script, tmp_path, **env)
    assert said == shown(model) * 5
    assert len(server.requests) == 1
    said, _ = run_python(script, tmp_path, **env, HF_HUB_OFFLINE="1")
    assert said == shown(model) * 5


def test_cards(hub, server, monkeypatch):
    entry = small.serve(server, SLOWONLY, monkeypatch.setattr)
    for name in WEIGHTS:
        if name != SLOWONLY:
            monkeypatch.delitem(publish.WEIGHTS, name)
    list(publish.publish("us"))
    header, body = card_of(hub, f"us/{SLOWONLY}")
    assert header["pipeline_tag"] == "video-classification"
    assert header["license"] == entry.license
    assert header["library_name"] == "tpn"
    for fact in ("top-1 76.74 %, top-5 92.57 %", "not yet", "10 clips x 3 crops of 256", entry.url, f'"hf-hub:us/{SLOWONLY}"'):
        assert fact in body
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)[1]
    compile(code, "card", "exec")

    tpn.push_to_hub(tpn.create_model("tpn_slowonly_r50_k400", num_classes=9), "me/mine", license="mit")
    header, body = card_of(hub, "me/mine")
    assert header["license"] == "mit"
    assert "| classes | 9 |" in body
    assert "76.7" not in body


def test_card_that_somebody_wrote_stays(hub):
    model = tpn.create_model("tsm_r50_sthv2", base_channels=4)
    hub.repos["me/mine"] = [{"README.md": b"my words"}]
    tpn.push_to_hub(model, "me/mine")
    assert hub.repos["me/mine"][-1]["README.md"] == b"my words"
    assert "model.safetensors" in hub.repos["me/mine"][-1]


def test_short_name_is_under_ones_own_account(hub):
    assert tpn.push_to_hub(tpn.create_model("tsm_r50_sthv2", base_channels=4), "mine") == f"{hub.url}/me/mine"


def test_wrong_token(hub):
    with pytest.raises(tpn.UploadError, match=r"no right to write to me/mine on the Hub \(http://127.*hf auth login"):
        tpn.push_to_hub(tpn.create_model("tsm_r50_sthv2", base_channels=4), "me/mine", token="hf_wrong")
    assert hub.repos == {}


def test_equal_models_give_equal_files(tmp_path):
    """So that the hash of a published file can be known to those who convert it themselves."""
    script = (
        "import torch, tpn; torch.manual_seed(0); tpn.save_pretrained(tpn.create_model('tsm_r50_sthv2', base_channels=4), '{}')"
    )
    for folder in "ab":
        run_python(script.format(folder), tmp_path)
    for name in (saved.WEIGHTS_FILE, saved.CONFIG_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_command(hub, server, tmp_path, monkeypatch):
    """One checkpoint lies in the cache, three have direct links, seventeen are to be fetched by hand."""
    entries = [small.serve(server, name, monkeypatch.setattr) for name in (SLOWONLY, TSM)]
    small.change_entry(BY_HAND, monkeypatch.setattr)
    scratch = small.change_entry(
        "tpn_slowonly_r50_k400.scratch", monkeypatch.setattr, url=entries[0].url, sha256=entries[0].sha256
    )
    saved.save_pretrained(small.random_model(BY_HAND), tmp_path / "cache" / BY_HAND)
    script = "\n".join(f"small.change_entry({e.name!r}, url={e.url!r}, sha256={e.sha256!r})" for e in (*entries, scratch))
    script = f"import sys, small\n{script}\nsmall.change_entry({BY_HAND!r})\nfrom tpn.cli import main\nsys.argv = ['tpn', 'publish', '--namespace', 'us'%s]\nmain()"

    dry, _ = run_python(script % ", '--dry-run'", tmp_path)
    lines = dry.splitlines()
    assert len(lines) == len(WEIGHTS) - 1  # one comes with the package
    assert [line.split()[-1] for line in lines if line.startswith("to fetch and publish")] == [
        f"us/{e.name}" for e in (entries[0], scratch, entries[1])
    ]
    (ready,) = [line for line in lines if line.startswith("to publish ")]
    assert sum(line.startswith("not here ") and "tpn convert FILE --model" in line for line in lines) == 17
    assert (hub.repos, server.requests, hub.requests) == ({}, [], [])

    done, _ = run_python(script % "", tmp_path)
    published = [line.split() for line in done.splitlines() if line.startswith("published")]
    assert (
        {repo for _, repo, _ in published}
        == hub.repos.keys()
        == {f"us/{e.name}" for e in (*entries, scratch)} | {f"us/{BY_HAND}"}
    )
    assert ready.split()[-2:] in [line[1:] for line in published]
    for _, repo, sha256 in published:
        assert hashlib.sha256(hub.repos[repo][-1]["model.safetensors"]).hexdigest() == sha256


def test_command_without_a_right_to_write(hub, tmp_path):
    saved.save_pretrained(small.random_model(BY_HAND), tmp_path / "cache" / BY_HAND)
    script = (
        f"import sys, small\nsmall.change_entry({BY_HAND!r})\nfrom tpn.zoo import publish\n"
        f"publish.WEIGHTS = {{k: v for k, v in publish.WEIGHTS.items() if k == {BY_HAND!r}}}\n"
        "from tpn.cli import main\nsys.argv = ['tpn', 'publish', '--namespace', 'us']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    print(stop.code)"
    )
    said, complaints = run_python(script, tmp_path, HF_TOKEN="hf_wrong")
    line, code = said.splitlines()
    assert re.match(rf"failed +us/{BY_HAND}  no right to write to .*hf auth login", line)
    assert (code, complaints) == ("1", "")
