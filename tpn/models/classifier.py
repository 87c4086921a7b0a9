"""The whole network: backbone, pyramid, heads."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tpn.models.backbones import AsMaps, layer_names
from tpn.models.heads import AuxHead, ClassificationHead
from tpn.models.neck import TemporalPyramid
from tpn.models.resnet import ResNet


def unwrapped(model: nn.Module, *, compiled: bool = False) -> Any:
    """Return the model inside DistributedDataParallel or DataParallel, with `compiled` also that inside torch.compile."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif compiled and hasattr(model, "_orig_mod"):
            model = cast("nn.Module", model._orig_mod)
        else:
            return model


class TPNClassifier(nn.Module):
    """A video classifier made of built modules.

    Args:
        backbone: maps a clip (B, C, T, H, W) to a sequence of feature maps, finest level first.
        neck: maps those to one map (`TemporalPyramid`), or None to classify the last one: the baseline.
        head: maps that map to logits.
        aux_head: maps the last feature map but one to auxiliary logits for training, or None.

    Attributes:
        num_classes, num_features: K, and the channels that the head pools.
        in_chans: input channels.
        labels: the K class names, where known.
        input_spec, model_args: what its clips must look like, and the arguments it was built with; set by the
            factories, read by `tpn.input_spec` and `tpn.save_pretrained`.

    Shape:
        x: (B, 3, T, H, W) float, RGB, normalised with the mean and standard deviation of the weights
            (`tpn.input_spec(model)`) → logits (B, K)
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module | None,
        head: ClassificationHead,
        aux_head: AuxHead | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.maps = AsMaps()
        self.neck = neck
        self.head = head
        self.aux_head = aux_head
        self.in_chans: int = getattr(backbone, "in_chans", 3)
        self.labels: tuple[str, ...] | None = None
        self.input_spec: Any = None
        self.model_args: dict[str, Any] | None = None

    @property
    def num_classes(self) -> int:
        return self.head.num_classes

    @property
    def num_features(self) -> int:
        return self.head.in_channels

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) → the map that the head reads: the pyramid's (B, C, T', H/32, W/32), or the backbone's last."""
        return self._fuse(self._feature_maps(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """That map → logits (B, K), or with `pre_logits` the pooled features (B, num_features)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_with_aux(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (logits, aux_logits), both (B, K), for the training loss CE(logits) + 0.5 CE(aux_logits).

        aux_logits is None for a model without auxiliary head.
        """
        maps = self._feature_maps(x)
        logits = self.forward_head(self._fuse(maps))
        return logits, None if self.aux_head is None else self.aux_head(maps[-2])

    def forward_intermediates(self, x: Tensor, names: Sequence[str] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what `forward_features` returns, and the maps on the way there by name.

        names: those wanted; all by default. The backbone's maps are "c4" and "c5" (three levels: "c3" to "c5", and so on, of
            whichever stages; without pyramid only "c5"), the pyramid's are those of `TemporalPyramid.forward_intermediates`.

        Shapes for TPN-SlowOnly R50, clips (B, 3, 8, 224, 224):

        - "c4": (B, 1024, 8, 14, 14), "c5": (B, 2048, 8, 7, 7)
        - "spatial_modulation.0", ".1": (B, 2048, 8, 7, 7)
        - "temporal_modulation.0", ".1", "top_down.0", ".1", "bottom_up.0", ".1": (B, 1024, 1, 7, 7)
        - "top_down_fusion", "bottom_up_fusion", "pyramid_fusion": (B, 2048, 1, 7, 7); the last is the first result
        """
        maps = self._feature_maps(x)
        found = {f"c{max(6 - len(maps), 1) + i}": each for i, each in enumerate(maps)}
        if isinstance(self.neck, TemporalPyramid):
            found |= self.neck.forward_intermediates(maps)
            features = found["pyramid_fusion"]
        else:
            features = self._fuse(maps)
        unknown = [name for name in names or () if name not in found]
        if unknown:
            raise ValueError(f"no intermediate is called {', '.join(map(repr, unknown))}; there are {', '.join(found)}")
        return features, found if names is None else {name: found[name] for name in names}

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give head and auxiliary head new, untrained classifiers for `num_classes`; forget what is known of the classes.

        num_classes = 0 removes them: the model then returns features. `global_pool` is timm's argument; only "avg"
        exists here.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be 'avg', got {global_pool!r}")
        like = next(self.backbone.parameters(), next(self.parameters(), torch.empty(0)))
        for head in filter(None, (self.head, self.aux_head)):
            head.reset(num_classes)
            head.to(device=like.device, dtype=like.dtype)
        self.labels = None
        if self.input_spec is not None:
            self.input_spec = replace(self.input_spec, mirrored=())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in training: recompute the backbone's activations in the backward pass."""
        if not hasattr(self.backbone, "set_grad_checkpointing"):
            raise ValueError(f"{type(self.backbone).__name__} has no set_grad_checkpointing")
        cast("Any", self.backbone).set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from input to output, for timm's layer-wise learning rates.

        They are the backbone's stem and blocks (`coarse`: stages), then all that follows. Of a backbone that is not one of tpn's
        residual networks, they are the modules that it is made of, in their order.
        """
        if isinstance(self.backbone, ResNet):
            stage = r"^backbone\.layer(\d+)" if coarse else r"^backbone\.layer(\d+)\.(\d+)"
            return {"stem": r"^backbone\.(?:conv1|bn1)", "blocks": stage}
        layers = [re.escape(f"backbone.{name}.") for name in layer_names(self.backbone, coarse=coarse)]
        return {"stem": rf"^(?!{'|'.join(layers)})backbone\.", **{f"block{i}": f"^{layer}" for i, layer in enumerate(layers)}}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay, beyond biases and norms: those that a part names, such as a transformer's."""
        parts = [(prefix, part) for prefix, part in self.named_modules() if prefix and hasattr(part, "no_weight_decay")]
        return {f"{prefix}.{name}" for prefix, part in parts for name in cast("Any", part).no_weight_decay()}

    def _feature_maps(self, x: Tensor) -> Sequence[Tensor]:
        if x.ndim != 5 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected clips (B, {self.in_chans}, T, H, W), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(
                f"expected float clips, normalised with the weights' mean and std, got {x.dtype}; "
                "tpn.input_spec(model).normalize takes uint8 frames"
            )
        return self.maps(self.backbone(x))

    def _fuse(self, maps: Sequence[Tensor]) -> Tensor:
        return maps[-1] if self.neck is None else self.neck(maps)
