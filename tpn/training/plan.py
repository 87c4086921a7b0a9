"""Choose the settings of a run from its data and its model, each with a reason.

The training page says which rules have been measured.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from timm.optim import get_optimizer_class
from torch import nn

from tpn.config import InputSpec
from tpn.devices import cpu_has_amx
from tpn.errors import plural
from tpn.models.classifier import TPNClassifier
from tpn.training.config import RECIPES, TrainConfig
from tpn.training.data import DataFacts
from tpn.video.sampling import clip_span

T = TypeVar("T")

CPU_CROP = 112
"""Side of the crops in pixels for a network of images on a CPU."""
MIN_STEPS = 300
"""Minimum steps of a planned run."""


@dataclass(frozen=True)
class PlanLine:
    """A setting of a run.

    Attributes:
        name: of the field of `TrainConfig`.
        value: of the setting.
        reason: why the plan chose it; "given" for an option, the recipe's name for a recipe.
    """

    name: str
    value: Any
    reason: str


class _Plan:
    """The settings, completed one by one."""

    def __init__(self, config: TrainConfig, recorded: Mapping[str, str]) -> None:
        self.config = config
        self.recipe = dict(RECIPES.get(config.recipe or "", {}))
        self.lines = [
            PlanLine(name, value, reason) for name, reason in recorded.items() if (value := getattr(config, name)) is not None
        ]
        for name in self.recipe:
            self.choose(name, None, "")

    def choose(self, name: str, value: T, reason: str) -> T:
        """Set a field unless it was given; return its value."""
        given: T | None = getattr(self.config, name)
        if given is not None:
            value, reason = given, f"recipe {self.config.recipe}" if given == self.recipe.get(name) else "given"
        change: dict[str, Any] = {name: value}
        self.config = replace(self.config, **change)
        if any(line.name == name for line in self.lines):
            return value
        self.lines.append(PlanLine(name, value, reason))
        return value


def make_plan(
    config: TrainConfig,
    facts: DataFacts,
    model: TPNClassifier,
    start: str,
    *,
    device: torch.device,
    world_size: int = 1,
    recorded: Mapping[str, str] | None = None,
) -> tuple[TrainConfig, list[PlanLine]]:
    """Return the complete settings, and a line for each that the plan chooses.

    Args:
        config: None stands for what the plan chooses.
        facts: about the training data.
        model: what is trained, with its weights and its `input_spec`.
        start: the weights that training starts from.
        device: of the run.
        world_size: number of processes.
        recorded: of a run that is resumed, the reasons for the settings, which `config` has. Only settings of the machine are
            chosen again.
    """
    plan = _Plan(config, recorded or {})
    if config.recipe is None and recorded is None:
        _choose_clips(plan, facts, model.input_spec)
        _choose_learning_part(plan, model.input_spec, start, device)
        _choose_optimization(plan, facts, start, device, world_size)
        _choose_augmentation(plan)
    _choose_computation(plan, device, model)
    return plan.config, plan.lines


def _choose_clips(plan: _Plan, facts: DataFacts, spec: InputSpec) -> None:
    if spec.sampling == "segments":
        plan.choose("views", f"{spec.num_clips}x1", "every clip spans the whole video")
        return
    interval, reason = spec.frame_interval, "the model's; no header states the length of a video"
    if facts.frames is not None:
        interval = max(1, min(int((facts.frames - 1) / max(spec.num_frames - 1, 1)), round((facts.fps or 30) / 2)))
        span = clip_span(spec.num_frames, interval)
        reason = f"{spec.num_frames} frames then span {span} of {facts.frames:g}, the median length of a video"
    interval = plan.choose("frame_interval", interval, reason)
    clips = 3
    if facts.frames is not None:
        clips = min(max(round(facts.frames / clip_span(spec.num_frames, interval)), 1), 10)
    plan.choose("views", f"{clips}x1", "one clip covers a video" if clips == 1 else f"{clips} clips cover a video")


def _choose_learning_part(plan: _Plan, spec: InputSpec, start: str, device: torch.device) -> None:
    if start != "backbone" or device.type != "cpu":
        plan.choose("freeze", "none", "the whole model learns")
        return
    plan.choose("freeze", "backbone", "its image weights are kept, which is several times as fast on a CPU")
    if spec.crop_size > CPU_CROP:
        speed = (spec.crop_size / CPU_CROP) ** 2
        plan.choose("crop_size", CPU_CROP, f"a CPU is {speed:.0f} times as fast as with {spec.crop_size}")


def _choose_optimization(plan: _Plan, facts: DataFacts, start: str, device: torch.device, world_size: int) -> None:
    size = min(8 if device.type == "cpu" else 32, max(facts.videos // (world_size * plan.config.accumulate), 1))
    batch = plan.choose("batch_size", size, "clips per device") * world_size * plan.config.accumulate
    epoch_steps = max(facts.videos // batch, 1)
    epochs = plan.config.epochs
    if epochs is None:
        per_video, least = (12, 3_000) if plan.config.freeze == "backbone" else (30, 6_000)
        steps = max(round(min(max(per_video * facts.videos, least), 200_000) / batch), MIN_STEPS)
        repeats = f"each of {facts.videos} videos about {steps * batch / facts.videos:.0f} times"
        steps = plan.choose("steps", steps, f"{steps * batch:,} clips, {repeats}")
        epochs = math.ceil(steps / epoch_steps)
    interval = max(1, round(epochs / 10))
    plan.choose("val_interval", interval, f"{plural(-(-epochs // interval), 'validation')} in {plural(epochs, 'epoch')}")
    optimizer = plan.choose("optimizer", "adamw", "needs less tuning of the learning rate than sgd")
    get_optimizer_class(optimizer)  # raises ValueError for an unknown name
    if optimizer not in ("adamw", "sgd") and plan.config.lr is None:
        raise ValueError(f"optimizer={optimizer!r} needs lr: the plan knows learning rates of adamw and sgd only")
    lr, weight_decay = 1e-3 if start == "random" or facts.videos < 5_000 else 3e-4, 0.05
    if optimizer == "sgd":
        lr, weight_decay = 20 * lr, 1e-4
    plan.choose("lr", lr, f"{optimizer}, steps of {batch} clips")
    plan.choose("lr_batch", batch, "the learning rate is for these steps")
    plan.choose("weight_decay", weight_decay, optimizer)
    plan.choose("warmup", 0.1, "share of the steps in which the learning rate rises")
    plan.choose("backbone_lr", 1.0, "one rate for all that learns")
    plan.choose("label_smoothing", 0.1, "limits the confidence in labels")
    plan.choose("ema", 0.0, "the learning rate falls to 0, which averages already")


def _choose_augmentation(plan: _Plan) -> None:
    plan.choose("crop_area", (0.3, 1.0), "small parts of a frame often miss the action")
    plan.choose("flip_prob", 0.5, "most actions stay the same when flipped; 0 if left and right matter")
    plan.choose("color_jitter", True, "videos of other cameras have other colors")
    for name in ("rand_augment", "random_erasing", "mixup", "cutmix"):
        plan.choose(name, 0, "off by default")


def _choose_computation(plan: _Plan, device: torch.device, model: TPNClassifier) -> None:
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
        workers = plan.choose("workers", min(max(cores // 2, 2), 4, cores), "reading videos often takes longest")
        plan.choose("threads", max(cores - workers, 1), f"{cores} cores, less those of the workers")
        if not cpu_has_amx():
            plan.choose("amp", "float32", "the CPU has no AMX")
        elif plan.config.freeze != "backbone" and any(map(_is_depthwise, model.backbone.modules())):
            plan.choose("amp", "float32", "the gradients of depthwise convolutions are slow in bfloat16 on CPUs")
        else:
            plan.choose("amp", "bfloat16", "the CPU has AMX")
        return
    plan.choose("workers", 4, "per device")
    if device.type != "cuda":
        plan.choose("amp", "float32", f"for {device.type}")
    elif torch.cuda.is_bf16_supported(including_emulation=False):
        plan.choose("amp", "bfloat16", "the GPU computes in it")
    else:
        plan.choose("amp", "float16", "the GPU does not compute in bfloat16")


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Conv3d) and 1 < module.groups == module.in_channels
