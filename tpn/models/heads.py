"""Classification heads: global mean, dropout, linear."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from tpn.models.layers import ConvBnAct, init_weights, kaiming_fan_out
from tpn.validation import check_int, check_temperature


def class_probs(logits: Tensor, *, multi_label: bool, temperature: float = 1.0) -> Tensor:
    """Return the probabilities of classes, (..., K), for the logits (..., K) of a view.

    They are the softmax of the logits, or for a multi-label model the sigmoid of each: independent of each other, with any sum.
    A temperature divides the logits (Guo et al., ICML 2017): above 1, the model is less confident.
    """
    logits = logits / temperature
    return logits.sigmoid() if multi_label else logits.softmax(dim=-1)


def to_logits(probs: Tensor, *, multi_label: bool) -> Tensor:
    """Return the logits (..., K) that have these probabilities (..., K)."""
    if not multi_label:
        return probs.log()
    return probs.log() - (1 - probs).clamp(min=torch.finfo(torch.float32).eps / 2).log()  # of 1, which may be rounded


def change_temperature(probs: Tensor, temperature: float, *, multi_label: bool) -> Tensor:
    """Return the probabilities (..., K) of a video at a temperature T, given those at 1, the mean over its views.

    Probabilities, or for a multi-label model odds, are raised to the power of 1 / T. Unlike the mean over views at another
    temperature, this keeps the order of the classes. With one view, both are the same.
    """
    if temperature == 1:
        return probs
    return class_probs(to_logits(probs, multi_label=multi_label), multi_label=multi_label, temperature=temperature)


class ClassificationHead(nn.Module):
    """Classify a map: mean over time and space, dropout, linear layer.

    Because the mean comes first, a clip of any size gives the scores that fully convolutional testing
    (classify every position, then average) would give.

    Args:
        in_channels: channels of the map.
        num_classes: K; 0 removes the linear layer.
        drop_rate: dropout before the linear layer.
        multi_label: a video may have several classes, or none; see `class_probs`.
        temperature: of the probabilities, see `class_probs`. Logits are never divided by it. A new classifier `fc` has a
            temperature of 1.

    Shape:
        (B, in_channels, T, H, W) → logits (B, K); with `pre_logits`, or K = 0, features (B, in_channels).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        drop_rate: float = 0.5,
        multi_label: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.multi_label = multi_label
        self.drop = nn.Dropout(drop_rate) if drop_rate else nn.Identity()
        self.reset(num_classes)
        self.temperature = temperature

    @property
    def num_classes(self) -> int:
        """K of the classifier `fc`, also of one that was assigned; 0 if there is none."""
        sizes: list[Any] = [layer.out_features for layer in self.fc.modules() if hasattr(layer, "out_features")]
        return int(sizes[-1]) if sizes else 0

    @property
    def temperature(self) -> float:
        return getattr(self.fc, "temperature", 1.0)

    @temperature.setter
    def temperature(self, value: float) -> None:
        check_temperature(value)
        cast("Any", self.fc).temperature = value

    def reset(self, num_classes: int) -> None:
        """Replace the classifier by a new, untrained one for `num_classes`."""
        check_int("num_classes", num_classes, minimum=0)
        self.fc: nn.Module = nn.Linear(self.in_channels, num_classes) if num_classes else nn.Identity()
        init_weights(self.fc, conv=kaiming_fan_out)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        features = x.mean(dim=(2, 3, 4))
        return features if pre_logits else self.fc(self.drop(features))


class AuxHead(ClassificationHead):
    """Classify c4 during training. The published recipes add its loss with weight 0.5.

    A (1, 3, 3) convolution of stride (1, 2, 2) to `mid_channels`, batch norm, ReLU, then a `ClassificationHead`.

    Shape:
        (B, in_channels, T, H, W) → aux_logits (B, K)
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        num_classes: int,
        drop_rate: float = 0.5,
        multi_label: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(mid_channels, num_classes, drop_rate, multi_label, temperature)
        self.conv = ConvBnAct(in_channels, mid_channels, (1, 3, 3), (1, 2, 2))
        init_weights(self.conv, conv=kaiming_fan_out)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward(self.conv(x), pre_logits)
