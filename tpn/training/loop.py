"""The training loop."""

import json
import logging
import math
import os
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from tpn.files import StrPath, atomic_write
from tpn.models.classifier import TPNClassifier
from tpn.models.layers import freeze_batch_norm
from tpn.training.config import TrainConfig
from tpn.training.console import TrainingConsole
from tpn.training.data import DataFacts, facts_of
from tpn.training.distributed import broadcast_bn_stats, end_with_parent, join_processes, run_on_rank0
from tpn.training.evaluation import validate
from tpn.training.loss import TrainingLoss, class_weights, draw_weights, epoch_batches
from tpn.training.metrics import Evaluation
from tpn.training.mix import Mix
from tpn.training.observer import Interrupted, Observer
from tpn.training.plan import PlanLine, make_plan
from tpn.training.report import write_run_report
from tpn.training.setup import build, freeze_and_layout, make_optimizer, make_schedule, recorded_settings, required, set_clips
from tpn.training.state import Checkpoint, MetricsLog, RunningMeans, check_finite, locked_folder, report_bad_files
from tpn.version import __version__
from tpn.zoo.saved import save_pretrained

_logger = logging.getLogger(__name__)

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
        evaluation: of the saved model on the validation data. None if there is none.
    """

    model: TPNClassifier
    folder: Path
    plan: list[PlanLine]
    evaluation: Evaluation | None


def train(
    data: StrPath,
    *,
    output: StrPath,
    resume: bool = False,
    dry_run: bool = False,
    verbose: bool = True,
    observer: "Observer | None" = None,
    **options: Any,
) -> TrainResult:
    """Train a model on labeled videos, or fine-tune a published one.

    Args:
        data: a folder of class folders, a folder with such folders named train and val, or a table or list of videos.
        output: folder for the model, the checkpoint, the metrics and the report.
        resume: continue the interrupted run in `output`.
        dry_run: make the plan and return, without training.
        verbose: print the data, the plan, and the progress.
        observer: receives the progress in place of the console.
        **options: fields of `TrainConfig`; `recipe` selects complete published settings.

    Returns:
        The trained model and its validation.

    Raises:
        TypeError: no such option.
        ValueError: an option or the data is not valid.
        FloatingPointError: the gradients of ten steps in a row were not finite.
        OSError, VideoError, TooManyBadFilesError: the data cannot be read.
        WeightsUnavailableError: the weights cannot be fetched.
    """
    if observer is None and verbose:
        observer = TrainingConsole()
    config = TrainConfig.of(**options)
    folder = Path(output)
    rank, world, device = join_processes(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with _process_state(), nullcontext() if dry_run else locked_folder(folder):
        reasons = None
        if resume and (recorded := run_on_rank0(lambda: recorded_settings(folder))) is not None:
            settings, reasons = recorded
            config = TrainConfig.of(recorded=settings, **options)
            reasons |= dict.fromkeys(options.keys() & settings.keys(), "given")
        run = Run(os.fspath(data), folder, config, rank=rank, world=world, device=device, observer=observer, recorded=reasons)
        if dry_run:
            run.observer.planned(run)
            return run.result()
        try:
            return run.fit(resume=resume)
        finally:
            run.observer.close()
            if run.log is not None:
                run.log.close()


@contextmanager
def _process_state() -> Iterator[None]:
    """Restore what a run changes in the process: threads, and how PyTorch chooses algorithms."""
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    deterministic, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


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
        recorded: Mapping[str, str] | None = None,
    ) -> None:
        self.source, self.folder, self.rank, self.world, self.device = data, folder, rank, world, device
        self.observer = observer if observer is not None and rank == 0 else Observer()
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = not config.deterministic
        torch.manual_seed(config.seed)
        model, self.data, self.weights, self.new_classifier = build(data, config)
        fps = config.target_fps or model.input_spec.target_fps
        self.facts: DataFacts = run_on_rank0(lambda: facts_of(self.data.train, fps))
        self.config, self.plan = make_plan(
            config, self.facts, model, self.weights, device=device, world_size=world, recorded=recorded
        )
        config = self.config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        set_clips(model, self.data, config)
        freeze_and_layout(model, config)
        self.model = model.to(device)
        train = self.data.train
        self.draw_weights = draw_weights(train.targets) if config.balanced else None
        mix = Mix(required(config.mixup), required(config.cutmix), model.num_classes) if config.mixup or config.cutmix else None
        network: Any = TrainingLoss(
            model,
            config.aux_weight,
            class_weights(train.targets) if config.class_weights else None,
            config.label_smoothing or 0.0,
            mix,
        ).to(device)
        if config.sync_bn and world > 1:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        if world > 1:
            network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
        self.network: Any = torch.compile(network) if config.compile else network
        self.batch = required(config.batch_size) * config.accumulate * world
        self.epoch_steps = len(self.data.train) // self.batch
        if self.epoch_steps == 0:
            raise ValueError(f"{len(self.data.train)} videos are less than one step of {self.batch} clips; decrease batch_size")
        self.total_steps = config.steps or required(config.epochs) * self.epoch_steps
        self.lr = required(config.lr) * self.batch / required(config.lr_batch)
        self.optimizer = make_optimizer(model, config, self.lr, device)
        self.schedule = make_schedule(self.optimizer, config, self.lr, self.total_steps, self.epoch_steps)
        self.amp = getattr(torch, required(config.amp))
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.ema = ModelEmaV3(model, config.ema, use_warmup=True) if config.ema else None
        self.saved_model: TPNClassifier = self.ema.module if self.ema else model
        self.statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.means = RunningMeans(device)
        self.step = self.validated_step = self.skipped = self.skipped_in_a_row = self.without_progress = 0
        self.best = -1.0
        self.stop_signal = 0
        self.evaluation: Evaluation | None = None
        self.log: MetricsLog | None = None
        self.checkpoint = self._checkpoint()

    def fit(self, *, resume: bool) -> TrainResult:
        """Train to the end."""
        if resume:
            self._restore()
        elif run_on_rank0(self.checkpoint.path.exists):
            raise ValueError(f"{self.folder} already has a checkpoint; resume it (--resume), or choose another output")
        elif run_on_rank0((self.folder / "model.safetensors").exists):
            raise ValueError(f"{self.folder} already has a model; choose another output")
        if self.rank == 0:
            self.log = MetricsLog(self.folder, self.step, self.validated_step)
            with atomic_write(self.folder / "train.json") as unfinished:
                about: dict[str, Any] = {"tpn": __version__, "data": os.path.abspath(self.source)}
                about["reasons"] = {line.name: line.reason for line in self.plan}
                unfinished.write_text(json.dumps(self.config.to_dict() | about, indent=2) + "\n")
            self.data.write(self.folder / "split.csv")
        self.observer.planned(self)
        with self._catching_signals():
            while True:
                if self.stop_signal and self.step < self.total_steps:
                    raise Interrupted(self.stop_signal, self.step)
                if self._validation_is_due():
                    self._validate()
                    self.save_checkpoint()
                elif self.step < self.total_steps and not self._is_stopped_early():
                    self._train_epoch()
                else:
                    break
                unread = self.evaluation.failed if self.evaluation is not None else {}
                report_bad_files(self.folder / "bad_files.txt", self.data.train, unread)
        if self.data.val and self.evaluation is None:  # a finished run is resumed
            self.evaluation = self._evaluate()
        if self.rank == 0:
            check_finite(self.saved_model)
            save_pretrained(self.saved_model, self.folder)
            write_run_report(self)
        self.observer.finished(self)
        return self.result()

    def result(self) -> TrainResult:
        return TrainResult(self.saved_model.eval(), self.folder, self.plan, self.evaluation)

    def _train_epoch(self) -> None:
        """Train to the end of the epoch, or of the run, and save a checkpoint."""
        config, train = self.config, self.data.train
        epoch = self.step // self.epoch_steps
        train.set_epoch(epoch)
        batches = epoch_batches(
            len(train),
            required(config.batch_size),
            seed=config.seed,
            epoch=epoch,
            accumulate=config.accumulate,
            weights=self.draw_weights,
            rank=self.rank,
            world_size=self.world,
        )
        loader = DataLoader(
            train,
            batch_sampler=batches[self.step % self.epoch_steps * config.accumulate :],  # a resumed epoch
            num_workers=required(config.workers),
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker,
        )
        clips = iter(loader)
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
            if self.stop_signal:
                break
            due = config.checkpoint_interval and self.step % config.checkpoint_interval == 0
            if due and self.step < end:
                self.save_checkpoint()
        del clips  # ends the loader processes
        if self.step == end:
            broadcast_bn_stats(self.model, self.saved_model)
        self.save_checkpoint()

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
            if self.ema:
                self.ema.update(self.model, self.step + 1)
        else:
            self._skip(before)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
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
        return validate(self.saved_model, required(self.data.val), workers=required(self.config.workers), amp=self.amp)

    def _validation_is_due(self) -> bool:
        epochs, rest = divmod(self.step, self.epoch_steps)
        at_interval = rest == 0 and epochs % required(self.config.val_interval) == 0
        return self.data.val is not None and self.step > self.validated_step and (at_interval or self.step == self.total_steps)

    def _validate(self) -> None:
        self.evaluation = self._evaluate()
        required(self.data.val).check_bad(self.evaluation.failed)
        metrics = self.evaluation.metrics
        epoch = (self.step - 1) // self.epoch_steps
        self._write({"epoch": epoch} | {f"val_{name}": value for name, value in metrics.items()})
        self.validated_step = self.step
        value = metrics[self.evaluation.main_metric]
        self.without_progress = 0 if value > self.best else self.without_progress + 1
        if value >= self.best:  # of equals the last, which has learned longer
            self.best = value
            if self.rank == 0:
                check_finite(self.saved_model)
                save_pretrained(self.saved_model, self.folder / "best")

    def _is_stopped_early(self) -> bool:
        return self.config.patience is not None and self.without_progress >= self.config.patience

    def _write(self, values: dict[str, float]) -> None:
        if self.log:
            self.log.write(self.step, values)
            self.observer.logged(self, values)

    def _checkpoint(self) -> Checkpoint:
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        parts |= {"ema": self.ema.module} if self.ema else {}
        settings = {name: value for name, value in self.config.to_dict().items() if name not in MUTABLE_ON_RESUME}
        train = self.data.train
        settings |= {
            "devices": self.world,
            "videos": len(train),
            "checksum of their classes and labels": zlib.crc32(repr((train.classes, train.labels)).encode()),
        }
        return Checkpoint(self.folder / "checkpoint.pt", parts, settings)

    def save_checkpoint(self) -> None:
        names = ("step", "validated_step", "best", "skipped", "without_progress")
        progress: dict[str, Any] = {name: getattr(self, name) for name in names}
        progress["sums"] = self.means.collect()
        if self.rank == 0:
            self.checkpoint.save(progress)

    def _restore(self) -> None:
        progress = self.checkpoint.load()
        if progress is None:
            _logger.warning("%s has no checkpoint; training starts at step 0", self.folder)
        else:
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


def _start_worker(worker: int) -> None:
    """Ignore signals in a loader process, which lives as long as the run: they often reach all processes of a group."""
    end_with_parent()  # a process that is left over would keep the lock of the folder
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


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
