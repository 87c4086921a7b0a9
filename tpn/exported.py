"""Run exported models: ONNX, PyTorch's exported programs (`.pt2`), and OpenVINO (`.xml` with `.bin`).

A file holds one network for clips of one size, with classes, sampling and transform as JSON under "tpn" in its metadata.
`tpn.export` writes them; `VideoClassifier`, `tpn.evaluate` and the commands take such a file in place of a model's name.
"""

import copy
import json
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpn import openvino_runtime
from tpn.config import InputSpec
from tpn.errors import CheckpointError
from tpn.files import StrPath, file_sha256
from tpn.models.classifier import TPNClassifier, require_input_spec
from tpn.validation import check_int, check_temperature, need_packages
from tpn.version import __version__

METADATA = "tpn"
"""Key of `metadata_props` in ONNX and of `rt_info` in OpenVINO, name of the extra file in `.pt2`."""


class ExportedClassifier(nn.Module):
    """A model from an exported file, returned by `load`. `VideoClassifier` accepts it like a `TPNClassifier`.

    Attributes:
        num_classes: as in `TPNClassifier`.
        num_features: as in `TPNClassifier`.
        in_chans: as in `TPNClassifier`.
        multi_label: as in `TPNClassifier`.
        temperature: as in `TPNClassifier`.
        labels: as in `TPNClassifier`.
        input_spec: as in `TPNClassifier`.
        about: the metadata of the file. It includes "model" (the config), "tpn_version", and for an int8 file "precision".
        precision: "float32" or "bfloat16", the precision of the computation. In an int8 file: of layers that are not quantized.
        path: the file; None for a result of `tpn.optimize`.
        report: for a result of `tpn.optimize`, the `OptimizationReport`.

    Shape:
        (B, C, T, S, S) float, B >= 1, with the exported size S → logits (B, K) float32, on the same device
    """

    report: Any = None

    def __init__(
        self, run: Callable[[Tensor], Tensor], about: dict[str, Any], path: Path | None = None, precision: str = "float32"
    ) -> None:
        super().__init__()
        self.run = run
        for part in self.modules():  # an exported program has no eval()
            part.training = False
        self.about = about
        self.path = path
        self.precision = precision
        self.num_classes: int = about["num_classes"]
        self.num_features: int = about["num_features"]
        self.in_chans: int = about["in_chans"]
        self.multi_label: bool = about.get("multi_label", False)  # absent from files of earlier versions
        self.temperature: float = about.get("temperature", 1.0)
        check_temperature(self.temperature)
        self.labels: tuple[str, ...] | None = None if about["labels"] is None else tuple(about["labels"])
        self.input_spec = InputSpec.from_dict(about["input_spec"], self.labels)

    def forward(self, x: Tensor) -> Tensor:
        wanted = self.input_spec.clip_shape
        if x.shape[1:] != wanted or not len(x) or not x.is_floating_point():
            raise ValueError(
                f"the model takes one or more float clips (B, {', '.join(map(str, wanted))}), got {x.dtype} {tuple(x.shape)}; "
                "for another size, export or optimize the original model again"
            )
        return self.run(x)

    def extra_repr(self) -> str:
        clips = ", ".join(map(str, self.input_spec.clip_shape))
        return f"{self.path}, {self.precision}, clips (B, {clips}), {self.num_classes} classes"

    def train(self, mode: bool = True) -> "ExportedClassifier":
        if mode:
            raise RuntimeError("an exported model is for inference only; train the original model")
        return self


def load(
    path: StrPath, *, providers: Sequence[str] = ("CPUExecutionProvider",), precision: str | None = None
) -> ExportedClassifier:
    """Read an exported file.

    ONNX and OpenVINO files hold data only. `torch.export.load` reads a `.pt2` file and may execute its contents: load files that
    you trust.

    Args:
        path: of the file; for OpenVINO, of the `.xml` file, which needs the `.bin` file beside it.
        providers: execution providers of onnxruntime for an ONNX file, see its documentation.
        precision: "float32", or "auto" for the fastest. An OpenVINO file also computes in "bfloat16", and "auto" is bfloat16 on
            CPUs with AMX or AVX512-BF16; in an int8 file, it applies to layers that are not quantized. Default: "auto" for an
            int8 file, otherwise "float32".

    Raises:
        CheckpointError: the file is damaged, or not one that tpn exported.
        FileNotFoundError, IsADirectoryError, PermissionError: it cannot be read.
        ImportError: onnxruntime or OpenVINO is missing.
        ValueError: this file does not compute in this precision.
    """
    path = Path(path)
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if path.suffix == ".xml":
        return _load_openvino(path, precision)
    if precision not in (None, "auto", "float32"):
        raise ValueError(f"{path} computes in float32, got precision={precision!r}; OpenVINO files have a choice")
    return _load_pt2(path) if zipped else _load_onnx(path, providers)


def prepare_export(model: TPNClassifier, size: int | None) -> tuple[TPNClassifier, Tensor, dict[str, Any]]:
    """Return a copy of a model for inference on a CPU, zeros (2, C, T, size, size) to trace it with, and the metadata."""
    if not isinstance(model, TPNClassifier):
        raise TypeError(f"only a TPNClassifier can be exported, got {type(model).__name__}")
    spec = _resized(require_input_spec(model), size)
    # Two clips: PyTorch treats a batch of one as a constant.
    clips = torch.zeros(2, *spec.clip_shape)
    config = None
    with suppress(ValueError):  # models put together by hand have none
        config = model.config.to_dict()
    about = {
        "tpn_version": __version__,
        "model": config,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "in_chans": model.in_chans,
        "multi_label": model.multi_label,
        "temperature": model.temperature,
        "labels": model.labels,
        "input_spec": spec.to_dict(),
    }
    return for_inference(model), clips, about


def for_inference(model: TPNClassifier) -> TPNClassifier:
    ready = copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)
    ready.aux_head = None
    return ready


def _resized(spec: InputSpec, size: int | None) -> InputSpec:
    size = spec.view_size if size is None else size
    check_int("size", size, minimum=1)
    short_side = max(round(spec.short_side * size / spec.view_size), size)
    return replace(spec, crop_size=size, three_crop_size=None if size == short_side else size, short_side=short_side)


def _load_onnx(path: Path, providers: Sequence[str]) -> ExportedClassifier:
    need_packages("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors, which are raised as well
    try:
        session = onnxruntime.InferenceSession(path, options, providers=list(providers))
    except Exception as error:  # onnxruntime's own errors have no narrower base
        raise CheckpointError(f"{path}: damaged, or neither ONNX nor .pt2 ({str(error).strip()})") from error
    about = _parse(path, session.get_modelmeta().custom_metadata_map.get(METADATA))

    def run(x: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"clips": x.detach().float().cpu().numpy()})
        return torch.from_numpy(logits).to(x.device)

    return _classifier(path, run, about)


def _load_pt2(path: Path) -> ExportedClassifier:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # PyTorch itself does not look at the checksums
            name = next((name for name in archive.namelist() if name.endswith(f"/{METADATA}")), None)
            text = archive.read(name).decode() if name and not damaged else None
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: the file is damaged ({error})") from error
    if damaged:
        raise CheckpointError(f"{path}: the file is damaged (checksum of {damaged})")
    about = _parse(path, text)
    return _classifier(path, torch.export.load(path).module(), about)


def _load_openvino(path: Path, precision: str | None) -> ExportedClassifier:
    need_packages("openvino", extra="openvino")
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise CheckpointError(f"{path}: its weights, {weights.name}, are missing; copy both files")
    remedy = "copy both files again, or export the model again"
    try:
        model = openvino_runtime.read(path)
    except (RuntimeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: this file or {weights.name} is damaged, or not an OpenVINO model; {remedy}") from error
    about = _parse(path, openvino_runtime.get_metadata(model, METADATA))
    if about.get("weights_sha256") != file_sha256(weights):
        raise CheckpointError(f"{path}: {weights.name} is damaged, or belongs to another model; {remedy}")
    precision = precision or ("auto" if about.get("precision") == "int8" else "float32")
    if precision == "auto":
        precision = openvino_runtime.fastest_precision()
    return _classifier(path, openvino_runtime.runner(model, precision), about, precision)


def _parse(path: Path, text: str | None) -> dict[str, Any]:
    if text is None:
        raise CheckpointError(f"{path}: not a model that tpn exported; it has no tpn metadata. Export one with tpn export")
    try:
        about = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: the metadata is damaged: {error}") from error
    return about if isinstance(about, dict) else {}


def _classifier(
    path: Path, run: Callable[[Tensor], Tensor], about: dict[str, Any], precision: str = "float32"
) -> ExportedClassifier:
    try:
        return ExportedClassifier(run, about, path, precision)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the metadata does not fit tpn {__version__}: {error}") from error
