"""The settings of a training run: one typed class for the command line, for `tpn.train`, and for what a run records."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tpn.config import parse_views
from tpn.errors import nearest


def _option(default: Any, help: str, group: str, **metadata: Any) -> Any:
    metadata = {"help": help, "group": group, **metadata}
    return field(default_factory=dict, metadata=metadata) if default == {} else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a training run. With None, the plan chooses from the data and the model; see `tpn.training.plan`.

    Raises ValueError if a value is out of range.
    """

    recipe: Literal["k400-scratch", "k400-in1k", "sthv1-tsm", "motion"] | None = _option(
        None, "Complete published settings, in place of the plan.", "Model"
    )
    model: str = _option("tpn_slowonly_r50_k400", "Name (see tpn list), folder of a saved model, or hf-hub:OWNER/NAME.", "Model")
    model_args: Mapping[str, Any] = _option(
        {}, "Arguments of create_model as JSON, such as '{\"num_frames\": 16}'.", "Model", metavar="JSON"
    )
    weights: str | None = _option(
        None, "Weights to start from: pretrained, backbone (its ImageNet weights), random, or a file.", "Model"
    )
    freeze: Literal["none", "bn", "backbone"] | None = _option(
        None, "Freeze batch norm statistics (bn), or the whole backbone.", "Model"
    )
    keep_classes: bool = _option(False, "Read numbers in a list as the model's classes, and keep its classifier.", "Model")

    val: str | None = _option(None, "Data for validation. Default: a split of the data.", "Data")
    val_fraction: float = _option(0.2, "Share of each class for validation, if the data has no split.", "Data")
    group: str | None = _option(
        None, "Regular expression for the part of a path that names its source; videos of one source stay in one split.", "Data"
    )
    root: str | None = _option(None, "Folder of relative paths in a list. Default: the folder of the list.", "Data")
    frames: str | None = _option(None, "File names of extracted frames, such as img_{:05d}.jpg.", "Data", metavar="TEMPLATE")
    first_frame: int = _option(1, "Number of the first extracted frame.", "Data")
    target_fps: float | None = _option(None, "Sample as if every video had this frame rate.", "Clips")
    max_bad: float = _option(0.05, "Stop if a larger share of videos is unreadable.", "Data")
    workers: int | None = _option(None, "Loader processes per device.", "Data")

    frame_interval: int | None = _option(None, "Use every n-th frame.", "Clips")
    short_side: int | None = _option(None, "Short side of frames in validation, in pixels. Default: the model's.", "Clips")
    crop_size: int | None = _option(None, "Side of crops in pixels. Default: the model's.", "Clips")
    views: str | None = _option(None, "Views of a video in validation and later use, CLIPSxCROPS.", "Clips")
    val_views: str | None = _option(None, "Views in validation. Default: --views.", "Clips")

    crop_area: tuple[float, float] | None = _option(
        None, "Smallest and largest area of training crops, as shares.", "Augmentation", metavar="MIN MAX"
    )
    flip_prob: float | None = _option(None, "Probability of a horizontal flip; 0 if left and right matter.", "Augmentation")
    color_jitter: bool | None = _option(None, "Change brightness, contrast, saturation, and hue.", "Augmentation")
    rand_augment: int | None = _option(None, "Magnitude of RandAugment, 1 to 30; 0: none.", "Augmentation")
    random_erasing: float | None = _option(None, "Probability that a rectangle is erased.", "Augmentation")
    mixup: float | None = _option(None, "Alpha of MixUp; 0: none.", "Augmentation")
    cutmix: float | None = _option(None, "Alpha of CutMix; 0: none.", "Augmentation")

    steps: int | None = _option(None, "Length of the training in steps.", "Optimization")
    epochs: int | None = _option(None, "Length of the training in epochs.", "Optimization")
    batch_size: int | None = _option(None, "Clips per device and forward pass.", "Optimization")
    accumulate: int = _option(1, "Forward passes per step.", "Optimization")
    optimizer: str | None = _option(None, "Name of a timm optimizer; sgd has Nesterov momentum.", "Optimization")
    lr: float | None = _option(None, "Learning rate for steps of --lr-batch clips; scaled linearly.", "Optimization")
    lr_batch: int | None = _option(None, "Clips per step for which --lr is given.", "Optimization")
    backbone_lr: float | None = _option(None, "Factor of the backbone's learning rate.", "Optimization")
    layer_decay: float | None = _option(None, "Factor of the learning rate from each layer to the one before it.", "Optimization")
    momentum: float = _option(0.9, "Momentum of sgd.", "Optimization")
    weight_decay: float | None = _option(None, "Weight decay.", "Optimization")
    schedule: Literal["cosine", "multistep"] = _option("cosine", "Learning rate schedule.", "Optimization")
    milestones: tuple[int, ...] = _option((75, 125), "Epochs after which multistep divides the rate by 10.", "Optimization")
    warmup: float | None = _option(None, "Share of the training in which the learning rate rises.", "Optimization")
    clip_grad: float = _option(40.0, "Largest gradient norm; 0: no limit.", "Optimization")
    aux_weight: float = _option(0.5, "Weight of the auxiliary loss; 0: no auxiliary loss.", "Optimization")
    label_smoothing: float | None = _option(None, "Label smoothing.", "Optimization")
    class_weights: bool = _option(False, "Weight the loss inversely to the size of the class.", "Optimization")
    balanced: bool = _option(False, "Draw all classes equally often, with replacement.", "Optimization")
    ema: float | None = _option(None, "Validate and save an average of the weights, such as 0.999; 0: none.", "Optimization")
    patience: int | None = _option(None, "Stop after this many validations without a better one.", "Optimization")

    device: str | None = _option(None, "cpu, cuda, cuda:1, ... Default: cuda if available, otherwise cpu.", "Run")
    threads: int | None = _option(None, "Threads of PyTorch on a CPU.", "Run")
    amp: Literal["float32", "bfloat16", "float16"] | None = _option(None, "Precision of the forward and backward pass.", "Run")
    channels_last: bool = _option(True, "Store weights and activations channels-last.", "Run")
    checkpointing: bool = _option(False, "Recompute activations to save memory.", "Run")
    compile: bool = _option(False, "Compile the model and the loss.", "Run")
    sync_bn: bool = _option(False, "Share batch norm's statistics among GPUs.", "Run")
    seed: int = _option(0, "Seed of all random choices.", "Run")
    deterministic: bool = _option(False, "Same results in every run; PyTorch warns where that is impossible.", "Run")
    val_interval: int | None = _option(None, "Validate after every n-th epoch.", "Run", metavar="EPOCHS")
    log_interval: int = _option(20, "Log after every n-th step, and after each epoch.", "Run", metavar="STEPS")
    checkpoint_interval: int | None = _option(None, "Save a checkpoint also after every n-th step.", "Run", metavar="STEPS")

    def __post_init__(self) -> None:
        ranges = {
            **dict.fromkeys(
                ("steps", "epochs", "batch_size", "accumulate", "lr_batch", "frame_interval", "short_side"), (1, None)
            ),
            **dict.fromkeys(
                ("crop_size", "patience", "val_interval", "log_interval", "checkpoint_interval", "threads"), (1, None)
            ),
            **dict.fromkeys(("workers", "first_frame", "momentum", "weight_decay", "clip_grad", "aux_weight", "lr"), (0, None)),
            **dict.fromkeys(("mixup", "cutmix", "backbone_lr", "seed"), (0, None)),
            **dict.fromkeys(
                ("flip_prob", "random_erasing", "label_smoothing", "layer_decay", "max_bad", "warmup", "ema"), (0, 1)
            ),
            "val_fraction": (0, 0.9),
            "rand_augment": (0, 30),
            "target_fps": (0.01, 1000),
        }
        for name, (smallest, largest) in ranges.items():
            value = getattr(self, name)
            if value is not None and not (value >= smallest and (largest is None or value <= largest)):
                allowed = f"at least {smallest}" if largest is None else f"between {smallest} and {largest}"
                raise ValueError(f"{name} must be {allowed}, got {value}")
        for name, kind in get_type_hints(TrainConfig).items():
            choices = [choice for part in (kind, *get_args(kind)) if get_origin(part) is Literal for choice in get_args(part)]
            if choices and getattr(self, name) not in (None, *choices):
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for views in (self.views, self.val_views):
            if views is not None:
                parse_views(views)
        if self.crop_area is not None and not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(f"crop_area must be two shares of the frame, 0 < smallest <= largest <= 1, got {self.crop_area}")
        if self.group is not None:
            try:
                re.compile(self.group)
            except re.error as error:
                raise ValueError(f"group must be a regular expression, got {self.group!r}: {error}") from error
        if self.frames is not None and self.target_fps is not None:
            raise ValueError(f"target_fps is not valid for extracted frames, which have no frame rate, got {self.target_fps}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"pass one of steps and epochs, got steps={self.steps} and epochs={self.epochs}")

    @classmethod
    def of(cls, recipe: str | None = None, *, recorded: Mapping[str, Any] | None = None, **options: Any) -> "TrainConfig":
        """Return the settings of a recipe, or those that an earlier run recorded, with options in place of some of them.

        Raises TypeError: no such option. ValueError: no such recipe, or an option is out of range.
        """
        base = {**RECIPES.get(recipe or "", {}), **(recorded or {})}
        if recipe is not None:
            options["recipe"] = recipe
        names = [each.name for each in fields(cls)]
        for name in options.keys() - set(names):
            raise TypeError(f"no option {name!r}; the nearest are {nearest(name, names)}")
        for name, other in (("steps", "epochs"), ("epochs", "steps")):
            if options.get(name) is not None:
                base.pop(other, None)
        return cls(**{**base, **options})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in types that JSON has."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


_PUBLISHED = {
    "freeze": "none",
    "crop_area": (0.08, 1.0),
    "flip_prob": 0.5,
    "color_jitter": True,
    "rand_augment": 0,
    "random_erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "backbone_lr": 1.0,
    "label_smoothing": 0.0,
    "ema": 0.0,
    "warmup": 0.0,
    "val_interval": 1,
    "val_views": "1x1",
    "epochs": 150,
    "lr": 0.01,
    "lr_batch": 64,
    "schedule": "multistep",
    "milestones": (75, 125),
    "batch_size": 8,
    "optimizer": "sgd",
    "clip_grad": 40.0,
    "weight_decay": 1e-4,
    "keep_classes": True,
}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "k400-scratch": {**_PUBLISHED, "model": "tpn_slowonly_r50_k400", "weights": "random"},
    "k400-in1k": {**_PUBLISHED, "model": "tpn_slowonly_r50_k400", "weights": "backbone"},
    "sthv1-tsm": {**_PUBLISHED, "model": "tpn_tsm_r50_sthv1", "weights": "backbone", "weight_decay": 5e-4, "clip_grad": 20.0},
    "motion": {
        **_PUBLISHED,
        "model": "tpn_slowonly_tiny_motion",
        "weights": "random",
        "epochs": 15,
        "batch_size": 32,
        "crop_area": (0.4, 1.0),
        "optimizer": "adamw",
        "lr": 0.003,
        "lr_batch": 32,
        "weight_decay": 0.05,
        "warmup": 1 / 15,
        "label_smoothing": 0.1,
        "ema": 0.998,
        "schedule": "cosine",
    },
}
"""Complete settings by name: the published recipes, for eight GPUs, and that of the model that ships with tpn."""
