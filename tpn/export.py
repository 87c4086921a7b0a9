"""Export models to files that run without this package: ONNX, and PyTorch's exported programs (`.pt2`).

A file holds one network for clips of one size and any batch size, with classes, sampling and transform as JSON under "tpn" in its
metadata. `load` reads it, for `VideoClassifier` and `tpn predict --onnx`.
"""

import copy
import importlib.util
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpn.config import InputSpec
from tpn.errors import CheckpointError
from tpn.files import atomic_write
from tpn.models.classifier import TPNClassifier
from tpn.optimization import OptimizedClassifier
from tpn.validation import check_int
from tpn.version import __version__

METADATA = "tpn"
"""Key of `metadata_props` in ONNX, name of the extra file in `.pt2`."""
TOLERANCE = 1e-4
"""Largest `max_difference` of a valid export."""


def export_onnx(model: TPNClassifier, path: str | os.PathLike[str], *, size: int | None = None) -> Path:
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
        ValueError: the model is optimized or has no input_spec, or size is not positive.
    """
    need_packages("onnx", "onnxscript")
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
    program.model.metadata_props[METADATA] = about
    with atomic_write(path) as unfinished:
        program.save(unfinished)
    return Path(path)


def export_pt2(model: TPNClassifier, path: str | os.PathLike[str], *, size: int | None = None) -> Path:
    """Write a model as a program of `torch.export`, which PyTorch runs without tpn; see `export_onnx`.

    A `.pt2` file is for the version of PyTorch that wrote it, and for later ones within PyTorch's promises; ONNX lasts longer.
    """
    ready, clips, about = _prepare(model, size)
    program = torch.export.export(ready, (clips,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with suppress(ValueError):  # PyTorch 2.6 does not allow it
        program.example_inputs = None  # saved with the program otherwise: 50 MB for 32 frames of 256 x 256
    with atomic_write(path) as unfinished:
        torch.export.save(program, unfinished, extra_files={METADATA: about})
    return Path(path)


class ExportedClassifier(nn.Module):
    """A model that `load` read, for inference; `VideoClassifier` takes it like a `TPNClassifier`.

    Attributes:
        num_classes, num_features, in_chans, multi_label, labels, input_spec: those of the `TPNClassifier`.
        about: the metadata of the file, which also has "model", the config, and "tpn_version".

    Shape:
        (B, C, T, S, S) float of the size that was exported → logits (B, K) float32, on the same device
    """

    def __init__(self, run: Callable[[Tensor], Tensor], about: dict[str, Any]) -> None:
        super().__init__()
        self.run = run
        for part in self.modules():  # an exported program has no eval()
            part.training = False
        self.about = about
        self.num_classes: int = about["num_classes"]
        self.num_features: int = about["num_features"]
        self.in_chans: int = about["in_chans"]
        self.multi_label: bool = about.get("multi_label", False)  # absent from files of earlier versions
        self.labels: tuple[str, ...] | None = None if about["labels"] is None else tuple(about["labels"])
        self.input_spec = InputSpec.from_dict(about["input_spec"], self.labels)

    def forward(self, x: Tensor) -> Tensor:
        wanted = _clip_shape(self.in_chans, self.input_spec)
        if x.shape[1:] != wanted or not x.is_floating_point():
            raise ValueError(
                f"the file was exported for float clips (B, {', '.join(map(str, wanted))}), got {x.dtype} {tuple(x.shape)}; "
                "export the model with another size"
            )
        return self.run(x)

    def train(self, mode: bool = True) -> "ExportedClassifier":
        if mode:
            raise RuntimeError("an exported model is for inference only; train the original model")
        return self


def load(path: str | os.PathLike[str], *, providers: Sequence[str] = ("CPUExecutionProvider",)) -> ExportedClassifier:
    """Read a file of `export_onnx` or `export_pt2`.

    An ONNX file holds data only. `torch.export.load` reads a `.pt2` file and may execute its contents: load files that you trust.

    Args:
        path: of the file.
        providers: execution providers of onnxruntime for an ONNX file, see its documentation.

    Raises:
        CheckpointError: the file is damaged, or not one that tpn exported.
        FileNotFoundError, IsADirectoryError, PermissionError: it cannot be read.
        ImportError: onnxruntime is missing.
    """
    path = Path(path)
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    return _load_pt2(path) if zipped else _load_onnx(path, providers)


def max_difference(model: TPNClassifier, path: str | os.PathLike[str]) -> float:
    """Return the largest difference between the logits of an exported file and the model's, relative to the largest logit.

    Random clips, in batches of 2 and of 1, on the CPU in float32. The model stays unchanged.
    """
    exported = load(path)
    clips = torch.randn(2, *_clip_shape(exported.in_chans, exported.input_spec), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = _for_inference(model)(clips)
        got = torch.stack((exported(clips), torch.cat((exported(clips[:1]), expected[1:]))))
    return float((got - expected).abs().max() / expected.abs().max())


def _prepare(model: TPNClassifier, size: int | None) -> tuple[TPNClassifier, Tensor, str]:
    """Return the model to export, clips to trace it with, and the metadata."""
    if isinstance(model, OptimizedClassifier):
        raise ValueError("an optimized model is made for one device; export the original model")
    if not isinstance(model, TPNClassifier):
        raise TypeError(f"only a TPNClassifier can be exported, got {type(model).__name__}")
    if model.input_spec is None:
        raise ValueError("the model has no input_spec; set model.input_spec = tpn.InputSpec(num_frames=..., ...)")
    spec = _resized(model.input_spec, size)
    # Two clips: PyTorch treats a batch of one as a constant.
    clips = torch.zeros(2, *_clip_shape(model.in_chans, spec))
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
        "labels": model.labels,
        "input_spec": spec.to_dict(),
    }
    return _for_inference(model), clips, json.dumps(about, ensure_ascii=False)


def _for_inference(model: TPNClassifier) -> TPNClassifier:
    ready = copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)
    ready.aux_head = None
    return ready


def _clip_shape(in_chans: int, spec: InputSpec) -> tuple[int, int, int, int]:
    return in_chans, spec.num_frames, spec.crop_size, spec.crop_size


def _resized(spec: InputSpec, size: int | None) -> InputSpec:
    size = spec.view_size if size is None else size
    check_int("size", size, minimum=1)
    short_side = max(round(spec.short_side * size / spec.view_size), size)
    return replace(spec, crop_size=size, three_crop_size=size, short_side=short_side)


def need_packages(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f'{" and ".join(missing)} missing: pip install "tpn[export]"')


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
    text = session.get_modelmeta().custom_metadata_map.get(METADATA)

    def run(x: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"clips": x.detach().float().cpu().numpy()})
        return torch.from_numpy(logits).to(x.device)

    return _classifier(path, run, text)


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
    return _classifier(path, torch.export.load(path).module() if text else nn.Identity(), text)


def _classifier(path: Path, run: Callable[[Tensor], Tensor], text: str | None) -> ExportedClassifier:
    if text is None:
        raise CheckpointError(f"{path}: not a model that tpn exported; it has no tpn metadata. Export one with tpn export")
    try:
        return ExportedClassifier(run, json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the metadata does not fit tpn {__version__}: {error}") from error
