"""TSM: a 2D residual network that exchanges channels between neighboring frames (Lin et al., ICCV 2019)."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from tpn.models.backbones.resnet import STAGES, Bottleneck, ResNet, check_depth
from tpn.models.registry import register_backbone

SHIFT_DIV = 8
"""One channel in `SHIFT_DIV` comes from the next frame, one from the previous."""

MANY_BLOCKS = 23
FOLD, UNFOLD = "b c t h w -> (b t) c h w", "(b t) c h w -> b c t h w"
LAYERS_3D: dict[type, type] = {nn.Conv2d: nn.Conv3d, nn.BatchNorm2d: nn.BatchNorm3d, nn.MaxPool2d: nn.MaxPool3d}


def shift_every(num_blocks: Iterable[int]) -> int:
    """Return n if every n-th residual block of each stage shifts, starting with the first.

    As in mmaction2, n is 2 for a network with a stage of 23 blocks or more, otherwise 1.

    Args:
        num_blocks: residual blocks of each stage.
    """
    return 2 if max(num_blocks) >= MANY_BLOCKS else 1


def temporal_shift(x: Tensor, num_frames: int | None = None) -> Tensor:
    """Return a tensor in which 1/8 of the channels come from frame t+1, the next 1/8 from frame t-1, with zeros at the ends.

    Args:
        x: (B*T, C, H, W), the T frames of a clip consecutive.
        num_frames: T; None for x of shape (B, C, T, H, W).
    """
    if num_frames is None:
        return _shift_by_convolution(x)
    x = x.unflatten(0, (-1, num_frames))
    fold = x.shape[2] // SHIFT_DIV
    from_next, from_previous, unchanged = x.split((fold, fold, x.shape[2] - 2 * fold), dim=2)
    zeros = torch.zeros_like(from_next[:, :1])
    from_next = torch.cat((from_next[:, 1:], zeros), dim=1)
    from_previous = torch.cat((zeros, from_previous[:, :-1]), dim=1)
    return torch.cat((from_next, from_previous, unchanged), dim=2).flatten(0, 1)


def _shift_by_convolution(x: Tensor) -> Tensor:
    """Shift (B, C, T, H, W) by a depthwise 3x1x1 convolution with one tap of 1 per channel.

    OpenVINO computes it in int8 and channels-last; slices along time and their concatenation interrupt both.
    """
    channels = x.shape[1]
    fold = channels // SHIFT_DIV
    from_previous, unchanged, from_next = torch.eye(3, dtype=x.dtype, device=x.device)
    taps = torch.cat((from_next.expand(fold, 3), from_previous.expand(fold, 3), unchanged.expand(channels - 2 * fold, 3)))
    return F.conv3d(x, taps.view(channels, 1, 3, 1, 1), padding=(1, 0, 0), groups=channels)


class ShiftBottleneck(Bottleneck):
    """2D bottleneck block whose residual branch, and with `shift_shortcut` its shortcut convolution, reads shifted frames."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, shift: bool, shift_shortcut: bool) -> None:
        super().__init__(2, in_channels, channels, stride)
        self.shift = shift
        self.shift_shortcut = shift_shortcut and self.downsample is not None

    def extra_repr(self) -> str:
        return f"shift={self.shift}, shift_shortcut={self.shift_shortcut}"

    def forward(self, x: Tensor, *args: int) -> Tensor:
        shifted = temporal_shift(x, *args) if self.shift else x
        return self.sum(self.branch(shifted), self.shortcut(shifted if self.shift_shortcut else x))


@register_backbone("tsm")
class ResNetTSM(ResNet):
    """A 2D residual network over folded frames, with temporal shifts in its residual branches.

    Args:
        depth: 50 or 101. With 101 every second block shifts, as in mmaction2.
        shift_shortcut: selects one of the two published variants. False (mmaction2): only the first convolution of a block reads
            shifted frames. True (original TPN code, "in place"): the shortcut convolution of a downsampling block reads them too.
            The parameters have the same names and shapes, but weights trained with one variant are wrong in the other.
        in_chans: as in `ResNet3dSlowOnly`.
        base_channels: as in `ResNet3dSlowOnly`.
        out_indices: as in `ResNet3dSlowOnly`.
        zero_init_last: as in `ResNet3dSlowOnly`.

    Attributes:
        silent_args: arguments that change what the same weights compute.
        folded: whether frames are folded into the batch. False for the result of `unfolded`.

    Shape:
        (B, in_chans, T, H, W) float, any T → one map (B, C_i, T, H_i, W_i) per `out_indices`, finest first.
    """

    silent_args = ("shift_shortcut",)
    folded = True

    def __init__(
        self,
        depth: int = 50,
        *,
        shift_shortcut: bool = False,
        in_chans: int = 3,
        base_channels: int = 64,
        out_indices: Sequence[int] = (2, 3),
        zero_init_last: bool = False,
    ) -> None:
        check_depth(depth, (50, 101))
        every = shift_every(STAGES[depth][1])

        def make_block(stage: int, index: int, in_channels: int, channels: int, stride: int) -> ShiftBottleneck:
            shift = index % every == 0
            return ShiftBottleneck(in_channels, channels, stride, shift=shift, shift_shortcut=shift_shortcut)

        super().__init__(
            2,
            depth,
            make_block,
            in_chans=in_chans,
            base_channels=base_channels,
            out_indices=out_indices,
            zero_init_last=zero_init_last,
        )
        self.shift_shortcut = shift_shortcut

    def unfolded(self) -> "ResNetTSM":
        """Return a copy with 3D layers, which computes the same without folding frames into the batch.

        On CPUs, it is faster in OpenVINO, which copies every map to fold and unfold it, and in PyTorch in bfloat16. In float32,
        PyTorch is faster with 2D layers.
        """
        network = copy.deepcopy(self)
        network.folded = False
        for module in network.modules():
            _add_time(module)
        return network

    def forward_frames(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the output of the stem; the first block shifts frames."""
        if not self.folded:
            return (self.stem(x),)
        return (rearrange(self.stem(rearrange(x, FOLD)), UNFOLD, t=x.shape[2]),)

    def forward_clips(self, *maps: Tensor) -> tuple[Tensor, ...]:
        (x,) = maps
        stages = range(4)
        if not self.folded:
            return tuple(self.forward_stages(x, stages)[0])
        num_frames = x.shape[2]
        folded, _ = self.forward_stages(rearrange(x, FOLD), stages, num_frames)
        return tuple(rearrange(m, UNFOLD, t=num_frames) for m in folded)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.forward_clips(*self.forward_frames(x))


def _add_time(module: Any) -> None:
    """Turn a 2D layer into a 3D one that computes the same on each frame of (B, C, T, H, W)."""
    if type(module) not in LAYERS_3D:
        return
    if type(module) is not nn.BatchNorm2d:
        for name, first in {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}.items():
            setattr(module, name, (first, *_pair(getattr(module, name))))
    if type(module) is nn.Conv2d:
        module.weight.data = module.weight.data.unsqueeze(2)
        module._reversed_padding_repeated_twice = [*module._reversed_padding_repeated_twice, 0, 0]
    module.__class__ = LAYERS_3D[type(module)]
