"""Resize, crop and normalize uint8 frames (..., 3, H, W) exactly as in the published test protocols."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

_FIXED_POINT_ONE = 1 << 11
"""A weight of 1.0 in OpenCV's fixed-point arithmetic."""


def resize_short_side(x: Tensor, size: int) -> Tensor:
    """Resize frames so that the shorter side has `size` pixels: bilinear, without antialiasing.

    The integer arithmetic is that of OpenCV's `resize(..., INTER_LINEAR)`, which was used to measure the published accuracies.
    With floating point, one pixel in eight would differ by one level, and probabilities by up to a few 1e-4.

    Args:
        x: uint8 (..., 3, H, W).
        size: length of the shorter side in pixels, at least 1.

    Returns:
        uint8 (..., 3, H', W'). The longer side is rounded to the nearest pixel.
    """
    _check_frames(x)
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    height, width = x.shape[-2:]
    scale = size / min(height, width)
    target = [int(height * scale + 0.5), int(width * scale + 0.5)]
    if target == [height, width]:
        return x
    horizontal, vertical = _taps(width, target[1], clamp_weights=True), _taps(height, target[0], clamp_weights=False)
    resize = _resize_with_numpy if x.device.type == "cpu" else _resize_with_torch
    return resize(x.reshape(-1, height, width), horizontal, vertical).view(*x.shape[:-2], *target)


def center_crop(x: Tensor, size: int) -> Tensor:
    """Crop the central square of `size` pixels: uint8 (..., 3, H, W) → (..., 3, size, size), a view."""
    _check_frames(x)
    height, width = x.shape[-2:]
    if min(height, width) < size:
        raise ValueError(f"cannot crop {size}x{size} from frames of {width}x{height}. Resize the shorter side to {size} first")
    return _crop(x, (height - size) // 2, (width - size) // 2, size)


def three_crop(x: Tensor, size: int) -> Tensor:
    """Crop three squares along the longer side, in the order start, end, center.

    Args:
        x: uint8 (..., 3, H, W).
        size: side of the squares in pixels, equal to the shorter side of `x`.

    Returns:
        uint8 (3, ..., 3, size, size).
    """
    return torch.stack(three_crop_views(x, size))


def three_crop_views(x: Tensor, size: int) -> list[Tensor]:
    """Return the crops of `three_crop` as views of `x`."""
    _check_frames(x)
    height, width = x.shape[-2:]
    if min(height, width) != size:
        raise ValueError(f"the shorter side must be {size}, got frames of {width}x{height}. Call resize_short_side first")
    step_y, step_x = (height - size) // 2, (width - size) // 2
    return [_crop(x, step_y * i, step_x * i, size) for i in (0, 2, 1)]


def adjust_hue(x: Tensor, turns: float) -> Tensor:
    """Rotate the hue of every pixel and keep saturation and value.

    The result differs from torchvision's `adjust_hue` by at most 1 level, and is computed several times faster.

    Args:
        x: uint8 RGB (..., 3, H, W).
        turns: fraction of the color wheel, -0.5..0.5.

    Returns:
        uint8 RGB (..., 3, H, W).
    """
    _check_frames(x)
    r, g, b = x.float().unbind(-3)
    top, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = top - low
    # Hue in sixths of the color wheel: 0 red, 2 green, 4 blue. From red via green to cyan it is 1 + (g + b - r) / chroma, with
    # `low` subtracted from r, g and b. From red via blue to cyan it is the negative of that.
    hue = torch.copysign((chroma - low).add_(g).add_(b).sub_(r), g - b).div_(chroma.clamp(min=1)).add_(6 * turns).remainder_(6)
    red = (hue - 3).abs_().sub_(1)
    green = (hue - 2).abs_().neg_().add_(2)
    blue = (hue - 4).abs_().neg_().add_(2)
    out = torch.empty_like(x)
    for i, fraction in enumerate((red, green, blue)):
        out.select(-3, i).copy_(fraction.clamp_(0, 1).mul_(chroma).add_(low).add_(0.5))
    return out


def normalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Convert frames to model input: (x - mean) / std, with channels before time.

    Args:
        x: uint8 RGB (..., T, C, H, W), 0..255.
        mean: of each channel, on the 0..255 scale.
        std: of each channel, on the 0..255 scale.

    Returns:
        float32 (..., C, T, H, W).
    """
    _check_frames(x, channels=len(mean))
    channel_tensor = _channel_tensor.__wrapped__ if torch.compiler.is_compiling() else _channel_tensor
    mean_tensor, std_tensor = (channel_tensor(tuple(values), x.device) for values in (mean, std))
    return ((x.float() - mean_tensor) / std_tensor).transpose(-4, -3)


@lru_cache(maxsize=32)
def _channel_tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a tensor (C, 1, 1). It is cached because copying it to a GPU waits for all queued work."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


@lru_cache(maxsize=32)
def _taps(size: int, target: int, *, clamp_weights: bool) -> tuple[NDArray[np.integer], ...]:
    """Return the indices (target,) of the two source pixels to blend for each target pixel, and their weights (target, 1).

    A weight of 1.0 is `_FIXED_POINT_ONE`. At the edges OpenCV clamps the indices, and for columns also the weights.
    """
    position = ((np.arange(target) + 0.5) * (size / target) - 0.5).astype(np.float32)
    before = np.floor(position)
    fraction = position - before
    first, second = (np.clip(i, 0, size - 1).astype(np.int64) for i in (before, before + 1))
    w0, w1 = (np.round(w * np.float32(_FIXED_POINT_ONE)).astype(np.int32)[:, None] for w in (1 - fraction, fraction))
    if clamp_weights:
        outside = (first == second)[:, None]
        w0, w1 = np.where(outside, np.int32(_FIXED_POINT_ONE), w0), np.where(outside, np.int32(0), w1)
    return first, second, w0, w1


def _resize_with_torch(images: Tensor, horizontal: tuple[Any, ...], vertical: tuple[Any, ...]) -> Tensor:
    taps = [tuple(torch.from_numpy(v).to(images.device) for v in axis) for axis in (horizontal, vertical)]
    return _resize(images.int(), *taps).to(torch.uint8).contiguous()


def _resize_with_numpy(images: Tensor, horizontal: tuple[Any, ...], vertical: tuple[Any, ...]) -> Tensor:
    """Resize image by image, which fits into the CPU cache. numpy uses one thread; torch's threads would slow down a decoder."""
    result = np.empty((len(images), len(vertical[0]), len(horizontal[0])), np.uint8)
    for image, out in zip(images.numpy(), result, strict=True):
        out[:] = _resize(image[None].astype(np.int32), horizontal, vertical)[0]
    return torch.from_numpy(result)


def _resize(x: Any, horizontal: tuple[Any, ...], vertical: tuple[Any, ...]) -> Any:
    """Resize int32 (N, H, W) → (N, H', W'), a numpy array or a tensor. Indexing whole rows is fast, hence the transpositions."""
    left, right, w0, w1 = horizontal
    height = x.shape[1]
    columns = rearrange(x, "n h w -> w (n h)")
    x, second = columns[left], columns[right]
    x *= w0
    second *= w1
    x += second
    x >>= 4
    rows = rearrange(x, "w (n h) -> h (n w)", h=height)
    top, bottom, w0, w1 = vertical
    x, second = rows[top], rows[bottom]
    x *= w0
    x >>= 16
    second *= w1
    second >>= 16
    x += second
    x += 2
    x >>= 2
    return rearrange(x, "h (n w) -> n h w", w=len(left))


def _crop(x: Tensor, top: int, left: int, size: int) -> Tensor:
    return x[..., top : top + size, left : left + size]


def _check_frames(x: Tensor, channels: int = 3) -> None:
    if x.dtype != torch.uint8:
        raise TypeError(f"expected uint8 frames, 0..255, got {x.dtype}")
    if x.ndim < 3 or x.shape[-3] != channels:
        raise ValueError(f"expected frames (..., {channels}, H, W), got {tuple(x.shape)}")
