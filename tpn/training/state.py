"""Files of a run: the checkpoint from which it resumes, its metrics, and the lock on its folder."""

import importlib.util
import io
import json
import math
import os
import pickle
import platform
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor, nn

from tpn.files import atomic_write
from tpn.training.distributed import all_gather_object, rank_and_world_size, run_on_rank0
from tpn.video.datasets import VideoDataset


class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Checkpoint:
    """The file from which an interrupted training resumes. At any moment it is complete or absent, and its weights are finite.

    In a distributed run, only rank 0 reads the file; the other processes receive its content.

    Args:
        path: of the file.
        parts: objects with a state dict, such as model and optimizer, by name.
        settings: values that must not change when the training resumes.
    """

    def __init__(self, path: Path, parts: dict[str, _Stateful], settings: dict[str, Any]) -> None:
        self.path, self.parts, self.settings = path, parts, settings

    def save(self, progress: dict[str, Any]) -> None:
        """Write the state of all parts, and the progress of the training: numbers, strings and lists of them.

        Raises FloatingPointError if a weight is not finite, OSError if the file cannot be written.
        """
        states = {name: part.state_dict() for name, part in self.parts.items()}
        for part in self.parts.values():
            if isinstance(part, nn.Module):
                check_finite(part)
        content = io.BytesIO()  # given a file on a full disk, torch.save raises an error that does not say so
        torch.save({"parts": states, "settings": self.settings, "progress": progress}, content)
        with atomic_write(self.path) as unfinished:
            unfinished.write_bytes(content.getbuffer())

    def load(self) -> dict[str, Any] | None:
        """Restore all parts and return the progress, or None if there is no file.

        Raises ValueError if the file is not a checkpoint, is damaged, or has other settings.
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
            with zipfile.ZipFile(self.path) as archive:
                damaged = archive.testzip()  # torch.load does not compare checksums
            if damaged is not None:
                raise RuntimeError(f"the checksum of {damaged} differs")
            content: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            saved = content["settings"]
        except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} is not a checkpoint, or damaged ({str(error).splitlines()[0]}); remove it to start again"
            ) from error
        names = sorted(saved.keys() | self.settings.keys())
        changes = [f"{n}={saved.get(n)!r}, now {self.settings.get(n)!r}" for n in names if saved.get(n) != self.settings.get(n)]
        if changes:
            raise ValueError(
                f"{self.path} has other settings: {'; '.join(changes)}. Use the same settings, or choose another output folder"
            )
        return content


def check_finite(model: nn.Module) -> None:
    """Raise FloatingPointError if a weight or statistic of a model is NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise FloatingPointError(f"{name} is not finite; the model is not saved. Try a smaller lr, or amp float32")


class MetricsLog:
    """Write metrics to `metrics.jsonl`, and to TensorBoard if it is installed.

    Args:
        folder: for `metrics.jsonl` and `tensorboard/`; created if necessary.
        step: at which the training starts or resumes. Metrics of later steps, from an interrupted run, are removed.
        validated_step: step of the last validation. Later validations are removed.
    """

    def __init__(self, folder: Path, step: int = 0, validated_step: int = 0) -> None:
        self.path, self.board = folder / "metrics.jsonl", None
        text = self.path.read_bytes().decode("utf-8", errors="replace") if self.path.exists() else ""
        last = {True: validated_step, False: step}
        lines = [line for line in map(_parse, text.splitlines()) if line is not None]
        self.lines = [line for line in lines if line["step"] <= last["val_loss" in line]]
        with atomic_write(self.path) as unfinished:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics of a step. `metrics.jsonl` has null for values that are not finite."""
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def close(self) -> None:
        """End TensorBoard's thread."""
        if self.board is not None:
            self.board.close()


def _parse(line: str) -> dict[str, Any] | None:
    """Read a line of `metrics.jsonl`; None for one that was cut off or damaged."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


class RunningMeans:
    """Means of loss and accuracy since the last `read`. The sums stay on the device until then.

    In a distributed run, all processes must call `collect` and `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, device=device)

    def add(self, loss: Tensor, hits: Tensor) -> None:
        """Add a forward pass: its mean loss, and which clips were correct, bool (B,). Losses that are not finite are left out."""
        values = torch.stack((loss.detach().float(), hits.float().mean(), torch.ones_like(self.sums[0])))
        self.sums += torch.where(values[0].isfinite(), values, 0)

    def collect(self) -> list[float]:
        """Move the sums of all processes to rank 0 and return them, for a checkpoint."""
        rank, world_size = rank_and_world_size()
        if world_size > 1:
            dist.all_reduce(self.sums)
        sums: list[float] = self.sums.tolist()
        self.sums *= rank == 0
        return sums

    def restore(self, sums: Sequence[float]) -> None:
        """Continue from the sums that `collect` returned."""
        self.sums.copy_(torch.tensor(sums)).mul_(rank_and_world_size()[0] == 0)

    def read(self) -> dict[str, float]:
        """Return loss and top1 (percent), and reset the sums."""
        loss, hits, count = self.collect()
        self.sums.zero_()
        return {"loss": loss / count, "top1": 100 * hits / count} if count else {}


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of an output folder. Raises ValueError that names the process which uses it."""
    if rank_and_world_size()[0] > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / ".run.pid"
    try:
        with FileLock(folder / ".run.lock", timeout=0):
            owner.write_text(f"{os.getpid()} on {platform.node()}")
            yield
    except Timeout as error:
        process = owner.read_text() if owner.exists() else "unknown"
        raise ValueError(
            f"{folder} is in use by another run, process {process}; wait for it, or choose another output"
        ) from error


def report_bad_files(path: Path, data: VideoDataset, others: Mapping[str, str] | None = None) -> None:
    """Write the unreadable videos of all processes to a file, one "path<tab>reason" per line.

    In a distributed run, all processes must call it. Without unreadable videos, no file is written.

    Args:
        path: of the file.
        data: a dataset that has been read.
        others: further videos with their reasons.

    Raises:
        TooManyBadFilesError: in every process, if the dataset has more of them than its `max_bad` allows.
    """
    bad = {file: reason for part in all_gather_object(data.bad_files()) for file, reason in part.items()}
    if (bad or others) and rank_and_world_size()[0] == 0:
        lines = [f"{file}\t{reason}\n" for file, reason in {**bad, **(others or {})}.items()]
        with atomic_write(path) as unfinished:
            unfinished.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    data.check_bad(bad)
