"""The whole network: backbone, neck, heads."""

import re
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from tpn.config import HeadConfig, InputSpec, ModelConfig, PartConfig
from tpn.models.feature_maps import FeatureList, feature_shapes, layer_names, spatial_scales
from tpn.models.heads import AuxHead, ClassificationHead
from tpn.models.layers import reference_tensor
from tpn.models.registry import BACKBONES, NECKS, attach_config, attached_config, part_of
from tpn.models.timm_cfg import timm_cfg
from tpn.validation import check_labels

ClipsOrMaps = Tensor | Sequence[Tensor]
"""Clips (B, C, T, H, W), or the result of `TPNClassifier.forward_frames` for them."""


def unwrapped(model: nn.Module, *, compiled: bool = False) -> Any:
    """Return the model inside DistributedDataParallel or DataParallel, with `compiled` also that inside torch.compile."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif compiled and hasattr(model, "_orig_mod"):
            model = cast("nn.Module", model._orig_mod)
        else:
            return model


def require_input_spec(model: Any) -> InputSpec:
    """Return the input spec of a model; ValueError without one, which only a model put together by hand can be."""
    if model.input_spec is None:
        raise ValueError("the model has no input_spec; set model.input_spec = tpn.InputSpec(num_frames=..., ...)")
    spec: InputSpec = model.input_spec
    return spec


class TPNClassifier(nn.Module):
    """A video classifier.

    `from_config` builds one that can be saved; the constructor takes modules that you built, for use in your own code.

    Args:
        backbone: maps a clip (B, C, T, H, W) to a sequence or dictionary of feature maps, finest level first.
        neck: fuses the maps into one, such as `TemporalPyramid`. None for the baseline, which classifies the last map.
        head: maps the fused map to logits.
        aux_head: maps the last feature map but one to auxiliary logits for training, or None.

    Attributes:
        config: the `ModelConfig` of the model, always up to date.
        num_classes: K, read from the classifier.
        num_features: channels that the head pools.
        multi_label: whether a video may have several classes. Probabilities are then sigmoids of the logits.
        temperature: T of the probabilities, 1 unless the model is calibrated. Logits are never divided by it. Like the labels, it
            belongs to the classifier `head.fc`. Set it to 1 before you train the classifier further.
        in_chans: input channels.
        labels: the K class names, None if unknown. Assign your own. A new classifier `head.fc` has no labels.
        input_spec: the `InputSpec` of its clips, None if unknown. Assign one to change sampling or sizes.
        architecture: the entry point that the model started from.

    Shape:
        x: (B, 3, T, H, W) float, RGB, normalized with the mean and standard deviation of the weights
            (`model.input_spec.normalize`) → logits (B, K)
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module | None,
        head: ClassificationHead,
        aux_head: AuxHead | None = None,
    ) -> None:
        super().__init__()
        if neck is None and aux_head is not None:
            raise ValueError("aux_head must be None for a model without neck (neck=None)")
        self.backbone = backbone
        self.feature_maps = FeatureList(last_only=neck is None)
        self.neck = neck
        self.head = head
        self.aux_head = aux_head
        self.architecture = "tpn"
        self.input_spec: Any = None  # an InputSpec; None only for models put together by hand
        # With the classifier that they describe, in a tuple, which does not make it a submodule.
        self._labels: tuple[tuple[str, ...] | None, nn.Module] = (None, head.fc)

    @classmethod
    def from_config(
        cls, config: ModelConfig, *, backbone: nn.Module | None = None, neck: nn.Module | None = None
    ) -> "TPNClassifier":
        """Build a model with random weights.

        Args:
            config: describes all parts.
            backbone: module in place of `config.backbone`. The neck and the heads move to its device and dtype.
            neck: module in place of `config.neck`.

        Raises:
            UnknownModelError: a part is not registered.
            TypeError, ValueError: arguments of a part, or parts that do not fit together.
        """
        spec = config.input_spec
        if neck is not None and config.neck is None:
            raise ValueError("neck is not valid here: the config says that the model has none (neck=None)")
        if backbone is None:
            backbone = build_backbone(config)
        else:
            _attach_own_config("backbone", backbone)
        shapes = feature_shapes(backbone, spec)
        out_channels = shapes[-1].channels
        if config.neck is not None:
            if neck is None:
                channels, frames, *_ = zip(*shapes, strict=True)
                scales = spatial_scales(shapes) if NECKS.takes(config.neck, "spatial_scales") else None
                neck = NECKS.build(config.neck, in_channels=channels, num_frames=frames, spatial_scales=scales)
            else:
                _attach_own_config("neck", neck)
            if not isinstance(getattr(neck, "out_channels", None), int):
                raise TypeError(f"a neck needs an attribute out_channels, the channels of its map; got a {type(neck).__name__}")
            out_channels = cast("Any", neck).out_channels
        head = ClassificationHead(out_channels, **vars(config.head))
        aux_head = None
        if config.aux_head is not None:
            if len(shapes) < 2:
                raise ValueError("aux_head needs two feature maps, the backbone returns one; pass aux_head=False")
            aux_head = AuxHead(shapes[-2].channels, out_channels, **vars(config.aux_head))
        model = cls(backbone, neck, head, aux_head)
        for part in filter(None, (neck, head, aux_head)):
            part.to(reference_tensor(backbone))
        model.input_spec, model.labels, model.architecture = spec, config.labels, config.architecture
        return model

    @property
    def config(self) -> ModelConfig:
        """The up-to-date description of the model: its parts, classes, labels, and input.

        Raises ValueError: a part was assigned after the model was built, and nothing says how to build it again.
        """
        return ModelConfig(
            head=_head_config("head", self.head),
            aux_head=None if self.aux_head is None else _head_config("aux_head", self.aux_head),
            backbone=_config_of("backbone", self.backbone),
            neck=None if self.neck is None else _config_of("neck", self.neck),
            input_spec=require_input_spec(self),
            labels=self.labels,
            architecture=self.architecture,
        )

    @property
    def num_classes(self) -> int:
        return self.head.num_classes

    @property
    def multi_label(self) -> bool:
        return self.head.multi_label

    @property
    def temperature(self) -> float:
        return self.head.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.head.temperature = value

    @property
    def num_features(self) -> int:
        return self.head.in_channels

    @property
    def in_chans(self) -> int:
        return int(getattr(self.backbone, "in_chans", 3) if self.input_spec is None else self.input_spec.in_chans)

    @property
    def labels(self) -> tuple[str, ...] | None:
        names, classifier = self._labels
        current = unwrapped(getattr(self.head, "fc", self.head), compiled=True)
        return names if current is unwrapped(classifier, compiled=True) else None

    @labels.setter
    def labels(self, names: Sequence[str] | None) -> None:
        if names is not None:
            check_labels(names, self.num_classes)
        self._labels = (None if names is None else tuple(names), self.head.fc)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The description in timm's terms, for `timm.data.resolve_model_data_config` and timm's tools."""
        first_conv = next(name for name, part in self.named_modules() if isinstance(part, nn.Conv2d | nn.Conv3d))
        cfg = timm_cfg(require_input_spec(self), self.num_classes, has_aux_head=self.aux_head is not None, first_conv=first_conv)
        return {"architecture": self.architecture, **cfg}

    default_cfg = pretrained_cfg

    def forward_frames(self, x: Tensor) -> Sequence[Tensor]:
        """Return the part of the backbone's result that depends on single frames, in evaluation mode.

        Use it for clips that share frames: combine the results of any frames to a clip, and pass it to `forward_features` or
        `forward_intermediates` in place of clips. A backbone without `forward_frames` and `forward_clips` returns `(x,)`.

        Shape: (B, 3, T, H, W) → one or more tensors (B, C_i, T, H_i, W_i), any T
        """
        self._check_clips(x)
        return cast("Any", self.backbone).forward_frames(x) if hasattr(self.backbone, "forward_clips") else (x,)

    def forward_features(self, x: ClipsOrMaps) -> Tensor:
        """Return the map that the head reads: (B, 3, T, H, W) → the neck's (B, C, T', H/32, W/32), or the backbone's last."""
        return self._fuse(self._backbone_maps(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, K) for the result of `forward_features`; with `pre_logits`, pooled features (B, num_features)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_with_aux(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (logits, aux_logits), both (B, K), for the training loss CE(logits) + 0.5 CE(aux_logits).

        aux_logits is None for a model without auxiliary head.
        """
        maps = self._backbone_maps(x)
        logits = self.forward_head(self._fuse(maps))
        return logits, None if self.aux_head is None else self.aux_head(maps[-2])

    def forward_intermediates(self, x: ClipsOrMaps, names: Sequence[str] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the result of `forward_features`, and the intermediate maps by name.

        Args:
            names: the maps to return; all by default. The backbone's maps are "c4" and "c5", for three levels "c3" to "c5", and
                so on; the pyramid's are those of `TemporalPyramid.forward_intermediates`.

        Shapes for TPN-SlowOnly R50, clips (B, 3, 8, 224, 224):

        - "c4": (B, 1024, 8, 14, 14), "c5": (B, 2048, 8, 7, 7)
        - "spatial_modulation.0", ".1": (B, 2048, 8, 7, 7)
        - "temporal_modulation.0", ".1", "top_down.0", ".1", "bottom_up.0", ".1": (B, 1024, 1, 7, 7)
        - "top_down_fusion", "bottom_up_fusion", "pyramid_fusion": (B, 2048, 1, 7, 7); the last is the first result
        """
        maps = self._backbone_maps(x)
        found = {f"c{max(6 - len(maps), 1) + i}": each for i, each in enumerate(maps)}
        if hasattr(self.neck, "forward_intermediates"):
            found |= cast("Any", self.neck).forward_intermediates(maps)
            features = list(found.values())[-1]
        else:
            features = self._fuse(maps)
        unknown = [name for name in names or () if name not in found]
        if unknown:
            raise ValueError(f"no intermediate map {', '.join(map(repr, unknown))}; there are {', '.join(found)}")
        return features, found if names is None else {name: found[name] for name in names}

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, *, multi_label: bool | None = None) -> None:
        """Give head and auxiliary head new, untrained classifiers for `num_classes`; labels and temperature are dropped.

        With num_classes = 0, the model returns features. `global_pool` is timm's argument and must be "avg". `multi_label` allows
        several classes per video; None keeps the present setting.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be 'avg', got {global_pool!r}")
        for head in filter(None, (self.head, self.aux_head)):
            head.reset(num_classes)
            head.multi_label = head.multi_label if multi_label is None else multi_label
            head.to(reference_tensor(self.backbone))
        self.labels = None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in training: recompute the backbone's activations in the backward pass."""
        if not hasattr(self.backbone, "set_grad_checkpointing"):
            raise ValueError(f"{type(self.backbone).__name__} has no set_grad_checkpointing")
        cast("Any", self.backbone).set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return parameter groups from input to output, for timm's layer-wise learning rates.

        The backbone's groups come first: those of its `group_matcher`, or otherwise its modules. The other parts follow.
        """
        if hasattr(self.backbone, "group_matcher"):
            groups = cast("Any", self.backbone).group_matcher(coarse)
            return {name: _below_backbone(pattern) for name, pattern in groups.items()}
        layers = [re.escape(f"backbone.{name}.") for name in layer_names(self.backbone, coarse=coarse)]
        return {"stem": rf"^(?!{'|'.join(layers)})backbone\.", **{f"block{i}": f"^{layer}" for i, layer in enumerate(layers)}}

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay that the parts name, besides biases and norms."""
        parts = [(prefix, part) for prefix, part in self.named_modules() if prefix and hasattr(part, "no_weight_decay")]
        return {f"{prefix}.{name}" for prefix, part in parts for name in cast("Any", part).no_weight_decay()}

    def _backbone_maps(self, x: ClipsOrMaps) -> Sequence[Tensor]:
        if not isinstance(x, Tensor):
            return self.feature_maps(getattr(self.backbone, "forward_clips", self.backbone)(*x))
        self._check_clips(x)
        return self.feature_maps(self.backbone(x))

    def _check_clips(self, x: Tensor) -> None:
        if x.ndim != 5 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected clips (B, {self.in_chans}, T, H, W), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(
                f"expected float clips, normalized with the weights' mean and std, got {x.dtype}; "
                "tpn.input_spec(model).normalize takes uint8 frames"
            )

    def _fuse(self, maps: Sequence[Tensor]) -> Tensor:
        return maps[-1] if self.neck is None else self.neck(maps)


def build_backbone(config: ModelConfig, *, pretrained: bool = False, cache_dir: Any = None) -> nn.Module:
    """Build the backbone of a config; with `pretrained`, from weights that its builder loads."""
    spec = config.input_spec
    context = {"in_chans": spec.in_chans, "num_frames": spec.num_frames, "crop_size": spec.crop_size}
    return BACKBONES.build(config.backbone, **context, pretrained=pretrained, cache_dir=cache_dir)


def _below_backbone(pattern: Any) -> Any:
    """Return a pattern of a backbone's `group_matcher`, or a list of tuples that begin with one, for the whole model."""
    if isinstance(pattern, str):
        anchored = re.sub(r"(^|[|])\^", r"\1", pattern)
        return rf"^backbone\.(?:{anchored})"
    return [(_below_backbone(each), *rest) for each, *rest in pattern]


def _attach_own_config(kind: str, module: nn.Module) -> None:
    """Attach a config to a module of the caller, unless it has one."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{kind} must be a module, got {module!r}; the config takes names")
    attach_config(module, part_of(module))


def _config_of(kind: str, module: nn.Module) -> PartConfig:
    module = unwrapped(module, compiled=True)
    part = attached_config(module)
    if part is None:
        raise ValueError(
            f"model.{kind} is a {type(module).__name__} that was assigned after the model was built, and cannot be built again. "
            f"Build the model with it, create_model(..., {kind}=MODULE), or register its class with tpn.register_{kind} and "
            f"build the {kind} by name"
        )
    return part


def _head_config(name: str, head: nn.Module) -> HeadConfig:
    head = unwrapped(head, compiled=True)
    if not isinstance(head, ClassificationHead):
        raise ValueError(
            f"model.{name} is a {type(head).__name__} that was assigned after the model was built; assign a classifier to "
            f"model.{name}.fc instead, or put the module into a neck"
        )
    return HeadConfig(head.num_classes, float(getattr(head.drop, "p", 0.0)), head.multi_label, head.temperature)
