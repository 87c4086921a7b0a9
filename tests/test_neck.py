"""The temporal pyramid on its own: levels, lengths, flows, arguments."""

import pytest
import torch

from tpn import TemporalPyramid
from tpn.models.neck import _same_size


def maps(channels, frames, size=8, batch=2):
    """Random feature maps whose height and width halve from level to level, rounded up."""
    torch.manual_seed(0)
    sizes = [(size // 2**level, -(-(size + 2) // 2**level)) for level in range(len(channels))]
    return [torch.randn(batch, c, t, *hw) for c, t, hw in zip(channels, frames, sizes, strict=True)]


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
@pytest.mark.parametrize("flow_order", ["cascade", "parallel", "top_down", "bottom_up"])
def test_shape_and_gradients(channels, frames, scales, length, flow_order):
    neck = TemporalPyramid(channels, frames, temporal_scales=scales, flow_order=flow_order)
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
        (((16, 32), 8), {"groups": 0}, "groups.*0"),
        (((16, 32), 8), {"mid_channels": -4}, "mid_channels.*-4"),
        (((16, 32), 8), {"out_channels": 0}, "out_channels.*0"),
    ],
)
def test_bad_arguments(args, kwargs, text):
    with pytest.raises(ValueError, match=text):
        TemporalPyramid(*args, **kwargs)


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
