"""Parts by name: registered, built, saved and loaded; and parts that are modules of your own."""

import json

import pytest
import torch
from backbones import SMALL, assert_same
from torch import nn

import tpn
from tpn.models.registry import BACKBONES, NECKS


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """Forget what a test registers."""
    for registry in (BACKBONES, NECKS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


class Concat(nn.Module):
    """A neck: every map, pooled to the size of the last, side by side."""

    def __init__(self, in_channels, out_channels=16, act="relu"):
        super().__init__()
        self.out_channels = out_channels
        self.mix = nn.Conv3d(sum(in_channels), out_channels, 1)
        self.act = nn.ReLU() if act == "relu" else nn.GELU()

    def forward(self, maps):
        size = maps[-1].shape[2:]
        return self.act(self.mix(torch.cat([nn.functional.adaptive_avg_pool3d(x, size) for x in maps], dim=1)))


class Strided(nn.Module):
    """A backbone with two maps."""

    def __init__(self, width=4, in_chans=3):
        super().__init__()
        self.fine = nn.Conv3d(in_chans, width, (1, 8, 8), (1, 8, 8))
        self.coarse = nn.Conv3d(width, 2 * width, (1, 2, 2), (1, 2, 2))

    def forward(self, x):
        x = self.fine(x).relu()
        return x, self.coarse(x)


def small(**kwargs):
    return tpn.create_model("tpn", **{"backbone": "timm/resnet18", "num_classes": 3, "input_spec": SMALL, **kwargs})


def test_registered_neck_comes_back_by_name(tmp_path):
    tpn.register_neck("concat")(Concat)
    model = small(neck="concat", out_channels=24, act="gelu")
    assert model.config.neck == tpn.PartConfig("concat", {"out_channels": 24, "act": "gelu"})
    assert (model.num_features, model.head.in_channels, model.aux_head.conv.conv.out_channels) == (24, 24, 24)
    assert_same(tpn.create_model(f"local-dir:{tpn.save_pretrained(model, tmp_path)}"), model)
    other = tpn.create_model(f"local-dir:{tmp_path}", num_classes=5)
    assert torch.equal(other.neck.mix.weight, model.neck.mix.weight)


def test_an_argument_of_your_neck_may_have_a_name_of_the_pyramid(tmp_path):
    @tpn.register_neck("scaled")
    class Scaled(Concat):
        def __init__(self, in_channels, out_channels=16, temporal_scales=None):
            super().__init__(in_channels, out_channels)

    model = small(neck="scaled")
    assert_same(tpn.create_model(f"local-dir:{tpn.save_pretrained(model, tmp_path)}"), model)


def test_registered_neck_on_a_model_of_the_zoo(tmp_path):
    tpn.register_neck("concat")(Concat)
    model = tpn.create_model("tpn_slowonly_tiny_motion", neck="concat")
    assert_same(tpn.create_model(f"local-dir:{tpn.save_pretrained(model, tmp_path)}"), model)
    baseline = tpn.create_model("tsm_r50_sthv1", base_channels=4, neck="tpn", flow_order="parallel")
    assert baseline.neck.flow_order == "parallel"
    assert baseline.aux_head is not None


def test_registered_backbone_comes_back_by_name(tmp_path):
    tpn.register_backbone("strided", input_defaults=lambda name, args: tpn.InputDefaults(64, 72))(Strided)
    model = tpn.create_model("tpn", backbone="strided", width=6, num_classes=3, num_frames=4, in_chans=2)
    assert (model.input_spec.crop_size, model.input_spec.short_side, model.in_chans) == (64, 72, 2)
    assert model.neck.in_channels == (6, 12)
    assert_same(tpn.create_model(f"local-dir:{tpn.save_pretrained(model, tmp_path)}"), model)


def test_families_get_the_rest_of_the_name(tmp_path):
    @tpn.register_backbone("mine/")
    def family(name, *, in_chans=3):
        return Strided(int(name), in_chans)

    model = small(backbone="mine/5")
    assert model.backbone.fine.out_channels == 5
    assert_same(tpn.create_model(f"local-dir:{tpn.save_pretrained(model, tmp_path)}"), model)


@pytest.mark.parametrize("name", [Concat, "", "auto", "module:x"])
def test_invalid_names(name):
    with pytest.raises(TypeError, match="neck.*register_neck"):
        tpn.register_neck(name)


def test_names_are_taken_once():
    tpn.register_neck("concat")(Concat)
    tpn.register_neck("concat")(Concat)  # the same class again, as when a module is imported twice
    with pytest.raises(ValueError, match="'concat'.*Concat"):
        tpn.register_neck("concat")(Strided)


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"neck": "concta"}, tpn.UnknownModelError, "neck.*'concta'.*'concat'"),
        ({"neck": "concat", "flow_order": "cascade"}, TypeError, "flow_order.*out_channels, act"),
        ({"neck": 3}, TypeError, "neck.*3"),
        ({"backbone": 3}, TypeError, "backbone.*3"),
        ({"neck": nn.Identity()}, TypeError, "out_channels.*Identity"),
        ({"backbone_args": {"in_chans": 1}}, ValueError, "in_chans"),
    ],
)
def test_errors(kwargs, error, says):
    tpn.register_neck("concat")(Concat)
    with pytest.raises(error, match=says):
        small(**kwargs)


def test_a_saved_name_that_is_not_registered_is_named(tmp_path):
    tpn.register_neck("concat")(Concat)
    tpn.save_pretrained(small(neck="concat"), tmp_path)
    del NECKS._entries["concat"]
    with pytest.raises(tpn.UnknownModelError, match=r"neck.*'concat'.*neck=MODULE"):
        tpn.create_model(f"local-dir:{tmp_path}")


def test_modules_in_place_of_registered_names(tmp_path):
    tpn.register_backbone("strided")(Strided)
    tpn.register_neck("concat")(Concat)
    model = small(backbone="strided", neck="concat")
    tpn.save_pretrained(model, tmp_path)
    with pytest.raises(TypeError, match="backbone.*module.*'tsm'"):
        tpn.create_model(f"local-dir:{tmp_path}", backbone="tsm")
    del BACKBONES._entries["strided"], NECKS._entries["concat"]
    loaded = tpn.create_model(f"local-dir:{tmp_path}", backbone=Strided(), neck=Concat((4, 8)))
    assert torch.equal(loaded.neck.mix.weight, model.neck.mix.weight)


def test_arguments_of_modules():
    for neck in (Concat((256, 512)), None):
        with pytest.raises(ValueError, match="neck_args.*registered"):
            small(neck=neck, neck_args={"out_channels": 7})
    with pytest.raises(ValueError, match="backbone_args.*module"):
        small(backbone=Strided(), backbone_args={"width": 7})
    with pytest.raises(TypeError, match="input_spec.*dict"):
        small(input_spec={"num_frames": 8})
    with pytest.raises(TypeError, match="num_frames.*'8'"):
        small(input_spec=None, num_frames="8")


def test_arguments_that_no_signature_names():
    @tpn.register_neck("free")
    def free(in_channels, **kwargs):
        return Concat(in_channels, **kwargs)

    assert small(neck="free", neck_args={"out_channels": 7}).num_features == 7


def test_saving_leaves_modules_alone(tmp_path):
    model = small(neck=Concat((128, 256)), backbone="timm/resnet18", out_indices=(-3, -2)).to(torch.bfloat16)
    tpn.save_pretrained(model, tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_modules_are_saved_and_asked_for(tmp_path):
    backbone, neck = Strided(), Concat((4, 8))
    model = small(backbone=backbone, neck=neck)
    assert model.backbone is backbone
    assert model.neck is neck
    assert model.config.neck.name.endswith("test_registry.Concat")
    tpn.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match=r"Strided.*backbone=MODULE"):
        tpn.create_model(f"local-dir:{tmp_path}")
    with pytest.raises(ValueError, match=r"Concat.*neck=MODULE"):
        tpn.create_model(f"local-dir:{tmp_path}", backbone=Strided())
    assert_same(tpn.create_model(f"local-dir:{tmp_path}", backbone=Strided(), neck=Concat((4, 8))), model)
    with pytest.raises(tpn.CheckpointError, match="does not fit"):
        tpn.create_model(f"local-dir:{tmp_path}", backbone=Strided(), neck=Concat((4, 8), 8))


def test_a_neck_on_one_map(tmp_path):
    tpn.register_neck("concat")(Concat)
    with pytest.raises(ValueError, match="aux_head=False"):
        small(neck="concat", out_indices=(-1,))
    model = small(neck="concat", out_indices=(-1,), aux_head=False)
    assert model.aux_head is None
    assert_same(tpn.create_model(f"local-dir:{tpn.save_pretrained(model, tmp_path)}"), model)


def test_from_config_builds_what_config_says():
    model = small(neck=None)
    again = tpn.TPNClassifier.from_config(model.config)
    again.load_state_dict(model.state_dict())
    assert_same(again, model)
    with pytest.raises(ValueError, match="neck"):
        tpn.TPNClassifier.from_config(model.config, neck=Concat((4, 8)))
    with pytest.raises(TypeError, match="backbone.*module.*'strided'"):
        tpn.TPNClassifier.from_config(model.config, backbone="strided")


def test_context_is_not_saved(tmp_path):
    tpn.register_backbone("strided")(Strided)
    folder = tpn.save_pretrained(small(backbone="strided"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["backbone"] == {"name": "strided", "args": {}}
    config["model"]["backbone"]["args"]["in_chans"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="in_chans"):
        tpn.create_model(f"local-dir:{folder}")
