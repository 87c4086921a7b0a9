"""Saved models: what is saved is what is there, or the model is refused."""

import copy
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from backbones import Pyramid, assert_same
from torch import nn

import tpn
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
    from safetensors.torch import save_file

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
    kept = {k for k, v in loaded.state_dict().items() if v.equal(model.state_dict()[k])}
    assert kept == {k for k in model.state_dict() if not k.startswith("head.fc.")}


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
    with pytest.raises(ValueError, match=r"input_spec.*from_config"):
        tpn.save_pretrained(model, tmp_path)
    model.input_spec = tpn.InputSpec(8)
    with pytest.raises(ValueError, match="backbone.*ResNet3dSlowOnly.*register_backbone"):
        tpn.save_pretrained(model, tmp_path)
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
        ("{}", "architecture"),
        ('{"architecture": "resnet50", "model_args": {}}', "'resnet50'"),
        ('{"architecture": "tsm_r50_sthv2", "model_args": {"checkpoint_path": "evil.pth"}}', "checkpoint_path"),
        ('{"architecture": "tsm_r50_sthv2", "model_args": {}, "input_spec": {"frames": 8}}', "num_frames"),
        ({"head": {"num_classes": 200}, "labels": None}, r"head\.fc.*200"),
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
