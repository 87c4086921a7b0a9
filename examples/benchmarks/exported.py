"""Compare exported files with the model: for `speed.py --against openvino`."""

import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import Bench, peak_memory

import tpn
from tpn import export, exported, openvino_runtime


def write_files(model: tpn.TPNClassifier, folder: Path) -> dict[str, tuple[Path, str | None]]:
    """Write a model in float32 and in int8, for clips of `crop_size`. Return (file, precision) by name.

    Random clips calibrate int8, and nothing checks its accuracy: `tpn export --int8` does both with real clips.
    """
    size = model.input_spec.crop_size
    export.export_openvino(model, folder / "float32.xml", size=size)
    ready, clips, about = exported.prepare_export(model, size)
    converted = openvino_runtime.convert(ready, clips)
    converted.reshape({0: [1, *clips.shape[1:]]})
    import nncf  # after OpenVINO, whose statistics tpn switches off

    data = [torch.randn(1, *clips.shape[1:], generator=torch.Generator().manual_seed(i)).numpy() for i in range(4)]
    quantized = openvino_runtime.in_other_thread(lambda: nncf.quantize(converted, nncf.Dataset(data), subset_size=len(data)))
    openvino_runtime.save(quantized, folder / "int8.xml", exported.METADATA, about | {"precision": "int8"})
    return {
        "OpenVINO float32": (folder / "float32.xml", None),
        "OpenVINO bfloat16": (folder / "float32.xml", "bfloat16"),
        "OpenVINO int8": (folder / "int8.xml", None),
    }


def first_result(source: str | Path, precision: str | None, threads: int) -> tuple[float, float, int]:
    """Return the seconds from a name or file to the model, to the first result after that, and the peak memory in bytes."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    classifier = tpn.VideoClassifier(source, precision=precision, device="cpu")
    loaded = time.perf_counter()
    spec = classifier.spec
    size = spec.view_size
    classifier(np.zeros((spec.num_frames, size, size, 3), np.uint8), num_clips=1, num_crops=1)
    return loaded - start, time.perf_counter() - loaded, peak_memory(torch.device("cpu"))


def measure_loading(bench: Bench, files: dict[str, tuple[Any, str | None]]) -> None:
    """Time the way from a file to the first result, beyond imports; each in a new process, whose peak memory it is."""
    rows: list[dict[str, Any]] = []
    for name, (source, precision) in files.items():
        measured = []
        for _ in range(bench.repeats):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                measured.append(pool.apply(first_result, (source, precision, torch.get_num_threads())))
        load, first, memory = sorted(measured, key=lambda each: each[0] + each[1])[len(measured) // 2]
        parts = [source, source.with_suffix(".bin")] if source.suffix == ".xml" else list(source.iterdir())
        row = {"what": f"{name}: load {1e3 * load:.0f} ms", "ms": 1e3 * (load + first), "memory_gib": memory / 2**30}
        row["file_mb"] = sum(part.stat().st_size for part in parts) / 1e6
        rows.append(row | {"ratio": (rows[0] if rows else row)["ms"] / row["ms"]})
    bench.record("loading: from a file to the first result", rows)
