"""Loading weights: ImageNet starts, other input channels, unexpected tensors."""

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import small
import timm
import torch
from backbones import small as on_backbone
from huggingface_hub import constants
from recipe import fill, sketch_state_dict
from safetensors.torch import load_file, save, save_file
from torch import nn

import tpn
from tpn import CheckpointError, WeightsUnavailableError
from tpn.zoo.convert import convert_state_dict
from tpn.zoo.load import load_weights, read_weights
from tpn.zoo.reader import read_checkpoint

SLOWONLY, TSM = "tpn_slowonly_r50_k400", "tpn_tsm_r50_sthv1"
TSM_MANIFEST = "original_tsm_r50_sthv2"


def save_pth(obj, path):
    torch.save(obj, path)
    return path


def timm_weights(name, divide=1):
    """Tensors under timm's names, ImageNet classifier included, of a network with 1/`divide` of the channels."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in timm.create_model(name).state_dict().items()}
    return {key: torch.from_numpy(fill(key, [n // divide if n >= 64 else n for n in shape])) for key, shape in shapes.items()}


@pytest.fixture
def resnet50(hub, tmp_path, monkeypatch):
    """The weights of a narrow ResNet-50 on the Hub; its cache is empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    weights = timm_weights("resnet50", divide=16)
    hub.add("timm/resnet50.tv_in1k", weights=save(weights))
    return weights


@pytest.mark.parametrize("name", [SLOWONLY, TSM])
def test_imagenet_start(hub, resnet50, name):
    model = tpn.create_model(name, backbone_pretrained="imagenet", base_channels=4)
    backbone = dict(model.backbone.state_dict())
    assert backbone.keys() == resnet50.keys() - {"fc.weight", "fc.bias"}
    for key, tensor in backbone.items():
        source = resnet50[key]
        if tensor.ndim == 5:  # a repeated image meets the sum over time
            assert torch.allclose(tensor.sum(2), source, atol=1e-6)
            assert (tensor == tensor[:, :, :1]).all()
        else:
            assert torch.equal(tensor, source)
    requests = len(hub.requests)
    again = tpn.create_model(name, backbone_pretrained=True, base_channels=4)
    assert torch.equal(again.backbone.conv1.weight, model.backbone.conv1.weight)
    assert len(hub.requests) == requests
    fewer = {"backbone": name.split("_")[-3] if "tsm" in name else "slowonly", "out_indices": (1, 2), "num_classes": 2}
    fewer = tpn.create_model("tpn", **fewer, backbone_pretrained=True, base_channels=4).backbone
    assert torch.equal(fewer.layer3[0].conv2.weight, model.backbone.layer3[0].conv2.weight)


def test_repeated_image_gives_the_features_of_the_image(hub, tmp_path):
    """Except at both ends of the clip, where convolutions read zeros."""
    weights = timm_weights("resnet18")
    hub.add("timm/resnet18.tv_in1k", weights=save(weights))
    args = {"base_channels": 64, "num_frames": 9, "backbone_pretrained": "imagenet", "cache_dir": tmp_path}
    model = tpn.create_model("tpn_slowonly_tiny_motion", **args).eval()
    image_model = timm.create_model("resnet18").eval()
    image_model.load_state_dict(weights)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = model.backbone(image.unsqueeze(2).expand(-1, -1, 9, -1, -1))
        expected = image_model.forward_features(image)
    assert torch.allclose(maps[-1][:, :, 4], expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_imagenet_start_is_not_saved(hub, resnet50, tmp_path):
    args = {"num_classes": 4, "in_chans": 1, "base_channels": 4}
    model = tpn.create_model("tsm_r50_sthv1", backbone_pretrained="imagenet", **args)
    assert torch.allclose(model.backbone.conv1.weight, resnet50["conv1.weight"].sum(1, keepdim=True), atol=1e-6)
    tpn.save_pretrained(model, tmp_path / "saved")
    hub.repos.clear()
    again = tpn.create_model(f"local-dir:{tmp_path / 'saved'}")
    assert torch.equal(again.backbone.conv1.weight, model.backbone.conv1.weight)


def test_imagenet_start_is_strict(hub, resnet50):
    del resnet50["layer3.2.conv1.weight"]
    hub.add("timm/resnet50.tv_in1k", weights=save(resnet50 | {"extra": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="1 .*missing.*layer3.2.conv1.weight.* 1 .*not in the model.*extra"):
        tpn.create_model("tsm_r50_sthv1", backbone_pretrained="imagenet", base_channels=4)


def test_imagenet_start_that_cannot_be_fetched(hub, tmp_path):
    with pytest.raises(WeightsUnavailableError, match="timm/resnet101.tv_in1k"):
        tpn.create_model("slowonly_r101_k400", backbone_pretrained="imagenet", base_channels=4, cache_dir=tmp_path)
    for wrong in ("kinetics", 1.5):
        with pytest.raises(ValueError, match=f"backbone_pretrained.*{wrong}"):
            tpn.create_model(SLOWONLY, backbone_pretrained=wrong)
    for other in ({"pretrained": True}, {"checkpoint_path": "x.pth", "num_classes": 4}):
        with pytest.raises(ValueError, match="one of pretrained.*backbone_pretrained"):
            tpn.create_model(SLOWONLY, backbone_pretrained="imagenet", **other)


# Input channels


@pytest.mark.parametrize("name", [SLOWONLY, TSM])
@pytest.mark.parametrize("in_chans", [1, 2, 10])
def test_stem_is_adapted_as_timm_does(name, in_chans, caplog):
    caplog.set_level(logging.INFO, logger="tpn")
    source = tpn.create_model(name, base_channels=4)
    model = tpn.create_model(name, base_channels=4, in_chans=in_chans)
    load_weights(model, read_weights(source.state_dict()))
    rgb, adapted = source.backbone.conv1.weight, model.backbone.conv1.weight
    assert adapted.shape == (4, in_chans, *rgb.shape[2:])
    gray = torch.randn(1, 1, 8, 32, 32)
    stems = [m.backbone.conv1 if rgb.ndim == 5 else (lambda x, m=m: m.backbone.conv1(x[:, :, 0])) for m in (source, model)]
    if in_chans == 1:  # a gray image gives what the same image as RGB gives
        assert torch.allclose(stems[1](gray), stems[0](gray.expand(-1, 3, -1, -1, -1)), atol=1e-5)
    else:
        for i in range(in_chans):
            assert torch.allclose(adapted[:, i], rgb[:, i % 3] * 3 / in_chans)
    rest = {k: v for k, v in source.state_dict().items() if k != "backbone.conv1.weight"}
    assert small.same(model, rest)
    (record,) = caplog.records
    assert re.search(f"RGB.* {in_chans} channels", record.getMessage())


def test_other_channels(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tpn")
    model = tpn.create_model(SLOWONLY, base_channels=4, in_chans=2)
    assert model.input_spec.mean == (sum(tpn.input_spec(SLOWONLY).mean) / 3,) * 2
    assert model.input_spec.normalize(torch.zeros(8, 2, 16, 16, dtype=torch.uint8)).shape == (2, 8, 16, 16)
    again = tpn.create_model(f"local-dir:{tpn.save_pretrained(model, tmp_path)}")
    assert torch.equal(again.backbone.conv1.weight, model.backbone.conv1.weight)
    assert caplog.records == []
    with pytest.raises(CheckpointError, match=r"backbone.conv1.weight \(4, 2, .* \(4, 3, "):
        load_weights(tpn.create_model(SLOWONLY, base_channels=4), read_weights(model.state_dict()))
    with pytest.raises(CheckpointError, match=r"conv1.*in_chans=2"):
        tpn.create_model(f"local-dir:{tmp_path}", in_chans=1)
    with pytest.raises(ValueError, match="RGB.*2"):
        tpn.VideoClassifier(model)


# Unexpected tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(dtype):
    source = small.random_model(TSM).to(dtype)
    model = tpn.create_model(TSM, base_channels=4)
    load_weights(model, read_weights(source.state_dict()))
    expected = source.state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.int64 if name.endswith("batches_tracked") else torch.float32)
        assert torch.equal(tensor, expected[name].to(tensor.dtype))


@pytest.mark.parametrize("classes", [174, 5])
@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("head.fc.weight", torch.tensor(1.0), r"shape.*head\.fc\.(weight \(\) instead of \(174, 128\)|bias)"),
        ("neck.pyramid_fusion.bn.weight", torch.full((128,), float("inf")), "neck.pyramid_fusion.bn.weight.* infinite"),
        ("backbone.bn1.bias", torch.full((4,), float("nan")), r"backbone\.bn1\.bias.* NaN"),
        ("backbone.bn1.weight", torch.ones(4, dtype=torch.int8), "backbone.bn1.weight.* torch.int8.* torch.float32"),
        ("backbone.bn1.bias", torch.ones(3), r"1 .*shape.*backbone\.bn1\.bias \(3,\).* \(4,\)\)$"),
        ("backbone.layer1.7.conv1.weight", torch.ones(1), r"1 .*not in.*backbone\.layer1\.7\.conv1\.weight\)$"),
        ("backbone.layer2.0.bn1.weight", None, r"1 .*missing.*backbone\.layer2\.0\.bn1\.weight\)$"),
        ("backbone.layer2.0.bn1.num_batches_tracked", None, r"1 .*missing.*layer2\.0\.bn1\.num_batches_tracked\)$"),
    ],
)
def test_unexpected_tensors(name, tensor, says, classes, tmp_path):
    model = tpn.create_model(TSM, base_channels=4, num_classes=classes)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v for k, v in (small.random_model(TSM).state_dict() | {name: tensor}).items() if v is not None}
    path = save_pth(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: .*{says}"):
        load_weights(model, read_weights(path))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# Checkpoint files


@pytest.mark.parametrize("num_classes", [None, 9, 5])
def test_values_arrive(num_classes, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tpn")
    path = tmp_path / "a.pth"
    path.write_bytes(small.upstream_file(small.TSM, dtype=torch.float16, num_classes=9)[0])
    source, _ = convert_state_dict(read_checkpoint(path)[0])
    model = tpn.create_model(TSM, num_classes=num_classes, checkpoint_path=path, base_channels=4)
    assert (model.num_classes, model.labels) == (num_classes or 9, None)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
        if num_classes == 5 and ".fc." in name:
            assert tensor.shape[0] == 5
            assert tensor.abs().max() < 0.1
        else:
            assert torch.equal(tensor, source[name].to(tensor.dtype)), name
    assert [r.levelname for r in caplog.records] == ["INFO"] * (num_classes == 5)
    assert num_classes != 5 or re.search(r"a\.pth.* 9 .* 5.* head\.fc.* aux_head\.fc", caplog.text)


def test_classes_for_a_model_saved_without(tmp_path):
    """Its classifiers are new. They must not be missing from the file of a model with classes."""
    name, args = "tpn_slowonly_tiny_motion", {"base_channels": 8}
    folder = tpn.save_pretrained(tpn.create_model(name, num_classes=0, **args), tmp_path / "without")
    source = load_file(folder / "model.safetensors")
    model = tpn.create_model(f"local-dir:{folder}", num_classes=5)
    assert (model.num_classes, model.aux_head.fc.out_features) == (5, 5)
    assert all(torch.equal(tensor, source[n]) for n, tensor in model.state_dict().items() if ".fc." not in n)
    assert tpn.create_model(f"local-dir:{folder}").num_classes == 0
    assert tpn.create_model(name, checkpoint_path=folder / "model.safetensors", **args).num_classes == 0

    save_file(source, tmp_path / "lost.safetensors")  # without metadata
    with pytest.raises(CheckpointError, match="4 .*missing"):
        tpn.create_model(name, num_classes=5, checkpoint_path=tmp_path / "lost.safetensors", **args)


@pytest.mark.parametrize(
    ("name", "manifest_name", "says"),
    [
        (
            "slowonly_r50_k400",
            "original_slowonly_r101_32x2",
            "SlowOnly R101, 400 classes.* 306 .*not in.*backbone.layer3.10.bn1.bias",
        ),
        (
            "slowonly_r101_k400",
            "original_slowonly_r50_8x8",
            "SlowOnly R50, 400 classes.* 306 .*missing.*backbone.layer3.10.bn1.bias",
        ),
        ("slowonly_r50_k400", TSM_MANIFEST, r"TSM R50, 174 classes.*backbone.conv1.weight \(64, 3, 7, 7\).* \(64, 3, 1, 7, 7\)"),
        ("slowonly_r50_k400", "original_tpn_slowonly_r50_8x8", "TPN on SlowOnly R50.*not in.*neck.bottom_up"),
        (SLOWONLY, "original_slowonly_r50_8x8", r"SlowOnly R50, 400 classes.*missing.*aux_head.conv.bn.bias"),
    ],
)
def test_wrong_architecture(name, manifest_name, says, tmp_path):
    path = save_pth(sketch_state_dict(manifest_name), tmp_path / "a.pth")
    with torch.device("meta"), pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: .*{says}"):
        tpn.create_model(name, checkpoint_path=path)


# The two variants of TSM, which names and shapes cannot tell apart


@pytest.mark.parametrize(
    ("manifest", "name", "kwargs", "says"),
    [
        ("original_tpn_tsm_r50_sthv2", TSM, {}, "shift_shortcut=True"),
        ("original_tpn_tsm_r50_sthv2", TSM, {"num_classes": 5}, "shift_shortcut=True"),
        ("mmaction2_tpn_tsm_r50_sthv1", TSM, {"shift_shortcut": True}, "shift_shortcut=False"),
        ("mmaction2_tpn_tsm_r50_sthv1", f"{TSM}.original", {}, "shift_shortcut=False"),
    ],
)
def test_code_bases_need_their_variant(manifest, name, kwargs, says, tmp_path):
    path = save_pth(sketch_state_dict(manifest), tmp_path / "a.pth")
    with torch.device("meta"), pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: .*{says}"):
        tpn.create_model(name, checkpoint_path=path, **kwargs)


@pytest.mark.parametrize(
    ("name", "argument", "values"),
    [
        ("tsm_r50_sthv1", "shift_shortcut", (True, False)),
        ("tsm_r50_sthv1", "shift_shortcut", (False, True)),
        (SLOWONLY, "flow_order", ("parallel", "cascade")),
    ],
)
def test_saved_weights_know_their_variant(name, argument, values, tmp_path):
    saved, other = (tpn.create_model(name, base_channels=4, num_classes=3, **{argument: value}) for value in values)
    path = tpn.save_pretrained(saved, tmp_path) / "model.safetensors"
    with pytest.raises(CheckpointError, match=f"trained with {argument}={values[0]}.* built with {argument}={values[1]}"):
        load_weights(other, read_weights(path))
    loaded = tpn.create_model(name, checkpoint_path=path, base_channels=4, **{argument: values[0]})
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict(), rtol=0, atol=0)


def test_saved_weights_know_arguments_that_no_shape_shows(tmp_path, caplog):
    def make(**kwargs):
        return on_backbone("timm/resnet18", num_frames=4, **kwargs)

    path = tpn.save_pretrained(make(temporal_scales=(2, 4), backbone_args={"act_layer": "gelu"}), tmp_path) / "model.safetensors"
    right = {"temporal_scales": (2, 4), "backbone_args": {"act_layer": "gelu"}}
    assert make(checkpoint_path=path, **right).neck.temporal_scales == (2, 4)
    with pytest.raises(CheckpointError, match=r"trained with temporal_scales=\(2, 4\).* built with temporal_scales=\(4, 4\)"):
        make(checkpoint_path=path, backbone_args=right["backbone_args"])
    assert not caplog.records
    make(checkpoint_path=path, temporal_scales=(2, 4))
    assert re.search(r"backbone.*\{'act_layer': 'gelu'\}.*\{\}", caplog.text)


@pytest.mark.parametrize(("args", "scales", "other"), [({}, (8, 8), (2, 8)), ({"temporal_modulation": False}, (1, 1), None)])
def test_saved_weights_know_their_default_scales(args, scales, other, tmp_path):
    small = partial(tpn.create_model, "tpn_slowonly_r50_k400", base_channels=4, num_classes=3, **args)
    path = tpn.save_pretrained(small(), tmp_path) / "model.safetensors"
    assert small(checkpoint_path=path, temporal_scales=scales).neck.temporal_scales == scales
    if other is not None:
        with pytest.raises(CheckpointError, match=r"trained with temporal_scales=\(8, 8\).* built with temporal_scales=\(2, 8\)"):
            small(checkpoint_path=path, temporal_scales=other)


def test_weights_of_another_kind_of_neck(tmp_path):
    """A neck that was a module has no registered name to look up."""

    class Last(nn.Module):
        out_channels = 128

        def forward(self, maps):
            return maps[-1]

    path = tpn.save_pretrained(tpn.create_model(TSM, base_channels=4, neck=Last()), tmp_path) / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"missing.*neck\."):
        tpn.create_model(TSM, base_channels=4, checkpoint_path=path)


def test_several_threads_read_at_once(tmp_path):
    """torch keeps one list of safe globals for the whole process."""
    path = tmp_path / "a.pth"
    torch.save({"meta": np.float64(1.0), "state_dict": {"a": torch.ones(2)}}, path)
    torch.serialization.add_safe_globals([np.dtype])
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: read_checkpoint(path)[0]["a"].sum().item(), range(80)))
    assert results == [2.0] * 80
    assert np.dtype in torch.serialization.get_safe_globals()
