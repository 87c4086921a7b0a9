"""Feature maps: what a backbone returns, and the shapes that a neck is built for."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tpn.config import InputSpec
from tpn.models.layers import evaluating, reference_tensor
from tpn.models.neck import max_size_mismatch


class FeatureShape(NamedTuple):
    """Shape of one feature map, without the batch."""

    channels: int
    frames: int
    height: int
    width: int


class FeatureList(nn.Module):
    """`to_feature_list` as a module, for hooks. `last_only` keeps the last map, for a baseline.

    A map that is several levels becomes one tensor for each: gradients of a level are its own.
    """

    def __init__(self, *, last_only: bool) -> None:
        super().__init__()
        self.last_only = last_only

    def forward(self, result: Any) -> tuple[Tensor, ...]:
        maps = to_feature_list(result)
        if self.last_only:
            return maps[-1:]
        return tuple(x.clone() if any(x is y for y in maps[:i]) else x for i, x in enumerate(maps))


def to_feature_list(result: Any) -> tuple[Tensor, ...]:
    """Return the result of a backbone (a sequence of maps, a dictionary of maps, or one map) as a tuple of maps."""
    if isinstance(result, Tensor):
        return (result,)
    maps = tuple(result.values()) if isinstance(result, Mapping) else tuple(result) if isinstance(result, Sequence) else ()
    if not maps or not all(isinstance(x, Tensor) for x in maps):
        raise TypeError(f"a backbone must return a sequence of feature maps (B, C, T, H, W), got {type(result).__name__}")
    return maps


def feature_shapes(backbone: nn.Module, spec: InputSpec, *, crop_size: int | None = None) -> list[FeatureShape]:
    """Return the shape of each feature map for a clip of `spec`, finest first.

    A backbone may have a method `feature_shapes(clip)`; any other is run on a clip of zeros. Its mode and its running statistics
    stay unchanged.

    Raises ValueError: the backbone does not accept the clip, or does not return 5D maps from fine to coarse.
    """
    size = spec.crop_size if crop_size is None else crop_size
    clip = torch.zeros(1, spec.in_chans, spec.num_frames, size, size)
    if hasattr(backbone, "feature_shapes"):
        return [FeatureShape(*shape) for shape in cast("Any", backbone).feature_shapes(clip)]
    return measure(backbone, clip)


def measure(backbone: nn.Module, clip: Tensor) -> list[FeatureShape]:
    """Return the shape of each feature map that a backbone makes of `clip` (1, C, T, H, W); see `feature_shapes`."""
    clip = clip.to(reference_tensor(backbone))
    try:
        with evaluating(backbone), torch.no_grad():
            result = backbone(clip)
    except Exception as error:  # each network raises its own type
        raise ValueError(
            f"the backbone does not accept a clip {tuple(clip.shape)} ({type(error).__name__}: {error}). Choose another "
            "num_frames, another crop_size in input_spec, or for a network of a fixed size backbone_args={'img_size': ...}"
        ) from error
    maps = to_feature_list(result)
    if any(x.ndim != 5 or len(x) != 1 or not x.is_floating_point() for x in maps):
        got = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in maps)
        raise ValueError(f"a backbone must return float feature maps (B, C, T, H, W), got {got} for a clip {tuple(clip.shape)}")
    shapes = [FeatureShape(*x.shape[1:]) for x in maps]
    for fine, coarse in pairwise(shapes):
        if any(a < b for a, b in zip(fine[1:], coarse[1:], strict=True)):
            raise ValueError(f"feature maps must go from fine to coarse, got (C, T, H, W) {tuple(fine)} before {tuple(coarse)}")
    return shapes


def spatial_scales(shapes: Sequence[FeatureShape]) -> tuple[int, ...]:
    """Return the size of each level relative to the last, powers of two; the neck cuts off small differences.

    Raises ValueError: the sizes do not differ by powers of two.
    """
    sizes = [(shape.height, shape.width) for shape in shapes]
    scales, last = [1], sizes[-1]
    for level in reversed(range(len(sizes) - 1)):
        fine = sizes[level]
        # Small sizes are rounded at every step: compare with the next level. Without padding, compare with the last one.
        candidates = (_ratio(fine, sizes[level + 1]) * scales[0], _ratio(fine, last))
        scale = next((scale for scale in candidates if scale and _fits(fine, last, scale)), None)
        if scale is None:
            raise ValueError(
                f"level {level} is {fine[0]} x {fine[1]}, the last level {last[0]} x {last[1]}. The neck needs sizes that differ "
                "by a power of two, up to a pixel or so: choose other levels (out_indices), or another crop_size in input_spec"
            )
        scales.insert(0, scale)
    return tuple(scales)


def _ratio(fine: tuple[int, int], coarse: tuple[int, int]) -> int:
    """Return the power of two by which one map is larger than another, rounded either way; 0 for none."""
    scales = [2**i for i in range(max(fine).bit_length())]
    for scale in scales:
        if all(c in (f // scale, -(-f // scale)) for f, c in zip(fine, coarse, strict=True)):
            return scale
    return next((scale for scale in scales if _fits(fine, coarse, scale)), 0)  # networks without padding lose more


def _fits(fine: tuple[int, int], coarse: tuple[int, int], scale: int) -> bool:
    """Whether the neck can make a map as large as the coarsest, by halving, rounded up, and cutting."""
    return all(c <= -(-f // scale) <= c + max_size_mismatch(c) for f, c in zip(fine, coarse, strict=True))


def layer_names(backbone: nn.Module, *, coarse: bool = False) -> list[str]:
    """Return the names of the modules that a network consists of, in order; chains are taken apart unless `coarse`."""
    parts = _children("", backbone)
    while len(parts) == 1 and (inside := _children(*parts[0])) != parts:  # a wrapper
        parts = inside
    if coarse:
        return [name for name, _ in parts]
    chains = (nn.Sequential, nn.ModuleList)
    return [inner for name, part in parts for inner, _ in (_children(name, part) if isinstance(part, chains) else [(name, part)])]


def _children(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the children that have parameters, by their full names; the module itself if it has none."""
    prefix = f"{name}." if name else ""
    children = [(prefix + key, child) for key, child in module.named_children() if any(True for _ in child.parameters())]
    return children or [(name, module)]
