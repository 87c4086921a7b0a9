"""Pieces of a training loop: order of the batches, validation, checkpoints, metrics. `examples/train.py` puts them together."""

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from tpn.models.classifier import TPNClassifier
from tpn.video.datasets import VideoDataset


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
    that cannot be read is replaced as in training; `examples/evaluate.py` is strict about these.

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


def ranks() -> tuple[int, int]:
    """Return (rank, number of processes) of a distributed run, (0, 1) of any other."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def report_bad_files(path: Path, *datasets: VideoDataset) -> int:
    """Write the unreadable videos that any process has met to `path`, "file <tab> reason"; return their number.

    In a distributed run all processes must call it. Without any, no file is written.
    """
    bad = {file: reason for data in datasets for file, reason in data.bad_files().items()}
    rank, world_size = ranks()
    if world_size > 1:
        parts: list[Any] = [None] * world_size
        dist.all_gather_object(parts, bad)
        bad = {file: reason for part in parts for file, reason in part.items()}
    if bad and rank == 0:
        with whole_file(path, "w") as out:
            out.writelines(f"{file}\t{reason}\n" for file, reason in bad.items())
    return len(bad)


@contextmanager
def whole_file(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file for writing that takes the place of `path` when it is complete and on the disk, and only then.

    A process that is killed meanwhile leaves `path` as it was, and a file `.{name}.unfinished` that the next one overwrites.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, mode, encoding=None if "b" in mode else "utf-8") as file:
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


class Checkpoint:
    """The file from which a training continues; it is a whole one at any moment.

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

    def load(self) -> dict[str, Any]:
        """Restore all parts, return the progress. ValueError if the settings are not those it was written with."""
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        before = content["settings"]
        names = sorted(before.keys() | self.settings.keys())
        other = [f"{n}={before.get(n)!r}, now {self.settings.get(n)!r}" for n in names if before.get(n) != self.settings.get(n)]
        if other:
            raise ValueError(f"{self.path} was written with other settings: {'; '.join(other)}")
        for name, part in self.parts.items():
            part.load_state_dict(content["parts"][name])
        progress: dict[str, Any] = content["progress"]
        return progress


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
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
