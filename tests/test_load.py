"""Weights into models: ImageNet starts, other input channels, strange tensors."""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import small
import timm
import torch
from backbones import small as on_backbone
from huggingface_hub import constants
from recipe import fill, our_names, sketch_state_dict
from safetensors.torch import load_file, save, save_file

import tpn
from tpn import CheckpointError, WeightsUnavailableError
from tpn.zoo.checkpoint import read_checkpoint
from tpn.zoo.convert import load_strict
from tpn.zoo.load import load_checkpoint, load_state_dict

SLOWONLY, TSM = "tpn_slowonly_r50_k400", "tpn_tsm_r50_sthv1"
TSM_MANIFEST = "original_tsm_r50_sthv2"


def save_pth(obj, path):
    torch.save(obj, path)
    return path


@pytest.fixture(scope="module")
def resnet50():
    """A 2D ResNet-50 with its ImageNet classifier, in timm's names."""
    with torch.device("meta"):
        shapes = timm.create_model("resnet50").state_dict()
    return {name: torch.from_numpy(fill(name, tensor.shape)) for name, tensor in shapes.items()}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", [SLOWONLY, "slowonly_r50_32x2_k400", TSM, "tsm_r50_sthv2"])
def test_imagenet_start(hub, cache, resnet50, name):
    hub.add("timm/resnet50.tv_in1k", weights=save(resnet50))
    model = tpn.create_model(name, backbone_pretrained="imagenet", cache_dir=cache)
    backbone = dict(model.backbone.state_dict())
    assert backbone.keys() == resnet50.keys() - {"fc.weight", "fc.bias"}
    for key, tensor in backbone.items():
        source = resnet50[key]
        if tensor.ndim == 5:  # a sum over time: what a still image meets
            assert torch.allclose(tensor.sum(2), source, atol=1e-6)
            assert (tensor == tensor[:, :, :1]).all()
        else:
            assert torch.equal(tensor, source)
    requests = len(hub.requests)
    again = tpn.create_model(name, backbone_pretrained="imagenet", cache_dir=cache)
    assert torch.equal(again.backbone.conv1.weight, model.backbone.conv1.weight)
    assert len(hub.requests) == requests


def test_still_image_gives_the_image_networks_features(hub, cache, resnet50):
    """Inflated weights see a repeated image as the 2D network sees the image; at both ends of the clip zeros come in."""
    hub.add("timm/resnet50.tv_in1k", weights=save(resnet50))
    model = tpn.create_model("slowonly_r50_k400", num_frames=32, backbone_pretrained="imagenet", cache_dir=cache).eval()
    image_model = timm.create_model("resnet50").eval()
    image_model.load_state_dict(resnet50)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (maps,) = model.backbone(image.unsqueeze(2).expand(-1, -1, 32, -1, -1))
        expected = image_model.forward_features(image)
    assert torch.allclose(maps[:, :, 15], expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_imagenet_start_is_not_saved(hub, cache, resnet50, tmp_path):
    hub.add("timm/resnet50.tv_in1k", weights=save(resnet50))
    model = tpn.create_model("tsm_r50_sthv1", backbone_pretrained="imagenet", num_classes=4, in_chans=1, cache_dir=cache)
    assert torch.allclose(model.backbone.conv1.weight, resnet50["conv1.weight"].sum(1, keepdim=True), atol=1e-6)
    tpn.save_pretrained(model, tmp_path / "saved")
    hub.repos.clear()
    again = tpn.create_model(f"local-dir:{tmp_path / 'saved'}")
    assert torch.equal(again.backbone.conv1.weight, model.backbone.conv1.weight)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("layer3.2.conv1.weight"), "1 tensors of the model are missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 of its tensors are not in the model"),
        (lambda state: state.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}), "1 have another shape"),
        (lambda state: state["bn1.weight"].fill_(float("nan")), "backbone.bn1.weight holds NaN"),
    ],
)
def test_imagenet_start_is_strict(hub, cache, resnet50, change, says):
    state = {name: tensor.clone() for name, tensor in resnet50.items()}
    change(state)
    hub.add("timm/resnet50.tv_in1k", weights=save(state))
    with pytest.raises(CheckpointError, match=says):
        tpn.create_model("tsm_r50_sthv1", backbone_pretrained="imagenet", cache_dir=cache)


def test_imagenet_start_that_cannot_be_fetched(hub, cache):
    with pytest.raises(WeightsUnavailableError, match=r"there is no repository timm/resnet101.tv_in1k on the Hub"):
        tpn.create_model("tpn_slowonly_r101_k400", backbone_pretrained="imagenet", cache_dir=cache)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"backbone_pretrained": "kinetics"}, "backbone_pretrained must be True, False or 'imagenet', got 'kinetics'"),
        ({"backbone_pretrained": 1.5}, "backbone_pretrained must be True, False or 'imagenet', got 1.5"),
        ({"backbone_pretrained": "imagenet", "pretrained": True}, "pass one of pretrained=True"),
        ({"backbone_pretrained": "imagenet", "checkpoint_path": "x.pth"}, "pass one of pretrained=True"),
    ],
)
def test_imagenet_start_refused(kwargs, says):
    with pytest.raises(ValueError, match=says):
        tpn.create_model(SLOWONLY, **kwargs)


# Input channels


@pytest.mark.parametrize("name", [SLOWONLY, TSM])
@pytest.mark.parametrize("in_chans", [1, 2, 5, 10])
def test_stem_is_adapted_as_timm_does(name, in_chans, caplog):
    caplog.set_level(logging.INFO, logger="tpn")
    source = tpn.create_model(name, base_channels=4)
    model = tpn.create_model(name, base_channels=4, in_chans=in_chans)
    load_state_dict(model, source.state_dict())
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
    assert all(torch.equal(model.state_dict()[k], v) for k, v in rest.items())
    assert [r.getMessage() for r in caplog.records] == [
        f"the state dict takes RGB, the model {in_chans} channels: the stem's weights were adapted"
    ]


def test_input_spec_of_other_channels():
    spec = tpn.create_model(SLOWONLY, base_channels=4, in_chans=2).input_spec
    assert spec.mean == (sum(tpn.input_spec(SLOWONLY).mean) / 3,) * 2
    assert spec.normalize(torch.zeros(8, 2, 16, 16, dtype=torch.uint8)).shape == (2, 8, 16, 16)


def test_adapted_model_comes_back_as_it_is(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tpn")
    model = tpn.create_model(SLOWONLY, base_channels=4, in_chans=2)
    tpn.save_pretrained(model, tmp_path)
    again = tpn.create_model(f"local-dir:{tmp_path}")
    assert torch.equal(again.backbone.conv1.weight, model.backbone.conv1.weight)
    assert caplog.records == []


def test_other_channels_do_not_become_rgb():
    flow = tpn.create_model(SLOWONLY, base_channels=4, in_chans=2)
    with pytest.raises(CheckpointError, match=r"backbone.conv1.weight \(4, 2, 1, 7, 7\) instead of \(4, 3, 1, 7, 7\)"):
        load_state_dict(tpn.create_model(SLOWONLY, base_channels=4), flow.state_dict())


def test_video_classifier_wants_rgb():
    with pytest.raises(ValueError, match="reads RGB video, the model takes 2 channels"):
        tpn.VideoClassifier(tpn.create_model(SLOWONLY, base_channels=4, in_chans=2))


# Strange tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(dtype):
    source = small.random_model(TSM).to(dtype)
    model = tpn.create_model(TSM, base_channels=4)
    load_state_dict(model, source.state_dict())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.int64 if name.endswith("batches_tracked") else torch.float32)
        assert torch.equal(tensor, source.state_dict()[name].to(tensor.dtype))


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("head.fc.weight", torch.zeros(174, 9), r"head.fc.weight \(174, 9\) instead of \(174, 128\)"),
        (
            "neck.pyramid_fusion.bn.weight",
            torch.full((128,), float("inf")),
            "neck.pyramid_fusion.bn.weight holds NaN or infinite",
        ),
        ("backbone.bn1.weight", torch.ones(4, dtype=torch.int8), "backbone.bn1.weight is torch.int8, expected torch.float32"),
    ],
)
def test_strange_tensors(name, tensor, says):
    model = tpn.create_model(TSM, base_channels=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=says):
        load_state_dict(model, small.random_model(TSM).state_dict() | {name: tensor})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# Checkpoint files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_values_arrive(dtype, tmp_path):
    source = sketch_state_dict(TSM_MANIFEST, dtype)
    model = tpn.create_model("tsm_r50_sthv2", checkpoint_path=save_pth(source, tmp_path / "a.pth"))
    state = model.state_dict()
    for name, ours in our_names(TSM_MANIFEST).items():
        assert state[ours].dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
        assert torch.equal(state[ours], source[name].to(state[ours].dtype)), name


def test_other_number_of_classes(tmp_path, caplog):
    name = "mmaction2_tpn_tsm_r50_sthv1"
    source = sketch_state_dict(name)
    path = save_pth({"state_dict": source}, tmp_path / "a.pth")
    with caplog.at_level(logging.INFO, logger="tpn"):
        model = tpn.create_model("tpn_tsm_r50_sthv1", num_classes=5, checkpoint_path=path)
    (record,) = [r for r in caplog.records if r.name.startswith("tpn")]
    assert record.levelname == "INFO"
    assert record.getMessage() == (f"{path} is for 174 classes, the model has 5: new and untrained: head.fc and aux_head.fc")
    state = model.state_dict()
    fresh = {"head.fc.weight", "head.fc.bias", "aux_head.fc.weight", "aux_head.fc.bias"}
    for upstream, ours in our_names(name).items():
        if ours in fresh:
            assert state[ours].shape[0] == 5
            assert state[ours].abs().max() < 0.1
        else:
            assert torch.equal(state[ours], source[upstream]), ours


def test_same_number_of_classes_is_silent(tmp_path, caplog):
    path = save_pth(sketch_state_dict(TSM_MANIFEST), tmp_path / "a.pth")
    with caplog.at_level(logging.INFO, logger="tpn"):
        tpn.create_model("tsm_r50_sthv2", num_classes=174, checkpoint_path=path)
    assert not [r for r in caplog.records if r.name.startswith("tpn")]


def test_classes_for_a_model_saved_without(tmp_path):
    """Its classifiers are new; but they cannot be missing from a model that had some."""
    name, args = "tpn_slowonly_tiny_motion", {"base_channels": 8}
    folder = tpn.save_pretrained(tpn.create_model(name, num_classes=0, **args), tmp_path / "without")
    source = load_file(folder / "model.safetensors")
    model = tpn.create_model(f"local-dir:{folder}", num_classes=5)
    assert (model.num_classes, model.aux_head.fc.out_features) == (5, 5)
    assert all(torch.equal(tensor, source[n]) for n, tensor in model.state_dict().items() if ".fc." not in n)
    assert tpn.create_model(f"local-dir:{folder}").num_classes == 0
    assert tpn.create_model(name, checkpoint_path=folder / "model.safetensors", **args).num_classes == 0

    save_file(source, tmp_path / "lost.safetensors")  # no word of who saved it
    with pytest.raises(CheckpointError, match="4 tensors of the model are missing from it"):
        tpn.create_model(name, num_classes=5, checkpoint_path=tmp_path / "lost.safetensors", **args)


def test_number_of_classes_comes_from_the_checkpoint(tmp_path):
    source = sketch_state_dict(TSM_MANIFEST)
    source["cls_head.fc_cls.weight"] = torch.ones(9, 2048)
    source["cls_head.fc_cls.bias"] = torch.ones(9)
    model = tpn.create_model("tsm_r50_sthv2", checkpoint_path=save_pth(source, tmp_path / "a.pth"))
    assert (model.num_classes, model.labels) == (9, None)
    assert model.head.fc.bias.eq(1).all()


@pytest.mark.parametrize(
    ("name", "manifest_name", "parts"),
    [
        (
            "slowonly_r50_k400",
            "original_slowonly_r101_32x2",
            [
                "SlowOnly R101, 400 classes, does not fit",
                "306 of its tensors are not in the model",
                "backbone.layer3.10.bn1.bias",
            ],
        ),
        (
            "slowonly_r101_k400",
            "original_slowonly_r50_8x8",
            ["SlowOnly R50, 400 classes, does not fit", "306 tensors of the model are missing", "backbone.layer3.10.bn1.bias"],
        ),
        (
            "slowonly_r50_k400",
            TSM_MANIFEST,
            [
                "TSM R50, 174 classes, does not fit",
                "have another shape",
                "backbone.conv1.weight (64, 3, 7, 7) instead of (64, 3, 1, 7, 7)",
            ],
        ),
        (
            "slowonly_r50_k400",
            "original_tpn_slowonly_r50_8x8",
            ["a TPN on SlowOnly R50", "of its tensors are not in the model (aux_head.conv.bn.bias, "],
        ),
        (
            "tpn_slowonly_r50_k400",
            "original_slowonly_r50_8x8",
            ["checkpoint, SlowOnly R50, 400 classes", "tensors of the model are missing from it (aux_head.conv.bn.bias, "],
        ),
    ],
)
def test_wrong_architecture(name, manifest_name, parts, tmp_path):
    with torch.device("meta"):
        model = tpn.create_model(name)
    path = save_pth(sketch_state_dict(manifest_name), tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, path)
    assert str(error.value).startswith(f"{path}: ")
    for part in parts:
        assert part in str(error.value)
    with torch.device("meta"), pytest.raises(CheckpointError, match="does not fit the model"):
        tpn.create_model(name, checkpoint_path=path)


def drop(state):
    del state["backbone.layer2.0.bn1.weight"]


def drop_a_batch_counter(state):
    del state["backbone.layer2.0.bn1.num_batches_tracked"]


def add(state):
    state["backbone.layer1.7.conv1.weight"] = torch.ones(1)


def reshape(state):
    state["backbone.bn1.bias"] = torch.ones(63)


def add_nan(state):
    state["backbone.bn1.bias"] = torch.full((64,), float("nan"))


def add_infinity(state):
    state["backbone.bn1.running_var"] = torch.cat([torch.ones(63), torch.tensor([float("inf")])])


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (drop, r"does not fit the model: 1 tensors of the model are missing from it \(backbone\.layer2\.0\.bn1\.weight\)$"),
        (drop_a_batch_counter, r"1 tensors of the model are missing from it \(backbone\.layer2\.0\.bn1\.num_batches_tracked\)$"),
        (add, r"does not fit the model: 1 of its tensors are not in the model \(backbone\.layer1\.7\.conv1\.weight\)$"),
        (reshape, r"1 have another shape \(backbone\.bn1\.bias \(63,\) instead of \(64,\)\)$"),
        (add_nan, r"backbone\.bn1\.bias holds NaN or infinite values; the checkpoint is damaged"),
        (add_infinity, r"backbone\.bn1\.running_var holds NaN or infinite values"),
    ],
)
@pytest.mark.parametrize("classes", [174, 5])
def test_damaged(damage, text, classes, tmp_path):
    state = sketch_state_dict(TSM_MANIFEST)
    damage(state)
    path = save_pth(state, tmp_path / "a.pth")
    with torch.device("meta"):
        model = tpn.create_model("tsm_r50_sthv2", num_classes=classes)
    with pytest.raises(CheckpointError, match=text) as error:
        load_checkpoint(model, path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_refused_checkpoint_changes_nothing():
    model = tpn.create_model("tsm_r50_sthv2", base_channels=8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bad = {k: torch.full_like(v, 7) for k, v in before.items()}
    bad["head.fc.bias"][0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        load_strict(model, bad)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# The two variants of TSM, which names and shapes do not tell apart


def test_original_weights_need_shift_shortcut(tmp_path):
    path = save_pth(sketch_state_dict("original_tpn_tsm_r50_sthv2"), tmp_path / "a.pth")
    with torch.device("meta"):
        with pytest.raises(CheckpointError, match="pass shift_shortcut=True to create_model") as error:
            tpn.create_model("tpn_tsm_r50_sthv1", checkpoint_path=path)
        assert str(error.value).startswith(f"{path}: ")
        with pytest.raises(CheckpointError, match="shift_shortcut=True"):
            tpn.create_model("tpn_tsm_r50_sthv1", checkpoint_path=path, num_classes=5)
    assert tpn.create_model("tpn_tsm_r50_sthv1", checkpoint_path=path, shift_shortcut=True).backbone.shift_shortcut


def test_mmaction2_weights_need_the_other_variant(tmp_path):
    path = save_pth(sketch_state_dict("mmaction2_tpn_tsm_r50_sthv1"), tmp_path / "a.pth")
    for name, kwargs in (("tpn_tsm_r50_sthv1", {"shift_shortcut": True}), ("tpn_tsm_r50_sthv1.original", {})):
        with torch.device("meta"), pytest.raises(CheckpointError, match="pass shift_shortcut=False to create_model"):
            tpn.create_model(name, checkpoint_path=path, **kwargs)


@pytest.mark.parametrize("flag", [True, False])
def test_saved_weights_know_their_variant(flag, tmp_path):
    saved = tpn.create_model("tsm_r50_sthv1", shift_shortcut=flag, base_channels=8, num_classes=3)
    path = tpn.save_pretrained(saved, tmp_path) / "model.safetensors"
    with pytest.raises(CheckpointError, match=f"trained with shift_shortcut={flag}.* pass shift_shortcut={flag} to create_model"):
        tpn.create_model("tsm_r50_sthv1", checkpoint_path=path, shift_shortcut=not flag, base_channels=8)
    loaded = tpn.create_model("tsm_r50_sthv1", checkpoint_path=path, shift_shortcut=flag, base_channels=8)
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict(), rtol=0, atol=0)


def test_slowonly_has_no_variants():
    names = ("mmaction2_tpn_slowonly_r50_8x8_k400", "original_tpn_slowonly_r50_8x8")
    first, second = (set(our_names(name).values()) for name in names)
    assert first == second


def test_saved_weights_know_their_flow_order(tmp_path):
    model = tpn.create_model(SLOWONLY, base_channels=4, flow_order="parallel")
    path = tpn.save_pretrained(model, tmp_path) / "model.safetensors"
    tpn.create_model(SLOWONLY, base_channels=4, flow_order="parallel", checkpoint_path=path)
    with pytest.raises(CheckpointError, match="trained with flow_order=parallel, .* pass flow_order='parallel' to create_model"):
        tpn.create_model(SLOWONLY, base_channels=4, checkpoint_path=path)


def test_saved_weights_know_what_no_shape_shows(tmp_path, caplog):
    def make(**kwargs):
        return on_backbone("timm/resnet18", num_frames=4, **kwargs)

    path = tpn.save_pretrained(make(temporal_scales=(2, 4), backbone_args={"act_layer": "gelu"}), tmp_path) / "model.safetensors"
    right = {"temporal_scales": (2, 4), "backbone_args": {"act_layer": "gelu"}}
    assert make(checkpoint_path=path, **right).neck.temporal_scales == (2, 4)
    with pytest.raises(CheckpointError, match=r"temporal_scales=\(2, 4\), .* built with temporal_scales=\(4, 4\)"):
        make(checkpoint_path=path, backbone_args=right["backbone_args"])
    assert not caplog.records
    make(checkpoint_path=path, temporal_scales=(2, 4))
    assert "trained with backbone_args={'act_layer': 'gelu'}, the model was built with {}" in caplog.text


def test_several_threads_read_at_once(tmp_path):
    """torch keeps one list of harmless classes for the whole process."""
    path = tmp_path / "a.pth"
    torch.save({"meta": np.float64(1.0), "state_dict": {"a": torch.ones(2)}}, path)
    torch.serialization.add_safe_globals([np.dtype])
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: read_checkpoint(path)[0]["a"].sum().item(), range(80)))
    assert results == [2.0] * 80
    assert np.dtype in torch.serialization.get_safe_globals()
