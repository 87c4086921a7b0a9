"""A model cut off before it classifies."""

import torch
from torch import Tensor, nn

from tpn.models.classifier import TPNClassifier, unwrapped
from tpn.models.layers import evaluating


class FeatureModel(nn.Module):
    """A model that gives one of its maps, averaged over time and space; `VideoClassifier` takes it in the place of a classifier.

    Args:
        model: any TPNClassifier, which is used as it is, and stays as it is.
        name: of the map, as `forward_intermediates` calls it. Default: the one that the head reads, so that the result is that
            of a model with `num_classes=0`.

    Attributes:
        num_features: C. num_classes: 0. in_chans, labels, input_spec: as those of a `TPNClassifier`.

    Shape:
        (B, 3, T, H, W) float, normalised → (B, C)
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
                self.num_features = self(self._zeros()).shape[1]

    def forward(self, x: Tensor) -> Tensor:
        if self.name is None:
            return self.model.forward_head(self.model.forward_features(x), pre_logits=True)
        _, found = self.model.forward_intermediates(x, [self.name])
        return found[self.name].mean(dim=(2, 3, 4))

    def _zeros(self) -> Tensor:
        like, size = next(self.parameters()), self.input_spec.crop_size
        return torch.zeros(1, self.in_chans, self.input_spec.num_frames, size, size, dtype=like.dtype, device=like.device)
