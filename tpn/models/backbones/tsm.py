"""TSM: a 2D residual network that exchanges channels between neighboring frames (Lin et al., ICCV 2019)."""

from collections.abc import Iterable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from tpn.models.backbones.resnet import STAGES, Bottleneck, ResNet, check_depth
from tpn.models.registry import register_backbone

SHIFT_DIV = 8
"""One channel in `SHIFT_DIV` comes from the next frame, one from the previous."""

MANY_BLOCKS = 23


def shift_every(num_blocks: Iterable[int]) -> int:
    """Return n if every n-th residual block of each stage shifts, starting with the first.

    As in mmaction2, n is 2 for a network with a stage of 23 blocks or more, otherwise 1.

    Args:
        num_blocks: residual blocks of each stage.
    """
    return 2 if max(num_blocks) >= MANY_BLOCKS else 1


def temporal_shift(x: Tensor, num_frames: int) -> Tensor:
    """Return a tensor in which 1/8 of the channels come from frame t+1, the next 1/8 from frame t-1, with zeros at the ends.

    Args:
        x: (B*T, C, H, W), the T frames of a clip consecutive.
    """
    x = x.unflatten(0, (-1, num_frames))
    fold = x.shape[2] // SHIFT_DIV
    from_next, from_previous, unchanged = x.split((fold, fold, x.shape[2] - 2 * fold), dim=2)
    zeros = torch.zeros_like(from_next[:, :1])
    from_next = torch.cat((from_next[:, 1:], zeros), dim=1)
    from_previous = torch.cat((zeros, from_previous[:, :-1]), dim=1)
    return torch.cat((from_next, from_previous, unchanged), dim=2).flatten(0, 1)


class ShiftBottleneck(Bottleneck):
    """2D bottleneck block whose residual branch, and with `shift_shortcut` its shortcut convolution, reads shifted frames."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, shift: bool, shift_shortcut: bool) -> None:
        super().__init__(2, in_channels, channels, stride)
        self.shift = shift
        self.shift_shortcut = shift_shortcut and self.downsample is not None

    def extra_repr(self) -> str:
        return f"shift={self.shift}, shift_shortcut={self.shift_shortcut}"

    def forward(self, x: Tensor, *args: int) -> Tensor:
        (num_frames,) = args
        shifted = temporal_shift(x, num_frames) if self.shift else x
        return self.sum(self.branch(shifted), self.shortcut(shifted if self.shift_shortcut else x))


@register_backbone("tsm")
class ResNetTSM(ResNet):
    """2D residual network over folded frames, with temporal shifts in its residual branches.

    Args:
        depth: 50 or 101. With 101 every second block shifts, as in mmaction2.
        shift_shortcut: selects one of the two published variants. False (mmaction2): only the first convolution of a block reads
            shifted frames. True (original TPN code, "in place"): the shortcut convolution of a downsampling block reads them too.
            The parameters have the same names and shapes, but weights trained with one variant are wrong in the other.
        in_chans, base_channels, out_indices, zero_init_last: as in `ResNet3dSlowOnly`.

    Attributes:
        silent_args: arguments that change what the same weights compute.

    Shape:
        (B, in_chans, T, H, W) float, any T → one map (B, C_i, T, H_i, W_i) per `out_indices`, finest first.
    """

    silent_args = ("shift_shortcut",)

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

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        num_frames = x.shape[2]
        maps = self.forward_stages(rearrange(x, "b c t h w -> (b t) c h w"), num_frames)
        return tuple(rearrange(m, "(b t) c h w -> b c t h w", t=num_frames) for m in maps)
