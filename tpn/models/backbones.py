"""Other people's networks as backbones: what turns them into (B, C, T, H, W) → one such map per level.

A backbone is any module that maps a clip to two or more feature maps, finest first. `FoldedBackbone` makes one of a network for
images, `StagedBackbone` of a network for video that is a chain of stages.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from tpn.models.layers import checkpointed, evaluating
from tpn.models.resnet_tsm import shift_every, temporal_shift


class FoldedBackbone(nn.Module):
    """A network for images that sees the frames of a clip one by one, folded into its batch.

    Args:
        net: (N, C, H, W) → a sequence of maps (N, C_i, H_i, W_i), finest first.
        channels_last: the maps are (N, H_i, W_i, C_i) instead.

    Shape:
        (B, C, T, H, W) float → one map (B, C_i, T, H_i, W_i) per map of `net`; any T, unless `add_temporal_shift` was called.
    """

    def __init__(self, net: nn.Module, *, channels_last: bool = False) -> None:
        super().__init__()
        self.net = net
        self.channels_last = channels_last
        self.num_frames: int | None = None

    def forward(self, x: Tensor) -> list[Tensor]:
        num_frames = x.shape[2]
        if self.num_frames not in (None, num_frames):
            raise ValueError(f"the temporal shifts were built for {self.num_frames} frames, got {num_frames}")
        pattern = "(b t) h w c -> b c t h w" if self.channels_last else "(b t) c h w -> b c t h w"
        maps = self.net(rearrange(x, "b c t h w -> (b t) c h w"))
        return [rearrange(each, pattern, t=num_frames) for each in maps]

    def add_temporal_shift(self, num_frames: int) -> int:
        """Let the first convolution of each residual block see shifted frames of clips of `num_frames`; return how many do.

        A residual block is a module with `conv1`, `conv2` (or `conv3`: Res2Net) and a shortcut, `downsample` or `shortcut`, which
        may be None: those of torchvision and timm. Blocks of a stage are those under one parent. ValueError if there are none.
        """
        if self.num_frames is not None:
            raise ValueError(f"the blocks shift frames already, for clips of {self.num_frames}")
        stages: dict[str, list[Any]] = {}
        for name, module in self.net.named_modules():
            if _is_residual_block(module):
                stages.setdefault(name.rpartition(".")[0], []).append(module)
        if not stages:
            raise ValueError(
                "temporal_shift needs residual blocks, modules with conv1, conv2 and a shortcut called downsample or shortcut; "
                "this network has none"
            )
        every = shift_every(map(len, stages.values()))
        shifted = [block for blocks in stages.values() for block in blocks[::every]]
        for block in shifted:
            block.conv1 = TemporalShift(block.conv1, num_frames)
        self.num_frames = num_frames
        return len(shifted)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, as far as `net` knows how to.

        It does so in its own way: timm's networks update the running statistics of batch norms in the recomputation once more.
        """
        if not hasattr(self.net, "set_grad_checkpointing"):
            raise ValueError(f"{type(self.net).__name__} has no set_grad_checkpointing")
        cast("Any", self.net).set_grad_checkpointing(enable)


def _is_residual_block(module: nn.Module) -> bool:
    has = partial(hasattr, module)
    return has("conv1") and (has("conv2") or has("conv3")) and (has("downsample") or has("shortcut"))


class TemporalShift(nn.Module):
    """A convolution whose input exchanges channels between neighbouring frames first (TSM, Lin et al., ICCV 2019).

    Shape:
        (B*T, C, H, W), the `num_frames` frames of a clip consecutive → what `conv` gives.
    """

    def __init__(self, conv: nn.Module, num_frames: int) -> None:
        super().__init__()
        self.conv = conv
        self.num_frames = num_frames

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(temporal_shift(x, self.num_frames))


class StagedBackbone(nn.Module):
    """A network for video that is a chain of stages; what comes out of some of them are its feature maps.

    Args:
        stages: modules, called one after the other. Those after the last of `out_indices` are left out.
        out_indices: stages to return, 0 = the first; negative ones count from the end.
        channels_last: the stages pass (B, T, H, W, C) on; the maps returned are (B, C, T, H, W) all the same.

    Shape:
        (B, C, T, H, W) float → one map (B, C_i, T_i, H_i, W_i) per index.
    """

    def __init__(self, stages: Sequence[nn.Module], out_indices: Sequence[int], *, channels_last: bool = False) -> None:
        super().__init__()
        self.out_indices = positive_indices(out_indices, len(stages))
        self.stages = nn.ModuleList(stages[: self.out_indices[-1] + 1])
        self.channels_last = channels_last
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, stage in enumerate(self.stages):
            x = checkpointed(stage, x) if self.grad_checkpointing and self.training else stage(x)
            if i in self.out_indices:
                maps.append(rearrange(x, "b t h w c -> b c t h w") if self.channels_last else x)
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable


def measure(backbone: nn.Module, clip: Tensor) -> list[tuple[int, int, int, int]]:
    """Return (C, T, H, W) of each feature map that a backbone makes of `clip` (1, C, T, H, W).

    Its mode and its running statistics stay as they are. Raises ValueError if it does not take the clip, or gives anything but 5D
    maps from fine to coarse.
    """
    try:
        with evaluating(backbone), torch.no_grad():
            result = backbone(clip)
    except Exception as error:  # of whatever kind
        raise ValueError(
            f"the backbone does not take a clip {tuple(clip.shape)} ({type(error).__name__}: {error}); choose another "
            "num_frames, crop_size in input_spec, or for a network of a fixed size backbone_args={'img_size': ...}"
        ) from error
    maps = as_maps(result)
    shapes = [tuple(each.shape[1:]) for each in maps]
    if any(each.ndim != 5 or len(each) != 1 or not each.is_floating_point() for each in maps):
        got = ", ".join(f"{each.dtype} {tuple(each.shape)}" for each in maps)
        raise ValueError(
            f"a backbone must give float feature maps (B, C, T, H, W); of a clip {tuple(clip.shape)} this one made {got}"
        )
    for fine, coarse in pairwise(shapes):
        if any(a < b for a, b in zip(fine[1:], coarse[1:], strict=True)):
            raise ValueError(
                f"feature maps must go from fine to coarse in time and space; got (C, T, H, W) {fine} before {coarse}"
            )
    return cast("list[tuple[int, int, int, int]]", shapes)


class AsMaps(nn.Module):
    """What a backbone gave → the tuple of its maps; a module, so that hooks can see it."""

    def forward(self, result: Any) -> tuple[Tensor, ...]:
        return as_maps(result)


def as_maps(result: Any) -> tuple[Tensor, ...]:
    """Return what a backbone gave as a sequence of maps: a sequence, a dictionary of them, or one alone."""
    if isinstance(result, Tensor):
        return (result,)
    maps = tuple(result.values()) if isinstance(result, Mapping) else tuple(result) if isinstance(result, Sequence) else ()
    if not maps or not all(isinstance(each, Tensor) for each in maps):
        raise TypeError(f"a backbone must return a sequence of feature maps (B, C, T, H, W), got {type(result).__name__}")
    return maps


def layer_names(backbone: nn.Module, *, coarse: bool = False) -> list[str]:
    """Return the names of the modules that a network is made of, in their order; unless `coarse`, chains are taken apart."""
    parts = _children("", backbone)
    while len(parts) == 1 and (inside := _children(*parts[0])) != parts:  # a wrapper
        parts = inside
    if coarse:
        return [name for name, _ in parts]
    chains = (nn.Sequential, nn.ModuleList)
    return [inner for name, part in parts for inner, _ in (_children(name, part) if isinstance(part, chains) else [(name, part)])]


def _children(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the children with parameters, by their whole names; the module itself if it has none."""
    prefix = f"{name}." if name else ""
    children = [(prefix + key, child) for key, child in module.named_children() if any(True for _ in child.parameters())]
    return children or [(name, module)]


def positive_indices(indices: Sequence[int], count: int) -> tuple[int, ...]:
    """Return increasing indices into `count` stages, negative ones counted from the end."""
    positive = tuple(i + count if i < 0 else i for i in indices)
    if not positive or list(positive) != sorted(set(positive)) or not 0 <= positive[0] <= positive[-1] < count:
        raise ValueError(f"out_indices must be increasing indices of {count} stages, got {tuple(indices)}")
    return positive
