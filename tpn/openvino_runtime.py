"""Convert models to OpenVINO, and run them on a CPU."""

import importlib
import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, partial, reduce
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tpn.devices import cpu_has_amx, fastest_dtype
from tpn.files import StrPath, file_sha256

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
SMALL_ROW = 8
"""Largest number of pixels in a row for `split_small_convolutions`; splitting 14 x 14 was not faster."""
_CORE_LOCK = threading.Lock()


def convert(model: nn.Module, clips: Tensor) -> Any:
    """Return an `openvino.Model` with the input "clips", of the given size but any batch size, and the output "logits"."""
    openvino = _import_openvino()
    backbone: Any = model.backbone
    if hasattr(backbone, "unfolded"):
        model.backbone = backbone.unfolded()
    program = torch.export.export(model, (clips,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    converted = openvino.convert_model(program)
    converted.reshape({0: [-1, *clips.shape[1:]]})
    converted.inputs[0].set_names({"clips"})
    converted.outputs[0].set_names({"logits"})
    return converted


def read(path: StrPath) -> Any:
    """Read an `openvino.Model`. Raises RuntimeError."""
    return _core().read_model(path)


def get_metadata(model: Any, key: str) -> str | None:
    return str(model.get_rt_info(key).value) if model.has_rt_info(key) else None


def save(model: Any, path: Path, key: str, about: dict[str, Any]) -> None:
    """Write a model as `path`, which ends in `.xml`, and a `.bin` file, with metadata and the SHA-256 of the `.bin` file."""
    openvino = _import_openvino()
    write = partial(openvino.save_model, model, path, compress_to_fp16=False)
    write()
    about = about | {"weights_sha256": file_sha256(path.with_suffix(".bin"))}
    model.set_rt_info(json.dumps(about), key)
    write()


def fastest_precision() -> str:
    """Return the key of `PRECISIONS` in which this computer's CPU is fastest."""
    return str(fastest_dtype(torch.device("cpu"))).removeprefix("torch.")


def runner(model: Any, precision: str) -> Callable[[Tensor], Tensor]:
    """Return a function of clips (B, C, T, H, W) that runs a model one clip at a time, with as many threads as PyTorch.

    More clips at once are not faster on a CPU. Calls from several threads wait for each other.

    Args:
        model: an `openvino.Model`.
        precision: a key of `PRECISIONS`. In an int8 model, it applies to layers that are not quantized.
    """
    if precision not in PRECISIONS:
        int8 = "; export the model to int8, which needs videos" if precision == "int8" else ""
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)} or auto with OpenVINO, got {precision!r}{int8}")
    model = model.clone()
    model.reshape({0: [1, *list(model.inputs[0].get_partial_shape())[1:]]})
    if precision == "bfloat16" and cpu_has_amx():
        split_small_convolutions(model)
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
    }
    request = _core().compile_model(model, "CPU", options).create_infer_request()
    lock = threading.Lock()

    def run(x: Tensor) -> Tensor:
        clips = x.detach().float().cpu().numpy()
        with lock:
            logits = [request.infer({0: clip[None]}, share_inputs=True)[0] for clip in clips]
        return torch.from_numpy(np.concatenate(logits)).to(x.device)

    return run


def split_small_convolutions(model: Any) -> None:
    """Write convolutions with rows of few pixels as sums of 1x1x1 ones, one for each position of their kernel.

    AMX multiplies 16 rows of a matrix at once. For larger kernels, OpenVINO passes one row of pixels at a time: 7 pixels use less
    than half of the 16. For a kernel of 1x1x1, it passes the whole map.
    """
    ops: Any = importlib.import_module("openvino.opset13")
    for op in model.get_ordered_ops():
        if op.get_type_name() != "Convolution" or op.input_value(1).get_node().get_type_name() != "Constant":
            continue  # another layer, or quantized
        weight, size = op.input_value(1).get_node().get_data(), np.array(op.output(0).get_shape()[2:])
        kernel, stride = weight.shape[2:], np.array(op.get_strides())
        if np.prod(kernel) == 1 or size[-1] > SMALL_ROW or any(step != 1 for step in op.get_dilations()):
            continue
        axes, ones, zeros = np.arange(2, weight.ndim), [1] * len(kernel), [0] * len(kernel)
        padded = ops.pad(op.input_value(0), [0, 0, *op.get_pads_begin()], [0, 0, *op.get_pads_end()], "constant", np.float32(0))
        products = []
        for start in np.ndindex(kernel):
            pixels = ops.slice(padded, np.array(start), start + stride * (size - 1) + 1, stride, axes)
            tap = np.ascontiguousarray(np.moveaxis(weight, (0, 1), (-2, -1))[start]).reshape(*weight.shape[:2], *ones)
            products.append(ops.convolution(pixels, ops.constant(tap), ones, zeros, zeros, ones))
        op.output(0).replace(reduce(ops.add, products).output(0))


def _import_openvino() -> Any:
    """Return OpenVINO without its usage statistics, for which it forks this process and connects to a server."""
    sys.modules.setdefault("openvino_telemetry", cast("Any", None))
    return importlib.import_module("openvino")


def _core() -> Any:
    """Return the one `openvino.Core` of tpn.

    A Core that compiles gives its thread a stack for signal handlers, and frees it in the end. Several of them may leave the
    thread with a stack that was freed, and the next signal that is handled, such as Ctrl-C, ends the process.
    """
    with _CORE_LOCK:
        return _new_core()


@cache
def _new_core() -> Any:
    return _import_openvino().Core()


def in_other_thread(run: Callable[[], Any]) -> Any:
    """Return the result of a function that makes Cores of its own, as NNCF does: that thread gets their stacks, see `_core`."""
    future: Future[Any] = Future()

    def target() -> None:
        try:
            future.set_result(run())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=target, daemon=True).start()  # Ctrl-C does not wait for it
    return future.result()
