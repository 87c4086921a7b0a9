"""Runs of several processes that torchrun starts."""

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.utils import distribute_bn
from torch import nn

from tpn.devices import resolve_device

T = TypeVar("T")


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
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    if "RANK" in os.environ and not dist.is_initialized():
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        # Harmless: it is about 1x1 convolutions, whose memory is the same in both layouts.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        backend = backend or ("nccl" if device.startswith("cuda") else "gloo")
        # With gloo, an evaluation exchanges only its results, and the first process may wait long for the slowest.
        dist.init_process_group(backend, timeout=timedelta(days=7) if backend == "gloo" else None)
    return *rank_and_world_size(), place


def end_with_parent() -> None:
    """Let the kernel kill this process as soon as its parent has ended, even by SIGKILL. It does nothing on other systems."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, ctypes.c_ulong(signal.SIGKILL))  # PR_SET_PDEATHSIG


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
