"""Deterministic pixels-to-tensor steps of the published test protocols, on uint8 frames (..., 3, H, W)."""

from collections.abc import Sequence

import torch
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
    top, bottom, y0, y1 = (v[:, None] for v in _taps(height, target[0], x.device))
    left, right, x0, x1 = _taps(width, target[1], x.device)
    # OpenCV clamps a column that falls outside together with its weights, but a row only by its index.
    outside = left == right
    x0, x1 = x0.masked_fill(outside, _ONE), x1.masked_fill(outside, 0)
    source = x.int()
    rows = (source[..., left] * x0 + source[..., right] * x1) >> 4
    blend = (rows[..., top[:, 0], :] * y0 >> 16) + (rows[..., bottom[:, 0], :] * y1 >> 16)
    return ((blend + 2) >> 2).clamp_(0, 255).to(torch.uint8)


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
    shape = (-1, 1, 1)
    mean_, std_ = (torch.tensor(v, dtype=torch.float32, device=x.device).view(shape) for v in (mean, std))
    return ((x.float() - mean_) / std_).transpose(-4, -3)


def _taps(size: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each of `target` positions: the two source indices it lies between, and their weights in units of 1/2048."""
    place = ((torch.arange(target, dtype=torch.float64) + 0.5) * (size / target) - 0.5).float()
    before = place.floor()
    fraction = place - before
    weights = ((w * _ONE).round().int() for w in (1 - fraction, fraction))
    indices = (i.long().clamp(0, size - 1) for i in (before, before + 1))
    first, second, w0, w1 = (v.to(device) for v in (*indices, *weights))
    return first, second, w0, w1


def _crop(x: Tensor, top: int, left: int, size: int) -> Tensor:
    return x[..., top : top + size, left : left + size]


def _check_frames(x: Tensor, channels: int = 3) -> None:
    if x.dtype != torch.uint8:
        raise TypeError(f"expected uint8 frames, 0..255, got {x.dtype}")
    if x.ndim < 3 or x.shape[-3] != channels:
        raise ValueError(f"expected frames (..., {channels}, H, W), got {tuple(x.shape)}")
