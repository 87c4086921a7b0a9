"""Every network of the zoo: shapes, gradients, classifiers, memory formats, compilation; and its parts."""

from types import SimpleNamespace

import pytest
import torch
from backbones import Pyramid
from timm.models import group_parameters
from torch import nn

import tpn
from tpn import AuxHead, ClassificationHead, ResNet3dSlowOnly, ResNetTSM, TemporalPyramid, TPNClassifier
from tpn.models.backbones.tsm import temporal_shift
from tpn.models.layers import channels_last, freeze_batch_norm

FAMILIES = ["tpn_slowonly_r50_k400", "tpn_tsm_r50_sthv1", "slowonly_r50_k400", "tsm_r50_sthv1"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomize_norms(model):
    """Give batch norms the statistics and scales of a trained network; fresh ones are the identity in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def small_tsm_tpn(**kwargs):
    """A TPN on a narrow TSM ResNet-50: half a million parameters."""
    return randomize_norms(tpn.create_model("tpn_tsm_r50_sthv1", base_channels=8, **kwargs))


def relative_error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "r101" in n else n for n in tpn.list_models()])
def test_model(name):
    spec = tpn.input_spec(name)
    model = tpn.create_model(name, drop_rate=0.0, base_channels=16)
    k = tpn.model_info(name).checkpoint.config.num_classes
    x = torch.randn(2, 3, spec.num_frames, 33, 47)
    assert model.training

    logits, aux = model.forward_with_aux(x)
    assert logits.shape == (2, k)
    assert (aux is not None) == name.startswith("tpn_")
    loss = logits.square().sum()
    if aux is not None:
        assert aux.shape == (2, k)
        loss = loss + aux.square().sum()
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name
    model.zero_grad()

    model.eval()
    with torch.inference_mode():
        expected = model(x)
        assert expected.shape == (2, k)
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features), expected)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)

        with torch.device("meta"):
            fresh = tpn.create_model(name, base_channels=16)
        fresh.load_state_dict(model.state_dict(), assign=True)
        assert torch.equal(fresh.eval()(x), expected)

        for module in model.modules():
            if isinstance(module, nn.Conv3d):  # torch refuses to convert the 2D convolutions of TSM
                module.to(memory_format=torch.channels_last_3d)
        assert relative_error(model(x.to(memory_format=torch.channels_last_3d)), expected) < 2e-5

        for classes in (1, 2, 400):
            model.reset_classifier(classes)
            assert model.num_classes == classes
            logits, aux = model.forward_with_aux(x[:, :, :, :32, :32])
            assert logits.shape == (2, classes)
            assert aux is None or aux.shape == (2, classes)


@pytest.mark.parametrize(
    ("name", "count"),
    [("tpn_slowonly_r50_k400", 91_498_336), ("tpn_slowonly_r101_k400", 119_403_360), ("tpn_tsm_r50_sthv1", 82_445_724)],
)
def test_parameter_count(name, count):
    assert tpn.model_info(name).params == count


def test_macs():
    assert tpn.model_info("tpn_slowonly_r50_k400").gmacs == pytest.approx(50.3, abs=0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_num_classes(name):
    x = torch.randn(2, 3, 8, 32, 32)
    own = tpn.model_info(name).checkpoint.config.num_classes
    for classes in (1, own):
        model = getattr(tpn, name)(num_classes=classes, base_channels=8)
        logits, aux = model.forward_with_aux(x)
        assert logits.shape == model(x).shape == model.eval()(x).shape == (2, classes)
        assert aux is None or aux.shape == (2, classes)
        assert (model.labels is None) == (classes != own)
    model = tpn.create_model(name, num_classes=0, base_channels=8).eval()
    assert isinstance(model.get_classifier(), nn.Identity)
    assert torch.equal(model(x), model.forward_features(x).mean((2, 3, 4)))
    assert model(x).shape == (2, model.num_features)


def test_reset_classifier():
    model = small_tsm_tpn()
    assert model.labels is not None
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.double().reset_classifier(174)
    assert model.labels is None
    assert model.head.fc.weight.dtype == torch.float64
    after = model.state_dict()
    changed = {k for k in before if not torch.equal(before[k].double(), after[k].double())}
    assert changed == {"head.fc.weight", "aux_head.fc.weight"}  # biases start at zero
    model.reset_classifier(0)
    assert model.num_classes == 0
    model.reset_classifier(2, global_pool="avg")
    assert model(torch.randn(2, 3, 8, 32, 32).double()).shape == (2, 2)
    with pytest.raises(ValueError, match="global_pool.*'max'"):
        model.reset_classifier(2, global_pool="max")


@pytest.mark.parametrize(("classes", "error"), [(-1, ValueError), (2.5, TypeError), (True, TypeError), ("7", TypeError)])
def test_bad_num_classes(classes, error):
    with pytest.raises(error, match=f"num_classes.*{classes}"):
        ClassificationHead(8, classes)


def test_clips_of_a_batch_do_not_mix():
    model = small_tsm_tpn().eval()
    x = torch.randn(3, 3, 8, 32, 32)
    with torch.inference_mode():
        together = model(x)
        alone = torch.cat([model(x[i : i + 1]) for i in range(3)])
    assert relative_error(together, alone) < 2e-5


def test_order_of_frames_matters():
    for model in (small_tsm_tpn().eval(), randomize_norms(tpn.create_model("slowonly_r50_k400", base_channels=8)).eval()):
        x = torch.randn(1, 3, 8, 32, 32)
        with torch.inference_mode():
            assert relative_error(model(x.flip(2)), model(x)) > 1e-3


@pytest.mark.slow
def test_compiled_training_step():
    model = randomize_norms(tpn.create_model("tpn_slowonly_tiny_motion", drop_rate=0.0, base_channels=4, num_frames=4))
    x = torch.randn(2, 3, 4, 32, 32)
    model(x).square().sum().backward()
    expected = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    parameters = dict(model.named_parameters())
    for name, gradient in expected.items():
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-3, atol=1e-5, msg=name)
    torch.compiler.reset()


@pytest.mark.slow
def test_inductor():
    model = small_tsm_tpn().eval()
    x = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        assert relative_error(torch.compile(model, fullgraph=True)(x), model(x)) < 2e-5
    torch.compiler.reset()


def backbone_step(make, checkpointing):
    """One training step of a backbone: its gradients and running statistics."""
    torch.manual_seed(0)
    backbone = make().train()
    model = TPNClassifier(backbone, None, ClassificationHead(backbone.out_channels[-1], 3, 0.0)).train()
    model.set_grad_checkpointing(checkpointing)
    model(torch.randn(2, 3, 4, 32, 32)).square().sum().backward()
    return {k: p.grad for k, p in model.named_parameters()}, {k: b.clone() for k, b in model.named_buffers()}


@pytest.mark.parametrize(
    "make",
    [
        lambda: ResNet3dSlowOnly(18, base_channels=8),
        lambda: ResNetTSM(50, base_channels=8),
        lambda: ResNetTSM(50, base_channels=8, shift_shortcut=True),
    ],
)
def test_grad_checkpointing(make):
    (grads, stats), (expected_grads, expected_stats) = backbone_step(make, True), backbone_step(make, False)
    assert stats["backbone.bn1.num_batches_tracked"] == stats["backbone.layer4.1.bn2.num_batches_tracked"] == 1
    torch.testing.assert_close(stats, expected_stats)
    torch.testing.assert_close(grads, expected_grads)


def test_grad_checkpointing_recomputes():
    calls = []
    backbone = ResNet3dSlowOnly(18, base_channels=8).train()
    backbone.layer1[0].conv2.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 2, 32, 32)
    for enable, count in ((False, 1), (True, 2), (False, 1)):
        backbone.set_grad_checkpointing(enable)
        calls.clear()
        sum(m.sum() for m in backbone(x)).backward()
        assert len(calls) == count


def test_grad_checkpointing_of_a_backbone_without_it():
    model = TPNClassifier(nn.Identity(), None, ClassificationHead(3, 2))
    with pytest.raises(ValueError, match="Identity.*set_grad_checkpointing"):
        model.set_grad_checkpointing()


def test_wrong_clips():
    model = small_tsm_tpn()
    with pytest.raises(TypeError, match=r"torch\.uint8.*normalize"):
        model(torch.zeros(1, 3, 8, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(B, 3, T, H, W\).*\(3, 8, 32, 32\)"):
        model(torch.zeros(3, 8, 32, 32))
    with pytest.raises(ValueError, match=r"\(B, 3, T, H, W\).*\(1, 8, 3, 32, 32\)"):
        model(torch.zeros(1, 8, 3, 32, 32))
    with pytest.raises(ValueError, match="8 frames.*level 0.*num_frames=16"):
        model(torch.zeros(1, 3, 16, 32, 32))
    with pytest.raises(ValueError, match="8 frames.*num_frames=4"):
        model.forward_with_aux(torch.zeros(1, 3, 4, 32, 32))


@pytest.mark.parametrize("name", ["tsm_r50_sthv1", "slowonly_r50_k400"])
def test_baselines_take_any_number_of_frames(name):
    model = tpn.create_model(name, base_channels=8).eval()
    assert model(torch.randn(2, 3, 5, 32, 32)).shape == (2, model.num_classes)


def test_dropout():
    model = small_tsm_tpn(drop_rate=0.25)
    assert model.head.drop.p == model.aux_head.drop.p == 0.25
    assert tpn.create_model("tsm_r50_sthv1", base_channels=8).head.drop.p == 0.5


@pytest.mark.parametrize("num_frames", [1, 2, 5])
@pytest.mark.parametrize("channels", [8, 20, 7])
def test_temporal_shift(num_frames, channels):
    x = torch.randn(3 * num_frames, channels, 2, 3)
    expected, fold = torch.zeros_like(x), channels // 8
    for b in range(3):
        for t in range(num_frames):
            for c in range(channels):
                source = t + 1 if c < fold else t - 1 if c < 2 * fold else t
                if 0 <= source < num_frames:
                    expected[b * num_frames + t, c] = x[b * num_frames + source, c]
    copy = x.clone()
    assert torch.equal(temporal_shift(x, num_frames), expected)
    assert torch.equal(x, copy)
    as_clips = [each.unflatten(0, (3, num_frames)).transpose(1, 2) for each in (x, expected)]
    assert torch.equal(temporal_shift(as_clips[0]), as_clips[1])


@pytest.mark.parametrize("shift_shortcut", [False, True])
def test_unfolded_tsm(shift_shortcut):
    """The same maps from 3D layers, without folding frames into the batch; the network itself stays as it is."""
    network = randomize_norms(ResNetTSM(50, base_channels=8, out_indices=(0, 3), shift_shortcut=shift_shortcut)).eval()
    network.layer1[0].conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2).eval()  # of one's own, with a bias
    names = network.state_dict().keys()
    unfolded = network.unfolded()
    assert unfolded.state_dict().keys() == names
    assert not [m for m in unfolded.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.MaxPool2d) or m.training]
    assert network.folded
    for num_frames in (1, 5):
        x = torch.randn(2, 3, num_frames, 32, 48)
        with torch.no_grad():
            for got, expected in zip(unfolded(x), network(x), strict=True):
                assert relative_error(got, expected) < 1e-5


def test_shift_shortcut_changes_downsampling_blocks_only():
    plain, in_place = (ResNetTSM(50, base_channels=8, shift_shortcut=flag) for flag in (False, True))
    in_place.load_state_dict(plain.state_dict())
    shifted = [name for name, m in in_place.named_modules() if getattr(m, "shift_shortcut", False) and name]
    assert shifted == [f"layer{i}.0" for i in (1, 2, 3, 4)]
    x = torch.randn(1, 3, 4, 32, 32)
    assert not torch.allclose(plain.eval()(x)[-1], in_place.eval()(x)[-1])


def test_tsm_r101_shifts_every_second_block():
    with torch.device("meta"):
        deep, shallow = ResNetTSM(101), ResNetTSM(50)
    assert [block.shift for block in deep.layer3] == [i % 2 == 0 for i in range(23)]
    assert [block.shift for block in deep.layer1] == [True, False, True]
    assert all(block.shift for stage in (1, 2, 3, 4) for block in getattr(shallow, f"layer{stage}"))


def test_backbone_maps():
    backbone = ResNet3dSlowOnly(18, base_channels=8, out_indices=(0, 1, 2, 3))
    maps = backbone(torch.randn(1, 3, 5, 33, 47))
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 5, 9, 12), (16, 5, 5, 6), (32, 5, 3, 3), (64, 5, 2, 2)]
    assert backbone.out_channels == (8, 16, 32, 64)
    short = ResNet3dSlowOnly(50, base_channels=8, out_indices=(1,))
    assert not hasattr(short, "layer3")
    kernels = [backbone.get_submodule(f"layer{i}.0.conv1").kernel_size[0] for i in (1, 2, 3, 4)]
    assert kernels == [1, 1, 3, 3]


def test_model_of_your_own_parts():
    backbone = ResNet3dSlowOnly(18, base_channels=16)
    neck = TemporalPyramid(backbone.out_channels, num_frames=4)
    head, aux_head = ClassificationHead(neck.out_channels, 5), AuxHead(backbone.out_channels[0], 32, 5)
    model = TPNClassifier(backbone, neck, head, aux_head)
    logits, aux = model.forward_with_aux(torch.randn(2, 3, 4, 33, 47))
    assert logits.shape == aux.shape == (2, 5)
    assert (model.num_classes, model.num_features, model.in_chans, model.labels) == (5, 128, 3, None)


@pytest.mark.parametrize(
    ("make", "norm"), [(lambda **k: ResNet3dSlowOnly(18, **k), "bn2"), (lambda **k: ResNetTSM(50, **k), "bn3")]
)
def test_zero_init_last(make, norm):
    backbone = make(base_channels=8, zero_init_last=True)
    for block in (*backbone.layer1, *backbone.layer4):
        assert not getattr(block, norm).weight.any()
    assert all(getattr(block, norm).weight.all() for block in make(base_channels=8).layer1)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ResNet3dSlowOnly(34), "depth.*18, 50, 101.* 34"),
        (lambda: ResNetTSM(18), "depth.*50, 101.* 18"),
        (lambda: ResNet3dSlowOnly(out_indices=()), r"out_indices.*\(\)"),
        (lambda: ResNet3dSlowOnly(out_indices=3), "out_indices.* 3"),
        (lambda: ResNet3dSlowOnly(out_indices=(3.0, 3.0)), r"out_indices.*\(3.0, 3.0\)"),
        (lambda: ResNet3dSlowOnly(out_indices=(3, 2)), r"out_indices.*\(3, 2\)"),
        (lambda: ResNetTSM(out_indices=(2, 4)), r"out_indices.*\(2, 4\)"),
    ],
)
def test_bad_backbone_arguments(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_group_matcher_covers_every_parameter():
    model = tpn.create_model("tpn_slowonly_r50_k400", base_channels=8)
    groups = group_parameters(model, model.group_matcher())
    assert sorted(n for group in groups.values() for n in group) == sorted(n for n, _ in model.named_parameters())
    assert groups[0] == ["backbone.conv1.weight", "backbone.bn1.weight", "backbone.bn1.bias"]
    assert len(groups) == 1 + 3 + 4 + 6 + 3 + 1
    assert len(group_parameters(model, model.group_matcher(coarse=True))) == 1 + 4 + 1
    assert {n.split(".")[0] for n in groups[max(groups)]} == {"neck", "head", "aux_head"}


def test_groups_of_a_backbone_that_timm_describes():
    """Alternatives, as in its ResNet, and lists of patterns, as in its transformer: the last norm is in the last group."""

    class Net(Pyramid):
        def group_matcher(self, coarse=False):
            return {"stem": "^a|b", "blocks": [(r"^c\.(\d+)", None), ("^norm", (99999,))]}

    matcher = tpn.build(Net(), num_classes=2, input_spec=tpn.InputSpec(8, 2)).group_matcher()
    names = [f"backbone.{each}.weight" for each in ("a", "b", "c.0", "c.1", "norm")]
    others = ["neck.b", "head.fc.weight"]
    found = group_parameters(SimpleNamespace(named_parameters=lambda: [(name, None) for name in names + others]), matcher)
    assert [found[i] for i in sorted(found)] == [names[:2], names[2:3], names[3:], others]


def test_channels_last_and_frozen_batch_norm():
    """Neither changes the result, in 3D or in 2D networks."""
    for name in ("tpn_slowonly_tiny_motion", "tpn_tsm_r50_sthv1"):
        torch.manual_seed(0)
        model = tpn.create_model(name, base_channels=8).eval()
        x = torch.randn(2, 3, model.input_spec.num_frames, 32, 32)
        expected = model(x)
        channels_last(model)
        stem = model.backbone.conv1.weight
        last = torch.channels_last if stem.ndim == 4 else torch.channels_last_3d
        assert stem.is_contiguous(memory_format=last)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        freeze_batch_norm(model.train())
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.forward_with_aux(x)
        assert model.training
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        model.train().forward_with_aux(x)
        assert not all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_contradictory_parts():
    with pytest.raises(ValueError, match="aux_head.*neck=None"):
        TPNClassifier(ResNet3dSlowOnly(18, base_channels=8), None, ClassificationHead(64, 2), AuxHead(32, 64, 2))
