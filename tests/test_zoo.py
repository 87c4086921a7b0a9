"""The weights table, the registry, timm's side of it, and saved model folders."""

import importlib
import json
import re
import warnings
from dataclasses import FrozenInstanceError

import pytest
import timm
import torch

import tpn
from tpn.zoo import factories
from tpn.zoo.weights import HUB_NAMESPACE, STHV1, STHV2, WEIGHTS


def narrow(name, **kwargs):
    """A model of the zoo with an eighth of its channels."""
    torch.manual_seed(0)
    return tpn.create_model(name, base_channels=8, **kwargs)


def test_table():
    assert len(WEIGHTS) == 22
    assert [entry.name for entry in WEIGHTS.values() if entry.embedded] == ["tpn_slowonly_tiny_motion.scratch"]
    assert {entry.model for entry in WEIGHTS.values()} == set(tpn.list_models())
    assert sum(entry.layout == "mmaction2" for entry in WEIGHTS.values()) == 3
    for field in ("url", "name"):
        assert len({getattr(entry, field) for entry in WEIGHTS.values()}) == 22


PUBLISHED = {name: entry for name, entry in WEIGHTS.items() if not entry.embedded}


@pytest.mark.parametrize("entry", PUBLISHED.values(), ids=PUBLISHED)
def test_published_entry(entry):
    assert WEIGHTS[f"{entry.model}.{entry.tag}"] is entry
    assert entry.url.startswith("https://")
    assert entry.manual == (entry.layout == "original")
    if entry.manual:
        assert entry.sha256 is None
    else:
        assert re.fullmatch("[0-9a-f]{8}", entry.sha256)
        assert entry.url.endswith(f"-{entry.sha256}.pth")

    family, depth, *middle, data = entry.model.removeprefix("tpn_").split("_")
    assert entry.dataset.file == data
    assert depth in ("r50", "r101")
    if family == "tsm":
        assert (entry.input.sampling, entry.input.num_frames, entry.input.num_clips) == ("segments", 8, 2)
        assert dict(entry.model_args) == ({"shift_shortcut": True} if entry.layout == "original" else {})
    else:
        frames, interval = map(int, (middle or ["8x8"])[0].split("x"))
        assert (entry.input.num_frames, entry.input.frame_interval) == (frames, interval)
        assert (entry.input.sampling, entry.input.num_clips) == ("dense", 10)
        assert not entry.model_args
    assert entry.input.num_crops == 3
    assert entry.input.flip == (entry.layout == "original" and family == "slowonly")

    assert entry.license == "apache-2.0"
    assert entry.repo_id == f"{HUB_NAMESPACE}/{entry.name}"
    assert (entry.revision, entry.measured_top1, entry.measured_top5) == (None, None, None)
    assert entry.converted_sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.converted_sha256)
    with pytest.raises(FrozenInstanceError):
        entry.url = "elsewhere"

    labels = entry.dataset.labels
    assert len(labels) == len(set(labels)) == entry.dataset.num_classes
    assert all(label == label.strip() != "" for label in labels)
    assert 40 < entry.reported_top1 < 90
    assert entry.reported_top5 is None or entry.reported_top1 < entry.reported_top5 < 100


def test_mirrored_labels_are_left_and_right():
    assert {entry.dataset.title for entry in PUBLISHED.values() if entry.input.mirrored} == {STHV1.title, STHV2.title}
    for dataset, mirrored in {(entry.dataset, entry.input.mirrored) for entry in PUBLISHED.values()}:
        for a, b in mirrored:
            left, right = dataset.labels[a].lower(), dataset.labels[b].lower()
            swapped = {"left": "right", "right": "left"}
            assert re.sub("left|right", lambda m: swapped[m[0]], left) == right  # noqa: B023


def test_model_info():
    info = tpn.model_info("tpn_slowonly_r50_k400.scratch")
    assert info.weights is WEIGHTS["tpn_slowonly_r50_k400.scratch"]
    assert info.params > 91e6
    assert tpn.model_info("tpn_slowonly_r50_k400").weights.tag == "in1k"
    for model in tpn.list_models():
        assert hasattr(factories, model)


def test_list_models():
    names = tpn.list_models()
    assert len(names) == len(set(names)) == 17
    assert tpn.list_models("tpn_*r101*") == [
        "tpn_slowonly_r101_16x4_k400",
        "tpn_slowonly_r101_32x2_k400",
        "tpn_slowonly_r101_k400",
    ]
    assert set(tpn.list_models(pretrained=True)) == set(WEIGHTS)
    assert tpn.list_models("nothing*") == []


def test_timm_knows_the_models():
    assert set(timm.list_models("tpn_*")) == set(tpn.list_models("tpn_*"))
    assert timm.is_model("tsm_r50_sthv1")
    cfg = timm.get_pretrained_cfg("tpn_tsm_r50_sthv2")
    assert (cfg.num_classes, cfg.tag, cfg.classifier) == (174, "original", ("head.fc", "aux_head.fc"))
    assert timm.get_pretrained_cfg("tsm_r50_sthv2").classifier == "head.fc"


def test_timm_gives_the_same():
    ours = narrow("tpn_tsm_r50_sthv1", num_classes=5)
    torch.manual_seed(0)
    theirs = timm.create_model("tpn_tsm_r50_sthv1", num_classes=5, base_channels=8)
    torch.manual_seed(0)
    function = factories.tpn_tsm_r50_sthv1(num_classes=5, base_channels=8)
    for other in (theirs, function):
        assert type(other) is tpn.TPNClassifier
        assert (other.input_spec, other.labels) == (ours.input_spec, ours.labels)
        torch.testing.assert_close(other.state_dict(), ours.state_dict(), rtol=0, atol=0)


def test_factory_function():
    model = factories.tpn_slowonly_r50_k400(num_classes=3)
    assert (model.num_classes, model.num_features, model.labels) == (3, 2048, None)
    assert model.backbone.out_channels == (1024, 2048)


def test_reload_is_silent():
    names = tpn.list_models()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(factories)
    assert tpn.list_models() == names
    assert narrow("tsm_r50_sthv1").num_classes == 174


def test_labels_and_input():
    model = narrow("tpn_slowonly_r50_16x4_k400")
    assert model.labels[0] == "abseiling"
    assert len(model.labels) == 400
    assert (model.input_spec.num_frames, model.input_spec.frame_interval) == (16, 4)
    assert tpn.input_spec(model) == tpn.input_spec("tpn_slowonly_r50_16x4_k400")
    assert tpn.input_spec("tpn_slowonly_r50_k400.original").flip
    assert not tpn.input_spec("tpn_slowonly_r50_k400").flip
    assert tpn.input_spec(narrow("tpn_slowonly_r50_k400.original")).flip


def test_tags_carry_model_arguments():
    assert narrow("tpn_tsm_r50_sthv1.original").backbone.shift_shortcut
    assert not narrow("tpn_tsm_r50_sthv1").backbone.shift_shortcut
    assert narrow("tsm_r50_sthv2").backbone.shift_shortcut
    assert not narrow("tsm_r50_sthv2", shift_shortcut=False).backbone.shift_shortcut
    assert factories.tpn_tsm_r50_sthv1(pretrained_cfg="original", base_channels=8).backbone.shift_shortcut


def test_pyramid_scales():
    for suffix, frames in (("", 8), ("_16x4", 16), ("_32x2", 32)):
        with torch.device("meta"):
            r50, r101 = (tpn.create_model(f"tpn_slowonly_{depth}{suffix}_k400") for depth in ("r50", "r101"))
        assert r50.neck.temporal_scales == (frames, frames)
        assert r101.neck.temporal_scales == (frames // 2, frames)
        assert r50.neck.num_frames == r101.neck.num_frames == (frames, frames)


@pytest.mark.parametrize("create", [tpn.create_model, tpn.input_spec, tpn.model_info])
def test_unknown_names(create):
    text = r"unknown model 'tpn_slowonly_r50'; the nearest are (\w+, ){2}\w+; tpn\.list_models\(\) and `tpn list` have all"
    with pytest.raises(tpn.UnknownModelError, match=text) as error:
        create("tpn_slowonly_r50")
    assert "tpn_slowonly_r50_k400" in str(error.value)
    with pytest.raises(tpn.UnknownModelError, match=r"tpn_slowonly_r50_k400 has no weights 'nope'; it has in1k, scratch, ori"):
        create("tpn_slowonly_r50_k400.nope")
    with pytest.raises(ValueError, match="unknown model 'resnet50'"):
        create("resnet50")
    with pytest.raises(tpn.UnknownModelError):
        create("")


def test_unknown_arguments():
    with pytest.raises(TypeError, match="num_frame"):
        narrow("tsm_r50_sthv1", num_frame=8)
    with pytest.raises(ValueError, match="flow_order must be one of 'cascade', .* got 'both'"):
        narrow("tpn_tsm_r50_sthv1", flow_order="both")
    with pytest.raises(ValueError, match=r"features_only .* model\.backbone\(x\)"):
        timm.create_model("tsm_r50_sthv1", features_only=True)
    with pytest.raises(ValueError, match="pass one of pretrained=True"):
        tpn.create_model("tsm_r50_sthv1", True, checkpoint_path="x.pth")


def test_weights_fetched_by_hand(tmp_path):
    entry = WEIGHTS["tsm_r50_sthv2.original"]
    with pytest.raises(tpn.WeightsUnavailableError) as error:
        tpn.create_model("tsm_r50_sthv2", pretrained=True, cache_dir=tmp_path, base_channels=8)
    for part in ("by hand", entry.url, "tpn convert FILE --model tsm_r50_sthv2.original"):
        assert part in str(error.value)


def test_weights_in_the_cache(tmp_path, monkeypatch):
    saved = narrow("tsm_r50_sthv2")
    tpn.save_pretrained(saved, tmp_path / "tsm_r50_sthv2.original")
    for kwargs in ({"cache_dir": tmp_path}, {}):
        if not kwargs:
            monkeypatch.setenv("TPN_CACHE", str(tmp_path))
        loaded = tpn.create_model("tsm_r50_sthv2", pretrained=True, base_channels=8, **kwargs)
        torch.testing.assert_close(loaded.state_dict(), saved.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("tpn_tsm_r50_sthv1", {}),
        ("tpn_tsm_r50_sthv1", {"num_classes": 5}),
        ("tpn_tsm_r50_sthv1.original", {"num_classes": 7}),
        ("tpn_tsm_r50_sthv1", {"shift_shortcut": True}),
        ("tsm_r50_sthv2", {"shift_shortcut": False, "num_classes": 1}),
        ("tpn_slowonly_r50_k400", {"flow_order": "parallel"}),
        ("tpn_slowonly_r50_k400.scratch", {"num_frames": 16, "num_classes": 2}),
        ("tpn_slowonly_r101_k400", {"temporal_scales": (2, 8), "drop_rate": 0.1, "in_chans": 2}),
        ("slowonly_r50_16x4_k400", {}),
    ],
)
def test_saved_folder(name, kwargs, tmp_path):
    model = narrow(name, **kwargs).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim == 1 else None
    folder = tpn.save_pretrained(model, tmp_path / "my model")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    x = torch.randn(1, model.in_chans, model.input_spec.num_frames, 32, 32)
    address = f"local-dir:{folder}"
    for loaded in (tpn.create_model(address), timm.create_model(address, pretrained=True)):
        assert not any(p.is_meta for p in loaded.parameters())
        assert torch.equal(loaded.eval()(x), model(x))
        assert loaded.num_classes == model.num_classes
        assert loaded.labels == model.labels
        assert loaded.input_spec == model.input_spec
        assert loaded.head.drop.p == model.head.drop.p
        assert json.dumps(loaded.model_args, sort_keys=True) == json.dumps(model.model_args, sort_keys=True)


def test_saving_again_gives_the_same(tmp_path):
    first = tpn.save_pretrained(narrow("tpn_tsm_r50_sthv1.original", num_classes=5), tmp_path / "1")
    second = tpn.save_pretrained(tpn.create_model(f"local-dir:{first}"), tmp_path / "2")
    assert json.loads((first / "config.json").read_text()) == json.loads((second / "config.json").read_text())


def test_saved_labels_of_ones_own(tmp_path):
    model = narrow("tsm_r50_sthv1", num_classes=2)
    model.labels = ("ja", "nein 否")
    folder = tpn.save_pretrained(model, tmp_path)
    assert tpn.create_model(f"local-dir:{folder}").labels == model.labels


def test_saved_folder_with_other_classes(tmp_path):
    saved = narrow("tpn_tsm_r50_sthv1", num_classes=5)
    folder = tpn.save_pretrained(saved, tmp_path)
    loaded = tpn.create_model(f"local-dir:{folder}", num_classes=3)
    assert (loaded.num_classes, loaded.labels) == (3, None)
    kept = {k for k, v in loaded.state_dict().items() if v.equal(saved.state_dict()[k])}
    assert kept == {k for k in saved.state_dict() if not k.startswith(("head.fc.", "aux_head.fc."))}
    reset = saved
    reset.reset_classifier(4)
    tpn.save_pretrained(reset, tmp_path / "reset")
    assert tpn.create_model(f"local-dir:{tmp_path / 'reset'}").num_classes == 4


def test_saved_folder_as_a_checkpoint(tmp_path):
    saved = narrow("tpn_tsm_r50_sthv1", num_classes=5)
    folder = tpn.save_pretrained(saved, tmp_path)
    loaded = narrow("tpn_tsm_r50_sthv1", checkpoint_path=folder / "model.safetensors")
    assert loaded.num_classes == 5
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict(), rtol=0, atol=0)


def test_missing_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        with pytest.raises(FileNotFoundError, match=name):
            tpn.create_model(f"local-dir:{tmp_path / name}")


def test_only_models_of_the_zoo_can_be_saved(tmp_path):
    backbone = tpn.ResNet3dSlowOnly(18, base_channels=8)
    model = tpn.TPNClassifier(backbone, None, tpn.ClassificationHead(64, 2))
    with pytest.raises(ValueError, match=r"only models made by tpn\.create_model"):
        tpn.save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{oops", "not JSON"),
        ("[1]", "no architecture, pretrained_cfg, input_spec"),
        ('{"architecture": "tsm_r50_sthv2", "pretrained_cfg": {}}', "no input_spec"),
        ('{"architecture": "resnet50", "pretrained_cfg": {}, "input_spec": {"num_frames": 8}}', "unknown model 'resnet50'"),
        (
            '{"architecture": "tsm_r50_sthv2", "pretrained_cfg": {}, "input_spec": {"frames": 8}}',
            "missing 1 required positional argument: 'num_frames'",
        ),
        ('{"architecture": "tsm_r50_sthv2", "pretrained_cfg": {}, "input_spec": null}', "config.json: "),
    ],
)
def test_damaged_config(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(tpn.CheckpointError, match=f"config.json: .*{says}" if says != "config.json: " else says):
        tpn.create_model(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("num_frames", [0, -1, "8", 2.5])
def test_bad_num_frames(num_frames):
    with pytest.raises(ValueError, match="num_frames must be an integer >= 1, got"):
        tpn.create_model("tsm_r50_sthv2", num_frames=num_frames)


def test_saved_files_can_be_read_by_all(tmp_path):
    tpn.save_pretrained(narrow("tsm_r50_sthv1"), tmp_path)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_wrapped_models_are_saved_unwrapped(tmp_path):
    model = narrow("tsm_r50_sthv1")
    tpn.save_pretrained(torch.nn.DataParallel(torch.compile(model)), tmp_path)
    again = tpn.create_model(f"local-dir:{tmp_path}")
    assert again.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(TypeError, match="only a TPNClassifier can be saved, got Linear"):
        tpn.save_pretrained(torch.nn.Linear(2, 2), tmp_path)


def test_labels_that_do_not_fit_are_not_saved(tmp_path):
    model = narrow("tsm_r50_sthv1", num_classes=3)
    model.labels = ("a", "b")
    with pytest.raises(ValueError, match="model.labels has 2 names, the model has 3 classes"):
        tpn.save_pretrained(model, tmp_path)


@pytest.mark.parametrize("name", ["me/my-tpn", "/some/folder", "hub:me/x"])
def test_names_of_other_places(name):
    with pytest.raises(tpn.UnknownModelError, match="'hf-hub:owner/name', one in a folder 'local-dir:folder'"):
        tpn.create_model(name)
