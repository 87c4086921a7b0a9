"""Whole-clip transforms for training and evaluation loops, on torchvision's v2 operators."""

import operator
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from tpn.video.transforms import adjust_hue

if TYPE_CHECKING:
    from tpn.video.spec import InputSpec


class TrainTransform(nn.Module):
    """Random crop, flip and colour jitter with the published settings, one draw for all frames of a clip.

    Crop, aspect 3/4 to 4/3, resized to `spec.crop_size` (bilinear, not antialiased); flip; brightness, contrast and
    saturation by up to 0.5, hue by up to 0.1.

    Args:
        spec: what the model expects, from `tpn.input_spec(model)`.
        crop_area: smallest and largest share of the picture that a crop shows.
        flip_prob: probability of a horizontal flip. `spec.mirrored` classes change places with it.
        color_jitter: whether to jitter colours.
        normalize: return the model's input; otherwise uint8, for `spec.normalize` on the device.

    Shape:
        uint8 (T, 3, H, W) → float32 (3, T, S, S), or uint8 (T, 3, S, S) without `normalize`.
    """

    def __init__(
        self,
        spec: "InputSpec",
        *,
        crop_area: tuple[float, float] = (0.08, 1.0),
        flip_prob: float = 0.5,
        color_jitter: bool = True,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        _check_rgb(spec)
        if not 0 < crop_area[0] <= crop_area[1] <= 1:
            raise ValueError(f"crop_area must be two shares of the picture, 0 < smallest <= largest <= 1, got {crop_area}")
        if not 0 <= flip_prob <= 1:
            raise ValueError(f"flip_prob must be within 0..1, got {flip_prob}")
        self.spec, self.flip_prob, self.normalize = spec, flip_prob, normalize
        crop = v2.RandomResizedCrop(spec.crop_size, scale=crop_area, ratio=(3 / 4, 4 / 3), antialias=False)
        self.augment = v2.Compose([crop, ColorJitter()] if color_jitter else [crop])
        self.swaps = {a: b for pair in spec.mirrored for a, b in (pair, pair[::-1])}

    @overload
    def forward(self, clip: Tensor) -> Tensor: ...

    @overload
    def forward(self, clip: Tensor, label: int) -> tuple[Tensor, int]: ...

    def forward(self, clip: Tensor, label: int | None = None) -> Tensor | tuple[Tensor, int]:
        """Transform a clip, and its label if given; ValueError if flips can change labels and none is given."""
        _check(clip)
        label = None if label is None else operator.index(label)  # a tensor, too
        if self.swaps and self.flip_prob and label is None:
            raise ValueError(
                f"a flip swaps labels {self.spec.mirrored} of this data set: call transform(clip, label), "
                "or take train_transform(flip_prob=0)"
            )
        if torch.rand(()) < self.flip_prob:
            clip = clip.flip(-1)
            label = None if label is None else self.swaps.get(label, label)
        clip = self.augment(clip)
        clip = self.spec.normalize(clip) if self.normalize else clip
        return clip if label is None else (clip, label)


class ColorJitter(nn.Module):
    """Brightness, contrast and saturation by up to 0.5, hue by up to 0.1, in random order: uint8 (T, 3, H, W) → the same.

    One draw for all frames. They are changed one after another: what a whole clip needs in between does not fit in a core's
    cache, and takes twice the time.
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
    """Resize the short side, then one centre crop, or three along the longer side.

    Shape:
        uint8 (T, 3, H, W) → float32 (3, T, S, S) for one crop, (3 crops, 3, T, S, S) for three; without
        `normalize` uint8 (T, 3, S, S) or (3, T, 3, S, S).
    """

    def __init__(self, spec: "InputSpec", *, normalize: bool = True) -> None:
        super().__init__()
        _check_rgb(spec)
        self.spec, self.normalize = spec, normalize

    def forward(self, clip: Tensor) -> Tensor:
        _check(clip)
        crops = self.spec.crops(clip)
        crops = self.spec.normalize(crops) if self.normalize else crops
        return crops if len(crops) > 1 else crops[0]


def _check_rgb(spec: "InputSpec") -> None:
    if len(spec.mean) != 3:
        raise ValueError(f"the transforms are for RGB clips, this spec is for {len(spec.mean)} channels")


def _check(clip: Tensor) -> None:
    if clip.ndim != 4 or clip.shape[1] != 3 or clip.dtype != torch.uint8:
        raise ValueError(f"expected a uint8 RGB clip (T, 3, H, W), got {clip.dtype} {tuple(clip.shape)}")
