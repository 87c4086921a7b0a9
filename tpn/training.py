"""Pieces of a training loop: order of the batches, validation, checkpoints, metrics. `examples/train.py` puts them together."""

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from tpn.models.classifier import TPNClassifier
from tpn.optimize import usable_device
from tpn.video.datasets import TooManyBadFilesError, VideoDataset
from tpn.video.decode import VideoError
from tpn.zoo.hub import WeightsUnavailableError

T = TypeVar("T")


def class_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Return a weight for each class, (K,) float32: inversely proportional to its number of videos, on average 1 over the videos.

    labels: the class of each video, `dataset.labels`.
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
    """Return the batches that one of several devices reads in one epoch: a `batch_sampler` for a DataLoader.

    A step takes the same videos however it is divided among devices and forward passes. Videos that do not fill a last step
    are left out. To continue half-way, leave out the first batches.

    Args:
        labels: the class of each video, `dataset.labels`.
        batch_size: clips of a forward pass on one device.
        seed, epoch: they decide the order, and nothing else does.
        accumulate: forward passes of a step.
        balanced: draw every class equally often, with replacement, instead of every video once.
        rank, world_size: of the device.

    Returns:
        for each forward pass its items, (index, draw) for `VideoDataset`.
    """
    rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order, draws = torch.randperm(len(labels), generator=rng), torch.zeros(len(labels), dtype=torch.int64)
    if balanced:
        weights = class_weights(labels, max(labels) + 1)[torch.tensor(labels)]
        order = torch.multinomial(weights, len(labels), replacement=True, generator=rng)
        draws = torch.arange(len(labels))  # a video that comes twice gives two different clips
    step = batch_size * accumulate * world_size
    items = torch.stack((order, draws), dim=1)[: len(labels) // step * step]
    mine = items.view(-1, world_size, batch_size, 2)[:, rank]
    return [[(index, draw) for index, draw in batch] for batch in mine.tolist()]


@torch.no_grad()
def validate(
    model: TPNClassifier, data: VideoDataset, *, batch_size: int, workers: int = 0, amp: torch.dtype = torch.float32
) -> dict[str, float]:
    """Return val_top1, val_top5 (percent) and val_loss on one clip of each video.

    In a distributed run every process takes its part of the videos, each of which counts once, and gets the same result. A video
    that cannot be read is replaced as in training; `examples/evaluate.py` leaves it out and says so.

    Args:
        data: a data set made with `train=False` and the model's `input_spec`.
        batch_size, workers: of the loader.
        amp: precision of autocast.
    """
    rank, world_size = ranks()
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for frames, labels in DataLoader(Subset(data, range(rank, len(data), world_size)), batch_size, num_workers=workers):
        frames, labels = frames.to(device), labels.to(device)
        with torch.autocast(device.type, amp, enabled=amp != torch.float32):
            logits = model(model.input_spec.normalize(frames)).float()
        hits = logits.topk(min(5, model.num_classes)).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack((hits[:, 0].sum(), hits.sum(), loss, torch.ones_like(labels).sum()))
    model.train(training)
    if world_size > 1:
        dist.all_reduce(sums)
    top1, top5, total_loss, count = sums.tolist()
    return {"val_top1": 100 * top1 / count, "val_top5": 100 * top5 / count, "val_loss": total_loss / count}


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights and buffers, by name, to tell whether results come from the same ones."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def positive_int(text: str) -> int:
    """Read a number of something, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def join_processes(device: str, backend: str | None = None) -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started, if it did; return rank, number of processes, and this one's device.

    device: such as "cuda"; with torchrun each process takes the GPU of its local rank. backend: default "nccl" on GPUs, else
    "gloo". Raises ValueError if the device cannot be used.
    """
    if "RANK" in os.environ and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    place = usable_device(device)
    if "RANK" in os.environ:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        # Of a 1x1 convolution's weight, which is the same in memory whichever of its two layouts it is said to have.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        backend = backend or ("nccl" if device.startswith("cuda") else "gloo")
        # Where only results are exchanged, at the end, the first process may wait long for the last one.
        dist.init_process_group(backend, timeout=timedelta(days=7) if backend == "gloo" else None)
    return *ranks(), place


def ranks() -> tuple[int, int]:
    """Return (rank, number of processes) of a distributed run, (0, 1) of any other."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def same_batch_norms(*modules: nn.Module) -> None:
    """Give the running statistics of the first process to all of them, so that they validate and save the same model."""
    if ranks()[1] > 1:
        for module in modules:
            distribute_bn(module, ranks()[1])


def shared(read: Callable[[], T]) -> T:
    """Call `read` in the first process only; return its value, or raise its error, in all of them."""
    rank, world_size = ranks()
    if world_size == 1:
        return read()
    values: list[Any] = [None]
    if rank == 0:
        try:
            values = [read()]
        except (ValueError, OSError) as error:
            values = [error]
    dist.broadcast_object_list(values)
    if isinstance(values[0], Exception):
        raise values[0]
    value: T = values[0]
    return value


def gathered(value: T) -> list[T]:
    """Return the values of all processes, in all of them."""
    values: list[Any] = [value]
    if ranks()[1] > 1:
        values = [None] * ranks()[1]
        dist.all_gather_object(values, value)
    return values


def command(main: Callable[[], None]) -> None:
    """Run a script's `main`. What its user can cause is one line on standard error and exit code 1, or 130 if interrupted.

    In a distributed run a process that fails does not wait for the others, which may wait for it; torchrun ends them.
    """
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold what the terminal's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except TooManyBadFilesError as error:  # from a loader's process, with its traceback as text before it
        _fail(str(error).rpartition("TooManyBadFilesError: ")[2])
    except torch.OutOfMemoryError as error:
        _fail(f"{str(error).splitlines()[0]} Try a smaller --batch-size.")
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except (ValueError, TypeError, FloatingPointError, WeightsUnavailableError, VideoError) as error:
        _fail(str(error))
    except RuntimeError as error:
        if dist.is_initialized() and (isinstance(error, dist.DistError) or "Connection closed by peer" in str(error)):
            _fail("another process stopped; its message says why")
        traceback.print_exc()
        _fail("")
    if dist.is_initialized():
        dist.destroy_process_group()


def _fail(message: str, code: int = 1) -> NoReturn:
    if message:
        print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)


def report_bad_files(path: Path, *datasets: VideoDataset) -> int:
    """Write the unreadable videos that any process has met to `path`, "file <tab> reason"; return their number.

    In a distributed run all processes must call it. Without any, no file is written. Raises TooManyBadFilesError, in every
    process, if all of them together have met more than a data set's `max_bad` allows.
    """
    everywhere = gathered([data.bad_files() for data in datasets])
    bad = [{file: reason for one in parts for file, reason in one.items()} for parts in zip(*everywhere, strict=True)]
    merged = {file: reason for one in bad for file, reason in one.items()}
    if merged and ranks()[0] == 0:
        with whole_file(path, "w") as out:
            out.writelines(f"{file}\t{reason}\n" for file, reason in merged.items())
    for data, one in zip(datasets, bad, strict=True):
        data.check_bad(one)
    return len(merged)


@contextmanager
def whole_file(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file for writing that takes the place of `path` when it is complete and on the disk, and only then.

    A process that is killed meanwhile leaves `path` as it was, and a file `.{name}.unfinished` that the next one overwrites.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
        with open(unfinished, mode, encoding=encoding, errors=errors) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    os.replace(unfinished, path)


class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class RunningMeans:
    """Means of loss and hits since they were last read; they stay on the device until then.

    In a distributed run all processes must call `collect` and `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, device=device)

    def add(self, loss: Tensor, hits: Tensor) -> None:
        """loss: of a forward pass, a mean over its clips. hits: which of them it got right, bool (B,)."""
        self.sums += torch.stack((loss.detach().float(), hits.float().mean(), torch.ones_like(self.sums[0])))

    def collect(self) -> list[float]:
        """Move the sums of all processes to the first, for a checkpoint; FloatingPointError if a loss was not finite."""
        rank, world_size = ranks()
        if world_size > 1:
            dist.all_reduce(self.sums)
        sums: list[float] = self.sums.tolist()
        if not all(map(math.isfinite, sums)):
            raise FloatingPointError(f"the loss is {sums[0] / sums[2]}; try a smaller --lr, or --amp float32")
        self.sums *= rank == 0
        return sums

    def restore(self, sums: Sequence[float]) -> None:
        """Continue from what `collect` returned."""
        self.sums.copy_(torch.tensor(sums)).mul_(ranks()[0] == 0)

    def read(self) -> dict[str, float]:
        """Return loss and top1 (percent), and start anew."""
        loss, hits, count = self.collect()
        self.sums.zero_()
        return {"loss": loss / count, "top1": 100 * hits / count}


class Checkpoint:
    """The file from which a training continues; it is a whole one at any moment.

    In a distributed run the first process reads it and the others get what it read, so that it need not lie where all see it.

    Args:
        path: of the file.
        parts: what has a state: model, optimizer, ...
        settings: what must be the same when the training continues.
    """

    def __init__(self, path: Path, parts: dict[str, _Stateful], settings: dict[str, Any]) -> None:
        self.path, self.parts, self.settings = path, parts, settings

    def save(self, progress: dict[str, Any]) -> None:
        """Write the state of all parts. progress: where the training is, numbers and strings."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        with whole_file(self.path) as file:
            torch.save({"parts": states, "settings": self.settings, "progress": progress}, file)

    def load(self) -> dict[str, Any] | None:
        """Restore all parts, return the progress, or None if there is no file.

        Raises ValueError if the settings are not those it was written with, or if it is not a checkpoint.
        """
        content = shared(self._read)
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
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            before = content["settings"]
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no checkpoint of such a training; remove it to start anew") from error
        names = sorted(before.keys() | self.settings.keys())
        other = [f"{n}={before.get(n)!r}, now {self.settings.get(n)!r}" for n in names if before.get(n) != self.settings.get(n)]
        if other:
            raise ValueError(
                f"{self.path} was written with other settings: {'; '.join(other)}; keep those, or take another --output"
            )
        whole: dict[str, Any] = content
        return whole


class MetricsLog:
    """Metrics on standard output, as JSON lines and, where it is installed, in TensorBoard.

    Args:
        folder: of `metrics.jsonl` and `tensorboard/`, created if need be.
        step: where the training starts or continues; later lines of an interrupted one are dropped.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.board = folder / "metrics.jsonl", None
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        with whole_file(self.path, "w") as file:
            file.writelines(line + "\n" for line in kept)
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add the values that belong to a step."""
        print(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()), flush=True)
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
