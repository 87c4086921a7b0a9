"""Parts of a training loop: batch order, validation, checkpoints, metrics. `examples/train.py` combines them."""

import argparse
import hashlib
import importlib.util
import io
import json
import math
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from tpn.errors import WeightsUnavailableError
from tpn.files import atomic_write
from tpn.models.classifier import TPNClassifier
from tpn.models.layers import evaluating
from tpn.optimization import resolve_device
from tpn.video.datasets import TooManyBadFilesError, VideoDataset
from tpn.video.decode import VideoError

T = TypeVar("T")


def class_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Return loss weights for the classes, inversely proportional to their number of videos.

    Args:
        labels: class of each video, `dataset.labels`.
        num_classes: K.

    Returns:
        weights (K,), float32, with a mean of 1 over the videos.
    """
    counts = torch.bincount(torch.tensor(labels), minlength=num_classes)
    return len(labels) / (counts > 0).sum() / counts.clamp(min=1)


def epoch_batches(
    labels: Sequence[int],
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    accumulate: int = 1,
    balanced: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> list[list[tuple[int, int]]]:
    """Return the batches of one process for one epoch, as a `batch_sampler` for a DataLoader.

    A step uses the same videos for every division into processes and forward passes. Videos that do not fill the last step are
    dropped. To resume within an epoch, skip the first batches.

    Args:
        labels: class of each video, `dataset.labels`.
        batch_size: clips per process and forward pass.
        seed, epoch: determine the order.
        accumulate: forward passes per step.
        balanced: draw all classes equally often, with replacement. Default: every video once.
        rank, world_size: of this process.

    Returns:
        a list of (index, draw) for each forward pass, the items that `VideoDataset` takes.
    """
    rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order, draws = torch.randperm(len(labels), generator=rng), torch.zeros(len(labels), dtype=torch.int64)
    if balanced:
        weights = class_weights(labels, max(labels) + 1)[torch.tensor(labels)]
        order = torch.multinomial(weights, len(labels), replacement=True, generator=rng)
        draws = torch.arange(len(labels))  # a video that is drawn twice gives two different clips
    step = batch_size * accumulate * world_size
    items = torch.stack((order, draws), dim=1)[: len(labels) // step * step]
    mine = items.view(-1, world_size, batch_size, 2)[:, rank]
    return [[(index, draw) for index, draw in batch] for batch in mine.tolist()]


@torch.no_grad()
def validate(
    model: TPNClassifier, data: VideoDataset, *, batch_size: int, workers: int = 0, amp: torch.dtype = torch.float32
) -> dict[str, float]:
    """Validate a model on one clip of each video.

    In a distributed run, each process takes a share of the videos, and all of them must call this function. An unreadable video
    is replaced by another one, as in training; `examples/evaluate.py` excludes it instead. The mode of every module is restored.

    Args:
        model: classifier on any device, in any mode.
        data: dataset with `train=False` and the model's `input_spec`.
        batch_size: clips per process and forward pass.
        workers: loader processes.
        amp: dtype of autocast; float32 disables it.

    Returns:
        val_top1 and val_top5 in percent, and val_loss; the same in every process.
    """
    rank, world_size = rank_and_world_size()
    device = next(model.parameters()).device
    sums = torch.zeros(4, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    with evaluating(model):
        for frames, labels in DataLoader(Subset(data, range(rank, len(data), world_size)), batch_size, num_workers=workers):
            frames, labels = frames.to(device), labels.to(device)
            with torch.autocast(device.type, amp, enabled=amp != torch.float32):
                logits = model(model.input_spec.normalize(frames)).float()
            hits = logits.topk(min(5, model.num_classes)).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack((hits[:, 0].sum(), hits.sum(), loss, torch.ones_like(labels).sum()))
    if world_size > 1:
        dist.all_reduce(sums)
    top1, top5, total_loss, count = sums.tolist()
    return {"val_top1": 100 * top1 / count, "val_top5": 100 * top5 / count, "val_loss": total_loss / count}


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 (hexadecimal) of a model's state dict, including names and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def positive_int(text: str) -> int:
    """Parse an integer >= 1; a `type` for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def join_processes(device: str, backend: str | None = None) -> tuple[int, int, torch.device]:
    """Initialize the process group if torchrun started this process.

    Args:
        device: such as "cpu" or "cuda". Under torchrun, "cuda" is the GPU of the local rank.
        backend: of `torch.distributed`. Default: "nccl" on GPUs, otherwise "gloo".

    Returns:
        rank, number of processes, and device of this process.

    Raises:
        ValueError: the device cannot be used.
    """
    if "RANK" in os.environ and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    place = resolve_device(device)
    if "RANK" in os.environ:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        # Harmless: it is about 1x1 convolutions, whose memory is the same in both layouts.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        backend = backend or ("nccl" if device.startswith("cuda") else "gloo")
        # With gloo, an evaluation exchanges only its results, and the first process may wait long for the slowest.
        dist.init_process_group(backend, timeout=timedelta(days=7) if backend == "gloo" else None)
    return *rank_and_world_size(), place


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank and the number of processes; (0, 1) if the run is not distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def broadcast_bn_stats(*modules: nn.Module) -> None:
    """Copy batch norm's running statistics from rank 0, so that all processes validate the model that is saved."""
    _, world_size = rank_and_world_size()
    if world_size > 1:
        for module in modules:
            distribute_bn(module, world_size)


def run_on_rank0(function: Callable[[], T]) -> T:
    """Call a function in rank 0 only; return its value, or raise its ValueError or OSError, in all processes."""
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return function()
    values: list[Any] = [None]
    if rank == 0:
        try:
            values = [function()]
        except (ValueError, OSError) as error:
            values = [error]
    dist.broadcast_object_list(values)
    if isinstance(values[0], Exception):
        raise values[0]
    value: T = values[0]
    return value


def all_gather_object(value: T) -> list[T]:
    """Return the values of all processes, by rank, in every process."""
    _, world_size = rank_and_world_size()
    values: list[Any] = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values


def run_cli(main: Callable[[], None]) -> None:
    """Run the `main` function of a script, and report errors that its user can cause as one line on standard error.

    The exit code is then 1, or 130 after Ctrl-C. In a distributed run, a process that fails exits without waiting for the
    others, which may be waiting for it; torchrun ends them.
    """
    for stream in (sys.stdout, sys.stderr):  # file names may contain characters that the terminal cannot encode
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except TooManyBadFilesError as error:  # from a loader process, the message starts with a traceback
        _exit(str(error).rpartition("TooManyBadFilesError: ")[2])
    except torch.OutOfMemoryError as error:
        _exit(f"{str(error).splitlines()[0]} Try a smaller --batch-size.")
    except OSError as error:
        _exit(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except (ValueError, TypeError, FloatingPointError, WeightsUnavailableError, VideoError) as error:
        _exit(str(error))
    except RuntimeError as error:
        if dist.is_initialized() and (isinstance(error, dist.DistError) or "Connection closed by peer" in str(error)):
            _exit("another process failed; see its message")
        traceback.print_exc()
        _exit("")
    if dist.is_initialized():
        dist.destroy_process_group()


def _exit(message: str, code: int = 1) -> NoReturn:
    if message:
        print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)


def report_bad_files(path: Path, *datasets: VideoDataset) -> int:
    """Write the unreadable videos of all processes to a file, one "path<tab>reason" per line.

    In a distributed run, all processes must call it. Without unreadable videos, no file is written.

    Args:
        path: of the file.
        datasets: datasets that have been read.

    Returns:
        the number of unreadable videos.

    Raises:
        TooManyBadFilesError: in every process, if a dataset has more of them than its `max_bad` allows.
    """
    by_process = all_gather_object([data.bad_files() for data in datasets])
    by_dataset = [{file: reason for bad in parts for file, reason in bad.items()} for parts in zip(*by_process, strict=True)]
    merged = {file: reason for bad in by_dataset for file, reason in bad.items()}
    if merged and rank_and_world_size()[0] == 0:
        lines = [f"{file}\t{reason}\n" for file, reason in merged.items()]
        with atomic_write(path) as unfinished:
            unfinished.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    for data, bad in zip(datasets, by_dataset, strict=True):
        data.check_bad(bad)
    return len(merged)


class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class RunningMeans:
    """Means of loss and accuracy since the last `read`. The sums stay on the device until then.

    In a distributed run, all processes must call `collect` and `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, device=device)

    def add(self, loss: Tensor, hits: Tensor) -> None:
        """Add a forward pass: its mean loss, and which clips were correct, bool (B,)."""
        self.sums += torch.stack((loss.detach().float(), hits.float().mean(), torch.ones_like(self.sums[0])))

    def collect(self) -> list[float]:
        """Move the sums of all processes to rank 0 and return them, for a checkpoint.

        Raises FloatingPointError if a loss was not finite.
        """
        rank, world_size = rank_and_world_size()
        if world_size > 1:
            dist.all_reduce(self.sums)
        sums: list[float] = self.sums.tolist()
        if not all(map(math.isfinite, sums)):
            raise FloatingPointError(f"the loss is {sums[0] / sums[2]}; try a smaller --lr, or --amp float32")
        self.sums *= rank == 0
        return sums

    def restore(self, sums: Sequence[float]) -> None:
        """Continue from the sums that `collect` returned."""
        self.sums.copy_(torch.tensor(sums)).mul_(rank_and_world_size()[0] == 0)

    def read(self) -> dict[str, float]:
        """Return loss and top1 (percent), and reset the sums."""
        loss, hits, count = self.collect()
        self.sums.zero_()
        return {"loss": loss / count, "top1": 100 * hits / count}


class Checkpoint:
    """The file from which an interrupted training resumes. At any moment it is complete or absent.

    In a distributed run, only rank 0 reads the file; the other processes receive its content.

    Args:
        path: of the file.
        parts: objects with a state dict, such as model and optimizer, by name.
        settings: values that must not change when the training resumes.
    """

    def __init__(self, path: Path, parts: dict[str, _Stateful], settings: dict[str, Any]) -> None:
        self.path, self.parts, self.settings = path, parts, settings

    def save(self, progress: dict[str, Any]) -> None:
        """Write the state of all parts, and the progress of the training: numbers, strings and lists of them."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        with atomic_write(self.path) as unfinished:
            torch.save({"parts": states, "settings": self.settings, "progress": progress}, unfinished)

    def load(self) -> dict[str, Any] | None:
        """Restore all parts and return the progress, or None if there is no file.

        Raises ValueError if the file is not a checkpoint, or has other settings.
        """
        content = run_on_rank0(self._read)
        if content is None:
            return None
        for name, part in self.parts.items():
            part.load_state_dict(content["parts"][name])
        progress: dict[str, Any] = content["progress"]
        return progress

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            content: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            saved = content["settings"]
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is not a training checkpoint; remove it to start again") from error
        names = sorted(saved.keys() | self.settings.keys())
        changes = [f"{n}={saved.get(n)!r}, now {self.settings.get(n)!r}" for n in names if saved.get(n) != self.settings.get(n)]
        if changes:
            raise ValueError(
                f"{self.path} has other settings: {'; '.join(changes)}. Use the same settings, or choose another --output"
            )
        return content


class MetricsLog:
    """Write metrics to standard output, to `metrics.jsonl`, and to TensorBoard if it is installed.

    Args:
        folder: for `metrics.jsonl` and `tensorboard/`; created if necessary.
        step: at which the training starts or resumes. Metrics of later steps, from an interrupted run, are removed.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.path, self.board = folder / "metrics.jsonl", None
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]  # the last may be cut off
        with atomic_write(self.path) as unfinished:
            unfinished.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics of a step. `metrics.jsonl` has null for values that are not finite."""
        print(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()), flush=True)
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
