"""The training loop."""

import inspect
import json
import math
import os
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from tpn.config import InputSpec
from tpn.files import atomic_write
from tpn.models.classifier import TPNClassifier
from tpn.models.layers import channels_last, freeze_batch_norm
from tpn.training.config import TrainConfig
from tpn.training.data import DataFacts, TrainData, facts_of, open_data, views_spec, with_spec
from tpn.training.distributed import broadcast_bn_stats, join_processes, run_on_rank0
from tpn.training.evaluation import validate
from tpn.training.loss import TrainingLoss, class_weights, epoch_batches
from tpn.training.metrics import Evaluation
from tpn.training.mix import Mix
from tpn.training.plan import PlanLine, make_plan
from tpn.training.report import write_run_report
from tpn.training.state import Checkpoint, MetricsLog, RunningMeans, check_finite, locked_folder, report_bad_files
from tpn.zoo.create import create_model, is_saved
from tpn.zoo.saved import save_pretrained

T = TypeVar("T")

MUTABLE_ON_RESUME = (
    *("workers", "threads", "device", "checkpointing", "val", "max_bad", "steps", "epochs", "patience"),
    *("log_interval", "checkpoint_interval", "val_interval"),
)
MAX_SKIPPED = 10
"""Steps in a row whose gradient is not finite, after which a run stops."""


@dataclass(frozen=True)
class TrainResult:
    """The result of `train`.

    Attributes:
        model: the trained model, on its device, in evaluation mode.
        folder: where it is saved.
        plan: the settings of the run, with reasons.
        evaluation: of the saved model on the validation data; None without.
    """

    model: TPNClassifier
    folder: Path
    plan: list[PlanLine]
    evaluation: Evaluation | None


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal, after it had saved a checkpoint."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}")
        self.number = number


def train(
    data: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    resume: bool = False,
    dry_run: bool = False,
    verbose: bool = True,
    observer: "Observer | None" = None,
    **options: Any,
) -> TrainResult:
    """Train a model on labelled videos, or fine-tune a published one.

    Args:
        data: a folder of class folders, a folder with such folders named train and val, or a list of videos.
        output: folder for the model, the checkpoint, the metrics and the report.
        resume: continue the interrupted run in `output`.
        dry_run: make the plan and return, without training.
        verbose: print what was understood, the plan, and progress.
        observer: is told about progress instead.
        **options: fields of `TrainConfig`; `recipe` selects complete published settings.

    Returns:
        the trained model and its validation.

    Raises:
        TypeError: no such option.
        ValueError: an option or the data is not valid.
        FloatingPointError: the gradients of ten steps in a row were not finite.
        OSError, VideoError, TooManyBadFilesError, WeightsUnavailableError.
    """
    if observer is None and verbose:
        from tpn.training.console import TrainingConsole

        observer = TrainingConsole()
    config = TrainConfig.of(**options)
    folder = Path(output)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, world, place = join_processes(device)
    threads = torch.get_num_threads()
    with nullcontext() if dry_run else locked_folder(folder):
        process: dict[str, Any] = {"rank": rank, "world": world, "device": place}
        run = Run(os.fspath(data), folder, config, observer=observer, resume=resume, **process)
        if dry_run:
            run.observer.planned(run)
            torch.set_num_threads(threads)
            return run.result(None)
        try:
            return run.fit(resume=resume)
        finally:
            run.observer.close()
            torch.set_num_threads(threads)


class Observer:
    """Is told about a run; this one does nothing."""

    def planned(self, run: "Run") -> None:
        """The run is set up, nothing is trained yet."""

    def stepped(self, run: "Run", loss: Tensor) -> None:
        """A step is done."""

    def logged(self, run: "Run", values: Mapping[str, float]) -> None:
        """Metrics are written."""

    def validating(self, run: "Run") -> None:
        """A validation begins."""

    def finished(self, run: "Run") -> None:
        """The model and the report are written."""

    def close(self) -> None:
        """The run is over, also if it failed."""


class Run:
    """One training: everything that is built before the first step, and the loop."""

    def __init__(
        self,
        data: str,
        folder: Path,
        config: TrainConfig,
        *,
        rank: int,
        world: int,
        device: torch.device,
        observer: Observer | None,
        resume: bool = False,
    ) -> None:
        self.folder, self.rank, self.world, self.device = folder, rank, world, device
        self.observer = observer if observer is not None and rank == 0 else Observer()
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = not config.deterministic
        torch.manual_seed(config.seed)
        model, self.data, self.weights, self.new_classifier = build(data, config)
        self.facts: DataFacts = facts_of(self.data.train)
        before = run_on_rank0(lambda: recorded_settings(folder)) if resume else {}
        place: dict[str, Any] = {"device": device, "world_size": world, "before": before}
        self.config, self.plan = make_plan(config, self.facts, model, self.weights, **place)
        config = self.config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        model.input_spec, self.data = clips_of(model, self.data, config)
        prepare(model, config)
        self.model = model.to(device)
        targets = self.data.train.targets
        mix = Mix(_set(config.mixup), _set(config.cutmix), model.num_classes) if config.mixup or config.cutmix else None
        network: Any = TrainingLoss(
            model, config.aux_weight, class_weights(targets) if config.class_weights else None, config.label_smoothing or 0.0, mix
        ).to(device)
        if config.sync_bn and world > 1:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        if world > 1:
            network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
        self.network: Any = torch.compile(network) if config.compile else network
        self.batch = _set(config.batch_size) * config.accumulate * world
        self.epoch_steps = len(self.data.train) // self.batch
        if self.epoch_steps == 0:
            raise ValueError(f"{len(self.data.train)} videos are less than one step of {self.batch} clips; decrease batch_size")
        self.total_steps = config.steps or _set(config.epochs) * self.epoch_steps
        self.lr = _set(config.lr) * self.batch / _set(config.lr_batch)
        self.optimizer = make_optimizer(model, config, self.lr, device)
        self.schedule = make_schedule(self.optimizer, config, self.lr, self.total_steps, self.epoch_steps)
        self.amp = getattr(torch, _set(config.amp))
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.ema = ModelEmaV3(model, config.ema, use_warmup=True) if config.ema else None
        self.saved_model: TPNClassifier = self.ema.module if self.ema else model
        self.statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.means = RunningMeans(device)
        self.step = self.skipped = self.skipped_in_a_row = self.without_progress = 0
        self.best = -1.0
        self.stop_signal = 0
        self.evaluation: Evaluation | None = None
        self.log: MetricsLog | None = None
        self.checkpoint = self._checkpoint()

    @property
    def epoch(self) -> int:
        return self.step // self.epoch_steps

    def fit(self, *, resume: bool) -> TrainResult:
        """Train to the end."""
        if resume:
            self._restore()
        elif run_on_rank0(self.checkpoint.path.exists):
            raise ValueError(f"{self.folder} already has a checkpoint; resume it (--resume), or choose another output")
        elif run_on_rank0((self.folder / "model.safetensors").exists):
            raise ValueError(f"{self.folder} already has a model; choose another output")
        if self.rank == 0:
            self.log = MetricsLog(self.folder, self.step)
            with atomic_write(self.folder / "train.json") as unfinished:
                unfinished.write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
            self.data.write(self.folder / "split.csv")
        self.observer.planned(self)
        with self._catching_signals():
            while self.step < self.total_steps and not self._is_stopped_early():
                self._train_epoch()
        if self.data.val and self.evaluation is None:  # a finished run is resumed
            self.evaluation = self._evaluate()
        evaluation = self._save_result()
        self.observer.finished(self)
        return self.result(evaluation)

    def result(self, evaluation: Evaluation | None) -> TrainResult:
        return TrainResult(self.saved_model.eval(), self.folder, self.plan, evaluation)

    def _train_epoch(self) -> None:
        """Train to the end of the epoch, or of the run, then validate and save."""
        config, epoch = self.config, self.epoch
        train = self.data.train
        train.set_epoch(epoch)
        order: dict[str, Any] = {
            "accumulate": config.accumulate,
            "balanced": config.balanced,
            "seed": config.seed,
            "epoch": epoch,
        }
        batches = epoch_batches(train.targets, _set(config.batch_size), rank=self.rank, world_size=self.world, **order)
        batches = batches[self.step % self.epoch_steps * config.accumulate :]  # a resumed epoch
        pin = self.device.type == "cuda"
        options: dict[str, Any] = {
            "num_workers": _set(config.workers),
            "pin_memory": pin,
            "worker_init_fn": _leave_signals_to_the_run,
        }
        clips = iter(DataLoader(train, batch_sampler=batches, **options))
        self.model.train()
        if config.freeze != "none":
            freeze_batch_norm(self.model if config.freeze == "bn" else self.model.backbone)
        end = min((epoch + 1) * self.epoch_steps, self.total_steps)
        clock = _Clock(self.step)
        while self.step < end:
            norm = self._train_step(clips, clock)
            if self.step % config.log_interval == 0 or self.step == end:
                rates = {"lr": max(group["lr"] for group in self.optimizer.param_groups)}
                self._write(
                    {"epoch": epoch} | self.means.read() | rates | clock.read(self.step, self.batch) | {"grad_norm": norm}
                )
            if self.stop_signal and self.step < end:
                self.save_checkpoint()
                raise Interrupted(self.stop_signal, self.step)
            due = config.checkpoint_interval and self.step % config.checkpoint_interval == 0
            if due and self.step < end:
                self.save_checkpoint()
        del clips  # ends the loader processes
        broadcast_bn_stats(self.model, self.saved_model)
        self.save_checkpoint()  # before validation, which may fail
        if self.data.val and ((epoch + 1) % _set(config.val_interval) == 0 or self.step == self.total_steps):
            self._validate(epoch)
            self.save_checkpoint()
        report_bad_files(self.folder / "bad_files.txt", train, also=self.evaluation.failed if self.evaluation else {})
        if self.stop_signal and self.step < self.total_steps:
            raise Interrupted(self.stop_signal, self.step)

    def _train_step(self, clips: Iterator[tuple[Tensor, Tensor]], clock: "_Clock") -> float:
        """Take one step; return the gradient norm. A step whose gradient is not finite changes nothing, and is counted."""
        config = self.config
        torch.manual_seed((config.seed * self.world + self.rank) * 1_000_003 + self.step)  # a resumed run has the same dropout
        self.schedule.step_update(self.step)
        before = [statistic.clone() for statistic in self.statistics]
        for i in range(config.accumulate):
            with clock.waiting():
                frames, labels = next(clips)
            frames, labels = frames.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            targets = labels if labels.ndim == 2 else F.one_hot(labels, self.model.num_classes).float()
            with nullcontext() if self.world == 1 or i == config.accumulate - 1 else self.network.no_sync():
                with torch.autocast(self.device.type, self.amp, enabled=self.amp != torch.float32):
                    loss, logits, targets = self.network(frames, targets)
                self.scaler.scale(loss / config.accumulate).backward()
            self.means.add(loss, targets.gather(1, logits.argmax(dim=1, keepdim=True)) >= 0.5)
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad or math.inf))
        if math.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.skipped_in_a_row = 0
        else:
            self._skip(before)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema:
            self.ema.update(self.model, self.step)
        self.observer.stepped(self, loss)
        return norm

    def _skip(self, before: list[Tensor]) -> None:
        for statistic, value in zip(self.statistics, before, strict=True):
            statistic.copy_(value)
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise FloatingPointError(
                f"the gradients of {MAX_SKIPPED} steps in a row were not finite, up to step {self.step}; "
                "try a smaller lr, or amp float32"
            )

    def _evaluate(self) -> Evaluation:
        self.observer.validating(self)
        return validate(self.saved_model, _set(self.data.val), workers=_set(self.config.workers), amp=self.amp)

    def _validate(self, epoch: int) -> None:
        self.evaluation = self._evaluate()
        _set(self.data.val).check_bad(self.evaluation.failed)
        metrics = self.evaluation.metrics
        self._write({"epoch": epoch} | {f"val_{name}": value for name, value in metrics.items()})
        value = metrics[self.evaluation.main_metric]
        if value > self.best:
            self.best, self.without_progress = value, 0
            if self.rank == 0:
                check_finite(self.saved_model)
                save_pretrained(self.saved_model, self.folder / "best")
        else:
            self.without_progress += 1

    def _is_stopped_early(self) -> bool:
        return self.config.patience is not None and self.without_progress >= self.config.patience

    def _write(self, values: dict[str, float]) -> None:
        if self.log:
            self.log.write(self.step, values)
            self.observer.logged(self, values)

    def _save_result(self) -> Evaluation | None:
        if self.rank == 0:
            check_finite(self.saved_model)
            save_pretrained(self.saved_model, self.folder)
            write_run_report(self)
        return self.evaluation

    def _checkpoint(self) -> Checkpoint:
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        parts |= {"ema": self.ema.module} if self.ema else {}
        settings = {name: value for name, value in self.config.to_dict().items() if name not in MUTABLE_ON_RESUME}
        train = self.data.train
        settings |= {
            "devices": self.world,
            "videos": len(train),
            "checksum of their labels": zlib.crc32(repr(train.labels).encode()),
        }
        return Checkpoint(self.folder / "checkpoint.pt", parts, settings)

    def save_checkpoint(self) -> None:
        progress: dict[str, Any] = {name: getattr(self, name) for name in ("step", "best", "skipped", "without_progress")}
        progress["sums"] = self.means.collect()
        if self.rank == 0:
            self.checkpoint.save(progress)

    def _restore(self) -> None:
        progress = self.checkpoint.load()
        if progress is not None:
            self.means.restore(progress.pop("sums"))
            for name, value in progress.items():
                setattr(self, name, value)

    @contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM, so that the only process saves a checkpoint after the running step. A second signal kills."""
        previous: dict[int, Any] = {}

        def note(number: int, frame: FrameType | None) -> None:
            self.stop_signal = number
            signal.signal(number, previous[number])

        if self.world == 1 and threading.current_thread() is threading.main_thread():
            previous.update({number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)})
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


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


def _leave_signals_to_the_run(worker: int) -> None:
    """Let a loader process live until the run has finished its step: signals often reach all processes of a group."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


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
    changes = {"short_side": config.short_side, "three_crop_size": config.short_side, "crop_size": config.crop_size}
    changes |= {"frame_interval": config.frame_interval}
    spec: InputSpec = replace(model.input_spec, **{name: value for name, value in changes.items() if value})
    spec = views_spec(spec, config.views) if config.views else spec
    names = ("crop_area", "flip_prob", "color_jitter", "rand_augment", "random_erasing")
    draws = {name: getattr(config, name) for name in names}
    val = data.val and with_spec(data.val, views_spec(spec, config.val_views) if config.val_views else spec)
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
    name = _set(config.optimizer)
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
                {**group, "params": theirs, "lr_scale": _set(config.backbone_lr) * group.get("lr_scale", 1)}
            )
    return optimizer


def make_schedule(optimizer: Optimizer, config: TrainConfig, lr: float, total_steps: int, epoch_steps: int) -> Scheduler:
    """Return timm's schedule, counted in steps."""
    schedule, _ = create_scheduler_v2(
        optimizer,
        config.schedule,
        num_epochs=total_steps,
        decay_milestones=[milestone * epoch_steps + 1 for milestone in config.milestones],  # timm counts steps from 1
        warmup_epochs=round(_set(config.warmup) * total_steps),
        warmup_lr=lr / 100,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    assert schedule is not None
    return schedule


class _Clock:
    """Measures clips per second, and the share of the time that is spent waiting for data."""

    def __init__(self, step: int) -> None:
        self.start, self.step, self.waited = time.perf_counter(), step, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def read(self, step: int, batch: int) -> dict[str, float]:
        seconds = time.perf_counter() - self.start
        values = {"clips_per_s": (step - self.step) * batch / seconds, "data_wait": self.waited / seconds}
        self.start, self.step, self.waited = time.perf_counter(), step, 0.0
        return values


def _set(value: T | None) -> T:
    """Return a value that the plan has set."""
    assert value is not None
    return value
