"""The pyramid on timm's image networks and torchvision's video networks."""

import copy
import re
import shutil

import pytest
import timm
import torch
import torchvision
from backbones import BACKBONES, MORE_BACKBONES, WITHOUT_GRADIENT, assert_same, clips, small, switch_on
from huggingface_hub import constants
from safetensors.torch import save
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

import tpn
from tpn import transfer
from tpn.models.backbones import FoldedBackbone
from tpn.training.loop import train
from tpn.video import motion


@pytest.mark.parametrize("name", [*BACKBONES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_BACKBONES)])
def test_family(name, tmp_path, caplog):
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
    assert again.config == model.config
    assert not [record for record in caplog.records if record.name.startswith("tpn")]


@pytest.mark.parametrize(
    ("name", "last", "scales"),
    [
        ("tpn_slowonly_r50_k400", 3, (4, 8)),
        ("tpn_tsm_r50_sthv1", 3, (4, 8)),
        ("timm/resnet18", -1, (4, 8)),
        pytest.param("torchvision/mc3_18", 3, (4, 8), marks=pytest.mark.slow),
    ],
)
def test_one_map_at_two_rates(name, last, scales, tmp_path):
    """The network runs once, and each level has its own tempo."""
    args = {"out_indices": (last, last), "temporal_scales": scales, "num_frames": 8, "drop_rate": 0.0}
    model = switch_on(small(name, **args) if "/" in name else tpn.create_model(name, num_classes=5, base_channels=4, **args))
    calls = []
    network = getattr(model.backbone, "net", model.backbone)
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Conv3d))
    first.register_forward_hook(lambda *_: calls.append(1))
    logits, aux_logits = model.forward_with_aux(clips(model))
    assert len(calls) == 1
    (logits.square().sum() + aux_logits.square().sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    _, found = model.eval().forward_intermediates(clips(model, 1))
    assert torch.equal(found["c4"], found["c5"])
    assert found["spatial_modulation.0"].shape == found["c5"].shape
    assert [found[f"temporal_modulation.{level}"].shape[2] for level in range(2)] == [2, 1]
    assert_same(tpn.create_model(f"local-dir:{tpn.save_pretrained(model, tmp_path)}"), model)


@pytest.mark.parametrize(
    ("name", "fine", "coarse"),
    [
        ("timm/resnet18", 11, 7),
        ("timm/vit_tiny_patch16_224", 15, 4),
        ("timm/convnext_atto", 7, 7),
        ("torchvision/swin3d_t", 10, 5),
    ],
)
def test_layer_wise_learning_rates(name, fine, coarse):
    """Layers are in the order of computation; pyramid and heads come last."""
    model = small(name)
    order = [n for n, _ in model.named_parameters() if n.startswith("backbone.")]
    for count, matcher in ((fine, model.group_matcher()), (coarse, model.group_matcher(coarse=True))):
        groups = group_parameters(model, matcher)
        assert len(groups) == count
        assert [n for i in range(count - 1) for n in groups[i]] == order
        assert {n.split(".")[0] for n in groups[count - 1]} == {"neck", "head", "aux_head"}
    rates = param_groups_layer_decay(model, layer_decay=0.5)
    assert min(group["lr_scale"] for group in rates) == 0.5 ** (fine - 1)


def test_baseline_has_the_same_interface():
    with_pyramid, model = small("timm/resnet18"), small("timm/resnet18", neck=None)
    assert model.neck is None
    assert model.aux_head is None
    logits, aux_logits = model.forward_with_aux(clips(model))
    assert logits.shape == (2, 5)
    assert aux_logits is None
    assert model.num_features == with_pyramid.num_features == 512
    assert model.input_spec == with_pyramid.input_spec
    assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]), torch.nn.Conv2d)
    assert list(model.forward_intermediates(clips(model))[1]) == ["c5"]


def test_baseline_of_the_zoo():
    model = tpn.create_model("tpn_slowonly_r50_k400", neck=None, base_channels=8)
    baseline = tpn.create_model("slowonly_r50_k400", base_channels=8)
    assert model.state_dict().keys() == baseline.state_dict().keys()
    model.load_state_dict(baseline.state_dict())
    x = torch.randn(1, 3, 8, 32, 32)
    assert torch.equal(model.eval()(x), baseline.eval()(x))
    with pytest.raises(tpn.UnknownModelError, match="'fpn'.*'tpn'"):
        tpn.create_model("tpn_slowonly_r50_k400", neck="fpn")


@pytest.mark.parametrize(("depth", "shifts"), [(50, 3 + 4 + 6 + 3), (101, 2 + 2 + 12 + 2)])
def test_temporal_shift_is_that_of_tsm(depth, shifts):
    """timm's ResNets with shifts equal our TSM ResNets; in the deep one, every second block shifts."""
    shifted = switch_on(timm.create_model(f"resnet{depth}", features_only=True, out_indices=(-2, -1)))
    backbone = FoldedBackbone(shifted).eval()
    ours = tpn.ResNetTSM(depth).eval()
    ours.load_state_dict(shifted.state_dict())
    assert backbone.add_temporal_shift(4) == shifts
    x = torch.randn(2, 3, 4, 64, 64)
    with torch.inference_mode():
        for got, expected in zip(backbone(x), ours(x), strict=True):
            assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="num_frames.*4.*5"):
        backbone(torch.randn(1, 3, 5, 64, 64))


@pytest.mark.parametrize(
    ("name", "shifts"), [("seresnet18", 8), ("resnetv2_50", 16), ("res2net50_14w_8s", 16), ("regnety_002", 13), ("resnest14d", 4)]
)
def test_networks_with_residual_blocks(name, shifts):
    net = FoldedBackbone(timm.create_model(name, features_only=True, out_indices=(-2, -1)))
    assert net.add_temporal_shift(8) == shifts


@pytest.mark.parametrize(
    "name", ["timm/resnet18", "timm/convnext_atto", pytest.param("torchvision/r3d_18", marks=pytest.mark.slow)]
)
def test_other_sizes(name):
    """Built for one size, run at another; at 32 pixels the coarsest map has a single pixel."""
    model = small(name).eval()
    for size in (32, 63):
        built = small(name, crop_size=size).eval()
        assert built(clips(built)).shape == (2, 5)
        assert built.state_dict().keys() == model.state_dict().keys()
        assert model(torch.randn(1, 3, model.input_spec.num_frames, size, size + 7)).shape == (1, 5)


def test_other_sizes_of_a_network_without_padding():
    model = small("timm/inception_v3").eval()
    assert len(model.neck.spatial_modulation[0]) == 1
    for size in (139, 160, 224, 299):
        with torch.device("meta"):
            assert model.to("meta")(torch.empty(1, 3, 2, size, size + 40)).shape == (1, 5)


def test_no_weight_decay():
    names = small("timm/vit_tiny_patch16_224").no_weight_decay()
    assert {"backbone.net.model.pos_embed", "backbone.net.model.cls_token"} <= names
    assert small("timm/resnet18").no_weight_decay() == set()


def test_shifts_mix_frames():
    for shift in (False, True):
        model = switch_on(small("timm/resnet18", temporal_shift=shift)).eval()
        x = clips(model, batch=1)
        other = x.clone()
        other[:, :, 1] += 1
        same = torch.equal(model.backbone(x)[-1][:, :, 0], model.backbone(other)[-1][:, :, 0])
        assert same != shift


def test_input_spec_follows_the_backbone():
    spec = tpn.create_model("tpn", backbone="timm/vit_tiny_patch16_224", num_classes=2, num_frames=4).input_spec
    assert (spec.num_frames, spec.frame_interval, spec.crop_size, spec.short_side) == (4, 16, 224, 256)
    assert spec.mean == (127.5, 127.5, 127.5)
    spec = tpn.create_model("tpn", backbone="torchvision/r3d_18", num_classes=2).input_spec
    assert (spec.num_frames, spec.frame_interval, spec.crop_size, spec.short_side) == (8, 8, 112, 128)
    assert spec.mean == (110.201, 100.64, 95.995)
    assert small("timm/resnet18", in_chans=2).input_spec.mean == (114.495, 114.495)


@pytest.mark.parametrize("name", ["timm/convnext_atto", pytest.param("torchvision/r3d_18", marks=pytest.mark.slow)])
def test_grad_checkpointing(name):
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


def test_backbone_starts_from_its_own_weights(hub, tmp_path):
    torch.manual_seed(1)
    published = timm.create_model("resnet18").state_dict()
    hub.add("timm/resnet18.a1_in1k", weights=save(published))
    model = small("timm/resnet18", backbone_pretrained=True, cache_dir=tmp_path / "cache")
    assert any((tmp_path / "cache").rglob("model.safetensors"))
    names = {name.removeprefix("net."): tensor for name, tensor in model.backbone.state_dict().items()}
    assert names.keys() == published.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(tensor, published[name]) for name, tensor in names.items())

    tpn.save_pretrained(model, tmp_path / "saved")
    hub.clear()
    again = tpn.create_model(f"local-dir:{tmp_path / 'saved'}")  # does not ask for the weights of the backbone
    assert torch.equal(again.backbone.net.conv1.weight, published["conv1.weight"])
    assert hub.requests == []


def last_map_to_logits(network, x):
    """Classify the last feature map as torchvision does."""
    if hasattr(network, "fc"):
        return network.fc(x.mean((2, 3, 4)))
    if hasattr(network, "classifier"):
        return network.classifier(network.avgpool(x)).mean((2, 3, 4))
    return network.head(x.mean((2, 3, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18", "s3d", "swin3d_t"])
def test_video_networks_start_from_their_own_weights(name, tmp_path, monkeypatch):
    """Their last map is the one that torchvision classifies."""
    torch.manual_seed(1)
    network = torchvision.models.get_model(name).eval()
    fetched = []

    def fetch(url, path, pauses, sha256):
        torch.save(network.state_dict(), path)
        fetched.append((url, sha256))

    monkeypatch.setattr(transfer, "download", fetch)
    size = 224 if name == "s3d" else 64  # its pooling needs that
    frames = 16 if name == "s3d" else 8
    model = small(f"torchvision/{name}", num_frames=frames, out_indices=(-2, -1), backbone_pretrained=True, cache_dir=tmp_path)
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    assert fetched == [(url, re.search(r"-([0-9a-f]{8})\.pth", url)[1])]
    assert [path.name for path in tmp_path.iterdir()] == [url.rpartition("/")[2]]
    x = torch.randn(1, 3, frames, size, size)
    with torch.inference_mode():
        expected = network(x)
        got = last_map_to_logits(network, model.backbone.eval()(x)[-1])
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_damaged_weights_of_a_video_network_are_fetched_again(tmp_path, monkeypatch):
    state, fetched = torchvision.models.get_model("r3d_18").state_dict(), []
    monkeypatch.setattr(transfer, "download", lambda url, path, **_: fetched.append(url) or torch.save(state, path))
    (entry,) = torchvision.models.get_model_weights("r3d_18")
    for sha256, expected in ((entry.url[-12:-4], 1), (entry.url[-12:-4], 1), ("f" * 64, 2)):
        monkeypatch.setattr("tpn.models.backbones.torchvision.file_sha256", lambda path, sha256=sha256: sha256)
        small("torchvision/r3d_18", num_frames=8, backbone_pretrained=True, cache_dir=tmp_path)
        assert len(fetched) == expected


def test_weights_of_a_backbone_that_cannot_be_fetched(hub, tmp_path):
    with pytest.raises(tpn.WeightsUnavailableError, match="timm/resnet18.tv_in1k"):
        small("timm/resnet18.tv_in1k", backbone_pretrained=True, cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["timm/resnet18.tv_in1k", "torchvision/r3d_18"])
def test_offline(hub, tmp_path, monkeypatch, name):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(tpn.WeightsUnavailableError, match=f"{name}.*HF_HUB_OFFLINE forbids requests") as error:
        small(name, num_frames=8, backbone_pretrained=True, cache_dir=tmp_path)
    assert not re.search("tries: [^1]", str(error.value))
    assert hub.requests == []


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
    assert "`timm/resnet18`" in card
    fewer = tpn.create_model("hf-hub:me/mine", num_classes=3, cache_dir=tmp_path)
    assert fewer.labels is None
    assert torch.equal(fewer.backbone.net.conv1.weight, model.backbone.net.conv1.weight)


def test_trained(tmp_path):
    """The number of classes comes from the data."""
    motion.write_dataset(tmp_path / "videos", 1, seed=1, num_frames=16)
    for name in motion.CLASSES[2:]:
        shutil.rmtree(tmp_path / "videos" / name)
    args = {"backbone": "timm/resnet18", "num_frames": 2}
    options = {
        "weights": "random",
        "crop_size": 64,
        "short_side": 64,
        "epochs": 1,
        "batch_size": 2,
        "val_fraction": 0,
        "workers": 0,
    }
    train(tmp_path / "videos", output=tmp_path / "run", model="tpn", model_args=args, threads=torch.get_num_threads(), **options)
    model = tpn.create_model(f"local-dir:{tmp_path / 'run'}")
    assert model.labels == tuple(sorted(motion.CLASSES[:2]))
    assert model.config.backbone == tpn.PartConfig("timm/resnet18")
    assert (model.input_spec.num_frames, model.input_spec.crop_size) == (2, 64)
