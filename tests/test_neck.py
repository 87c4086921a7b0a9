"""The temporal pyramid on its own: levels, lengths, flows, arguments."""

import pytest
import torch
import torch.nn.functional as F

from tpn import TemporalPyramid
from tpn.models.neck import _same_size


def maps(channels, frames, size=8, batch=2):
    """Random feature maps whose height and width halve from level to level, rounded up."""
    torch.manual_seed(0)
    sizes = [(size // 2**level, -(-(size + 2) // 2**level)) for level in range(len(channels))]
    return [torch.randn(batch, c, t, *hw) for c, t, hw in zip(channels, frames, sizes, strict=True)]


each_flow_order = pytest.mark.parametrize("flow_order", ["cascade", "parallel", "top_down", "bottom_up", "isolation"])


@pytest.mark.parametrize(
    ("channels", "frames", "scales", "length"),
    [
        ((16, 32), (8, 8), None, 1),
        ((16, 32), (8, 8), (4, 8), 1),
        ((16, 32), (16, 16), (2, 8), 2),
        ((16, 32), (5, 5), (2, 5), 1),
        ((16, 32), (5, 5), (5, 5), 1),
        ((8, 16, 32), (8, 8, 8), None, 1),
        ((8, 16, 32), (8, 4, 2), None, 1),
        ((8, 16, 32), (8, 4, 2), (1, 1, 1), 2),
        ((8, 16, 32), (8, 8, 8), (2, 4, 8), 1),
        ((8, 8, 8, 8), (4, 4, 4, 4), (1, 2, 4, 4), 1),
    ],
)
@each_flow_order
def test_shape_and_gradients(channels, frames, scales, length, flow_order):
    check(TemporalPyramid(channels, frames, temporal_scales=scales, flow_order=flow_order), channels, frames, length)


@pytest.mark.parametrize(("spatial", "temporal"), [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize(("channels", "frames"), [((12, 32), (8, 8)), ((6, 9, 32), (8, 8, 4)), ((8, 8, 8, 8), (4, 4, 2, 2))])
@each_flow_order
def test_without_modulation(spatial, temporal, channels, frames, flow_order):
    neck = TemporalPyramid(channels, frames, flow_order=flow_order, spatial_modulation=spatial, temporal_modulation=temporal)
    check(neck, channels, frames, 1 if temporal else frames[-1])
    shapes = {name: x.shape[1:3] for name, x in neck.forward_intermediates(maps(channels, frames)).items()}
    for level in range(len(channels)):
        width = channels[-1] if spatial else channels[level]
        assert shapes[f"spatial_modulation.{level}"] == (width, frames[level])
        assert shapes[f"temporal_modulation.{level}"] == (channels[-1] // 2, 1 if temporal else frames[level])
    assert (len(neck.spatial_modulation.state_dict()) > 0) == spatial
    assert {m.conv.kernel_size for m in neck.temporal_modulation} == {(3 if temporal else 1, 1, 1)}


def check(neck, channels, frames, length):
    """The result has a shape, and every parameter and input a gradient."""
    features = [x.requires_grad_() for x in maps(channels, frames)]
    out = neck(features)
    height, width = features[-1].shape[3:]
    assert out.shape == (2, channels[-1], length, height, width)
    (out * torch.randn_like(out)).sum().backward()
    for name, tensor in [*neck.named_parameters(), *((f"input {i}", x) for i, x in enumerate(features))]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.any(), name


def test_one_number_of_frames_stands_for_every_level():
    torch.manual_seed(0)
    one = TemporalPyramid((16, 32), 8).eval()
    each = TemporalPyramid((16, 32), (8, 8), temporal_scales=(8, 8), spatial_scales=(2, 1), out_channels=32, mid_channels=16)
    each.load_state_dict(one.state_dict())
    x = maps((16, 32), (8, 8))
    assert torch.equal(one(x), each.eval()(x))


def test_widths():
    neck = TemporalPyramid((16, 32), 4, out_channels=24, mid_channels=20)
    assert neck(maps((16, 32), (4, 4))).shape == (2, 24, 1, 4, 5)
    assert neck.out_channels == 24
    assert [m.conv.groups for m in neck.temporal_modulation] == [4, 4]


@pytest.mark.parametrize(("channels", "groups"), [((24, 40), 4), ((1024, 2048), 32), ((8, 6), 1)])
def test_groups_adapt(channels, groups):
    with torch.device("meta"):
        neck = TemporalPyramid(channels, 4)
    grouped = [*neck.temporal_modulation, *neck.top_down_fusion.mix, *neck.bottom_up_fusion.mix]
    assert {m.conv.groups for m in grouped} == {groups}
    assert {m.conv.groups for m in neck.bottom_up} == {1}


def test_spatial_scales():
    neck = TemporalPyramid((8, 16), 4, spatial_scales=(4, 1))
    x = [torch.randn(1, 8, 4, 16, 16), torch.randn(1, 16, 4, 4, 4)]
    assert neck(x).shape == (1, 16, 1, 4, 4)
    same = TemporalPyramid((8, 16), 4, spatial_scales=(1, 1))
    assert same([x[0], x[0].repeat(1, 2, 1, 1, 1)]).shape == (1, 16, 1, 16, 16)


def test_cascade_starts_from_the_top_down_result_and_parallel_does_not():
    torch.manual_seed(0)
    cascade = TemporalPyramid((16, 32), 8).eval()
    parallel = TemporalPyramid((16, 32), 8, flow_order="parallel").eval()
    parallel.load_state_dict(cascade.state_dict())
    x = maps((16, 32), (8, 8))
    assert not torch.allclose(cascade(x), parallel(x))
    for neck in (cascade, parallel):
        levels = [m(y) for m, y in zip(neck.spatial_modulation, x, strict=True)]
        fine, coarse = (m(y) for m, y in zip(neck.temporal_modulation, levels, strict=True))
        top_down = [fine + coarse, coarse]
        start = top_down if neck is cascade else [fine, coarse]
        bottom_up = [start[0], start[1] + neck.bottom_up[0](start[0])]
        fused = torch.cat((neck.top_down_fusion(top_down), neck.bottom_up_fusion(bottom_up)), dim=1)
        torch.testing.assert_close(neck(x), neck.pyramid_fusion(fused))


def test_single_flows():
    """Each is one half of the parallel pyramid."""
    torch.manual_seed(0)
    parallel = TemporalPyramid((16, 32), 8, temporal_scales=(4, 8), flow_order="parallel").eval()
    x = maps((16, 32), (8, 8))
    levels = [m(y) for m, y in zip(parallel.spatial_modulation, x, strict=True)]
    levels = [m(y) for m, y in zip(parallel.temporal_modulation, levels, strict=True)]
    for flow_order in ("top_down", "bottom_up"):
        neck = TemporalPyramid((16, 32), 8, temporal_scales=(4, 8), flow_order=flow_order).eval()
        names = neck.state_dict().keys()
        state = {k: v for k, v in parallel.state_dict().items() if k in names and "pyramid_fusion" not in k}
        assert {k.split(".")[0] for k in names} - {k.split(".")[0] for k in state} == {"pyramid_fusion"}
        neck.load_state_dict(state, strict=False)
        fused = getattr(parallel, f"{flow_order}_fusion")(getattr(parallel, f"{flow_order}_flow")(levels))
        torch.testing.assert_close(neck(x), neck.pyramid_fusion(fused))


def test_levels_in_isolation_meet_in_one_fusion():
    torch.manual_seed(0)
    x = maps((8, 16, 32), (8, 8, 8))
    changed = [x[0], torch.randn_like(x[1]), x[2]]
    received = {}
    for flow_order in ("isolation", "parallel"):
        neck = TemporalPyramid((8, 16, 32), 8, temporal_scales=(2, 4, 8), flow_order=flow_order).eval()
        fusion = neck.level_fusion if flow_order == "isolation" else neck.top_down_fusion
        fusion.register_forward_pre_hook(lambda module, args, name=flow_order: received.setdefault(name, []).append(args[0]))
        neck(x), neck(changed)
        same = [torch.equal(a, b) for a, b in zip(*received[flow_order], strict=True)]
        assert same == ([True, False, True] if flow_order == "isolation" else [False, False, True])
    neck = TemporalPyramid((8, 16, 32), 8, temporal_scales=(2, 4, 8), flow_order="isolation").eval()
    found = neck.forward_intermediates(x)
    assert [name for name in found if "modulation" not in name] == ["level_fusion", "pyramid_fusion"]
    levels = [found[f"temporal_modulation.{i}"] for i in range(3)]
    assert torch.equal(neck(x), neck.pyramid_fusion(neck.level_fusion(levels)))


def test_levels_without_spatial_modulation_are_max_pooled():
    neck = TemporalPyramid((8, 16, 32), 4, spatial_modulation=False)
    x = [torch.randn(1, 8, 4, 13, 16), torch.randn(1, 16, 4, 7, 8), torch.randn(1, 32, 4, 4, 4)]
    found = neck.forward_intermediates(x)
    blocks = F.pad(x[0], (0, 0, 0, 3), value=-torch.inf).view(1, 8, 4, 4, 4, 4, 4)
    assert torch.equal(found["spatial_modulation.0"], blocks.amax(dim=(4, 6)))
    assert torch.equal(found["spatial_modulation.2"], x[2])


def test_top_down_stretches_the_coarser_level():
    neck = TemporalPyramid((8, 8), 8, temporal_scales=(2, 8))
    fine, coarse = torch.zeros(1, 4, 4, 1, 1), torch.ones(1, 4, 1, 1, 1)
    assert torch.equal(neck.top_down_flow([fine, coarse])[0], torch.ones_like(fine))
    three = TemporalPyramid((8, 8, 8), 4, temporal_scales=(1, 2, 4))
    levels = [torch.full((1, 4, t, 1, 1), float(t)) for t in (4, 2, 1)]
    assert [x.unique().tolist() for x in three.top_down_flow(levels)] == [[7.0], [3.0], [1.0]]


@pytest.mark.parametrize("flow_order", ["cascade", "parallel"])
def test_inputs_are_not_changed(flow_order):
    neck = TemporalPyramid((16, 32), 8, temporal_scales=(4, 8), flow_order=flow_order)
    features = maps((16, 32), (8, 8))
    kept, copies = list(features), [x.clone() for x in features]
    assert torch.equal(neck.eval()(features), neck(tuple(features)))
    assert all(a is b for a, b in zip(features, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(features, copies, strict=True))
    levels = [torch.randn(1, 16, 2, 2, 2), torch.randn(1, 16, 1, 2, 2)]
    copies = [x.clone() for x in levels]
    neck.top_down_flow(levels), neck.bottom_up_flow(levels)
    assert all(torch.equal(a, b) for a, b in zip(levels, copies, strict=True))


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        (((16,), 8), {}, r"in_channels=\(16,\)"),
        (((16, 32), 8), {"flow_order": "both"}, "flow_order.*'cascade', 'parallel', 'top_down', 'bottom_up'.*'both'"),
        (((16, 32), (8, 8, 8)), {}, r"num_frames.*\(8, 8, 8\)"),
        (((16, 32), 0), {}, r"num_frames.*\(0, 0\)"),
        (((16, 32), 8), {"temporal_scales": (8,)}, r"temporal_scales.*\(8,\)"),
        (((16, 32), 8), {"temporal_scales": (8, 0)}, r"temporal_scales.*\(8, 0\)"),
        (((16, 32), 8), {"temporal_scales": (8, 2.0)}, r"temporal_scales.*\(8, 2.0\)"),
        (((16, 32), 8), {"temporal_scales": (8, 4)}, r"temporal_scales.*\(8, 4\).*\(1, 2\)"),
        (((16, 32), 6), {"temporal_scales": (2, 3)}, r"temporal_scales.*\(2, 3\).*\(3, 2\)"),
        (((16, 32), 8), {"spatial_scales": (3, 1)}, r"spatial_scales.*\(3, 1\)"),
        (((16, 32), 8), {"spatial_scales": (4, 2, 1)}, r"spatial_scales.*\(4, 2, 1\)"),
        (((16, 32), 8), {"temporal_scales": (4, 8), "temporal_modulation": False}, r"\(1, 1\).*temporal_modulation.*\(4, 8\)"),
        (((16, 32), 8), {"groups": 0}, "groups.*0"),
        (((16, 32), 8), {"mid_channels": -4}, "mid_channels.*-4"),
        (((16, 32), 8), {"out_channels": 0}, "out_channels.*0"),
    ],
)
def test_bad_arguments(args, kwargs, text):
    with pytest.raises(ValueError, match=text):
        TemporalPyramid(*args, **kwargs)


@pytest.mark.parametrize("name", ["spatial_modulation", "temporal_modulation"])
def test_modulation_is_on_or_off(name):
    with pytest.raises(TypeError, match=f"{name}.*'no'"):
        TemporalPyramid((16, 32), 8, **{name: "no"})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: x[:1], "2 feature maps.*got 1"),
        (lambda x: [*x, x[-1]], "2 feature maps.*got 3"),
        (lambda x: x[::-1], r"level 0.*\(B, 16, T, H, W\).*\(2, 32, 8, 4, 5\)"),
        (lambda x: [x[0], x[1][:, :, 0]], r"level 1.*\(B, 32, T, H, W\).*\(2, 32, 4, 5\)"),
        (lambda x: [x[0], x[1][:, :, :4]], "8 frames.*level 1.*num_frames=4"),
    ],
)
def test_wrong_feature_maps(change, text):
    neck = TemporalPyramid((16, 32), 8)
    with pytest.raises(ValueError, match=text):
        neck(change(maps((16, 32), (8, 8))))


def test_levels_of_unexpected_sizes_are_refused():
    neck = TemporalPyramid((8, 16), 4, groups=2)
    with pytest.raises(ValueError, match="level 0.*14 x 14.*7 x 7.*spatial_scales"):
        neck([torch.randn(1, 8, 4, 28, 28), torch.randn(1, 16, 4, 7, 7)])
    assert neck([torch.randn(1, 8, 4, 17, 15), torch.randn(1, 16, 4, 8, 7)]).shape == (1, 16, 1, 8, 7)


def test_larger_levels_are_cropped_to_their_center():
    x = torch.arange(100.0).view(1, 1, 1, 10, 10)
    cut, same = _same_size([x, torch.zeros(1, 1, 1, 8, 9)])
    assert torch.equal(cut, x[..., 1:9, :9])
    assert same.shape == (1, 1, 1, 8, 9)
