"""The pyramid on your own modules, and invalid arguments."""

import copy
import json
import re

import pytest
import timm
import torch
from backbones import SMALL, SPEC, Pyramid, clips, small
from safetensors.torch import load_file, save_file
from torch import nn

import tpn
from tpn.files import file_sha256
from tpn.models.backbones import FoldedBackbone


class Returns(nn.Module):
    """A backbone without parameters."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


@pytest.mark.parametrize("as_dict", [False, True])
def test_module(as_dict, tmp_path):
    model = tpn.build(Pyramid(as_dict=as_dict), num_classes=4, input_spec=SPEC, temporal_scales=(2, 2, 1))
    assert model.neck.in_channels == (6, 10, 9)
    assert model.neck.num_frames == (8, 4, 2)
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
    args = {"num_classes": 4, "input_spec": SPEC, "temporal_scales": (2, 2, 1)}
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": model.state_dict()}}
    fresh = tpn.build(Pyramid(as_dict=as_dict), **args, **overlay)
    assert torch.equal(fresh.eval()(x), model(x))
    longer = tpn.create_model(f"local-dir:{tmp_path}", backbone=Pyramid(as_dict=as_dict), num_frames=32)
    assert longer.input_spec.num_frames == 32
    assert (longer.neck.num_frames, longer.neck.temporal_scales) == ((16, 8, 4), (4, 4, 2))


@pytest.mark.parametrize(("scales", "lengths"), [((8, 4, 2), [1, 1, 1]), ((2, 2, 1), [4, 2, 2]), ((1, 1, 1), [8, 4, 2])])
@pytest.mark.parametrize("flow_order", ["cascade", "parallel", "top_down", "bottom_up", "isolation"])
def test_levels_that_differ_in_time(scales, lengths, flow_order):
    """Each level keeps its own tempo until the levels are fused."""
    model = tpn.build(Pyramid(), num_classes=4, input_spec=SPEC, temporal_scales=scales, flow_order=flow_order, drop_rate=0.0)
    features, found = model.forward_intermediates(clips(model))
    assert [found[f"temporal_modulation.{i}"].shape[2] for i in range(3)] == lengths
    assert features.shape == (2, 9, lengths[-1], 6, 6)
    assert features is found["pyramid_fusion"]
    logits, aux_logits = model.forward_with_aux(clips(model))
    (logits.square().sum() + aux_logits.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_backbone_is_not_changed():
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


def test_folded_network_with_temporal_shifts():
    """Also after a build that failed."""
    backbone = FoldedBackbone(timm.create_model("resnet18", features_only=True, out_indices=(2, 3, 4)))
    assert backbone.add_temporal_shift(2) == 8
    with pytest.raises(ValueError, match="flow_order.*'nope'"):
        tpn.build(backbone, num_classes=3, input_spec=SMALL, flow_order="nope")
    with pytest.raises(ValueError, match="num_frames must be 2.*4"):
        tpn.build(backbone, num_classes=3, num_frames=4)
    model = tpn.build(backbone, num_classes=3, input_spec=SMALL)
    assert model.neck.num_frames == (2, 2, 2)
    assert model(clips(model)).shape == (2, 3)
    with pytest.raises(ValueError, match="2"):
        backbone.add_temporal_shift(2)
    net = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(2, 3))
    assert tpn.build(FoldedBackbone(net), num_classes=3, num_frames=2).input_spec.mean == (127.5, 127.5, 127.5)


def test_backbone_without_parameters():
    pools = Returns(lambda x: [nn.functional.avg_pool3d(x, (1, s, s)) for s in (4, 8)])
    model = tpn.build(pools, num_classes=3, input_spec=SPEC)
    model.reset_classifier(0)
    model.reset_classifier(4)
    assert model(clips(model)).shape == (2, 4)


def test_weights_with_a_neck_need_one(tmp_path):
    tpn.save_pretrained(small("timm/resnet18", groups=8, flow_order="parallel"), tmp_path / "tpn")
    tpn.save_pretrained(small("timm/resnet18", neck=None), tmp_path / "baseline")
    for name in (f"local-dir:{tmp_path}/tpn", "tpn_slowonly_r50_k400"):
        with pytest.raises(ValueError, match="neck=None"):
            tpn.create_model(name, pretrained=True, neck=None)
    assert tpn.create_model(f"local-dir:{tmp_path}/baseline", neck=None).neck is None
    assert tpn.create_model(f"local-dir:{tmp_path}/baseline").neck is None
    baseline = tmp_path / "baseline" / "model.safetensors"
    assert tpn.create_model(f"local-dir:{tmp_path}/tpn", neck=None, checkpoint_path=baseline).neck is None


@pytest.mark.parametrize(
    ("sizes", "steps"),
    [
        ([56, 28, 14, 7], [3, 2, 1, 0]),
        ([5, 3, 2], [2, 1, 0]),  # each rounded up
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
def test_sizes_of_maps(sizes, steps):
    """Maps of any size pass through the pyramid, or the model is not built."""
    backbone = Returns(lambda x: [nn.functional.adaptive_avg_pool3d(x, (2, size, size)) for size in sizes])
    spec = tpn.InputSpec(2, crop_size=64, three_crop_size=64)
    if steps is None:
        with pytest.raises(ValueError, match="power of two"):
            tpn.build(backbone, num_classes=3, input_spec=spec)
        return
    model = tpn.build(backbone, num_classes=3, input_spec=spec)
    assert [len(modulation) for modulation in model.neck.spatial_modulation] == steps
    features, found = model.forward_intermediates(clips(model))
    assert features.shape == (2, 3, 1, sizes[-1], sizes[-1])
    first = max(6 - len(sizes), 1)
    assert [name for name in found if name[0] == "c"] == [f"c{first + i}" for i in range(len(sizes))]


def test_views_that_do_not_fit_a_network_of_a_fixed_size(caplog):
    """The warning comes when the model is built, not after training."""
    for fits in ({"three_crop_size": 64}, {"three_crop_size": 72, "num_crops": 1}):
        tpn.create_model("tpn", **FIXED_SIZE, input_spec=tpn.InputSpec(2, short_side=72, crop_size=64, **fits))
    assert not caplog.records
    tpn.create_model("tpn", **FIXED_SIZE, input_spec=tpn.InputSpec(2, short_side=72, crop_size=64, three_crop_size=72))
    assert re.search(r"three_crop_size=72.* three_crop_size=64", caplog.text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"args": {"pretrained": True}}, "pretrained"),
        ({"args": {"cache_dir": "/tmp"}}, "cache_dir"),
        ({"args": {"checkpoint_path": "evil.pth"}}, "checkpoint_path"),
        ({"args": {"pretrained_cfg_overlay": {"file": "evil.pth"}}}, "pretrained_cfg_overlay"),
        ({"name": "timm/hf-hub:evil/model"}, "hf-hub:evil/model"),
        ({"name": "torchvision/r3d_18", "args": {"weights": "DEFAULT"}}, "weights"),
        ({"name": "module:shutil.rmtree"}, "backbone=MODULE"),
    ],
)
@pytest.mark.parametrize("create", [tpn.create_model, timm.create_model])
def test_saved_model_cannot_choose_other_files_to_load(change, says, create, hub, tmp_path, monkeypatch):
    """A folder may come from anybody: it must not lead to other files, nor to the network."""
    config = json.loads((tpn.save_pretrained(small("timm/resnet18"), tmp_path) / "config.json").read_text())
    config["model"]["backbone"] |= change
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors", metadata={"model": json.dumps({"model": config["model"]})})
    config["weights_sha256"] = file_sha256(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail(f"timm got {args} {kwargs}"))
    with pytest.raises(ValueError, match=says):
        create(f"local-dir:{tmp_path}", pretrained=True)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "says"),
    [
        ("tpn", {"drop_path_rate": 0.1}, TypeError, "drop_path_rate.*backbone_args"),
        ("tpn", {"inchans": 1, "neck": None}, TypeError, "inchans.*out_indices"),
        ("tpn", {"groups": 8, "flow_order": "cascade", "neck": None}, ValueError, "flow_order, groups.*neck=None"),
        ("tpn_tsm_r50_sthv1", {"num_class": 3}, TypeError, "num_class;.*shift_shortcut.*flow_order"),
        ("slowonly_r50_k400", {"backbone": "timm/resnet18"}, TypeError, r"backbone.*create_model\('tpn', backbone=...\)"),
        ("slowonly_r50_k400", {"flow_order": "parallel"}, ValueError, "flow_order.*no neck"),
        ("tpn_tsm_r50_sthv1", {"temporal_scales": (4, 4), "neck": None}, ValueError, "temporal_scales.*no neck"),
    ],
)
def test_unknown_arguments(name, kwargs, error, says):
    backbone = {"backbone": "timm/resnet18", "num_classes": 3} if name == "tpn" else {}
    with pytest.raises(error, match=says):
        tpn.create_model(name, **backbone, **kwargs)


FIXED_SIZE = {
    "backbone": "timm/vit_tiny_patch16_224",
    "backbone_args": {"img_size": 64, "depth": 2},
    "out_indices": (0, 1),
    "num_classes": 3,
}


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"backbone": "resnet50"}, tpn.UnknownModelError, "'resnet50'.*register"),
        ({"backbone": "timm/resnet51"}, tpn.UnknownModelError, "'resnet51'.* 'resnet5"),
        ({"backbone": "torchvision/mvit_v2_s"}, tpn.UnknownModelError, "mvit_v2_s.*r3d_18"),
        ({"backbone": "torchvision/r3d_18", "in_chans": 1}, ValueError, "in_chans.*3.*1"),
        ({"backbone": "torchvision/r3d_18", "out_indices": (3, 2)}, ValueError, r"out_indices.*\(3, 2\)"),
        ({"backbone": "timm/resnet18", "out_indices": (-1, 2)}, ValueError, r"out_indices.*\(-1, 2\)"),
        ({"backbone": "timm/resnet18", "out_indices": "a"}, ValueError, "out_indices.*'a'"),
        ({"backbone": "torchvision/r3d_18", "out_indices": 3}, ValueError, "out_indices.* 3"),
        ({"backbone": "torchvision/r3d_18", "out_indices": (3,)}, ValueError, "two levels"),
        (
            {"backbone": "torchvision/s3d", "num_frames": 4},
            ValueError,
            r"\(1, 3, 4, 224, 224\).*Output size is too small.* num_frames",
        ),
        ({"backbone": "timm/resnet18", "out_indices": (3, 9)}, ValueError, r"resnet18.*out_indices=\(3, 9\)"),
        ({"backbone": "timm/resnet18", "backbone_args": {"widht": 3}}, ValueError, r"resnet18.*backbone_args=\{'widht': 3\}"),
        ({"backbone": "timm/resnet18", "num_class": 3}, TypeError, "num_class;.*'num_classes'"),
        ({"backbone": "timm/convnext_atto", "temporal_shift": True}, ValueError, "residual blocks"),
        ({"backbone": "torchvision/r3d_18", "temporal_shift": True}, TypeError, "temporal_shift.*torchvision/r3d_18"),
        ({"backbone": Pyramid(), "temporal_shift": True}, TypeError, "temporal_shift"),
        ({"backbone": "timm/resnet18", "temporal_shift": "yes"}, TypeError, "temporal_shift.*'yes'"),
        ({"backbone": "timm/resnet18", "num_frames": 0}, ValueError, "num_frames.*0"),
        ({"backbone": "timm/resnet18", "pretrained": True}, ValueError, "pretrained.*backbone_pretrained=True"),
        ({"backbone": Returns(lambda x: x)}, ValueError, "two levels"),
        ({"backbone": Returns(lambda x: [x.flatten(2)] * 2)}, ValueError, r"\(B, C, T, H, W\).*torch.float32 \(1, 3, 401408\)"),
        ({"backbone": Returns(lambda x: {"loss": 1.0})}, TypeError, "feature maps.* dict"),
        ({"backbone": Returns(lambda x: [x[:, :, ::2], x])}, ValueError, r"fine to coarse.*\(3, 4, 224, 224\).*\(3, 8, "),
        ({"backbone": Returns(lambda x: [x, x[:, :, :, ::3, ::3]])}, ValueError, "224 x 224.*75 x 75.*power of two"),
        ({"backbone": Pyramid(), "input_spec": SPEC, "temporal_scales": (3, 2, 1)}, ValueError, r"temporal_scales.*\(3, 2, 1\)"),
    ],
)
def test_invalid_arguments(kwargs, error, says):
    with pytest.raises(error, match=says):
        tpn.create_model("tpn", num_classes=3, **kwargs)


def test_missing_arguments():
    with pytest.raises(ValueError, match="backbone is needed"):
        tpn.create_model("tpn", num_classes=3)
    with pytest.raises(ValueError, match="num_classes is needed"):
        tpn.create_model("tpn", backbone="timm/resnet18")
    with pytest.raises(TypeError, match="backbone.*'timm/resnet18'"):
        tpn.build("timm/resnet18", num_classes=3)
    with pytest.raises(tpn.UnknownModelError, match="'tpn'.*backbone="):
        tpn.model_info("tpn")
