"""SlowOnly: a residual network with temporal convolutions in its last two stages (Feichtenhofer et al., ICCV 2019)."""

from collections.abc import Sequence

from torch import Tensor

from tpn.models.backbones.resnet import STAGES, ResidualBlock, ResNet, check_depth
from tpn.models.registry import register_backbone

TEMPORAL_KERNELS = (1, 1, 3, 3)
"""Temporal length of the first convolution of each block, by stage."""

FRAME_STAGES = 2
"""Stages that compute each frame alone: those before the first temporal convolution."""


@register_backbone("slowonly")
class ResNet3dSlowOnly(ResNet):
    """A 3D residual network that never downsamples time.

    Args:
        depth: 50 or 101 (bottleneck blocks), or 18 (basic blocks).
        in_chans: input channels, 3 for RGB.
        base_channels: width of the stem; stage i has `base_channels * 2**i * expansion` channels.
        out_indices: stages to return, 0 = stage 1; the pyramid reads (2, 3). (3, 3) returns one map as two levels.
        zero_init_last: start every residual branch at zero (its last batch norm's scale), for training from scratch.

    Shape:
        (B, in_chans, T, H, W) float → one map per `out_indices`, finest first. Stage i is
        `(B, C_i, T, H / 2**(i+2), W / 2**(i+2))`, rounded up; C = 1024, 2048 for depth 50, stages 3 and 4.
    """

    def __init__(
        self,
        depth: int = 50,
        *,
        in_chans: int = 3,
        base_channels: int = 64,
        out_indices: Sequence[int] = (2, 3),
        zero_init_last: bool = False,
    ) -> None:
        check_depth(depth, tuple(STAGES))
        block = STAGES[depth][0]

        def make_block(stage: int, index: int, in_channels: int, channels: int, stride: int) -> ResidualBlock:
            return block(3, in_channels, channels, stride, TEMPORAL_KERNELS[stage])

        super().__init__(
            3,
            depth,
            make_block,
            in_chans=in_chans,
            base_channels=base_channels,
            out_indices=out_indices,
            zero_init_last=zero_init_last,
        )

    def forward_frames(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of `out_indices` among the first two stages, and the input of the third."""
        maps, x = self.forward_stages(self.stem(x), range(FRAME_STAGES))
        return *maps, x

    def forward_clips(self, *maps: Tensor) -> tuple[Tensor, ...]:
        *first, x = maps
        last, _ = self.forward_stages(x, range(FRAME_STAGES, len(TEMPORAL_KERNELS)))
        return *first, *last

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.forward_clips(*self.forward_frames(x))
