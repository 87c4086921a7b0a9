"""Timing by turns: medians, ratios, memory, and the share of what the device could do at best."""

import copy
import gc
import json
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

from tpn.optimize import DTYPES, fastest_dtype
from tpn.training import whole_file

Run = Callable[[], Any]


class Bench:
    """Times callables by turns, and collects what came out; in a file, too, which begins with `about` the run."""

    def __init__(
        self, device: torch.device, repeats: int, about: dict[str, Any] | None = None, output: Path | None = None
    ) -> None:
        self.device, self.repeats = device, repeats
        self.about, self.output = about, output
        self.results: dict[str, list[dict[str, Any]]] = {}
        self._limits: dict[torch.dtype, tuple[float, float]] = {}

    def compare(self, title: str, runs: dict[str, Run], *, clips: int = 0, work: "list[Work] | None" = None) -> None:
        """Time the runs, the first of which is 1x. clips: of a run. work: its layers, for the floor."""
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
            row |= {"percent_of_floor": 100 * self.floor(work, dtype_of(name)) / median} if work else {}
            row |= {"memory_gib": memory[name] / 2**30} if self.device.type == "cuda" else {}
            rows.append(row)
        self.record(title, rows)

    def record(self, title: str, rows: list[dict[str, Any]]) -> None:
        """Keep and print results, the first of which is 1x."""
        self.results[title] = rows
        self._show(title, rows)
        if self.output is not None:
            with whole_file(self.output, "w") as file:
                json.dump({"about": self.about, "results": self.results}, file, indent=1)

    def floor(self, work: "list[Work]", dtype: torch.dtype) -> float:
        """Seconds that the layers must take: each by its arithmetic or by what it reads and writes, whichever is more."""
        per_s, bytes_per_s = self.limits(dtype)
        return sum(max(layer.operations / per_s, layer.numbers * dtype.itemsize / bytes_per_s) for layer in work)

    def limits(self, dtype: torch.dtype) -> tuple[float, float]:
        """Operations a second, of a large matrix product or convolution, and bytes a second, of a copy: what the device does."""
        if dtype not in self._limits:
            size, images = (8192, 64) if self.device.type == "cuda" else (2048, 4)
            like: dict[str, Any] = {"device": self.device, "dtype": dtype, "memory_format": torch.channels_last}
            matrix = torch.randn(size, size).to(self.device, dtype)
            x, weight = torch.randn(images, 512, 28, 28).to(**like), torch.randn(512, 512, 3, 3).to(**like)
            data = torch.zeros(2**28, dtype=torch.uint8, device=self.device)
            copy = torch.empty_like(data)
            product = min(self.seconds(lambda: matrix @ matrix) for _ in range(10))
            conv = min(self.seconds(lambda: F.conv2d(x, weight, padding=1)) for _ in range(10))
            seconds = min(self.seconds(lambda: copy.copy_(data)) for _ in range(10))
            self._limits[dtype] = max(2 * size**3 / product, 2 * x.numel() * 512 * 9 / conv), 2 * len(data) / seconds
        return self._limits[dtype]

    def seconds(self, run: Run) -> float:
        self._sync()
        start = time.perf_counter()
        run()
        self._sync()
        return time.perf_counter() - start

    def _warm_up(self, run: Run) -> int:
        """Run twice; return the peak of the device's memory."""
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
        heads |= {"percent_of_floor": "floor %", "memory_gib": "GiB"}
        shown = [key for key in heads if key in rows[0]]
        for key in shown:
            table.add_column(heads[key], justify="left" if key == "what" else "right", no_wrap=True)
        for row in rows:
            digits = {"ratio": "{:.2f}x", "spread": "{:.2f}", "memory_gib": "{:.2f}"}
            table.add_row(row["what"], *(digits.get(key, "{:.1f}").format(row[key]) for key in shown[1:]))
        Console(width=110).print(table)


@dataclass
class Work:
    """What a layer cannot do without: multiplications and additions; numbers read and written, weights included."""

    operations: int
    numbers: int


def work_of(model: nn.Module, clips: Tensor) -> list[Work]:
    """Return the work of each convolution and linear layer; all else could be done on the way."""
    layers: list[Work] = []

    def after(layer: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        weight: Any = layer.weight
        operations = 2 * result.numel() * weight[0].numel()
        layers.append(Work(operations, args[0].numel() + weight.numel() + result.numel()))

    shapes = copy.deepcopy(model).to("meta")  # computes nothing
    for module in shapes.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            module.register_forward_hook(after)
    with torch.inference_mode():
        shapes(clips.to("meta"))
    return layers


def dtype_of(name: str) -> torch.dtype:
    """What a run computes in: the word in its name that is a precision."""
    return next(DTYPES[word] for word in name.replace(",", " ").split() if word in DTYPES)


def half_of(device: torch.device) -> str | None:
    """The half precision that the device is fast in, if any."""
    dtype = fastest_dtype(device)
    return None if dtype == torch.float32 else str(dtype).removeprefix("torch.")
