"""Features of a model, in place of its logits."""

import torch
from torch import Tensor, nn

from tpn.models.classifier import ClipsOrMaps, TPNClassifier, unwrapped
from tpn.models.layers import evaluating


class FeatureModel(nn.Module):
    """Return one feature map of a model, averaged over time and space. `VideoClassifier` takes it like a classifier.

    Args:
        model: any `TPNClassifier`. It does not change.
        name: of a map in `forward_intermediates`. Default: the map that the head reads, as with `num_classes=0`.

    Attributes:
        num_features: C.
        num_classes: 0.
        in_chans: as in `TPNClassifier`.
        labels: None.
        input_spec: as in `TPNClassifier`.

    Shape:
        (B, 3, T, H, W) float, normalized, or `model.forward_frames` of these → (B, C)
    """

    def __init__(self, model: TPNClassifier, name: str | None = None) -> None:
        super().__init__()
        model = unwrapped(model)
        self.model, self.name = model, name
        self.num_classes = 0
        self.in_chans, self.labels, self.input_spec = model.in_chans, None, model.input_spec
        self.num_features = model.num_features
        if name is not None:
            with torch.no_grad(), evaluating(model):
                self.num_features = self(torch.zeros(1, *self.input_spec.clip_shape).to(next(self.parameters()))).shape[1]

    def forward(self, x: ClipsOrMaps) -> Tensor:
        if self.name is None:
            return self.model.forward_head(self.model.forward_features(x), pre_logits=True)
        _, found = self.model.forward_intermediates(x, [self.name])
        return found[self.name].mean(dim=(2, 3, 4))
