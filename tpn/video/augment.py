"""Whole-clip transforms for training and evaluation loops, on torchvision's v2 operators."""

import operator
from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from tpn.video.transforms import adjust_hue


class TrainTransform(nn.Module):
    """Random crop, flip and color jitter with the published settings, one draw for all frames of a clip.

    Crop, aspect 3/4 to 4/3, resized to `crop_size` (bilinear, without antialiasing); horizontal flip; brightness, contrast and
    saturation by up to 0.5, hue by up to 0.1. `tpn.InputSpec.train_transform` makes one for a model.

    Args:
        crop_size: side of the result in pixels.
        crop_area: smallest and largest share of the frame that a crop shows.
        flip_prob: probability of a horizontal flip.
        flip_label_pairs: pairs of classes that a flip exchanges.
        color_jitter: jitter colors.
        normalize: applied last, such as `spec.normalize`; None returns uint8.

    Shape:
        uint8 (T, 3, H, W) → the result of `normalize`, or uint8 (T, 3, S, S).
    """

    def __init__(
        self,
        crop_size: int,
        *,
        crop_area: tuple[float, float] = (0.08, 1.0),
        flip_prob: float = 0.5,
        flip_label_pairs: Sequence[tuple[int, int]] = (),
        color_jitter: bool = True,
        normalize: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not 0 < crop_area[0] <= crop_area[1] <= 1:
            raise ValueError(f"crop_area must be two shares of the frame, 0 < smallest <= largest <= 1, got {crop_area}")
        if not 0 <= flip_prob <= 1:
            raise ValueError(f"flip_prob must be in [0, 1], got {flip_prob}")
        self.flip_prob, self.normalize = flip_prob, normalize
        crop = v2.RandomResizedCrop(crop_size, scale=crop_area, ratio=(3 / 4, 4 / 3), antialias=False)
        self.augment = v2.Compose([crop, ColorJitter()] if color_jitter else [crop])
        self.flipped_labels = {a: b for pair in flip_label_pairs for a, b in (pair, pair[::-1])}

    @overload
    def forward(self, clip: Tensor) -> Tensor: ...

    @overload
    def forward(self, clip: Tensor, label: int) -> tuple[Tensor, int]: ...

    def forward(self, clip: Tensor, label: int | None = None) -> Tensor | tuple[Tensor, int]:
        """Transform a clip, and its label if given; ValueError if a flip can change labels and none is given."""
        _check_clip(clip)
        label = None if label is None else operator.index(label)  # accepts a tensor
        if self.flipped_labels and self.flip_prob and label is None:
            raise ValueError(
                f"a flip exchanges the labels {sorted(self.flipped_labels)}: call transform(clip, label), "
                "or use train_transform(flip_prob=0)"
            )
        if torch.rand(()) < self.flip_prob:
            clip = clip.flip(-1)
            label = None if label is None else self.flipped_labels.get(label, label)
        clip = self.augment(clip)
        clip = clip if self.normalize is None else self.normalize(clip)
        return clip if label is None else (clip, label)


class ColorJitter(nn.Module):
    """Jitter brightness, contrast and saturation by up to 0.5, hue by up to 0.1, in random order: uint8 (T, 3, H, W) → the same.

    One draw for all frames. Frames are changed one after another: the intermediate results of a whole clip do not fit into a
    core's cache, which doubles the time.
    """

    def forward(self, clip: Tensor) -> Tensor:
        factors = torch.empty(3).uniform_(0.5, 1.5).tolist()
        turns = torch.empty(()).uniform_(-0.1, 0.1).item()
        operators = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, adjust_hue)
        changes = list(zip(operators, (*factors, turns), strict=True))
        changes = [changes[i] for i in torch.randperm(len(changes))]
        frames = list(clip)
        for i, frame in enumerate(frames):
            for change, amount in changes:
                frame = change(frame, amount)
            frames[i] = frame
        return torch.stack(frames)


class EvalTransform(nn.Module):
    """Resize the short side, then take one center crop, or three along the longer side.

    `tpn.InputSpec.eval_transform` makes one for a model.

    Args:
        crops: uint8 (T, 3, H, W) → uint8 (crops, T, 3, S, S), such as `spec.crops`.
        normalize: applied last, such as `spec.normalize`; None returns uint8.

    Shape:
        uint8 (T, 3, H, W) → float32 (3, T, S, S) for one crop, (crops, 3, T, S, S) for more; without `normalize` uint8
        (T, 3, S, S) or (crops, T, 3, S, S).
    """

    def __init__(self, crops: Callable[[Tensor], Tensor], *, normalize: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.crops, self.normalize = crops, normalize

    def forward(self, clip: Tensor) -> Tensor:
        _check_clip(clip)
        crops = self.crops(clip)
        crops = crops if self.normalize is None else self.normalize(crops)
        return crops if len(crops) > 1 else crops[0]


def _check_clip(clip: Tensor) -> None:
    if clip.ndim != 4 or clip.shape[1] != 3 or clip.dtype != torch.uint8:
        raise ValueError(f"expected a uint8 RGB clip (T, 3, H, W), got {clip.dtype} {tuple(clip.shape)}")
