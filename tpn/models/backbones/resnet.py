"""The common parts of the SlowOnly and TSM residual networks: residual blocks, stem, four stages.

Attribute names are torchvision's (`conv1`, `bn1`, `layer1.0.downsample.0`, ...): ImageNet weights and the original TPN
checkpoints need no renaming.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from tpn.models.layers import checkpointed, init_weights, kaiming_fan_out


def conv(
    dims: int, in_channels: int, out_channels: int, kernel: int, stride: int = 1, temporal_kernel: int = 1
) -> nn.Conv2d | nn.Conv3d:
    """Return a 2D (`dims=2`) or 3D (`dims=3`) convolution without bias, strided over space only, "same"-padded."""
    if dims == 2:
        return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    kernels = (temporal_kernel, kernel, kernel)
    padding = (temporal_kernel // 2, kernel // 2, kernel // 2)
    return nn.Conv3d(in_channels, out_channels, kernels, (1, stride, stride), padding, bias=False)


def norm(dims: int, channels: int) -> nn.BatchNorm2d | nn.BatchNorm3d:
    return nn.BatchNorm2d(channels) if dims == 2 else nn.BatchNorm3d(channels)


class ResidualBlock(nn.Module):
    """`relu(branch(x) + shortcut(x))`; the shortcut is a strided 1x1 convolution where the shape changes.

    `sum_in_place` saves memory traffic, but overwrites the output of the last norm, which a hook may hold: for `tpn.optimize`.
    """

    expansion: int
    sum_in_place = False
    downsample: nn.Sequential | None

    def __init__(self, dims: int, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(conv(dims, in_channels, out_channels, 1, stride), norm(dims, out_channels))

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def forward(self, x: Tensor, *args: int) -> Tensor:
        """`args` come from `ResNet.forward_stages`; a plain block takes none."""
        return self.sum(self.branch(x), self.shortcut(x))

    def sum(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        return self.relu(branch.add_(shortcut) if self.sum_in_place else branch + shortcut)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions; `temporal_kernel` applies to the first."""

    expansion = 1

    def __init__(self, dims: int, in_channels: int, channels: int, stride: int, temporal_kernel: int = 1) -> None:
        super().__init__(dims, in_channels, channels, stride)
        self.conv1 = conv(dims, in_channels, channels, 3, stride, temporal_kernel)
        self.bn1 = norm(dims, channels)
        self.conv2 = conv(dims, channels, channels, 3)
        self.bn2 = norm(dims, channels)

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(ResidualBlock):
    """1x1, 3x3 (which carries the stride), 1x1 convolutions; `temporal_kernel` applies to the first."""

    expansion = 4

    def __init__(self, dims: int, in_channels: int, channels: int, stride: int, temporal_kernel: int = 1) -> None:
        super().__init__(dims, in_channels, channels, stride)
        self.conv1 = conv(dims, in_channels, channels, 1, 1, temporal_kernel)
        self.bn1 = norm(dims, channels)
        self.conv2 = conv(dims, channels, channels, 3, stride)
        self.bn2 = norm(dims, channels)
        self.conv3 = conv(dims, channels, channels * self.expansion, 1)
        self.bn3 = norm(dims, channels * self.expansion)

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


STAGES: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}
"""Block type and blocks per stage, by depth."""


class ResNet(nn.Module):
    """Stem and four stages whose outputs `out_indices` (0 = stage 1) are returned, finest first. One may repeat.

    Attributes:
        out_channels: channels of each returned map.
        imagenet_repo: Hub repository of the 2D ImageNet weights of this depth, which can be inflated into this network.
        in_chans: as given.
        silent_args: arguments that change what the same weights compute.
    """

    silent_args: tuple[str, ...] = ()

    def __init__(
        self,
        dims: int,
        depth: int,
        make_block: Callable[[int, int, int, int, int], ResidualBlock],
        *,
        in_chans: int,
        base_channels: int,
        out_indices: Sequence[int],
        zero_init_last: bool,
    ) -> None:
        """`make_block(stage, index, in_channels, channels, stride)` builds one residual block."""
        super().__init__()
        stages = isinstance(out_indices, Sequence) and all(isinstance(i, int) and i in range(4) for i in out_indices)
        if not stages or not out_indices or list(out_indices) != sorted(out_indices):
            raise ValueError(f"out_indices must be stage indices in 0..3 that never decrease, got {out_indices!r}")
        block, counts = STAGES[depth]
        self.imagenet_repo = f"timm/resnet{depth}.tv_in1k"
        self.in_chans = in_chans
        self.out_indices = tuple(out_indices)
        self.out_channels = tuple(base_channels * 2**i * block.expansion for i in self.out_indices)
        self.grad_checkpointing = False

        self.conv1 = conv(dims, in_chans, base_channels, 7, 2)
        self.bn1 = norm(dims, base_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if dims == 2 else nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))

        channels = base_channels
        for stage in range(max(self.out_indices) + 1):
            width, blocks = base_channels * 2**stage, []
            for index in range(counts[stage]):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(make_block(stage, index, channels, width, stride))
                channels = width * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

        init_weights(self, conv=kaiming_fan_out)
        if zero_init_last:  # of each branch, so that a block starts as the identity
            for m in self.modules():
                if isinstance(m, Bottleneck):
                    nn.init.zeros_(m.bn3.weight)
                elif isinstance(m, BasicBlock):
                    nn.init.zeros_(m.bn2.weight)

    def feature_shapes(self, clip: Tensor) -> list[tuple[int, ...]]:
        """Return (C, T, H, W) of each feature map of a clip (1, C, T, H, W)."""
        _, _, frames, height, width = clip.shape
        strides = [2 ** (i + 2) for i in self.out_indices]
        return [(c, frames, -(-height // s), -(-width // s)) for c, s in zip(self.out_channels, strides, strict=True)]

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the patterns of the stem and the blocks (`coarse`: stages), for layer-wise learning rates."""
        return {"stem": r"^(?:conv1|bn1)", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each residual block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def forward_stages(self, x: Tensor, stages: range, *block_args: int) -> tuple[list[Tensor], Tensor]:
        """Return the maps of `out_indices` among `stages`, and the output of the last of them that exists.

        `block_args` are passed on to every block. Stages after the last of `out_indices` do not exist.
        """
        maps: list[Tensor] = []
        for stage in stages:
            for block in getattr(self, f"layer{stage + 1}", ()):
                recompute = self.grad_checkpointing and self.training
                x = checkpointed(block, x, *block_args) if recompute else block(x, *block_args)
            maps += [x] * self.out_indices.count(stage)
        return maps, x


def check_depth(depth: int, supported: Sequence[int]) -> None:
    if depth not in supported:
        raise ValueError(f"depth must be one of {', '.join(map(str, supported))}, got {depth}")
