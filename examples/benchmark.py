"""Measure speed and memory, as ratios within one run: medians of repeats that take turns.

    python examples/benchmark.py                                        # this library against its own plain float32
    python examples/benchmark.py --against mmaction2 --compile          # against the reference implementation, same weights
    python examples/benchmark.py --against torchvision --only inference  # against torchvision's video models

For `--against mmaction2`: pip install mmaction2 "mmcv-lite<2.2" mmengine importlib_metadata, and no transformers, which its
old code cannot import. Both sides are checked to give the same logits before either is timed.
"""

import argparse
import gc
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tpn.optimize import fastest_dtype
from tpn.training import positive_int

PARTS = ["inference", "latency", "views", "training", "decode", "end-to-end"]
Run = Callable[[], Any]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="tpn_slowonly_r50_k400")
    add("--against", choices=["itself", "mmaction2", "torchvision"], default="itself")
    add("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch-size", type=positive_int, help="of inference and training; default: 32 on a GPU, 2 on a CPU")
    add("--compile", action="store_true", help="also time compiled models")
    add("--repeats", type=positive_int, default=7)
    add("--video", type=Path, help="for decode and end-to-end; default: 10 s of 340 x 256 are rendered")
    add("--output", type=Path, help="write the results as JSON")
    return parser.parse_args()


class Bench:
    """Times callables by turns, and collects what came out."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.results: dict[str, list[dict[str, Any]]] = {}
        self._peak: dict[torch.dtype, float] = {}

    def compare(self, title: str, runs: dict[str, Run], *, clips: int = 0, flops: float = 0.0) -> None:
        """Time the runs, the first of which is 1x. clips, flops: of a run; for clips/s and the share of the device's peak."""
        memory = {name: self._warm_up(run) for name, run in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.repeats):
            for name, run in runs.items():
                self._sync()
                start = time.perf_counter()
                run()
                self._sync()
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        first = next(iter(medians.values()))
        rows = []
        for name, median in medians.items():
            row = {"what": name, "ms": 1e3 * median, "ratio": first / median, "spread": max(seconds[name]) / min(seconds[name])}
            row |= {"clips_per_s": clips / median} if clips else {}
            row |= {"percent_of_peak": 100 * flops / median / self.peak(dtype_of(name))} if flops else {}
            row |= {"memory_gib": memory[name] / 2**30} if self.device.type == "cuda" else {}
            rows.append(row)
        self.results[title] = rows
        self._show(title, rows)

    def peak(self, dtype: torch.dtype) -> float:
        """Multiplications and additions a second of a large matrix product: what this device can do."""
        if dtype not in self._peak:
            size = 8192 if self.device.type == "cuda" else 2048
            a = torch.randn(size, size, device=self.device, dtype=dtype)
            times = []
            for _ in range(10):
                self._sync()
                start = time.perf_counter()
                a @ a
                self._sync()
                times.append(time.perf_counter() - start)
            self._peak[dtype] = 2 * size**3 / min(times)
        return self._peak[dtype]

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
        heads |= {"percent_of_peak": "% of peak", "memory_gib": "GiB"}
        shown = [key for key in heads if key in rows[0]]
        for key in shown:
            table.add_column(heads[key], justify="left" if key == "what" else "right", no_wrap=True)
        for row in rows:
            cells = [row["what"], f"{row['ms']:.1f}", f"{row['ratio']:.2f}x", f"{row['spread']:.2f}"]
            table.add_row(*cells, *(f"{row[key]:.1f}" for key in shown[4:]))
        Console(width=110).print(table)


def dtype_of(name: str) -> torch.dtype:
    """What a run computes in, by its name."""
    return next((dtype for dtype in (torch.float16, torch.bfloat16) if str(dtype).removeprefix("torch.") in name), torch.float32)


def half_of(device: torch.device) -> str | None:
    """The half precision that the device is fast in, if any."""
    dtype = fastest_dtype(device)
    return None if dtype == torch.float32 else str(dtype).removeprefix("torch.")


def build_mmaction2(num_classes: int) -> nn.Module:
    """The reference, TPN on SlowOnly R50 8x8, from MMAction2's own modules; randomly initialised."""
    # The package on PyPI lacks a module that its __init__ imports: https://github.com/open-mmlab/mmaction2/issues/2714
    for name in ("mmaction.models.localizers.drn", "mmaction.models.localizers.drn.drn"):
        sys.modules.setdefault(name, types.ModuleType(name)).DRN = None  # type: ignore[attr-defined]
    import mmaction.models  # noqa: F401
    from mmaction.registry import MODELS
    from mmengine.registry import init_default_scope

    init_default_scope("mmaction")
    backbone = {"type": "ResNet3dSlowOnly", "depth": 50, "pretrained": None, "lateral": False, "out_indices": (2, 3)}
    backbone |= {"conv1_kernel": (1, 7, 7), "inflate": (0, 0, 1, 1), "norm_eval": False}
    fusion = {"in_channels": (1024, 1024), "mid_channels": (1024, 1024), "out_channels": 2048}
    neck = {
        "type": "TPN",
        "in_channels": (1024, 2048),
        "out_channels": 1024,
        "spatial_modulation_cfg": {"in_channels": (1024, 2048), "out_channels": 2048},
        "temporal_modulation_cfg": {"downsample_scales": (8, 8)},
        "upsample_cfg": {"scale_factor": (1, 1, 1)},
        "downsample_cfg": {"downsample_scale": (1, 1, 1)},
        "level_fusion_cfg": fusion | {"downsample_scales": ((1, 1, 1), (1, 1, 1))},
        "aux_head_cfg": {"out_channels": num_classes, "loss_weight": 0.5},
    }
    head = {"type": "TPNHead", "num_classes": num_classes, "in_channels": 2048, "dropout_ratio": 0.5}
    recognizer = {"type": "Recognizer3D", "backbone": backbone, "neck": neck, "cls_head": head, "data_preprocessor": None}
    model: nn.Module = MODELS.build(recognizer)
    return model


class Reference(nn.Module):
    """MMAction2's recognizer with our interface: clips (B, 3, T, H, W) → logits; with labels → loss."""

    def __init__(self, recognizer: Any) -> None:
        super().__init__()
        self.recognizer = recognizer

    def forward(self, x: Tensor) -> Tensor:
        features, _ = self.recognizer.extract_feat(x[:, None])
        logits: Tensor = self.recognizer.cls_head(features)
        return logits

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        from mmaction.structures import ActionDataSample

        samples = [ActionDataSample().set_gt_label(int(label)) for label in labels]
        features, aux = self.recognizer.extract_feat(x[:, None], data_samples=samples)
        aux_loss: Tensor = aux["loss_aux"]["loss_aux"] if "loss_aux" in aux.get("loss_aux", {}) else aux["loss_aux"]
        return F.cross_entropy(self.recognizer.cls_head(features), labels) + aux_loss
