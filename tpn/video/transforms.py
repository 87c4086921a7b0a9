"""Deterministic pixels-to-tensor steps of the published test protocols, on uint8 frames (..., 3, H, W)."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

_ONE = 1 << 11
"""A weight of 1 in OpenCV's fixed-point arithmetic."""


def resize_short_side(x: Tensor, size: int) -> Tensor:
    """Scale so that the shorter side becomes `size` pixels: bilinear without antialiasing.

    The integers are those of OpenCV's `resize(..., INTER_LINEAR)`, with which the published accuracies were measured:
    floating point would move one pixel in eight by one level, and a probability by up to a few 1e-4.

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
    across, down = _taps(width, target[1], edges_in_weights=True), _taps(height, target[0], edges_in_weights=False)
    resize = _resize_by_numpy if x.device.type == "cpu" else _resize_by_torch
    return resize(x.reshape(-1, height, width), across, down).view(*x.shape[:-2], *target)


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
    return torch.stack(three_crop_views(x, size))


def three_crop_views(x: Tensor, size: int) -> list[Tensor]:
    """Return what `three_crop` does as views, which copy nothing."""
    _check_frames(x)
    height, width = x.shape[-2:]
    if min(height, width) != size:
        raise ValueError(f"three_crop needs frames whose short side is {size}, got {width}x{height}; resize_short_side first")
    step_y, step_x = (height - size) // 2, (width - size) // 2
    return [_crop(x, step_y * i, step_x * i, size) for i in (0, 2, 1)]


def adjust_hue(x: Tensor, turns: float) -> Tensor:
    """Turn the hue of every pixel; saturation and value stay. torchvision's operator within 1 level, several times faster.

    x: uint8 RGB (..., 3, H, W). turns: of the colour circle, -0.5..0.5. Returns the same type and shape.
    """
    _check_frames(x)
    r, g, b = x.float().unbind(-3)
    top, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = top - low
    # Hue in sixths of the circle: 0 red, 2 green, 4 blue. From red over green to cyan it is 1 + g + b - r (each less `low`,
    # in terms of chroma), and the same backwards on the side of blue.
    hue = torch.copysign((chroma - low).add_(g).add_(b).sub_(r), g - b).div_(chroma.clamp(min=1)).add_(6 * turns).remainder_(6)
    red = (hue - 3).abs_().sub_(1)
    green = (hue - 2).abs_().neg_().add_(2)
    blue = (hue - 4).abs_().neg_().add_(2)
    out = torch.empty_like(x)
    for i, share in enumerate((red, green, blue)):
        out.select(-3, i).copy_(share.clamp_(0, 1).mul_(chroma).add_(low).add_(0.5))
    return out


def normalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn frames into model input: (x - mean) / std, channels before time.

    x: uint8 RGB 0..255, (..., T, C, H, W). mean, std: per channel, on the 0..255 scale.
    Returns float32 (..., C, T, H, W).
    """
    _check_frames(x, channels=len(mean))
    constant = _per_channel.__wrapped__ if torch.compiler.is_compiling() else _per_channel
    mean_, std_ = (constant(tuple(v), x.device) for v in (mean, std))
    return ((x.float() - mean_) / std_).transpose(-4, -3)


@lru_cache(maxsize=32)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1). Kept, because to bring it to a GPU waits for all the work that was queued there before."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


@lru_cache(maxsize=32)
def _taps(size: int, target: int, *, edges_in_weights: bool) -> tuple[NDArray[np.integer], ...]:
    """For each of `target` positions: the two source indices it lies between, and their weights in units of 1/2048, (target, 1).

    OpenCV clamps a column that falls outside together with its weights, a row only by its index.
    """
    place = ((np.arange(target) + 0.5) * (size / target) - 0.5).astype(np.float32)
    before = np.floor(place)
    fraction = place - before
    first, second = (np.clip(i, 0, size - 1).astype(np.int64) for i in (before, before + 1))
    w0, w1 = (np.round(w * np.float32(_ONE)).astype(np.int32)[:, None] for w in (1 - fraction, fraction))
    if edges_in_weights:
        outside = (first == second)[:, None]
        w0, w1 = np.where(outside, np.int32(_ONE), w0), np.where(outside, np.int32(0), w1)
    return first, second, w0, w1


def _resize_by_torch(images: Tensor, across: tuple[Any, ...], down: tuple[Any, ...]) -> Tensor:
    """All images at once, on their device."""
    taps = [tuple(torch.from_numpy(v).to(images.device) for v in axis) for axis in (across, down)]
    return _resize(images.int(), *taps).to(torch.uint8).contiguous()


def _resize_by_numpy(images: Tensor, across: tuple[Any, ...], down: tuple[Any, ...]) -> Tensor:
    """Image by image, so that all fits into the cache. numpy keeps to its thread; torch's would be in the way of a decoder's."""
    result = np.empty((len(images), len(down[0]), len(across[0])), np.uint8)
    for image, out in zip(images.numpy(), result, strict=True):
        out[:] = _resize(image[None].astype(np.int32), across, down)[0]
    return torch.from_numpy(result)


def _resize(x: Any, across: tuple[Any, ...], down: tuple[Any, ...]) -> Any:
    """int32 (N, H, W) → (N, H', W'), of numpy or torch. What is taken lies in whole rows, which are copied fast."""
    left, right, w0, w1 = across
    height = x.shape[1]
    columns = rearrange(x, "n h w -> w (n h)")
    x, second = columns[left], columns[right]
    x *= w0
    second *= w1
    x += second
    x >>= 4
    rows = rearrange(x, "w (n h) -> h (n w)", h=height)
    top, bottom, w0, w1 = down
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
