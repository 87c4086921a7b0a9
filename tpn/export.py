"""Export models to files that run without this package: ONNX, PyTorch's exported programs (`.pt2`), and OpenVINO.

A file holds one network for clips of one size and any batch size, with classes, sampling and transform as JSON under "tpn" in its
metadata. `load` reads it; `VideoClassifier` and the commands take its name in place of a model's.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpn import openvino_runtime, quantization
from tpn.config import InputSpec
from tpn.exported import METADATA, ExportedClassifier, for_inference, load, prepare_export
from tpn.files import StrPath, atomic_write
from tpn.models.classifier import TPNClassifier
from tpn.optimization import OptimizedClassifier
from tpn.quantization import QuantizationReport
from tpn.validation import need_packages

__all__ = ["ExportedClassifier", "export_onnx", "export_openvino", "export_pt2", "load", "max_difference"]

TOLERANCE = 1e-4
"""Largest `max_difference` of a valid export."""


def export_onnx(model: TPNClassifier, path: StrPath, *, size: int | None = None) -> Path:
    """Write a model as ONNX, in PyTorch's default opset.

    Input "clips": (B, C, T, size, size) float32, RGB, normalized, any B >= 1. Output "logits": (B, K) float32, or features
    (B, num_features) of a model without classes. T is the model's number of frames.

    The file holds the model in float32 and evaluation mode, without the auxiliary head; the given model stays unchanged. Weights
    of more than 2 GB, the limit of the format, go into a second file beside it.

    Args:
        model: a `TPNClassifier` with an `input_spec`. Export the original of an optimized model: ONNX runtimes fold batch norms
            and choose formats for the device that they run on.
        path: of the file; its folder is created if necessary.
        size: side of the clips in pixels. Default: that of the test views, `three_crop_size` for three crops, otherwise
            `crop_size`. The short side of videos is scaled in proportion.

    Returns:
        The path.

    Raises:
        ImportError: onnx or onnxscript is missing.
        TypeError: not a `TPNClassifier`.
        ValueError: the model is optimized or has no input_spec; size is not positive; or the name does not end in `.onnx`.
    """
    need_packages("onnx", "onnxscript")
    path = _checked(path, ".onnx")
    ready, clips, about = _prepare(model, size)
    program: Any = torch.onnx.export(
        ready,
        (clips,),
        dynamo=True,
        input_names=["clips"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    program.model.metadata_props[METADATA] = json.dumps(about)
    with atomic_write(path) as unfinished:
        program.save(unfinished)
    return path


def export_pt2(model: TPNClassifier, path: StrPath, *, size: int | None = None) -> Path:
    """Write a model as a program of `torch.export`, which PyTorch runs without tpn; see `export_onnx`.

    PyTorch loads a `.pt2` file in the version that wrote it, and in later versions within its promises. ONNX files last longer.
    """
    path = _checked(path, ".pt2")
    ready, clips, about = _prepare(model, size)
    program = torch.export.export(ready, (clips,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with suppress(ValueError):  # PyTorch 2.6 does not allow it
        program.example_inputs = None  # saved with the program otherwise: 50 MB for 32 frames of 256 x 256
    with atomic_write(path) as unfinished:
        torch.export.save(program, unfinished, extra_files={METADATA: json.dumps(about)})
    return path


def export_openvino(
    model: TPNClassifier,
    path: StrPath,
    *,
    size: int | None = None,
    calibrate: StrPath | None = None,
    max_drop: float | None = None,
    root: StrPath | None = None,
    template: str | None = None,
    first: int = 1,
) -> QuantizationReport | None:
    """Write a model for OpenVINO: `path`, which ends in `.xml`, and its weights beside it in a `.bin` file.

    Inputs, outputs and metadata are those of `export_onnx`. The metadata has the SHA-256 of the weights, and `load` compares it.

    With `calibrate`, convolutions compute in int8: one clip of each of at most `quantization.MAX_CALIBRATION` videos gives the
    ranges of activations, and clips of other videos the agreement with float32. Layers that cost too much keep their precision.

    Args:
        model: see `export_onnx`.
        size: see `export_onnx`.
        calibrate: videos like those that the model will classify, in any form that `tpn.train` takes. The clips are those of the
            model's sampling and transform.
        max_drop: largest loss of accuracy on the other videos, from 0 to 1. Layers keep their precision until it is reached. The
            videos need the classes of the model. Default: labels do not matter, and layers keep their precision until
            `quantization.MIN_AGREEMENT` of the clips have the same result as in float32: the most probable class, or the classes
            above 0.5 of a multi-label model.
        root: see `tpn.video.datasets.open_dataset`.
        template: see `tpn.video.datasets.open_dataset`.
        first: see `tpn.video.datasets.open_dataset`.

    Returns:
        The measurements on the other videos; None without `calibrate`.

    Raises:
        ImportError: openvino or nncf is missing.
        TypeError: not a `TPNClassifier`.
        ValueError: see `export_onnx`; the name does not end in `.xml`; there are too few videos; the model has no classes; the
            videos have other classes than the model, or several each, with `max_drop`; or no int8 network is good enough.
    """
    need_packages("openvino", *(["nncf"] if calibrate is not None else []), extra="openvino")
    path = _checked(path, ".xml")
    ready, clips, about = _prepare(model, size)
    report = None
    if max_drop is not None and (calibrate is None or model.multi_label or not 0 <= max_drop <= 1):
        raise ValueError(f"max_drop is from 0 to 1, with calibrate and a model for one class per video; got max_drop={max_drop}")
    if calibrate is not None:  # before the conversion, which takes longer
        if not model.num_classes:
            raise ValueError("int8 is compared by its classes, and the model has none; export it without calibrate")
        spec = InputSpec.from_dict(about["input_spec"], model.labels)
        data = quantization.divide_data(
            calibrate, spec, model.labels if max_drop is not None else None, root=root, template=template, first=first
        )
        if max_drop is not None and (len(data[0].classes) != model.num_classes or data[0].multi_label):
            raise ValueError(
                f"max_drop needs videos of one of the model's {model.num_classes} classes each, and {calibrate} has "
                f"{len(data[0].classes)} classes{', several for one video' if data[0].multi_label else ''}"
            )
    converted = openvino_runtime.convert(ready, clips)
    if calibrate is not None:
        converted, report = quantization.quantize(converted, ready, *data, max_drop=max_drop)
        about |= {"precision": "int8", "quantization": vars(report)}
    with atomic_write(path) as unfinished:
        openvino_runtime.save(converted, unfinished, METADATA, about)
    return report


def max_difference(model: TPNClassifier, path: StrPath) -> float:
    """Return the largest difference between the logits of an exported file and the model's, relative to the largest logit.

    Random clips, in batches of 2 and of 1, on the CPU in float32. The model stays unchanged.
    """
    exported = load(path)
    clips = torch.randn(2, *exported.input_spec.clip_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = for_inference(model)(clips)
        got = torch.stack((exported(clips), torch.cat((exported(clips[:1]), expected[1:]))))
    return float((got - expected).abs().max() / expected.abs().max())


def _checked(path: StrPath, suffix: str) -> Path:
    if Path(path).suffix != suffix:  # the name says how to read it
        raise ValueError(f"the name of this file must end in {suffix}, got {str(path)!r}")
    return Path(path)


def _prepare(model: TPNClassifier, size: int | None) -> tuple[TPNClassifier, Tensor, dict[str, Any]]:
    if isinstance(model, OptimizedClassifier):
        raise ValueError("an optimized model is made for one device; export the original model")
    return prepare_export(model, size)
