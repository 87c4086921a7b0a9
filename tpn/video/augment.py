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

    Horizontal flip; crop, aspect 3/4 to 4/3, resized to `crop_size` (bilinear, without antialiasing); brightness, contrast and
    saturation by up to 0.5, hue by up to 0.1. Then RandAugment and random erasing, which the published recipes do not have.
    `tpn.InputSpec.train_transform` makes one for a model.

    Args:
        crop_size: side of the result in pixels.
        crop_area: smallest and largest share of the frame that a crop shows.
        flip_prob: probability of a horizontal flip.
        flip_label_pairs: pairs of labels that a flip exchanges. None stands for a class that the data does not have: clips of
            the other class of the pair are not flipped.
        color_jitter: jitter colors.
        rand_augment: magnitude of RandAugment's two operations, 1 to 30; 0 for none.
        random_erasing: probability of erasing a rectangle, 2% to 33% of the frame.
        fill: color of erased pixels, and of those that RandAugment moves into the picture; per channel, 0..255.
        normalize: applied last, such as `spec.normalize`; None returns uint8.

    Shape:
        uint8 (T, 3, H, W) → the result of `normalize`, or uint8 (T, 3, S, S). A label is an index, or for several classes float
        (K,) with 1 for each.
    """

    def __init__(
        self,
        crop_size: int,
        *,
        crop_area: tuple[float, float] = (0.08, 1.0),
        flip_prob: float = 0.5,
        flip_label_pairs: Sequence[tuple[int | None, int | None]] = (),
        color_jitter: bool = True,
        rand_augment: int = 0,
        random_erasing: float = 0.0,
        fill: Sequence[float] = (0, 0, 0),
        normalize: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not 0 < crop_area[0] <= crop_area[1] <= 1:
            raise ValueError(f"crop_area must be two shares of the frame, 0 < smallest <= largest <= 1, got {crop_area}")
        if not 0 <= flip_prob <= 1:
            raise ValueError(f"flip_prob must be in [0, 1], got {flip_prob}")
        if rand_augment not in range(31):
            raise ValueError(f"rand_augment must be 0 for none, or a magnitude from 1 to 30, got {rand_augment}")
        if not 0 <= random_erasing <= 1:
            raise ValueError(f"random_erasing must be in [0, 1], got {random_erasing}")
        self.flip_prob, self.normalize = flip_prob, normalize
        steps: list[nn.Module] = [v2.RandomResizedCrop(crop_size, scale=crop_area, ratio=(3 / 4, 4 / 3), antialias=False)]
        if color_jitter:
            steps.append(ColorJitter())
        if rand_augment:
            steps.append(v2.RandAugment(magnitude=rand_augment, interpolation=v2.InterpolationMode.BILINEAR, fill=[*fill]))
        if random_erasing:
            steps.append(v2.RandomErasing(random_erasing, value=[round(value) for value in fill]))
        self.augment = v2.Compose(steps)
        self.flipped_labels = {a: b for pair in flip_label_pairs for a, b in (pair, pair[::-1]) if a is not None}

    @overload
    def forward(self, clip: Tensor) -> Tensor: ...

    @overload
    def forward(self, clip: Tensor, label: int | Tensor) -> tuple[Tensor, int | Tensor]: ...

    def forward(self, clip: Tensor, label: int | Tensor | None = None) -> Tensor | tuple[Tensor, int | Tensor]:
        """Transform a clip, and its label if given; ValueError if a flip can change labels and none is given."""
        _check_clip(clip)
        if label is not None and not (isinstance(label, Tensor) and label.is_floating_point()):
            label = operator.index(label)  # accepts a tensor
        if self.flipped_labels and self.flip_prob and label is None:
            raise ValueError(
                f"a flip exchanges the labels {sorted(self.flipped_labels)}: call transform(clip, label), "
                "or use train_transform(flip_prob=0)"
            )
        if torch.rand(()) < self.flip_prob and self._can_flip(label):
            clip, label = clip.flip(-1), self._flip_label(label)
        clip = self.augment(clip)
        clip = clip if self.normalize is None else self.normalize(clip)
        return clip if label is None else (clip, label)

    def _can_flip(self, label: int | Tensor | None) -> bool:
        """Return whether the flipped clip has a class."""
        alone = [label for label, flipped in self.flipped_labels.items() if flipped is None]
        return not (label[alone].any() if isinstance(label, Tensor) else label in alone)

    def _flip_label(self, label: int | Tensor | None) -> int | Tensor | None:
        """Return the label of the flipped clip."""
        if not isinstance(label, Tensor):
            return label if label is None else self.flipped_labels.get(label, label)
        label = label.clone()
        pairs = {a: b for a, b in self.flipped_labels.items() if b is not None}
        label[[*pairs]] = label[[*pairs.values()]]
        return label


def index_pairs(pairs: Sequence[tuple[str, str]], classes: Sequence[str] | None) -> list[tuple[int | None, int | None]]:
    """Convert pairs of class names to pairs of indices in `classes`, with None for a name that is not in `classes`.

    Raises ValueError: there are pairs, but `classes` is None.
    """
    if pairs and classes is None:
        raise ValueError(
            f"classes is needed, because a flip exchanges {' and '.join(map(repr, pairs[0]))}: pass the class names of the data, "
            "such as classes=model.labels, or flip_prob=0"
        )
    indices = {name: index for index, name in enumerate(classes or ())}
    return [(indices.get(a), indices.get(b)) for a, b in pairs]


class ColorJitter(nn.Module):
    """Jitter brightness, contrast and saturation by up to 0.5, hue by up to 0.1, in random order: uint8 (T, 3, H, W) → the same.

    One draw for all frames. A few frames are changed at a time: the intermediate results of a whole clip do not fit into a
    core's cache, which can double the time.
    """

    PIXELS = 40_000

    def forward(self, clip: Tensor) -> Tensor:
        factors = torch.empty(3).uniform_(0.5, 1.5).tolist()
        turns = torch.empty(()).uniform_(-0.1, 0.1).item()
        operators = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, adjust_hue)
        changes = list(zip(operators, (*factors, turns), strict=True))
        changes = [changes[i] for i in torch.randperm(len(changes))]
        parts = list(clip.split(max(self.PIXELS // (clip.shape[-2] * clip.shape[-1]), 1)))
        for i, part in enumerate(parts):
            for change, amount in changes:
                part = change(part, amount)
            parts[i] = part
        return torch.cat(parts)


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
