"""Small pieces shared by the backbones, the neck and the heads."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class ConvBnAct(nn.Module):
    """3D convolution without bias, batch norm, ReLU; padded so that stride 1 keeps the size."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
        groups: int = 1,
    ) -> None:
        super().__init__()
        t, h, w = kernel_size
        padding = (t // 2, h // 2, w // 2)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm3d(out_channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


@contextmanager
def _restore_running_stats(module: nn.Module) -> Iterator[None]:
    """Let batch norms update copies of their running statistics, which are discarded afterwards."""
    norms = [m for m in module.modules() if isinstance(m, BATCH_NORMS)]
    buffers = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in buffers:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in buffers:
            setattr(norm, name, buffer)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, and restore the mode of each of its parts afterwards: some may be frozen."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def checkpointed(module: nn.Module, *args: Tensor | int) -> Tensor:
    """Call `module(*args)` and recompute its activations in the backward pass instead of keeping them.

    The recomputation does not update the running statistics of batch norm: a step with checkpointing updates them once, like a
    step without it.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _restore_running_stats(module)

    if torch.compiler.is_compiling():  # a compiled graph computes the statistics once anyway
        return checkpoint(module, *args, use_reentrant=False)
    return checkpoint(module, *args, use_reentrant=False, context_fn=contexts)


def reference_tensor(module: nn.Module) -> Tensor:
    """Return a tensor with the device and dtype of a module: its first parameter, or an empty tensor if it has none."""
    return next(module.parameters(), torch.empty(0))


def channels_last(module: nn.Module) -> None:
    """Store 2D and 3D convolution weights channels-last; `Module.to(memory_format=...)` does not accept both in one module."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            m.to(memory_format=torch.channels_last)
        elif isinstance(m, nn.Conv3d):
            m.to(memory_format=torch.channels_last_3d)


def freeze_batch_norm(module: nn.Module) -> None:
    """Let batch norms use their running statistics without updating them, until the next call of `train()`."""
    for m in module.modules():
        if isinstance(m, BATCH_NORMS):
            m.eval()


def init_weights(module: nn.Module, *, conv: Callable[[Tensor], Tensor]) -> None:
    """Initialize every convolution with `conv`, every batch norm with (1, 0), every linear with N(0, 0.01)."""
    if any(parameter.is_meta for parameter in module.parameters()):  # no values; PyTorch would import its compiler for them
        return
    for m in module.modules():
        if isinstance(m, nn.Conv2d | nn.Conv3d):
            conv(m.weight)
        elif isinstance(m, BATCH_NORMS):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=0.01)
            nn.init.zeros_(m.bias)


kaiming_fan_out = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
"""Initialization of the residual networks' convolutions (mmaction2 and torchvision)."""


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 (hexadecimal) of a model's state dict, including names and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
