"""The pyramid on other people's networks: timm's for images, torchvision's for video, modules of one's own."""

import copy
import json
import re
import shutil

import pytest
import timm
import torch
from safetensors.torch import save
from scripts import example
from torch import nn

import tpn
from tpn.models.backbones import FoldedBackbone, TemporalShift
from tpn.video import motion
from tpn.zoo.convert import CheckpointError

SMALL = tpn.InputSpec(2, 4, short_side=72, crop_size=64, three_crop_size=64)
FIXED = {"img_size": 64}  # networks that are built for one size

BACKBONES = {
    "timm/resnet18": {},
    "timm/seresnet18": {"temporal_shift": True},
    "timm/resnetv2_50": {"temporal_shift": True, "backbone_args": {"width_factor": 0.25}},
    "timm/resnest14d": {},
    "timm/res2net50_14w_8s": {},
    "timm/regnety_002": {"temporal_shift": True},
    "timm/convnext_atto": {},
    "timm/convnextv2_atto": {},
    "timm/mobilenetv3_small_050": {},
    "timm/mobilenetv4_conv_small": {},
    "timm/efficientnet_b0": {},
    "timm/rexnet_100": {},  # 185 channels
    "timm/ghostnet_050": {},
    "timm/densenet121": {},
    "timm/hrnet_w18_small": {},
    "timm/repvgg_a0": {},
    "timm/dla46_c": {},
    "timm/poolformer_s12": {},
    "timm/pvt_v2_b0": {},
    "timm/edgenext_xx_small": {},
    "timm/mobilevit_xxs": {},
    "timm/fastvit_t8": {},
    "timm/inception_next_atto": {},
    "timm/starnet_s1": {},
    "timm/mambaout_femto": {},  # channels last
    "timm/swin_tiny_patch4_window7_224": {"backbone_args": FIXED | {"depths": (1, 1, 1, 1), "embed_dim": 24, "window_size": 2}},
    "timm/maxvit_rmlp_pico_rw_256": {"backbone_args": FIXED},
    "timm/vit_tiny_patch16_224": {"backbone_args": FIXED, "out_indices": (5, 11)},
    "timm/eva02_tiny_patch14_224": {"backbone_args": {"img_size": 56}, "crop_size": 56},
    "timm/xcit_nano_12_p8_224": {},
    "timm/mixer_s32_224": {"backbone_args": FIXED},
    "timm/inception_v3": {"crop_size": 139},  # convolutions without padding
    "torchvision/r3d_18": {"num_frames": 4},
    "torchvision/mc3_18": {"num_frames": 4},
    "torchvision/r2plus1d_18": {"num_frames": 8, "out_indices": (0, 1, 2, 3)},
    "torchvision/s3d": {"num_frames": 14, "out_indices": (2, 3, 4)},
    "torchvision/swin3d_t": {"num_frames": 4},
}
"""Families, each by a small member, with what makes it small and cheap."""

WITHOUT_GRADIENT = {
    "timm/hrnet_w18_small": r"backbone\.net\.(stage4\.0\.fuse_layers\.[01]\.|incre_modules\.[01]\.)",
}
"""Parameters that only finer maps than those asked for depend on."""


def small(name, **kwargs):
    """A model on a backbone of the table, for clips of 64 x 64."""
    torch.manual_seed(0)
    args = {**BACKBONES.get(name, {}), **kwargs}
    size = args.pop("crop_size", 64)
    frames = args.get("num_frames", 2)
    spec = tpn.InputSpec(frames, 4, short_side=size, crop_size=size, three_crop_size=size)
    return tpn.create_model("tpn", backbone=name, num_classes=5, input_spec=spec, **args)


def clips(model, batch=2):
    spec = model.input_spec
    return torch.randn(batch, model.in_chans, spec.num_frames, spec.crop_size, spec.crop_size)


def switch_on(model):
    """Many networks begin with branches that are switched off, by a scale of zero."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", BACKBONES)
def test_family(name, tmp_path):
    model = small(name, drop_rate=0.0)
    switch_on(model)
    x = clips(model)
    logits, aux_logits = model.forward_with_aux(x)
    assert logits.shape == aux_logits.shape == (2, 5)
    (logits.square().sum() + aux_logits.square().sum()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in without if not re.match(WITHOUT_GRADIENT.get(name, "$"), n)] == []

    model.zero_grad()
    model.eval()
    tpn.save_pretrained(model, tmp_path)
    again = tpn.create_model(f"local-dir:{tmp_path}").eval()
    with torch.inference_mode():
        assert torch.equal(again(x), model(x))
    assert again.input_spec == model.input_spec
    assert again.model_args == json.loads(json.dumps(model.model_args))


def test_baseline_has_the_same_interface():
    with_pyramid, model = small("timm/resnet18"), small("timm/resnet18", neck=None)
    assert model.neck is None
    assert model.aux_head is None
    logits, aux_logits = model.forward_with_aux(clips(model))
    assert logits.shape == (2, 5)
    assert aux_logits is None
    assert model.num_features == with_pyramid.num_features == 512
    assert model.input_spec == with_pyramid.input_spec
    assert list(model.forward_intermediates(clips(model))[1]) == ["c5"]


def test_baseline_of_the_zoo():
    model = tpn.create_model("tpn_slowonly_r50_k400", neck=None, base_channels=8)
    baseline = tpn.create_model("slowonly_r50_k400", base_channels=8)
    assert model.state_dict().keys() == baseline.state_dict().keys()
    model.load_state_dict(baseline.state_dict())
    x = torch.randn(1, 3, 8, 32, 32)
    assert torch.equal(model.eval()(x), baseline.eval()(x))
    with pytest.raises(ValueError, match="neck must be 'tpn' or None, got 'fpn'"):
        tpn.create_model("tpn_slowonly_r50_k400", neck="fpn")


def test_temporal_shift_is_that_of_tsm():
    """timm's ResNet-50 with shifts computes what our TSM ResNet-50 computes."""
    shifted = switch_on(timm.create_model("resnet50", features_only=True, out_indices=(-2, -1)))
    backbone = FoldedBackbone(shifted).eval()
    ours = tpn.ResNetTSM(50).eval()
    ours.load_state_dict(shifted.state_dict())
    assert backbone.add_temporal_shift(4) == 16
    x = torch.randn(2, 3, 4, 64, 64)
    with torch.inference_mode():
        for got, expected in zip(backbone(x), ours(x), strict=True):
            assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="the temporal shifts were built for 4 frames, got 5"):
        backbone(torch.randn(1, 3, 5, 64, 64))


def test_temporal_shift_in_long_stages_is_in_every_second_block():
    net = FoldedBackbone(timm.create_model("resnet101", features_only=True, out_indices=(-2, -1)))
    assert net.add_temporal_shift(8) == 3 + 4 + 12 + 3


class Pyramid(nn.Module):
    """Maps of a clip at three places and times."""

    def __init__(self, channels=(6, 10, 9), as_dict=False):
        super().__init__()
        self.as_dict = as_dict
        before = (3, *channels)
        self.stages = nn.ModuleList(nn.Conv3d(before[i], channels[i], 3, 2, 1) for i in range(len(channels)))

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = stage(x).relu()
            maps.append(x)
        return {str(i): m for i, m in enumerate(maps)} if self.as_dict else maps


SPEC = tpn.InputSpec(16, 1, short_side=48, crop_size=48, three_crop_size=48)


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


@pytest.mark.parametrize("size", [32, 48, 63, 100])
def test_other_sizes(size):
    """Built for one size, run at another; at 32 pixels the coarsest map is a single one."""
    for name in ("timm/resnet18", "timm/convnext_atto", "torchvision/r3d_18"):
        built = small(name, crop_size=size).eval()
        assert built(clips(built)).shape == (2, 5)
        model = small(name).eval()
        assert built.state_dict().keys() == model.state_dict().keys()
        assert model(torch.randn(1, 3, model.input_spec.num_frames, size, size + 7)).shape == (1, 5)


def test_other_sizes_of_a_network_without_padding():
    model = small("timm/inception_v3").eval()
    assert len(model.neck.spatial_modulation[0]) == 1
    for size in (139, 160, 224, 299):
        with torch.device("meta"):
            assert model.to("meta")(torch.empty(1, 3, 2, size, size + 40)).shape == (1, 5)


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


def test_parameters_that_must_not_decay():
    names = small("timm/vit_tiny_patch16_224").no_weight_decay()
    assert {"backbone.net.model.pos_embed", "backbone.net.model.cls_token"} <= names
    assert small("timm/resnet18").no_weight_decay() == set()


def test_weights_with_a_pyramid_need_one(tmp_path):
    tpn.save_pretrained(small("timm/resnet18"), tmp_path / "tpn")
    tpn.save_pretrained(small("timm/resnet18", neck=None), tmp_path / "baseline")
    with pytest.raises(ValueError, match="these weights have a pyramid, which neck=None leaves out; use start without them"):
        tpn.create_model(f"local-dir:{tmp_path}/tpn", neck=None)
    with pytest.raises(ValueError, match=r"use create_model\('slowonly_r50_k400'\), or start without them"):
        tpn.create_model("tpn_slowonly_r50_k400", pretrained=True, neck=None)
    assert tpn.create_model(f"local-dir:{tmp_path}/baseline", neck=None).neck is None
    assert tpn.create_model(f"local-dir:{tmp_path}/baseline").neck is None


def test_saved_with_other_arguments(tmp_path):
    tpn.save_pretrained(small("torchvision/r3d_18"), tmp_path)
    longer = tpn.create_model(f"local-dir:{tmp_path}", num_frames=16)
    assert longer.input_spec.num_frames == longer.model_args["num_frames"] == 16
    assert longer.neck.num_frames == (4, 2)
    with pytest.raises(ValueError, match="the saved model takes 3 channels, got in_chans=1"):
        tpn.create_model(f"local-dir:{tmp_path}", in_chans=1)


def test_folded_network_of_ones_own():
    net = timm.create_model("resnet18", features_only=True, out_indices=(2, 3, 4))
    model = tpn.build(FoldedBackbone(net), num_classes=3, input_spec=SMALL, temporal_shift=True)
    assert model.neck.num_frames == (2, 2, 2)
    assert sum(isinstance(module, TemporalShift) for module in model.modules()) == 8
    assert model(clips(model)).shape == (2, 3)


def test_one_frame_sees_the_next_only_with_shifts():
    for shift in (False, True):
        model = switch_on(small("timm/resnet18", temporal_shift=shift)).eval()
        x = clips(model, batch=1)
        other = x.clone()
        other[:, :, 1] += 1
        same = torch.equal(model.backbone(x)[-1][:, :, 0], model.backbone(other)[-1][:, :, 0])
        assert same != shift


def test_what_clips_look_like_follows_the_backbone():
    spec = tpn.create_model("tpn", backbone="timm/vit_tiny_patch16_224", num_classes=2, num_frames=4).input_spec
    assert (spec.num_frames, spec.frame_interval, spec.crop_size, spec.short_side) == (4, 16, 224, 256)
    assert spec.mean == (127.5, 127.5, 127.5)
    spec = tpn.create_model("tpn", backbone="torchvision/r3d_18", num_classes=2).input_spec
    assert (spec.num_frames, spec.frame_interval, spec.crop_size, spec.short_side) == (8, 8, 112, 128)
    assert spec.mean == (110.201, 100.64, 95.995)
    assert small("timm/resnet18", in_chans=2).input_spec.mean == (114.495, 114.495)


def test_other_input_channels(tmp_path):
    model = small("timm/resnet18", in_chans=2).eval()
    assert model.in_chans == 2
    x = clips(model)
    assert x.shape[1] == 2
    tpn.save_pretrained(model, tmp_path)
    assert torch.equal(tpn.create_model(f"local-dir:{tmp_path}").eval()(x), model(x))


def test_classifier_goes_and_comes():
    model = small("timm/convnext_atto", drop_rate=0.0)
    x = clips(model)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), features)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)


@pytest.mark.parametrize("name", ["timm/convnext_atto", "torchvision/r3d_18"])
def test_recomputing_activations_changes_nothing(name):
    model = small(name, drop_rate=0.0)
    x = clips(model)
    calls, gradients, statistics = [0, 0], [], []
    for enable in (False, True):
        again = copy.deepcopy(model)
        again.set_grad_checkpointing(enable)
        for module in again.backbone.modules():
            if isinstance(module, nn.Conv3d | nn.Conv2d):
                module.register_forward_hook(lambda *_, enable=enable: calls.__setitem__(enable, calls[enable] + 1))
        again(x).square().sum().backward()
        gradients.append([p.grad for p in again.backbone.parameters()])
        statistics.append(dict(again.backbone.named_buffers()))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max())) for a, b in zip(*gradients, strict=True))
    assert calls[1] > 1.3 * calls[0]
    assert all(torch.allclose(tensor.float(), statistics[1][key].float()) for key, tensor in statistics[0].items())


@pytest.mark.parametrize("in_chans", [3, 2])
def test_optimized(in_chans):
    model = switch_on(small("timm/resnet18", in_chans=in_chans)).eval()
    nn.init.normal_(model.head.fc.weight)  # probabilities that differ
    fast = tpn.optimize(model, "float32", sample=clips(model))
    assert fast.report.folded_norms > 20
    assert fast.report.max_difference < 1e-5
    assert tpn.optimize(model, "bfloat16", sample=clips(model)).report.max_difference > 1e-4


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
        ({"backbone": "torchvision/r3d_18", "out_indices": (3,)}, ValueError, "a pyramid needs two levels or more"),
        (
            {"backbone": "torchvision/s3d", "num_frames": 4},
            ValueError,
            r"does not take a clip \(1, 3, 4, 224, 224\) .*Output size is too small.* num_frames",
        ),
        (
            {"backbone": "timm/resnet18", "out_indices": (3, 9)},
            ValueError,
            r"timm gives no feature maps \(3, 9\) of resnet18 .* out_indices",
        ),
        (
            {"backbone": "timm/resnet18", "backbone_args": {"widht": 3}},
            ValueError,
            r"timm gives no feature maps \(-2, -1\) of resnet18 \(.*widht",
        ),
        ({"backbone": "timm/convnext_atto", "temporal_shift": True}, ValueError, "temporal_shift needs residual blocks"),
        (
            {"backbone": "torchvision/r3d_18", "temporal_shift": True},
            ValueError,
            "temporal_shift is for networks that see one frame",
        ),
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
            r"must give feature maps \(B, C, T, H, W\); of a clip \(1, 3, 8, 224, 224\) .* \(1, 3, 401408\)",
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


def test_backbone_starts_from_its_own_weights(hub, tmp_path):
    torch.manual_seed(1)
    published = timm.create_model("resnet18").state_dict()
    hub.add("timm/resnet18.a1_in1k", weights=save(published))
    model = small("timm/resnet18", backbone_pretrained=True, cache_dir=tmp_path / "cache")
    names = {name.removeprefix("net."): tensor for name, tensor in model.backbone.state_dict().items()}
    assert names.keys() == published.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(tensor, published[name]) for name, tensor in names.items())

    tpn.save_pretrained(model, tmp_path / "saved")
    hub.clear()
    again = tpn.create_model(f"local-dir:{tmp_path / 'saved'}")  # asks nobody for the backbone's
    assert torch.equal(again.backbone.net.conv1.weight, published["conv1.weight"])
    assert hub.requests == []


def test_weights_of_a_backbone_that_cannot_be_fetched(hub, tmp_path):
    with pytest.raises(
        tpn.WeightsUnavailableError, match="the weights of timm/resnet18.tv_in1k could not be fetched .* HF_ENDPOINT"
    ):
        small("timm/resnet18.tv_in1k", backbone_pretrained=True, cache_dir=tmp_path)


def test_on_the_hub_and_through_timm(hub, tmp_path, monkeypatch):
    model = small("timm/resnet18", flow_order="parallel")
    model.labels = ("a", "b", "c", "d", "e")
    tpn.push_to_hub(model, "me/mine", token=hub.token)
    x = clips(model)
    for again in (
        tpn.create_model("hf-hub:me/mine", cache_dir=tmp_path),
        timm.create_model("hf-hub:me/mine", pretrained=True, cache_dir=tmp_path),
    ):
        assert torch.equal(again.eval()(x), model.eval()(x))
        assert again.labels == model.labels
        assert again.neck.flow_order == "parallel"
        assert again.input_spec == model.input_spec
    card = hub.repos["me/mine"][-1]["README.md"].decode()
    assert "backbone='timm/resnet18'" in card
    fewer = tpn.create_model("hf-hub:me/mine", num_classes=3, cache_dir=tmp_path)
    assert fewer.labels is None
    assert torch.equal(fewer.backbone.net.conv1.weight, model.backbone.net.conv1.weight)


def test_video_in_names_out(tmp_path):
    model = small("timm/resnet18", num_frames=4)
    model.labels = ("a", "b", "c", "d", "e")
    tpn.save_pretrained(model, tmp_path)
    prediction = tpn.VideoClassifier(f"local-dir:{tmp_path}")(
        torch.zeros(20, 70, 90, 3, dtype=torch.uint8), num_clips=2, num_crops=3
    )
    assert prediction.view_logits.shape == (6, 5)
    assert {name for name, _ in prediction.top(5)} == set(model.labels)


def test_trained_by_the_script(tmp_path, monkeypatch, capsys):
    """The number of classes comes from the data."""
    motion.write_dataset(tmp_path / "videos", 1, seed=1, num_frames=16)
    for name in motion.CLASSES[2:]:
        shutil.rmtree(tmp_path / "videos" / name)
    arguments = ["--train", tmp_path / "videos", "--output", tmp_path / "run", "--model", "tpn", "--epochs", 1, "--batch-size", 2]
    arguments += [
        "--model-args",
        json.dumps({"backbone": "timm/resnet18", "num_frames": 2}),
        "--crop-size",
        64,
        "--short-side",
        64,
    ]
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments), "--workers", "0"])
    example("train").main()
    assert "done: tpn predict --model" in capsys.readouterr().out
    model = tpn.create_model(f"local-dir:{tmp_path / 'run'}")
    assert model.labels == tuple(sorted(motion.CLASSES[:2]))
    assert model.model_args == {"backbone": "timm/resnet18", "num_frames": 2}
    assert model.input_spec.crop_size == 64
