"""The temporal pyramid: the paper's figure 2 in code (Yang et al., CVPR 2020, section 3).

c4 ─► spatial ─► temporal ─┬─► ( + ) ◄── upsample ──┐
      modulation modulation│     │                  │
c5 ─► (unchanged) ─► ...  ─┴─────│─────────────────(c5)     top-down:  coarse levels flow into fine ones
                                 └─► downsample ─► ( + )    bottom-up: fine levels flow into coarse ones

output = pyramid_fusion(concat(level_fusion(top-down levels), level_fusion(bottom-up levels)))
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from tpn.models.layers import ConvBnAct, init_weights
from tpn.models.registry import register_neck
from tpn.validation import check_bool

FlowOrder = Literal["cascade", "parallel", "top_down", "bottom_up", "isolation"]
FUSED: dict[FlowOrder, tuple[str, ...]] = {
    "cascade": ("top_down", "bottom_up"),
    "parallel": ("top_down", "bottom_up"),
    "top_down": ("top_down",),
    "bottom_up": ("bottom_up",),
    "isolation": ("level",),
}


def max_pool(*, time: int = 1, space: int = 1) -> nn.Module:
    """Max-pool over `time` consecutive frames and `space` x `space` positions, a last incomplete group included."""
    return nn.Identity() if time == space == 1 else nn.MaxPool3d((time, space, space), ceil_mode=True)


class SpatialModulation(nn.Sequential):
    """Bring one level to the coarsest level's spatial size and channels, (1, 3, 3) convolutions of stride 2.

    A level that already has both is passed on unchanged. Channels double with every step, up to `out_channels`.
    """

    def __init__(self, in_channels: int, out_channels: int, scale: int) -> None:
        steps = int(math.log2(scale))
        layers: list[nn.Module] = []
        channels = in_channels
        for step in range(steps):
            width = out_channels if step == steps - 1 else min(channels * 2, out_channels)
            layers.append(ConvBnAct(channels, width, (1, 3, 3), (1, 2, 2)))
            channels = width
        if channels != out_channels:
            layers.append(ConvBnAct(channels, out_channels, (1, 3, 3)))
        super().__init__(*layers)


class TemporalConvPool(nn.Module):
    """(`kernel`, 1, 1) convolution, neither norm nor activation, then a max-pool over `scale` frames."""

    def __init__(self, in_channels: int, out_channels: int, scale: int, groups: int = 1, kernel: int = 3) -> None:
        super().__init__()
        kernels, padding = (kernel, 1, 1), (kernel // 2, 0, 0)
        self.conv = nn.Conv3d(in_channels, out_channels, kernels, padding=padding, groups=groups, bias=False)
        self.pool = max_pool(time=scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x))


class LevelFusion(nn.Module):
    """Pool every level to the coarsest tempo, mix its channels, and fuse the levels into one map."""

    def __init__(self, channels: int, out_channels: int, scales: Sequence[int], groups: int) -> None:
        super().__init__()
        self.pool = nn.ModuleList(max_pool(time=scale) for scale in scales)
        self.mix = nn.ModuleList(ConvBnAct(channels, channels, (1, 1, 1), groups=groups) for _ in scales)
        self.fuse = ConvBnAct(channels * len(scales), out_channels, (1, 1, 1))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        mixed = [mix(pool(x)) for x, pool, mix in zip(levels, self.pool, self.mix, strict=True)]
        return self.fuse(torch.cat(mixed, dim=1))


@register_neck("tpn")
class TemporalPyramid(nn.Module):
    """The TPN neck: fuse feature maps of one backbone into one map that covers several tempos.

    Args:
        in_channels: channels of each input map, finest level first, such as (1024, 2048). Two levels or more.
        num_frames: length along time of the input maps: one number, or one per level.
        temporal_scales: frames that each level's temporal modulation pools into one. Default: all of them.
            The remaining length of each level must be a multiple of the next level's.
        spatial_scales: size of each map relative to the last one, powers of two. Default: (..., 4, 2, 1).
        out_channels: channels of the result. Default: those of the last input.
        mid_channels: channels of a level between modulation and fusion. Default: half of `out_channels`.
        groups: groups of the grouped convolutions; reduced to the greatest common divisor with the channels.
        flow_order: "cascade" starts the bottom-up flow from the result of the top-down flow (all published weights), "parallel"
            from the result of temporal modulation; "top_down" and "bottom_up" leave the other flow out, "isolation" both:
            levels meet only in one fusion.
        spatial_modulation: False max-pools each level to the coarsest size instead, and temporal modulation changes its channels.
        temporal_modulation: False puts a (1, 1, 1) convolution in its place, which only changes the channels: levels keep their
            lengths, and all `temporal_scales` are 1.

    Attributes:
        silent_args: arguments that change what the same weights compute.
        default_scales: the `temporal_scales` of a pyramid that is built without this argument.

    Shape:
        L maps (B, C_i, T_i, H_i, W_i) float → (B, out_channels, T_out, H_L, W_L), where
        T_out = ceil(T_L / temporal_scales[-1]), 1 by default.
    """

    silent_args = ("flow_order", "temporal_scales")

    def __init__(
        self,
        in_channels: Sequence[int],
        num_frames: int | Sequence[int],
        *,
        temporal_scales: Sequence[int] | None = None,
        spatial_scales: Sequence[int] | None = None,
        out_channels: int | None = None,
        mid_channels: int | None = None,
        groups: int = 32,
        flow_order: FlowOrder = "cascade",
        spatial_modulation: bool = True,
        temporal_modulation: bool = True,
    ) -> None:
        super().__init__()
        num_levels = len(in_channels)
        if num_levels < 2:
            raise ValueError(f"a pyramid needs two levels or more, got in_channels={tuple(in_channels)}")
        if flow_order not in FUSED:
            raise ValueError(f"flow_order must be one of {', '.join(map(repr, FUSED))}, got {flow_order!r}")
        check_bool("spatial_modulation", spatial_modulation)
        check_bool("temporal_modulation", temporal_modulation)
        frames = _per_level("num_frames", (num_frames,) * num_levels if isinstance(num_frames, int) else num_frames, num_levels)
        default_scales = frames if temporal_modulation else (1,) * num_levels
        temporal = _per_level("temporal_scales", default_scales if temporal_scales is None else temporal_scales, num_levels)
        if not temporal_modulation and max(temporal) > 1:
            raise ValueError(f"temporal_scales must be {default_scales} with temporal_modulation=False, got {temporal}")
        halvings = tuple(2**i for i in reversed(range(num_levels)))
        spatial = _per_level("spatial_scales", halvings if spatial_scales is None else spatial_scales, num_levels)
        if any(scale & (scale - 1) for scale in spatial):
            raise ValueError(f"spatial_scales must be powers of two, got {spatial}")
        lengths = [math.ceil(t / scale) for t, scale in zip(frames, temporal, strict=True)]
        if any(fine % coarse for fine, coarse in pairwise(lengths)):
            raise ValueError(
                f"temporal_scales {temporal} leave {tuple(lengths)} of {frames} frames; "
                "each level's length must be a multiple of the next one's"
            )
        out_channels = in_channels[-1] if out_channels is None else out_channels
        mid_channels = max(out_channels // 2, 1) if mid_channels is None else mid_channels
        for name, value in (("out_channels", out_channels), ("mid_channels", mid_channels), ("groups", groups)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        groups = math.gcd(groups, out_channels, mid_channels)
        ratios = [fine // coarse for fine, coarse in pairwise(lengths)]
        fusion_scales = [length // lengths[-1] for length in lengths]
        fusion = partial(LevelFusion, mid_channels, out_channels, fusion_scales, groups)
        flows = FUSED[flow_order]

        self.in_channels, self.out_channels = tuple(in_channels), out_channels
        self.num_frames, self.temporal_scales, self.default_scales = frames, temporal, default_scales
        self.flow_order = flow_order
        self.spatial_modulation = nn.ModuleList(
            SpatialModulation(channels, out_channels, scale) if spatial_modulation else max_pool(space=scale)
            for channels, scale in zip(in_channels, spatial, strict=True)
        )
        widths = [out_channels if spatial_modulation else channels for channels in in_channels]
        self.temporal_modulation = nn.ModuleList(
            TemporalConvPool(width, mid_channels, scale, math.gcd(groups, width), kernel=3 if temporal_modulation else 1)
            for width, scale in zip(widths, temporal, strict=True)
        )
        if "top_down" in flows:
            self.top_down = nn.ModuleList(
                nn.Identity() if r == 1 else nn.Upsample(scale_factor=(r, 1, 1), mode="nearest") for r in ratios
            )
            self.top_down_fusion = fusion()
        if "bottom_up" in flows:
            self.bottom_up = nn.ModuleList(TemporalConvPool(mid_channels, mid_channels, r) for r in ratios)
            self.bottom_up_fusion = fusion()
        if "level" in flows:
            self.level_fusion = fusion()
        self.pyramid_fusion = ConvBnAct(len(flows) * out_channels, out_channels, (1, 1, 1))
        init_weights(self, conv=nn.init.xavier_uniform_)

    def extra_repr(self) -> str:
        return f"num_frames={self.num_frames}, temporal_scales={self.temporal_scales}, flow_order={self.flow_order!r}"

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.forward_intermediates(features)["pyramid_fusion"]

    def forward_intermediates(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return every intermediate map by name, in order of computation; the last one is the result.

        With levels i = 0 (finest) to L - 1, the coarsest map's size h x w, and T_i' frames after level i's temporal modulation:

        - "spatial_modulation.i": (B, out_channels, T_i, h, w); without spatial modulation, (B, C_i, T_i, h, w)
        - "temporal_modulation.i", "top_down.i", "bottom_up.i": (B, mid_channels, T_i', h, w)
        - "top_down_fusion", "bottom_up_fusion", and "pyramid_fusion", the result: (B, out_channels, T_out, h, w)

        A pyramid with one flow has no maps of the other; one in isolation has "level_fusion" instead of both.
        """
        self._check(features)
        found: dict[str, Tensor] = {}
        levels = [modulate(x) for x, modulate in zip(features, self.spatial_modulation, strict=True)]
        levels = _same_size(levels)
        found.update(_named("spatial_modulation", levels))
        levels = [modulate(x) for x, modulate in zip(levels, self.temporal_modulation, strict=True)]
        found.update(_named("temporal_modulation", levels))
        flows = FUSED[self.flow_order]
        if "top_down" in flows:
            top_down = self.top_down_flow(levels)
            found.update(_named("top_down", top_down))
            found["top_down_fusion"] = self.top_down_fusion(top_down)
        if "bottom_up" in flows:
            bottom_up = self.bottom_up_flow(top_down if self.flow_order == "cascade" else levels)
            found.update(_named("bottom_up", bottom_up))
            found["bottom_up_fusion"] = self.bottom_up_fusion(bottom_up)
        if "level" in flows:
            found["level_fusion"] = self.level_fusion(levels)
        found["pyramid_fusion"] = self.pyramid_fusion(torch.cat([found[f"{name}_fusion"] for name in flows], dim=1))
        return found

    def top_down_flow(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Add each level, stretched in time, to the next finer one, from the coarsest down."""
        out = list(levels)
        for i in reversed(range(len(out) - 1)):
            out[i] = out[i] + self.top_down[i](out[i + 1])
        return out

    def bottom_up_flow(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Add each level, convolved and pooled in time, to the next coarser one, from the finest up."""
        out = list(levels)
        for i, downsample in enumerate(self.bottom_up):
            out[i + 1] = out[i + 1] + downsample(out[i])
        return out

    def _check(self, features: Sequence[Tensor]) -> None:
        if len(features) != len(self.in_channels):
            raise ValueError(f"expected {len(self.in_channels)} feature maps, finest first, got {len(features)}")
        for level, (x, channels, frames) in enumerate(zip(features, self.in_channels, self.num_frames, strict=True)):
            if x.ndim != 5 or x.shape[1] != channels:
                raise ValueError(f"level {level} must be (B, {channels}, T, H, W), got {tuple(x.shape)}")
            if x.shape[2] != frames:
                raise ValueError(
                    f"the pyramid was built for {frames} frames at level {level}, got {x.shape[2]}; "
                    f"sample {frames} frames, or build the model with num_frames={x.shape[2]}"
                )


def max_size_mismatch(size: int) -> int:
    """Return the pixels by which a level may exceed the coarsest map after modulation: backbones without padding lose some."""
    return max(size // 4, 1)


def _named(name: str, levels: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{i}": level for i, level in enumerate(levels)}


def _same_size(levels: Sequence[Tensor]) -> list[Tensor]:
    """Crop each level to the size of the coarsest one; larger differences than `max_size_mismatch` are an error."""
    coarsest = levels[-1].shape[3:]
    for i, x in enumerate(levels):
        if not all(c <= size <= c + max_size_mismatch(c) for size, c in zip(x.shape[3:], coarsest, strict=True)):
            raise ValueError(
                f"level {i} is {x.shape[3]} x {x.shape[4]} after spatial modulation, the last {coarsest[0]} x {coarsest[1]}; "
                "order the levels from fine to coarse, and pass spatial_scales, the size of each relative to the last"
            )
    height, width = coarsest
    return [x if x.shape[3:] == coarsest else _center(x, height, width) for x in levels]


def _center(x: Tensor, height: int, width: int) -> Tensor:
    top, left = (x.shape[3] - height) // 2, (x.shape[4] - width) // 2
    return x[:, :, :, top : top + height, left : left + width]


def _per_level(name: str, values: Sequence[int], num_levels: int) -> tuple[int, ...]:
    values = tuple(values) if isinstance(values, Sequence) else (values,)
    if len(values) != num_levels or any(not isinstance(v, int) or v < 1 for v in values):
        raise ValueError(f"{name} must be {num_levels} positive integers, one per level, got {values}")
    return values
