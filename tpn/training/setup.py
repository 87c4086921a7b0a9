"""Build the parts of a run from its settings: model, data, optimizer, schedule."""

import inspect
import json
import os
from dataclasses import fields, replace
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
from tpn.training.data import TrainData, open_data
from tpn.zoo.create import create_model
from tpn.zoo.names import is_saved

T = TypeVar("T")


def build(data: str, config: TrainConfig) -> tuple[TPNClassifier, TrainData, str, bool]:
    """Return the model, the data, the weights that training starts from, and whether loaded classifiers were replaced.

    The classifiers are new if the data has other classes than the model.
    """
    start = config.weights or default_weights(config)
    if start == "random" and is_saved(config.model):
        raise ValueError(f"weights='random' is not valid with the saved model {config.model}, whose weights are always loaded")
    is_file = start not in ("pretrained", "backbone", "random")
    if is_file and not os.path.isfile(start):
        raise ValueError(f"weights must be pretrained, backbone, random, or a file, got {start!r}; a saved folder is a model")
    args = {"num_classes": 0, **config.model_args} if config.model == "tpn" else dict(config.model_args)  # classifiers follow
    weights: dict[str, Any] = {"checkpoint_path": start if is_file else None, "backbone_pretrained": start == "backbone"}
    model = create_model(config.model, start == "pretrained", **weights, **args)
    model.temperature = 1.0  # it was fitted to the classifier before this training
    parts = open_data(data, config, model)
    if len(parts.train.classes) < 2 and not parts.train.multi_label:
        raise ValueError(f"{data} has one class, {parts.train.classes[0]!r}; training needs two or more")
    if parts.train.classes == model.labels and parts.train.multi_label == model.multi_label:
        return model, parts, start, False
    replaced = start not in ("random", "backbone") and model.num_classes > 0
    model.reset_classifier(len(parts.train.classes), multi_label=parts.train.multi_label)
    model.labels = parts.train.classes
    return model, parts, start, replaced


def default_weights(config: TrainConfig) -> str:
    """Return the best weights that a model can start from."""
    if config.model != "tpn":
        return "pretrained"
    backbone = config.model_args.get("backbone", "")
    return "backbone" if str(backbone).startswith(("timm/", "torchvision/")) else "random"


def set_clips(model: TPNClassifier, data: TrainData, config: TrainConfig) -> None:
    """Set the input spec of the model and of the datasets, and the augmentation."""
    spec: InputSpec = model.input_spec
    short_side = config.short_side
    if short_side is None and config.crop_size is not None:  # crops show as much of a frame as before
        short_side = round(spec.short_side * config.crop_size / spec.crop_size)
    names = ("crop_size", "frame_interval", "target_fps")
    changes: dict[str, Any] = {name: value for name in names if (value := getattr(config, name)) is not None}
    if short_side is not None:
        changes |= {"short_side": short_side, "three_crop_size": None}
    spec = replace(spec, **changes)
    spec = spec.with_views(*parse_views(config.views)) if config.views else spec
    draws = {name: getattr(config, name) for name in ("crop_area", "flip_prob", "color_jitter", "rand_augment", "random_erasing")}
    model.input_spec = spec
    data.train.use_spec(spec, **draws)
    if data.val is not None:
        data.val.use_spec(spec.with_views(*parse_views(config.val_views)) if config.val_views else spec)


def freeze_and_layout(model: TPNClassifier, config: TrainConfig) -> None:
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
    options: dict[str, Any] = {"momentum": config.momentum, "layer_decay": config.layer_decay}
    options |= {"weight_decay": config.weight_decay, "filter_bias_and_bn": name != "sgd"} | ({"fused": True} if fused else {})
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


def recorded_settings(folder: Path) -> tuple[dict[str, Any], dict[str, str]] | None:
    """Return the settings of the run in a folder, and their reasons, except for those of the machine; None if there is no run."""
    file = folder / "train.json"
    if not file.exists() or not (folder / "checkpoint.pt").exists():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        reasons: dict[str, str] = values["reasons"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); pass all settings of the run, and remove it") from error
    names = {field.name for field in fields(TrainConfig)} - {"workers", "threads", "device"}
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in names}
    return settings, {name: reason for name, reason in reasons.items() if name in names}


def required(value: T | None) -> T:
    """Return a value that the plan has set."""
    assert value is not None
    return value
