"""The pyramid on modules of one's own, and what cannot be."""

import copy
import json
import re

import pytest
import timm
import torch
from backbones import SMALL, SPEC, Pyramid, clips, small
from torch import nn

import tpn
from tpn.models.backbones import FoldedBackbone, TemporalShift
from tpn.zoo.convert import CheckpointError


@pytest.mark.parametrize("as_dict", [False, True])
def test_module_of_ones_own(as_dict, tmp_path):
    model = tpn.build(Pyramid(as_dict=as_dict), num_classes=4, input_spec=SPEC)
    assert model.neck.in_channels == (6, 10, 9)
    assert model.neck.num_frames == model.neck.temporal_scales == (8, 4, 2)
    assert model.training
    x = clips(model)
    logits, aux_logits = model.forward_with_aux(x)
    assert logits.shape == aux_logits.shape == (2, 4)
    assert {name: tuple(each.shape[1:]) for name, each in model.forward_intermediates(x)[1].items() if name[0] == "c"} == {
        "c3": (6, 8, 24, 24),
        "c4": (10, 4, 12, 12),
        "c5": (9, 2, 6, 6),
    }

    model.eval()
    tpn.save_pretrained(model, tmp_path)
    again = tpn.create_model(f"local-dir:{tmp_path}", backbone=Pyramid(as_dict=as_dict)).eval()
    assert torch.equal(again(x), model(x))
    fresh = tpn.build(
        Pyramid(as_dict=as_dict),
        num_classes=4,
        input_spec=SPEC,
        pretrained_cfg={"state_dict": model.state_dict()},
        pretrained=True,
    )
    assert torch.equal(fresh.eval()(x), model(x))
    with pytest.raises(ValueError, match=r"built on a module of its maker's own, \w*\.?Pyramid; pass such a module"):
        tpn.create_model(f"local-dir:{tmp_path}")
    with pytest.raises(CheckpointError, match=r"backbone.stages.1.weight \(10, 6, 3, 3, 3\) instead of \(12, 6, 3, 3, 3\)"):
        tpn.create_model(f"local-dir:{tmp_path}", backbone=Pyramid((6, 12, 9)))


@pytest.mark.parametrize(
    ("scales", "lengths"),
    [((8, 4, 2), [1, 1, 1]), ((2, 2, 1), [4, 2, 2]), ((1, 1, 1), [8, 4, 2])],
)
@pytest.mark.parametrize("flow_order", ["cascade", "parallel", "top_down", "bottom_up"])
def test_levels_that_differ_in_time(scales, lengths, flow_order):
    """The paper's general form: each level keeps a tempo of its own until the levels are fused."""
    model = tpn.build(Pyramid(), num_classes=4, input_spec=SPEC, temporal_scales=scales, flow_order=flow_order, drop_rate=0.0)
    features, found = model.forward_intermediates(clips(model))
    assert [found[f"temporal_modulation.{i}"].shape[2] for i in range(3)] == lengths
    assert features.shape == (2, 9, lengths[-1], 6, 6)
    assert features is found["pyramid_fusion"]
    logits, aux_logits = model.forward_with_aux(clips(model))
    (logits.square().sum() + aux_logits.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_backbone_is_left_as_it_is():
    backbone = small("timm/resnet18").backbone
    backbone.net.bn1.eval()  # frozen by its owner
    before = copy.deepcopy(backbone.state_dict())
    model = tpn.build(backbone, num_classes=3, num_frames=2, input_spec=SMALL)
    assert model.backbone is backbone
    assert not backbone.net.bn1.training
    assert backbone.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("meta", torch.float32)])
def test_neck_and_heads_go_where_the_backbone_is(device, dtype):
    model = tpn.build(Pyramid().to(device, dtype), num_classes=4, input_spec=SPEC)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device, dtype)}
    model.reset_classifier(2)
    assert model(clips(model).to(device, dtype)).shape == (2, 2)


def test_a_failed_build_leaves_the_module_as_it_was():
    backbone = FoldedBackbone(timm.create_model("resnet18", features_only=True, out_indices=(3, 4)))
    with pytest.raises(ValueError, match="flow_order must be one of"):
        tpn.build(backbone, num_classes=3, input_spec=SMALL, temporal_shift=True, flow_order="nope")
    assert backbone.num_frames is None
    backbone.add_temporal_shift(2)
    assert tpn.build(backbone, num_classes=3, input_spec=SMALL)(torch.randn(1, 3, 2, 64, 64)).shape == (1, 3)
    with pytest.raises(ValueError, match="the blocks shift frames already, for clips of 2"):
        backbone.add_temporal_shift(2)


def test_backbone_without_parameters():
    class Pools(nn.Module):
        def forward(self, x):
            return [nn.functional.avg_pool3d(x, (1, s, s)) for s in (4, 8)]

    model = tpn.build(Pools(), num_classes=3, input_spec=SPEC)
    model.reset_classifier(0)
    model.reset_classifier(4)
    assert model(clips(model)).shape == (2, 4)


def test_weights_with_a_pyramid_need_one(tmp_path):
    tpn.save_pretrained(small("timm/resnet18"), tmp_path / "tpn")
    tpn.save_pretrained(small("timm/resnet18", neck=None), tmp_path / "baseline")
    with pytest.raises(ValueError, match="these weights have a pyramid, which neck=None leaves out; use start without them"):
        tpn.create_model(f"local-dir:{tmp_path}/tpn", neck=None)
    with pytest.raises(ValueError, match=r"use create_model\('slowonly_r50_k400'\), or start without them"):
        tpn.create_model("tpn_slowonly_r50_k400", pretrained=True, neck=None)
    assert tpn.create_model(f"local-dir:{tmp_path}/baseline", neck=None).neck is None
    assert tpn.create_model(f"local-dir:{tmp_path}/baseline").neck is None


@pytest.mark.parametrize(
    ("sizes", "steps"),
    [
        ([56, 28, 14, 7], [3, 2, 1, 0]),
        ([5, 3, 2], [2, 1, 0]),  # rounded up again and again
        ([9, 5, 3], [2, 1, 0]),
        ([12, 5, 2], [2, 1, 0]),  # without padding
        ([20, 8, 3], [3, 1, 0]),
        ([20, 9, 7, 4], [2, 1, 1, 0]),
        ([8, 8], [0, 0]),
        ([64, 32, 16, 8, 4, 2, 1], [6, 5, 4, 3, 2, 1, 0]),
        ([25, 12, 5], None),
        ([27, 9], None),
    ],
)
def test_what_is_built_fits(sizes, steps):
    """Whatever sizes a backbone's maps have: they pass through the pyramid, or the model is not built."""

    class Sizes(nn.Module):
        def forward(self, x):
            return [nn.functional.adaptive_avg_pool3d(x, (2, size, size)) for size in sizes]

    spec = tpn.InputSpec(2, crop_size=64, three_crop_size=64)
    if steps is None:
        with pytest.raises(ValueError, match="needs sizes that differ by a power of two"):
            tpn.build(Sizes(), num_classes=3, input_spec=spec)
        return
    model = tpn.build(Sizes(), num_classes=3, input_spec=spec)
    assert [len(modulation) for modulation in model.neck.spatial_modulation] == steps
    features, found = model.forward_intermediates(clips(model))
    assert features.shape == (2, 3, 1, sizes[-1], sizes[-1])
    first = max(6 - len(sizes), 1)
    assert [name for name in found if name[0] == "c"] == [f"c{first + i}" for i in range(len(sizes))]


def test_a_baseline_from_the_folder_of_a_pyramid(tmp_path):
    """Its arguments are the file's, not the caller's."""
    model = small("timm/resnet18", groups=8, flow_order="parallel")
    tpn.save_pretrained(model, tmp_path / "tpn")
    tpn.save_pretrained(small("timm/resnet18", neck=None), tmp_path / "baseline")
    again = tpn.create_model(f"local-dir:{tmp_path}/tpn", neck=None, checkpoint_path=tmp_path / "baseline" / "model.safetensors")
    assert again.neck is None


def test_saved_with_other_arguments(tmp_path):
    tpn.save_pretrained(small("torchvision/r3d_18"), tmp_path)
    longer = tpn.create_model(f"local-dir:{tmp_path}", num_frames=16)
    assert longer.input_spec.num_frames == longer.model_args["num_frames"] == 16
    assert longer.neck.num_frames == (4, 2)
    with pytest.raises(ValueError, match="the saved model takes 3 channels, got in_chans=1"):
        tpn.create_model(f"local-dir:{tmp_path}", in_chans=1)


def test_views_that_a_network_of_a_fixed_size_cannot_take(caplog):
    """Said when it is built, not when somebody has trained it."""
    for fits in ({"three_crop_size": 64}, {"three_crop_size": 72, "num_crops": 1}):
        tpn.create_model("tpn", **FIXED_SIZE, input_spec=tpn.InputSpec(2, short_side=72, crop_size=64, **fits))
    assert not caplog.records
    tpn.create_model("tpn", **FIXED_SIZE, input_spec=tpn.InputSpec(2, short_side=72, crop_size=64, three_crop_size=72))
    assert re.search(r"crops of three_crop_size=72, but .*; give it three_crop_size=64, or num_crops=1", caplog.text)


def test_folded_network_of_ones_own():
    net = timm.create_model("resnet18", features_only=True, out_indices=(2, 3, 4))
    model = tpn.build(FoldedBackbone(net), num_classes=3, input_spec=SMALL, temporal_shift=True)
    assert model.neck.num_frames == (2, 2, 2)
    assert sum(isinstance(module, TemporalShift) for module in model.modules()) == 8
    assert model(clips(model)).shape == (2, 3)
    net = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(2, 3))
    assert tpn.build(FoldedBackbone(net), num_classes=3, num_frames=2).input_spec.mean == (127.5, 127.5, 127.5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"backbone_pretrained": True}, "model_args must not say what to load, got backbone_pretrained"),
        ({"checkpoint_path": "evil.pth"}, "must not say what to load, got checkpoint_path"),
        (
            {"backbone_args": {"checkpoint_path": "evil.pth"}},
            "backbone_args are arguments of the network itself, without checkpoint_path",
        ),
        ({"backbone_args": {"pretrained": True}}, "without pretrained;"),
        ({"backbone_args": {"pretrained_cfg_overlay": {"file": "evil.pth"}}}, "without pretrained_cfg_overlay"),
    ],
)
@pytest.mark.parametrize("create", [tpn.create_model, timm.create_model])
def test_a_saved_model_cannot_say_what_else_to_load(change, says, create, tmp_path):
    """A folder may be anybody's: it must not lead to other files, nor to the network."""
    config = json.loads((tpn.save_pretrained(small("timm/resnet18"), tmp_path) / "config.json").read_text())
    config["model_args"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says):
        create(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "says"),
    [
        (
            "tpn",
            {"drop_path_rate": 0.1},
            TypeError,
            r"unknown arguments drop_path_rate; those of the backbone go into backbone_args=",
        ),
        (
            "tpn",
            {"inchans": 1, "neck": None},
            TypeError,
            "unknown arguments inchans; .* tpn's are backbone, num_classes, num_frames, ",
        ),
        (
            "tpn",
            {"groups": 8, "flow_order": "cascade", "neck": None},
            ValueError,
            "groups, flow_order: of the pyramid, which this",
        ),
        (
            "tpn_tsm_r50_sthv1",
            {"num_class": 3},
            TypeError,
            "unknown arguments of tpn_tsm_r50_sthv1: num_class; there are num_classes, ",
        ),
        (
            "slowonly_r50_k400",
            {"backbone": "timm/resnet18"},
            TypeError,
            r'create_model\("tpn", backbone=...\) takes a backbone of',
        ),
        ("slowonly_r50_k400", {"flow_order": "parallel"}, ValueError, "flow_order: of the pyramid, which this model has not"),
        ("tpn_tsm_r50_sthv1", {"temporal_scales": (4, 4), "neck": None}, ValueError, "temporal_scales: of the pyramid"),
    ],
)
def test_arguments_without_effect(name, kwargs, error, says):
    backbone = {"backbone": "timm/resnet18", "num_classes": 3} if name == "tpn" else {}
    with pytest.raises(error, match=says):
        tpn.create_model(name, **backbone, **kwargs)


FIXED_SIZE = {
    "backbone": "timm/vit_tiny_patch16_224",
    "backbone_args": {"img_size": 64, "depth": 2},
    "out_indices": (0, 1),
    "num_classes": 3,
}


class OneMap(nn.Module):
    def forward(self, x):
        return x


class Flat(nn.Module):
    def forward(self, x):
        return [x.flatten(2), x.flatten(2)]


class NoMaps(nn.Module):
    def forward(self, x):
        return {"loss": 1.0}


class Backwards(nn.Module):
    def forward(self, x):
        return [x[:, :, ::2], x]


class Thirds(nn.Module):
    def forward(self, x):
        return [x, x[:, :, :, ::3, ::3]]


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        (
            {"backbone": "resnet50"},
            tpn.UnknownModelError,
            "backbone must be 'timm/NAME' .* 'torchvision/NAME' of r3d_18, .* got 'resnet50'",
        ),
        ({"backbone": "timm/resnet51"}, tpn.UnknownModelError, "timm has no model 'resnet51'; the nearest are resnet5"),
        (
            {"backbone": "torchvision/mvit_v2_s"},
            tpn.UnknownModelError,
            "of torchvision's models, r3d_18, .* can be backbones, got 'mvit_v2_s'",
        ),
        ({"backbone": "torchvision/r3d_18", "in_chans": 1}, ValueError, "takes 3 channels, got in_chans=1"),
        (
            {"backbone": "torchvision/r3d_18", "out_indices": (3, 2)},
            ValueError,
            r"out_indices must be increasing indices of stages, .* got \(3, 2\)",
        ),
        ({"backbone": "timm/resnet18", "out_indices": (-1, 2)}, ValueError, r"all of them >= 0 or all < 0, got \(-1, 2\)"),
        ({"backbone": "torchvision/r3d_18", "out_indices": (3,)}, ValueError, "a pyramid needs two levels or more"),
        (
            {"backbone": "torchvision/s3d", "num_frames": 4},
            ValueError,
            r"does not take a clip \(1, 3, 4, 224, 224\) .*Output size is too small.* num_frames",
        ),
        (
            {"backbone": "timm/resnet18", "out_indices": (3, 9)},
            ValueError,
            r"timm cannot build resnet18 with feature maps \(3, 9\) .* out_indices",
        ),
        (
            {"backbone": "timm/resnet18", "backbone_args": {"widht": 3}},
            ValueError,
            r"timm cannot build resnet18 .* backbone_args=\{'widht': 3\} \(.*widht",
        ),
        ({"backbone": "timm/convnext_atto", "temporal_shift": True}, ValueError, "temporal_shift needs residual blocks"),
        (
            {"backbone": "torchvision/r3d_18", "temporal_shift": True},
            ValueError,
            "temporal_shift is for networks that see one frame",
        ),
        ({"backbone": "timm/resnet18", "temporal_shift": "yes"}, TypeError, "temporal_shift must be True or False, got 'yes'"),
        ({"backbone": "timm/resnet18", "num_frames": 0}, ValueError, "num_frames must be an integer >= 1, got 0"),
        (
            {"backbone": "timm/resnet18", "pretrained": True},
            ValueError,
            "backbone_pretrained=True starts from those of the backbone",
        ),
        ({"backbone": OneMap()}, ValueError, "a pyramid needs two levels or more"),
        (
            {"backbone": Flat()},
            ValueError,
            r"must give float feature maps \(B, C, T, H, W\); of a clip \(1, 3, 8, 224, 224\) .* torch.float32 \(1, 3, 401408\)",
        ),
        ({"backbone": NoMaps()}, TypeError, "must return a sequence of feature maps .* got dict"),
        ({"backbone": Backwards()}, ValueError, "must go from fine to coarse in time and space"),
        ({"backbone": Thirds()}, ValueError, "level 0 is 224 x 224, the last one 75 x 75; .* power of two"),
        (
            {"backbone": Pyramid(), "input_spec": SPEC, "temporal_scales": (3, 2, 1)},
            ValueError,
            "each level's length must be a multiple of the next one's",
        ),
    ],
)
def test_what_cannot_be(kwargs, error, says):
    with pytest.raises(error, match=says):
        tpn.create_model("tpn", num_classes=3, **kwargs)


def test_what_is_missing():
    with pytest.raises(ValueError, match="backbone is needed: 'timm/NAME', 'torchvision/NAME' or a module"):
        tpn.create_model("tpn", num_classes=3)
    with pytest.raises(ValueError, match="num_classes is needed"):
        tpn.create_model("tpn", backbone="timm/resnet18")
    with pytest.raises(TypeError, match="build puts the pyramid on a module, got 'timm/resnet18'"):
        tpn.build("timm/resnet18", num_classes=3)
    with pytest.raises(tpn.UnknownModelError, match=r"create_model\('tpn', backbone='timm/resnet50', num_classes=K\)"):
        tpn.model_info("tpn")
