"""Time functions in turns: medians, ratios, memory, and the share of the device's attainable speed."""

import copy
import gc
import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tpn.devices import DTYPES, fastest_dtype
from tpn.files import atomic_write

Run = Callable[[], Any]


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: tensors on a GPU, otherwise the whole process.

    Where Linux's VmHWM is missing, it is `ru_maxrss`, in bytes on macOS, which is not less than what the parent process had.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Bench:
    """Time functions in turns; print the results and write them to a file.

    Args:
        device: of the functions.
        repeats: timed calls of each function.
        about: description of the run, for the file.
        output: JSON file, rewritten after each comparison. Default: none.
    """

    def __init__(
        self, device: torch.device, repeats: int, about: dict[str, Any] | None = None, output: Path | None = None
    ) -> None:
        self.device, self.repeats = device, repeats
        self.about, self.output = about, output
        self.results: dict[str, list[dict[str, Any]]] = {}
        self._limits: dict[torch.dtype, tuple[float, float]] = {}

    def compare(self, title: str, runs: dict[str, Run], *, clips: int = 0, work: "list[Work] | None" = None) -> None:
        """Time functions and record the results.

        Args:
            title: of the table.
            runs: functions by name; ratios are relative to the first. With `work`, each name contains a precision.
            clips: processed per call. Default: no clips per second.
            work: layers of the model. Default: no comparison with the floor.
        """
        memory = {name: self._warm_up(run) for name, run in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.repeats):
            for name, run in runs.items():
                seconds[name].append(self.seconds(run))
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        first = next(iter(medians.values()))
        rows = []
        for name, median in medians.items():
            row = {"what": name, "ms": 1e3 * median, "ratio": first / median, "spread": max(seconds[name]) / min(seconds[name])}
            row |= {"clips_per_s": clips / median} if clips else {}
            row |= {"percent_of_floor": 100 * self.floor(work, dtype_in(name)) / median} if work else {}
            row |= {"memory_gib": memory[name] / 2**30} if self.device.type == "cuda" else {}
            rows.append(row)
        self.record(title, rows)

    def record(self, title: str, rows: list[dict[str, Any]]) -> None:
        """Print results and add them to the file."""
        self.results[title] = rows
        self._show(title, rows)
        if self.output is not None:
            with atomic_write(self.output) as unfinished:
                unfinished.write_text(json.dumps({"about": self.about, "results": self.results}, indent=1), encoding="utf-8")

    def floor(self, work: "list[Work]", dtype: torch.dtype) -> float:
        """Return the seconds that the layers take at best: each is limited by arithmetic or by memory, whichever is slower."""
        per_s, bytes_per_s = self.limits(dtype)
        return sum(max(layer.operations / per_s, layer.elements * dtype.itemsize / bytes_per_s) for layer in work)

    def limits(self, dtype: torch.dtype) -> tuple[float, float]:
        """Return the measured limits: operations per second of a large product or convolution, bytes per second of a copy.

        For a CPU without bfloat16 instructions, they are those of float32: PyTorch is slower in other precisions there.
        """
        dtype = torch.float32 if self.device.type == "cpu" and fastest_dtype(self.device) == torch.float32 else dtype
        if dtype not in self._limits:
            size, images = (8192, 64) if self.device.type == "cuda" else (2048, 4)
            like: dict[str, Any] = {"device": self.device, "dtype": dtype, "memory_format": torch.channels_last}
            matrix = torch.randn(size, size).to(self.device, dtype)
            multiply: Any = torch._int_mm if dtype == torch.int8 else torch.mm
            x, weight = torch.randn(images, 512, 28, 28).to(**like), torch.randn(512, 512, 3, 3).to(**like)
            data = torch.zeros(2**28, dtype=torch.uint8, device=self.device)
            copy = torch.empty_like(data)
            rates = [2 * size**3 / min(self.seconds(lambda: multiply(matrix, matrix)) for _ in range(10))]
            if dtype != torch.int8:  # PyTorch has no such convolution
                conv = min(self.seconds(lambda: F.conv2d(x, weight, padding=1)) for _ in range(10))
                rates.append(2 * x.numel() * 512 * 9 / conv)
            seconds = min(self.seconds(lambda: copy.copy_(data)) for _ in range(10))
            self._limits[dtype] = max(rates), 2 * len(data) / seconds
        return self._limits[dtype]

    def seconds(self, run: Run) -> float:
        """Time one call."""
        self._sync()
        start = time.perf_counter()
        run()
        self._sync()
        return time.perf_counter() - start

    def _warm_up(self, run: Run) -> int:
        """Call twice; return the peak memory of the second call in bytes, 0 on a CPU."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        run()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run()
        self._sync()
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _show(self, title: str, rows: list[dict[str, Any]]) -> None:
        table = Table(title=title, title_justify="left", box=None)
        heads = {"what": "", "ms": "ms", "ratio": "ratio", "spread": "max/min", "clips_per_s": "clips/s"}
        heads |= {"percent_of_floor": "floor %", "memory_gib": "GiB", "file_mb": "file MB"}
        shown = [key for key in heads if key in rows[0]]
        for key in shown:
            table.add_column(heads[key], justify="left" if key == "what" else "right", no_wrap=True)
        for row in rows:
            digits = {"ratio": "{:.2f}x", "spread": "{:.2f}", "memory_gib": "{:.2f}"}
            table.add_row(row["what"], *(digits.get(key, "{:.1f}").format(row[key]) for key in shown[1:]))
        Console(width=110).print(table)


@dataclass
class Work:
    """Cost of a layer: multiplications and additions, and elements that are read or written, weights included."""

    operations: int
    elements: int


def layer_work(model: nn.Module, clips: Tensor) -> list[Work]:
    """Return the work of each convolution and linear layer. Other layers could be fused with them."""
    layers: list[Work] = []

    def after(layer: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        weight: Any = layer.weight
        operations = 2 * result.numel() * weight[0].numel()
        layers.append(Work(operations, args[0].numel() + weight.numel() + result.numel()))

    shapes = copy.deepcopy(model).to("meta")  # shapes without computation
    for module in shapes.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            module.register_forward_hook(after)
    with torch.inference_mode():
        shapes(clips.to("meta"))
    return layers


def dtype_in(name: str) -> torch.dtype:
    """Return the precision that a function's name contains."""
    dtypes = DTYPES | {"int8": torch.int8}
    return next(dtypes[word] for word in name.replace(",", " ").split() if word in dtypes)


def fast_half(device: torch.device) -> str | None:
    """Return the half precision in which the device is fastest, or None if that is float32."""
    dtype = fastest_dtype(device)
    return None if dtype == torch.float32 else str(dtype).removeprefix("torch.")
