"""`tpn.optimize`: an inference-only copy that returns the same results."""

import copy

import pytest
import torch
from torch import nn

import tpn
from tpn.devices import fastest_dtype
from tpn.optimization import OptimizedClassifier, fast_on_cuda

SIZES = {"base_channels": 8, "num_classes": 7}
NAMES = ["tpn_slowonly_r50_k400", "tpn_tsm_r50_sthv1", "tpn_slowonly_r101_k400", "slowonly_r50_k400", "tpn_slowonly_tiny_motion"]


def build(name, **kwargs):
    """A narrow model whose batch norms do something, and whose classes differ."""
    torch.manual_seed(0)
    model = tpn.create_model(name, **(SIZES | kwargs))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.3, 0.8)
            nn.init.normal_(module.bias, std=0.1)
    if model.num_classes:
        with torch.no_grad():
            scale = model.eval().forward_head(model.forward_features(clips(model)), pre_logits=True).norm(dim=1).mean()
            nn.init.normal_(model.head.fc.weight, std=1 / float(scale))
    return model.train()


def assert_near(got, expected):
    assert float((got - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def clips(model, batch=2, size=64):
    return torch.randn(batch, 3, model.input_spec.num_frames, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_same_results(name):
    model = build(name).eval()
    x = clips(model)
    fast = tpn.optimize(model, "float32", sample=x)
    with torch.no_grad():
        logits, aux_logits = model.forward_with_aux(x)
        assert_near(fast(x), logits)
        assert_near(fast.forward_features(x), model.forward_features(x))
        if aux_logits is not None:
            assert_near(fast.forward_with_aux(x)[1], aux_logits)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d)]
    assert fast.report.folded_norms == len(norms) > 10
    assert not [m for m in fast.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d)]
    assert fast.report.max_difference < 1e-5
    assert fast.report.same_top1
    assert isinstance(fast, tpn.TPNClassifier)
    assert (fast.labels, fast.input_spec, fast.num_classes) == (model.labels, model.input_spec, model.num_classes)


def test_given_model_does_not_change():
    model = build("tpn_tsm_r50_sthv1").train()
    before = copy.deepcopy(model.state_dict())
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    fast = tpn.optimize(model, torch.bfloat16, sample=clips(model))
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks == [m for m in (*model.modules(), *fast.modules()) if m._forward_hooks or m._forward_pre_hooks] == []
    nn.init.zeros_(model.head.fc.weight)
    assert fast.head.fc.weight.abs().sum() > 0
    assert fast.architecture == model.architecture == "tpn_tsm_r50_sthv1"


def test_half_precision_and_its_report():
    model = build("tpn_slowonly_r50_k400").eval()
    x = clips(model)
    fast = tpn.optimize(model, "bfloat16", sample=x)
    assert {p.dtype for part in (fast.backbone, fast.neck) for p in part.parameters()} == {torch.bfloat16} == {fast.report.dtype}
    with torch.inference_mode():
        expected, got = model(x).softmax(dim=1), fast(x).softmax(dim=1)
        assert torch.equal(fast(x.bfloat16()), fast(x))  # clips may have the dtype already
    assert got.dtype == torch.float32
    assert fast.report.max_difference == float((expected - got).abs().max()) > 1e-5
    assert fast.report.same_top1 == bool((expected.argmax(dim=1) == got.argmax(dim=1)).all())


def test_inference_only(tmp_path):
    fast = tpn.optimize(build("tpn_slowonly_tiny_motion"))
    assert not fast.training
    assert not any(p.requires_grad for p in fast.parameters())
    assert fast.eval() is fast
    with pytest.raises(RuntimeError, match=r"inference only.*original"):
        fast.train()
    with pytest.raises(RuntimeError, match=r"cannot be changed.*original"):
        fast.reset_classifier(3)
    with pytest.raises(ValueError, match="optimized"):
        tpn.optimize(fast)
    with pytest.raises(ValueError, match="optimized"):
        tpn.save_pretrained(fast, tmp_path / "fast")
    assert not (tmp_path / "fast").exists()


def test_features_without_classifier():
    model = build("tpn_slowonly_tiny_motion", num_classes=0).eval()
    x = clips(model)
    fast = tpn.optimize(model, "bfloat16", sample=x)
    with torch.no_grad():
        expected, got = model(x), fast(x)
    assert got.shape == (2, model.num_features)
    assert fast.report.max_difference == pytest.approx(float((expected - got).abs().max() / expected.abs().max()), rel=1e-3)


class Odd(nn.Module):
    """One convolution whose batch norm can be folded, and others whose batch norms cannot."""

    out_channels = (8,)

    def __init__(self):
        super().__init__()
        self.read_twice, self.norm1 = nn.Conv3d(3, 8, 1), nn.BatchNorm3d(8)
        self.used_twice, self.norm2 = nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(8)
        self.not_at_once, self.norm3 = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0)), nn.BatchNorm3d(8)
        self.by_batch, self.norm5 = nn.Conv3d(8, 8, 1), nn.BatchNorm3d(8, track_running_stats=False)
        self.plain, self.norm4 = nn.Conv3d(8, 8, 3), nn.BatchNorm3d(8)

    def forward(self, x):
        x = self.read_twice(x)
        x = x + self.norm1(x)
        x = self.norm2(self.used_twice(self.used_twice(x)))
        x = self.norm3(self.not_at_once(x).relu_())
        return (self.norm4(self.plain(self.norm5(self.by_batch(x)))),)


def test_only_batch_norms_that_alone_read_a_convolution_are_folded():
    torch.manual_seed(0)
    model = tpn.TPNClassifier(Odd(), None, tpn.ClassificationHead(8, 5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.bias)
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean)
    with pytest.raises(ValueError, match="input_spec"):
        tpn.optimize(model)
    x = torch.randn(2, 3, 4, 16, 16)
    fast = tpn.optimize(model, "float32", sample=x)
    assert fast.report.folded_norms == 1
    assert isinstance(fast.backbone.norm4, nn.Identity)
    torch.testing.assert_close(fast(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_errors():
    model = build("tpn_slowonly_tiny_motion")
    with pytest.raises(ValueError, match="dtype.*float32, float16, bfloat16.*'int8'"):
        tpn.optimize(model, "int8")
    with pytest.raises(ValueError, match="dtype.*torch.float64"):
        tpn.optimize(model, torch.float64)
    with torch.no_grad():
        model.head.fc.weight.mul_(1e6)
    with pytest.raises(ValueError, match="torch.float16.*dtype=torch.bfloat16"):
        tpn.optimize(model, "float16")


@pytest.mark.slow
def test_compiled():
    model = build("tpn_slowonly_tiny_motion", base_channels=4).eval()
    x = clips(model, batch=1)
    fast = tpn.optimize(model, "float32", compile=True, sample=x)
    assert fast.report.compiled
    with torch.no_grad():
        expected = model(x)
    torch._dynamo.utils.counters.clear()
    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with mode:
            got = fast(x)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(fast(x.clone().requires_grad_()), got)  # channels-last or not, with or without gradients
            assert torch.equal(fast(x.contiguous(memory_format=torch.channels_last_3d)), got)
    assert not got.is_inference()
    assert not torch._dynamo.utils.counters["frames"]["total"], "compiled again"


@pytest.mark.parametrize("has", [{}, {"avx512_bf16": True}, {"amx_bf16": True, "avx512_bf16": False}, {"avx512_f": True}])
def test_the_default_is_the_fastest_precision_of_the_device(monkeypatch, has):
    """On a CPU, bfloat16 if it has instructions for it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    half = has.keys() & {"avx512_bf16", "amx_bf16"}
    expected = torch.bfloat16 if half else torch.float32
    assert tpn.optimize(build("tpn_slowonly_tiny_motion")).report.dtype == fastest_dtype(torch.device("cpu")) == expected
    assert fastest_dtype(torch.device("cuda")) == torch.float16
    assert fastest_dtype(torch.device("mps")) == torch.float32


def test_video_classifier_optimizes_what_it_builds(tmp_path):
    model = build("tpn_slowonly_tiny_motion")
    tpn.save_pretrained(model, tmp_path)
    by_name = tpn.VideoClassifier(f"local-dir:{tmp_path}")
    assert isinstance(by_name.model, OptimizedClassifier)
    assert by_name.model.report.dtype == torch.float32
    given = tpn.VideoClassifier(model)
    assert given.model is model
    frames = torch.randint(256, (20, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(by_name(frames).probs, given(frames).probs, rtol=0, atol=1e-5)
    half = tpn.VideoClassifier(model, precision="bfloat16")
    assert half.model.report.dtype == torch.bfloat16
    assert tpn.VideoClassifier(model, precision="auto").model.report.dtype == fastest_dtype(torch.device("cpu"))
    before = half(frames).probs
    nn.init.zeros_(model.head.fc.weight)
    nn.init.zeros_(model.head.fc.bias)
    assert given(frames).probs.tolist() == pytest.approx([1 / 7] * 7)
    assert torch.equal(half(frames).probs, before)
    with pytest.raises(ValueError, match="precision.*'half'"):
        tpn.VideoClassifier(model, precision="half")


def test_compiled_classifier_sees_one_size(monkeypatch):
    """The last batch is padded: nothing is compiled twice."""
    sizes = []

    def compile(function, **_):
        def run(x):
            sizes.append(tuple(x.shape))
            return function(x)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    model = build("tpn_slowonly_tiny_motion")
    frames = torch.randint(256, (20, 3, 64, 64), dtype=torch.uint8)
    expected = tpn.VideoClassifier(model)(frames)
    got = tpn.VideoClassifier(model, compile=True, batch_size=2)(frames)  # three views
    torch.testing.assert_close(got.view_logits, expected.view_logits, rtol=1e-4, atol=1e-4)
    assert len(sizes) == 3  # the sample, and two batches
    assert len(set(sizes)) == 1
    sizes.clear()
    compiled = tpn.optimize(model, "float32", compile=True, sample=clips(model))
    tpn.VideoClassifier(compiled, batch_size=2)(frames)
    assert len(sizes) == 3
    assert len(set(sizes)) == 1


def test_hooks_of_other_models_see_unchanged_results():
    model = build("tpn_slowonly_r50_k400").eval()
    seen = {}
    model.backbone.layer3[0].bn3.register_forward_hook(lambda module, args, result: seen.update(kept=result, copy=result.clone()))
    with torch.no_grad():
        model(clips(model))
    assert torch.equal(seen["kept"], seen["copy"])


@pytest.mark.parametrize(
    ("args", "options", "replaced"),
    [
        ((3, 8, (1, 7, 7), (1, 2, 2), (0, 3, 3)), {}, True),
        ((3, 8, (1, 3, 3)), {"dilation": (1, 2, 2), "bias": False}, True),
        ((64, 32, (3, 1, 1), 1, (1, 0, 0)), {"groups": 4}, True),
        ((32, 64, (5, 1, 1)), {"groups": 2, "bias": False}, True),
        ((64, 64, 1), {"groups": 4}, True),
        ((3, 8, (3, 7, 7), (1, 2, 2), (1, 3, 3)), {}, False),
        ((3, 8, (1, 7, 7), (2, 2, 2)), {}, False),
        ((8, 8, (3, 1, 1), 1, (1, 0, 0)), {"groups": 8}, False),
        ((32, 32, (3, 1, 1), (2, 1, 1)), {"groups": 2}, False),
        ((32, 32, (1, 3, 3)), {"groups": 2}, False),
        ((3, 8, (1, 3, 3)), {"padding": "same"}, False),
    ],
)
def test_layers_for_cuda_compute_the_same(args, options, replaced):
    conv = nn.Conv3d(*args, **options)
    x = torch.randn(2, conv.in_channels, 6, 14, 14).contiguous(memory_format=torch.channels_last_3d)
    expected = conv(x)
    conv.__class__ = fast_on_cuda(conv)
    assert (type(conv) is not nn.Conv3d) == replaced
    got = conv(x)
    assert not replaced or got.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(got, expected)
