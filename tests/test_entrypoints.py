"""Models as functions: of tpn, of timm's registry, and of torch.hub."""

import importlib
import re
import sys
import types
import warnings

import pytest
import timm
import torch
from backbones import Pyramid
from servers import ROOT, run_python

import tpn
from tpn.zoo import entrypoints
from tpn.zoo.checkpoints import CHECKPOINTS


def test_every_model_is_a_function_of_tpn():
    from tpn import tpn_slowonly_r50_k400

    assert tpn_slowonly_r50_k400(num_classes=3).num_classes == 3
    assert set(tpn.list_models()) < set(dir(tpn))
    assert "8 x 8" in tpn_slowonly_r50_k400.__doc__
    with pytest.raises(AttributeError, match="nothing"):
        tpn.nothing  # noqa: B018


def test_all_ways_give_the_same():
    models = []
    for create in (tpn.create_model, timm.create_model, lambda name, **kwargs: getattr(tpn, name)(**kwargs)):
        torch.manual_seed(0)
        models.append(create("tpn_tsm_r50_sthv1", num_classes=5, base_channels=8))
    for other in models[1:]:
        assert type(other) is tpn.TPNClassifier
        assert other.config == models[0].config
        torch.testing.assert_close(other.state_dict(), models[0].state_dict(), rtol=0, atol=0)
    for create in (tpn.create_model, timm.create_model):
        assert create("tpn_tsm_r50_sthv1.original", base_channels=8).backbone.shift_shortcut
        assert not create("tpn_tsm_r50_sthv1", base_channels=8).backbone.shift_shortcut
    assert tpn.tpn_tsm_r50_sthv1(pretrained_cfg="original", base_channels=8).backbone.shift_shortcut


def test_saved_models_without_weights(tmp_path):
    model = tpn.create_model("tsm_r50_sthv1", base_channels=4, num_classes=3)
    address = f"local-dir:{tpn.save_pretrained(model, tmp_path)}"
    other = timm.create_model(address, num_classes=5)
    assert other.config.backbone == model.config.backbone
    assert other.num_classes == 5
    assert not torch.equal(other.backbone.conv1.weight, model.backbone.conv1.weight)
    model = tpn.build(Pyramid(), num_classes=4, input_spec=tpn.InputSpec(16, 1, short_side=48, crop_size=48))
    address = f"local-dir:{tpn.save_pretrained(model, tmp_path / 'module')}"
    assert timm.create_model(address, backbone=Pyramid()).config == model.config


def test_timm_lists_and_describes_the_models():
    assert set(timm.list_models("tpn_*")) == set(tpn.list_models("tpn_*"))
    assert set(CHECKPOINTS) <= set(timm.list_pretrained("*"))
    cfg = timm.get_pretrained_cfg("tpn_tsm_r50_sthv2")
    assert (cfg.num_classes, cfg.tag, cfg.classifier) == (174, "original", ("head.fc", "aux_head.fc"))
    assert timm.get_pretrained_cfg("tsm_r50_sthv2").classifier == "head.fc"
    model = timm.create_model("tpn_slowonly_tiny_motion", pretrained=True, num_classes=3)
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"]) == ((3, 64, 64), 1.0)
    with pytest.raises(ValueError, match=r"features_only.*model\.backbone"):
        timm.create_model("tsm_r50_sthv1", features_only=True)


def test_list_models():
    assert tpn.list_models("tpn_*r101*") == [
        "tpn_slowonly_r101_16x4_k400",
        "tpn_slowonly_r101_32x2_k400",
        "tpn_slowonly_r101_k400",
    ]
    assert set(tpn.list_models(pretrained=True)) == set(CHECKPOINTS)
    assert tpn.list_models("nothing*") == []


def test_models_of_other_packages_are_not_listed(monkeypatch):
    """timm groups models by the last part of a module's name, which another package may use, too."""
    for name in ("entrypoints", "factories"):
        module = types.ModuleType(f"other.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(f"def other_{name}_model(pretrained=False, **kwargs): pass", vars(module))
        timm.models.register_model(getattr(module, f"other_{name}_model"))
    assert not [name for name in tpn.list_models() if name.startswith("other_")]


def test_a_second_import_is_silent():
    names = tpn.list_models()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(entrypoints)
    assert set(names) < set(entrypoints.__all__)
    assert tpn.create_model("tsm_r50_sthv1", base_channels=4).num_classes == 174


TORCH_HUB = """
import sys, torch
repo = sys.argv[1]
sys.path = [p for p in sys.path if p and p != repo]
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "tpn" and repo not in sys.path:
            raise ImportError(name)
sys.meta_path.insert(0, Hidden())
try:
    import tpn
except ImportError:
    model = torch.hub.load(repo, "tsm_r50_sthv1", source="local", num_classes=7)
print(model(torch.zeros(1, 3, 4, 32, 32)).shape)
sys.path.insert(0, repo)
import hubconf
print(*(name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")))  # as torch.hub.list
print(hubconf.tpn_slowonly_r101_k400.__doc__)
"""


@pytest.mark.slow
def test_torch_hub_without_an_installed_tpn(tmp_path):
    out, _ = run_python(TORCH_HUB.replace("sys.argv[1]", repr(str(ROOT))), tmp_path)
    shape, names, doc, *_ = out.splitlines()
    assert set(names.split()) == {*tpn.list_models(), "tpn"}
    assert shape == "torch.Size([1, 7])"
    assert "slowonly" in doc


def test_torch_hub_asks_for_what_the_models_need():
    hubconf = importlib.import_module("hubconf")
    (listed,) = re.findall(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    packages = set(re.findall(r'"(\w+)', listed))
    assert set(hubconf.dependencies) == packages - {"av", "pillow", "typer", "rich", "filelock"}  # video, commands, training
