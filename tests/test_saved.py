"""Saved models: what is saved is what is there, or the model is refused."""

import copy
import hashlib
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from backbones import Pyramid, assert_same
from safetensors.torch import load_file, save_file
from scripts import call
from torch import nn

import tpn
from tpn import cli
from tpn.zoo import saved

FIRST_VERSION = Path(__file__).parent / "fixtures" / "first_version.json"


def narrow(name="tpn_tsm_r50_sthv1", **kwargs):
    """A model of the zoo with an eighth of its channels."""
    torch.manual_seed(0)
    model = tpn.create_model(name, base_channels=8, **kwargs)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim == 1 else None
    return model.eval()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("tpn_tsm_r50_sthv1", {}),
        ("tpn_tsm_r50_sthv1.original", {"num_classes": 7}),
        ("tsm_r50_sthv2", {"shift_shortcut": False, "num_classes": 1}),
        ("tpn_slowonly_r50_k400", {"flow_order": "parallel", "drop_rate": 0.0}),
        ("tpn_slowonly_r50_k400.scratch", {"num_frames": 16, "num_classes": 0}),
        ("tpn_slowonly_r50_k400", {"flow_order": "isolation", "spatial_modulation": False, "out_indices": (1, 2, 3)}),
        ("tpn_slowonly_r50_k400", {"temporal_modulation": False, "aux_head": False, "num_frames": 4}),
        ("tpn_tsm_r50_sthv2", {"out_indices": (3, 3), "temporal_scales": (2, 8)}),
        ("tpn_slowonly_r101_k400", {"temporal_scales": (2, 8), "drop_rate": 0.1, "in_chans": 2}),
    ],
)
def test_models_come_back(name, kwargs, tmp_path):
    model = narrow(name, **kwargs)
    folder = tpn.save_pretrained(model, tmp_path / "my model")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    address = f"local-dir:{folder}"
    for loaded in (tpn.create_model(address), timm.create_model(address, pretrained=True)):
        assert_same(loaded, model)
    again = tpn.save_pretrained(tpn.create_model(address), tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()


def test_files_of_the_first_version(tmp_path):
    """config.json of models that version 0.1.0 saved, and what they are."""
    for case in json.loads(FIRST_VERSION.read_text()):
        (tmp_path / "config.json").write_text(json.dumps(case["config"]))
        assert saved.read_config(tmp_path) == tpn.ModelConfig.from_dict(case["expected"]), case["name"]


def test_weights_of_the_first_version(tmp_path):
    """Its weights files say how they were trained, and are loaded through tpn and timm."""
    model = narrow(num_classes=3, shift_shortcut=True)
    model.labels, model.input_spec = ("a", "b", "c"), replace(model.input_spec, flip_label_pairs=(("a", "c"),))
    tpn.save_pretrained(model, tmp_path)
    args = {"num_frames": 8, "shift_shortcut": True, "base_channels": 8}
    old = {"architecture": "tpn_tsm_r50_sthv1", "model_args": args}
    spec = model.input_spec.to_dict()
    spec["mirrored"] = [[0, 2]]
    del spec["flip_label_pairs"]
    config = {**old, "num_classes": 3, "label_names": ["a", "b", "c"], "input_spec": spec, "pretrained_cfg": {"num_classes": 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"model": json.dumps(old)})
    address = f"local-dir:{tmp_path}"
    for loaded in (tpn.create_model(address), timm.create_model(address, pretrained=True)):
        assert_same(loaded, model)
    with pytest.raises(tpn.CheckpointError, match="shift_shortcut=True.*shift_shortcut=False"):
        narrow(checkpoint_path=tmp_path / "model.safetensors")


def test_assigned_classifier_is_saved(tmp_path):
    """torchvision's idiom: only the classifier is replaced, and the auxiliary one stays as it was."""
    model = narrow()
    model.head.fc = nn.Linear(model.num_features, 12)
    assert (model.num_classes, model.config.num_classes, model.labels) == (12, 12, None)
    assert model.config.aux_head.num_classes == 174
    tpn.save_pretrained(model, tmp_path)
    loaded = tpn.create_model(f"local-dir:{tmp_path}")
    assert torch.equal(loaded.head.fc.weight, model.head.fc.weight)
    assert_same(loaded, model)


def test_config_follows_the_model():
    model = narrow()
    assert model.labels
    model.head.fc = nn.Linear(model.num_features, model.num_classes)  # others, although there are as many
    assert model.labels is None
    model.reset_classifier(4)
    assert (model.config.num_classes, model.config.aux_head.num_classes, model.config.labels) == (4, 4, None)
    model.labels = ["a", "b", "c", "d"]
    assert model.config.labels == ("a", "b", "c", "d")
    model.head.drop.p = 0.25
    assert model.config.head.drop_rate == 0.25
    model.aux_head = None
    assert model.config.aux_head is None
    with pytest.raises(ValueError, match="labels.*4.*2"):
        model.labels = ("a", "b")
    with pytest.raises(TypeError, match="labels.*'abcd'"):
        model.labels = "abcd"


def test_labels_and_other_classes(tmp_path):
    model = narrow("tsm_r50_sthv1", num_classes=2)
    model.labels = ("ja", "nein 否")
    tpn.save_pretrained(model, tmp_path)
    assert tpn.create_model(f"local-dir:{tmp_path}").labels == model.labels
    loaded = tpn.create_model(f"local-dir:{tmp_path}", num_classes=3)
    assert (loaded.num_classes, loaded.labels) == (3, None)
    before = model.state_dict()
    kept = {k for k, v in loaded.state_dict().items() if v.equal(before[k])}
    assert kept == {k for k in before if not k.startswith("head.fc.")}


def assign(path, module):
    return lambda model: model.set_submodule(path, module)


def change_flow_order(model):
    model.neck.flow_order = "parallel"


def change_epsilon(model):
    model.backbone.bn1.eps = 0.5


def tie_parameters(model):
    model.aux_head.fc.weight = model.head.fc.weight


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (assign("neck", nn.Identity()), r"model\.neck.*Identity.*neck=MODULE.*register_neck"),
        (assign("head", nn.Identity()), r"model\.head.*Identity.*head\.fc"),
        (assign("backbone.layer4", nn.Identity()), r"backbone\.layer4"),
        (assign("backbone.layer1.0.relu", nn.SiLU()), r"backbone\.layer1\.0\.relu.*SiLU"),
        (
            assign("backbone.layer2.0.conv2", nn.Conv2d(16, 16, 3, 2, 2, dilation=2, bias=False)),
            r"backbone\.layer2\.0\.conv2.*dilation",
        ),
        (assign("head.fc", nn.Linear(256, 12, bias=False)), r"head\.fc"),
        (change_flow_order, r"neck.*parallel.*cascade"),
        (change_epsilon, r"backbone\.bn1.*0\.5"),
        (tie_parameters, r"tied.*aux_head\.fc\.weight"),
    ],
)
def test_models_that_do_not_match_their_config_are_refused(change, says, tmp_path):
    model = narrow()
    change(model)
    with pytest.raises(ValueError, match=says):
        tpn.save_pretrained(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_changes_of_training_are_not_changes_of_the_model(tmp_path):
    model = narrow()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.momentum = 0.01
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).half().requires_grad_(False)
    model.backbone.grad_checkpointing = True
    tpn.save_pretrained(model, tmp_path)
    assert torch.equal(tpn.create_model(f"local-dir:{tmp_path}").head.fc.weight, model.head.fc.weight.float())


def test_tied_parameters_of_a_module_are_saved(tmp_path):
    class Tied(Pyramid):
        def __init__(self):
            super().__init__((6, 6, 6))
            self.stages[2].weight = self.stages[1].weight

    model = tpn.build(Tied(), num_classes=4, input_spec=tpn.InputSpec(16, 1, short_side=48, crop_size=48))
    tpn.save_pretrained(model, tmp_path)
    again = tpn.create_model(f"local-dir:{tmp_path}", backbone=Tied())
    assert again.backbone.stages[2].weight is again.backbone.stages[1].weight
    assert torch.equal(again.backbone.stages[1].weight, model.backbone.stages[1].weight)


def test_saving_does_not_change_random_numbers(tmp_path):
    model = narrow()
    torch.manual_seed(1)
    tpn.save_pretrained(model, tmp_path)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)


def test_part_of_another_model_is_described(tmp_path):
    """The config belongs to the part: a neck that the zoo built is known wherever it goes."""
    model, other = narrow(), narrow(flow_order="parallel")
    model.neck = copy.deepcopy(other.neck)
    assert model.config == other.config
    assert_same(tpn.create_model(f"local-dir:{tpn.save_pretrained(model, tmp_path)}"), model)


def compile_backbone(model):
    model.backbone = torch.compile(model.backbone)
    return model


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m)), compile_backbone])
def test_wrapped_models_and_their_checkpoints(wrap, tmp_path):
    expected = narrow(num_classes=5)
    wrapped = wrap(copy.deepcopy(expected))
    tpn.save_pretrained(wrapped, tmp_path)
    assert_same(tpn.create_model(f"local-dir:{tmp_path}"), expected)
    torch.save(wrapped.state_dict(), tmp_path / "state.pth")
    assert_same(narrow(checkpoint_path=tmp_path / "state.pth"), expected)


def test_models_put_together_by_hand(tmp_path):
    model = tpn.TPNClassifier(tpn.ResNet3dSlowOnly(18, base_channels=8), None, tpn.ClassificationHead(64, 2))
    with pytest.raises(ValueError, match="backbone.*ResNet3dSlowOnly.*register_backbone"):
        tpn.save_pretrained(model, tmp_path)
    registered = narrow()
    registered.input_spec = None
    for use in (tpn.input_spec, tpn.VideoClassifier, lambda model: tpn.save_pretrained(model, tmp_path)):
        with pytest.raises(ValueError, match=r"no input_spec.*tpn\.InputSpec"):
            use(registered)
    with pytest.raises(TypeError, match="TPNClassifier.*Linear"):
        tpn.save_pretrained(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="optimized"):
        tpn.save_pretrained(tpn.optimize(narrow("tsm_r50_sthv1"), sample=torch.randn(1, 3, 8, 32, 32)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_weights_for_a_saved_model(tmp_path):
    address = f"local-dir:{tpn.save_pretrained(narrow(), tmp_path)}"
    with pytest.raises(ValueError, match="url.*checkpoint_path"):
        tpn.create_model(address, pretrained_cfg_overlay={"url": "http://127.0.0.1/x-01234567.pth"})


def test_missing_files(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        with pytest.raises(FileNotFoundError, match=name):
            tpn.create_model(f"local-dir:{tmp_path / name}")
    shutil.copy(tpn.save_pretrained(narrow(), tmp_path / "all") / "config.json", tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        tpn.create_model(f"local-dir:{tmp_path / 'empty'}")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("{oops", "not JSON"),
        ("[1]", "config.json"),
        ("{}", "'model' is missing"),
        ('{"architecture": "resnet50", "model_args": {}}', "'resnet50'"),
        ('{"architecture": "tsm_r50_sthv2", "model_args": {"checkpoint_path": "evil.pth"}}', "checkpoint_path"),
        ('{"architecture": "tsm_r50_sthv2", "model_args": {}, "input_spec": {"frames": 8}}', "num_frames"),
        ({"head": {"num_classes": 200}, "labels": None}, r"head\.num_classes.*200"),
        ({"input_spec": {"num_frames": 0}}, "num_frames.*0"),
        ({"head": {"num_classes": "x"}}, "num_classes.*'x'"),
        ({"backbone": None}, "backbone.*None"),
        ({"backbone": {"name": "tsm", "args": {"depht": 50}}}, "depht"),
        ({"neck": {"name": "nope"}}, "neck.*'nope'"),
    ],
)
def test_damaged_config(change, says, tmp_path):
    config = json.loads((tpn.save_pretrained(narrow("tsm_r50_sthv2"), tmp_path) / "config.json").read_text())
    text = change if isinstance(change, str) else json.dumps({**config, "model": {**config["model"], **change}})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((ValueError, TypeError), match=says):
        tpn.create_model(f"local-dir:{tmp_path}")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_config_has_the_hash_of_the_weights(tmp_path):
    folder = tpn.save_pretrained(narrow(), tmp_path)
    assert json.loads((folder / "config.json").read_text())["weights_sha256"] == sha256(folder / "model.safetensors")


def test_a_flipped_bit_is_found(tmp_path):
    path = tpn.save_pretrained(narrow(), tmp_path) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5000] ^= 4
    path.write_bytes(data)
    with pytest.raises(tpn.CheckpointError, match=rf"^{tmp_path}/config\.json: .*weights_sha256.*{sha256(path)}.*damaged"):
        tpn.create_model(tmp_path)


def test_check_model(tmp_path):
    def check(name):
        done = call(cli.main, "tpn", "check-model", name)
        return done.returncode, done.stdout, done.stderr

    folder = tpn.save_pretrained(narrow(), tmp_path / "model")
    path = folder / "model.safetensors"
    assert check(folder) == (0, f"{path}: {len(load_file(path))} tensors, SHA-256 {sha256(path)}, verified\n", "")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    code, out, error = check(f"local-dir:{folder}")
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"error: {folder}/config\.json: .*weights_sha256.*{sha256(path)}.*\n", error)
    own = tpn.build(Pyramid((6, 6, 6)), num_classes=4, input_spec=tpn.InputSpec(16, 1, short_side=48, crop_size=48))
    for name in (without_hash(tpn.save_pretrained(own, tmp_path / "own")), "tpn_slowonly_tiny_motion"):
        assert re.search(r"SHA-256 [0-9a-f]{64}, not verified", check(name)[1])


def without_hash(folder):
    """Change a saved model to one of an earlier version, which had no hash."""
    config = json.loads((folder / "config.json").read_text())
    del config["weights_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_files_of_two_saves(tmp_path):
    """As after a crash between the two renames, or a download while a repository changes."""
    first, second = narrow(num_classes=3), narrow(num_classes=3)
    first.labels, second.labels = ("a", "b", "c"), ("c", "b", "a")
    tpn.save_pretrained(first, tmp_path / "first")
    torch.nn.init.ones_(second.head.fc.weight)
    tpn.save_pretrained(second, tmp_path / "second")
    shutil.copy(tmp_path / "second" / "config.json", tmp_path / "first")
    for create in (tpn.create_model, lambda name: timm.create_model(f"local-dir:{name}", pretrained=True)):
        with pytest.raises(
            tpn.CheckpointError, match=rf"^{tmp_path}/first/config\.json: .*weights_sha256.*another save.*checkpoint_path"
        ):
            create(tmp_path / "first")
    weights = tmp_path / "first" / "model.safetensors"
    assert torch.equal(narrow(num_classes=3, checkpoint_path=weights).head.fc.weight, first.head.fc.weight)


def test_a_model_that_is_saved_while_it_is_opened(tmp_path, monkeypatch):
    """The config was read before both files were replaced."""
    tpn.save_pretrained(narrow(num_classes=3), tmp_path)
    newer, file_sha256 = narrow(num_classes=5), saved.file_sha256

    def save_first(path):
        monkeypatch.setattr(saved, "file_sha256", file_sha256)
        tpn.save_pretrained(newer, tmp_path)
        return file_sha256(path)

    monkeypatch.setattr(saved, "file_sha256", save_first)
    assert_same(tpn.create_model(tmp_path), newer)


def test_weights_that_are_a_pointer_of_git_lfs(tmp_path):
    tpn.save_pretrained(narrow(), tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(tpn.CheckpointError, match=rf"^{tmp_path}/model\.safetensors: .*git-lfs"):
        tpn.create_model(tmp_path)


def test_weights_saved_from_a_parallel_model(tmp_path):
    model = narrow()
    without_hash(tpn.save_pretrained(model, tmp_path))
    save_file({f"module.{name}": value for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert_same(tpn.create_model(tmp_path), model)


def test_models_saved_without_a_hash(tmp_path):
    model = narrow()
    assert_same(tpn.create_model(without_hash(tpn.save_pretrained(model, tmp_path))), model)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["neck"]["args"]["flow_order"] = "parallel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(tpn.CheckpointError, match=r"config\.json: neck\.args\.flow_order.*'parallel'.*missing"):
        tpn.create_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"head": {"num_classes": 7}, "labels": None}, r"head\.num_classes.*7.*3"),
        ({"head": {"num_classes": 7}, "labels": list("abcdefg")}, r"head\.num_classes.*7.*3"),
        ({"head": {"num_classes": 0}, "labels": None}, r"head\.num_classes.*0.*3"),
        ({"labels": ["a", "b"]}, r"labels.*3.*2"),
        ({"aux_head": {"num_classes": 5}}, r"aux_head\.num_classes.*5.*3"),
        ({"backbone": {"name": "tsm", "args": {"base_channels": 8000}}}, r"base_channels.*8000"),
        ({"neck": {"name": "tpn", "args": {"groups": 2**40}}}, r"groups"),
    ],
)
@pytest.mark.parametrize("own_config", [True, False], ids=["own weights", "weights of others"])
def test_sizes_are_those_of_the_weights(change, says, own_config, tmp_path):
    """Whatever the caller asks for: a wrong configuration is not a new classifier."""
    model = narrow(num_classes=3)
    model.labels = ("a", "b", "c")
    config = json.loads((tpn.save_pretrained(model, tmp_path) / "config.json").read_text())
    config["model"] |= change
    if not own_config:
        del config["weights_sha256"]
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        if "neck" in change:
            return  # nothing in the file shows it
    (tmp_path / "config.json").write_text(json.dumps(config))
    for kwargs in ({}, {"num_classes": 7}, {"num_classes": 3}):
        with pytest.raises(tpn.CheckpointError, match=rf"^{tmp_path}/config\.json: .*({says})"):
            tpn.create_model(tmp_path, **kwargs)


def test_fields_that_may_be_edited(tmp_path):
    model = narrow(num_classes=3)
    config = json.loads((tpn.save_pretrained(model, tmp_path) / "config.json").read_text())
    config["model"]["labels"] = ["x", "y", "z"]
    config["model"]["head"]["drop_rate"] = 0.25
    config["model"]["input_spec"] |= {"num_clips": 1, "num_crops": 1, "short_side": 300, "target_fps": 12.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = tpn.create_model(tmp_path)
    assert (loaded.labels, loaded.config.head.drop_rate, loaded.input_spec.num_views) == (("x", "y", "z"), 0.25, 1)
    assert torch.equal(loaded.head.fc.weight, model.head.fc.weight)


def test_errors_of_a_part_name_the_file_and_the_field(tmp_path):
    """Of a saved model without weights in its folder, too: another file has them."""
    model = narrow(num_classes=3)
    config = json.loads((tpn.save_pretrained(model, tmp_path / "saved") / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"model": {**config["model"], "neck": {"name": "tpn", "args": {"groups": "x"}}}})
    )
    with pytest.raises(tpn.CheckpointError, match=rf"^{tmp_path}/config\.json: .*neck\.name='tpn'.*neck\.args\.groups='x'"):
        tpn.create_model(tmp_path, checkpoint_path=tmp_path / "saved" / "model.safetensors")


@pytest.mark.parametrize("values", ["of a tensor", "counted"])
def test_networks_that_need_values_while_they_are_built(values, tmp_path):
    """They cannot be built without memory, so only their owner's machine can tell whether they fit."""

    @tpn.register_backbone(f"needs values {values}")
    class NeedsValues(Pyramid):
        def __init__(self, width=6):
            super().__init__((width,) * 3)
            self.rates = (
                [rate.item() for rate in torch.linspace(0, 1, 3)]
                if values == "of a tensor"
                else torch.bincount(torch.ones(3).int())
            )

    spec = tpn.InputSpec(16, 1, sampling="segments", short_side=48, crop_size=48)
    model = tpn.create_model("tpn", backbone=f"needs values {values}", num_classes=4, input_spec=spec)
    assert_same(tpn.create_model(tpn.save_pretrained(model, tmp_path)), model)


def test_loading_does_not_change_random_numbers(tmp_path):
    tpn.save_pretrained(narrow(), tmp_path)
    states = []
    for build in (lambda: saved.open_saved(tmp_path), lambda: None):
        torch.manual_seed(1)
        build()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_failed_write_leaves_no_half_model(tmp_path, monkeypatch):
    before = tpn.save_pretrained(narrow(num_classes=2), tmp_path)
    expected = {path.name: path.read_bytes() for path in before.iterdir()}

    def full(*args, **kwargs):
        raise saved.SafetensorError("No space left on device")

    monkeypatch.setattr(saved, "save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors.*No space"):
        tpn.save_pretrained(narrow(num_classes=3), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == expected
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
