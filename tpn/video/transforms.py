"""Deterministic pixels-to-tensor steps of the published test protocols, on uint8 frames (..., 3, H, W)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F


def resize_short_side(x: Tensor, size: int) -> Tensor:
    """Scale so that the shorter side becomes `size` pixels: bilinear without antialiasing, as mmaction2 does.

    x: uint8 (..., 3, H, W). Returns uint8 (..., 3, H', W'); the longer side is rounded to the nearest pixel.
    """
    _check_frames(x)
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    height, width = x.shape[-2:]
    scale = size / min(height, width)
    target = [int(height * scale + 0.5), int(width * scale + 0.5)]
    if target == [height, width]:
        return x
    # In float, then rounded: torchvision's uint8 kernel is off by one level twice as often.
    resized = F.resize(x.float(), target, interpolation=InterpolationMode.BILINEAR, antialias=False)
    return resized.round().to(torch.uint8)


def center_crop(x: Tensor, size: int) -> Tensor:
    """Cut the central square of `size` pixels: uint8 (..., 3, H, W) → (..., 3, size, size), a view."""
    _check_frames(x)
    height, width = x.shape[-2:]
    if min(height, width) < size:
        raise ValueError(f"cannot crop {size}x{size} from frames of {width}x{height}; resize the short side to {size} first")
    return _crop(x, (height - size) // 2, (width - size) // 2, size)


def three_crop(x: Tensor, size: int) -> Tensor:
    """Cut three squares along the longer side, in the order start, end, centre.

    x: uint8 (..., 3, H, W) whose shorter side is `size`. Returns uint8 (3, ..., 3, size, size).
    """
    _check_frames(x)
    height, width = x.shape[-2:]
    if min(height, width) != size:
        raise ValueError(f"three_crop needs frames whose short side is {size}, got {width}x{height}; resize_short_side first")
    step_y, step_x = (height - size) // 2, (width - size) // 2
    return torch.stack([_crop(x, step_y * i, step_x * i, size) for i in (0, 2, 1)])


def normalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn frames into model input: (x - mean) / std, channels before time.

    x: uint8 RGB 0..255, (..., T, C, H, W). mean, std: per channel, on the 0..255 scale.
    Returns float32 (..., C, T, H, W).
    """
    _check_frames(x, channels=len(mean))
    shape = (-1, 1, 1)
    mean_, std_ = (torch.tensor(v, dtype=torch.float32, device=x.device).view(shape) for v in (mean, std))
    return ((x.float() - mean_) / std_).transpose(-4, -3)


def _crop(x: Tensor, top: int, left: int, size: int) -> Tensor:
    return x[..., top : top + size, left : left + size]


def _check_frames(x: Tensor, channels: int = 3) -> None:
    if x.dtype != torch.uint8:
        raise TypeError(f"expected uint8 frames, 0..255, got {x.dtype}")
    if x.ndim < 3 or x.shape[-3] != channels:
        raise ValueError(f"expected frames (..., {channels}, H, W), got {tuple(x.shape)}")
