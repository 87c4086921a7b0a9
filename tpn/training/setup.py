"""Build the parts of a run from its settings: model, data, optimizer, schedule."""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from tpn.config import InputSpec, parse_views
from tpn.models.classifier import TPNClassifier
from tpn.models.layers import channels_last
from tpn.training.config import TrainConfig
from tpn.training.data import TrainData, open_data, with_spec
from tpn.zoo.create import create_model, is_saved

T = TypeVar("T")


def build(data: str, config: TrainConfig) -> tuple[TPNClassifier, TrainData, str, bool]:
    """Return the model, the data, the weights that training starts from, and whether loaded classifiers were replaced.

    The classifiers are new if the data has other classes than the model.
    """
    start = config.weights or default_weights(config)
    if start == "random" and is_saved(config.model):
        raise ValueError(f"weights='random' is not valid with the saved model {config.model}, whose weights are always loaded")
    is_file = start not in ("pretrained", "backbone", "random")
    args = {"num_classes": 0, **config.model_args} if config.model == "tpn" else dict(config.model_args)  # classifiers follow
    weights: dict[str, Any] = {"checkpoint_path": start if is_file else None, "backbone_pretrained": start == "backbone"}
    model = create_model(config.model, start == "pretrained", **weights, **args)
    parts = open_data(data, config, model.input_spec)
    if len(parts.train.classes) < 2 and not parts.train.multi_label:
        raise ValueError(f"{data} has one class, {parts.train.classes[0]!r}; training needs two or more")
    keep = parts.train.numbered and config.keep_classes
    same_task = parts.train.multi_label == model.multi_label
    if model.labels and same_task and (keep or set(parts.train.classes) == set(model.labels)):
        parts = open_data(data, config, model.input_spec, classes=model.labels)  # in the model's order
        return model, parts, start, False
    replaced = start != "random" and start != "backbone" and model.num_classes > 0
    model.reset_classifier(len(parts.train.classes), multi_label=parts.train.multi_label)
    model.labels = parts.train.classes
    return model, parts, start, replaced


def default_weights(config: TrainConfig) -> str:
    """Return the best weights that a model can start from."""
    if config.model != "tpn":
        return "pretrained"
    backbone = config.model_args.get("backbone", "")
    return "backbone" if str(backbone).startswith(("timm/", "torchvision/")) else "random"


def clips_of(model: TPNClassifier, data: TrainData, config: TrainConfig) -> tuple[InputSpec, TrainData]:
    """Return the input spec of the trained model, and datasets that use it."""
    changes: dict[str, Any] = {"three_crop_size": config.short_side}
    changes |= {name: getattr(config, name) for name in ("short_side", "crop_size", "frame_interval", "target_fps")}
    spec: InputSpec = replace(model.input_spec, **{name: value for name, value in changes.items() if value})
    spec = spec.with_views(*parse_views(config.views)) if config.views else spec
    names = ("crop_area", "flip_prob", "color_jitter", "rand_augment", "random_erasing")
    draws = {name: getattr(config, name) for name in names}
    val_spec = spec.with_views(*parse_views(config.val_views)) if config.val_views else spec
    val = data.val and with_spec(data.val, val_spec)
    return spec, replace(data, train=with_spec(data.train, spec, **draws), val=val)


def prepare(model: TPNClassifier, config: TrainConfig) -> None:
    """Freeze what does not learn, and store weights as the run computes with them."""
    if config.checkpointing:
        model.set_grad_checkpointing()
    model.backbone.requires_grad_(config.freeze != "backbone")
    if model.aux_head is not None:
        model.aux_head.requires_grad_(config.aux_weight > 0)
    if config.channels_last:
        channels_last(model)


def make_optimizer(model: TPNClassifier, config: TrainConfig, lr: float, device: torch.device) -> Optimizer:
    """Return timm's optimizer; groups of the backbone's parameters have `backbone_lr` in their "lr_scale"."""
    name = required(config.optimizer)
    kind = get_optimizer_class(name, bind_defaults=False)
    fused = "fused" in inspect.signature(kind).parameters and device.type in ("cuda", "cpu")
    if kind is torch.optim.SGD and config.amp == "float16":
        fused = False  # if the first step overflows, as it often does, fused SGD keeps an uninitialized momentum buffer
    options: dict[str, Any] = {"momentum": config.momentum, "layer_decay": config.layer_decay} | (
        {"fused": True} if fused else {}
    )
    options |= {"weight_decay": config.weight_decay, "filter_bias_and_bn": name != "sgd"}
    optimizer = create_optimizer_v2(model, name, lr, **options)
    in_backbone = {id(parameter) for parameter in model.backbone.parameters()}
    for group in list(optimizer.param_groups) if config.backbone_lr != 1 else ():
        theirs = [parameter for parameter in group["params"] if id(parameter) in in_backbone]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in in_backbone]
        if theirs:
            optimizer.add_param_group(
                {**group, "params": theirs, "lr_scale": required(config.backbone_lr) * group.get("lr_scale", 1)}
            )
    return optimizer


def make_schedule(optimizer: Optimizer, config: TrainConfig, lr: float, total_steps: int, epoch_steps: int) -> Scheduler:
    """Return timm's schedule, counted in steps."""
    schedule, _ = create_scheduler_v2(
        optimizer,
        config.schedule,
        num_epochs=total_steps,
        decay_milestones=[milestone * epoch_steps + 1 for milestone in config.milestones],  # timm counts steps from 1
        warmup_epochs=round(required(config.warmup) * total_steps),
        warmup_lr=lr / 100,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    assert schedule is not None
    return schedule


def recorded_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in a folder; empty if there is none."""
    file = folder / "train.json"
    if not file.exists() or not (folder / "checkpoint.pt").exists():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); pass all settings of the run, and remove it") from error
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def required(value: T | None) -> T:
    """Return a value that the plan has set."""
    assert value is not None
    return value
