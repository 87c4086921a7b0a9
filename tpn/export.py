"""Models as files that run without the code that made them: ONNX, and PyTorch's exported programs (`.pt2`).

A file holds one network for clips of one size, any number at once, and what must be known to feed it: classes, sampling and
transform, as JSON under "tpn" in its metadata. `load` reads it back, for `VideoClassifier` and `tpn predict --onnx`.
"""

import copy
import importlib.util
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tpn
from tpn.models.classifier import TPNClassifier
from tpn.optimize import OptimizedClassifier
from tpn.video.spec import InputSpec
from tpn.zoo.convert import CheckpointError

METADATA = "tpn"
"""The key of `metadata_props` in ONNX, the name of the extra file in `.pt2`."""
TOLERANCE = 1e-4
"""What `max_difference` may be at most."""


def export_onnx(model: TPNClassifier, path: str | os.PathLike[str], *, size: int | None = None) -> Path:
    """Write a model as ONNX, in the opset that PyTorch prefers.

    Input "clips": (B, C, T, size, size) float32, RGB, normalised, any B >= 1. Output "logits": (B, K) float32, features
    (B, num_features) of a model without classes. T is the model's number of frames.

    The file is written in float32 and evaluation mode, whatever the model's dtype, device and mode, which stay as they are; the
    auxiliary head, which only training needs, is left out. It appears under its name when it is complete. Weights of more than
    2 GB, the limit of the format, stand beside it in a second file.

    Args:
        model: a `TPNClassifier` with an `input_spec`. Of an optimized model, export the one that it was made of: ONNX
            runtimes fold batch norms, and choose formats, for the device that they run on.
        path: of the file; its folder is created if need be.
        size: side of the clips in pixels. Default: that of the published views, three crops of `three_crop_size` or one of
            `crop_size`. The short side of videos is scaled with it, so that a smaller clip shows as much of the picture.

    Returns:
        The path.

    Raises:
        ImportError: onnx or onnxscript is missing.
        TypeError, ValueError: not a model as above, or no positive size.
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
    with whole(path) as unfinished:
        program.save(unfinished)
    return Path(path)


def export_pt2(model: TPNClassifier, path: str | os.PathLike[str], *, size: int | None = None) -> Path:
    """Write a model as a program of `torch.export`, for PyTorch without tpn; as `export_onnx` does otherwise.

    A `.pt2` is for the version of PyTorch that wrote it, and later ones as far as these promise; ONNX is for keeps.
    """
    ready, clips, about = _prepare(model, size)
    program = torch.export.export(ready, (clips,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with suppress(ValueError):  # PyTorch 2.6 does not part with them
        program.example_inputs = None  # they would be saved, too: 50 MB for 32 frames of 256 x 256
    with whole(path) as unfinished:
        torch.export.save(program, unfinished, extra_files={METADATA: about})
    return Path(path)


class ExportedClassifier(nn.Module):
    """A model read from a file, for inference; `VideoClassifier` takes it in the place of a `TPNClassifier`.

    Attributes:
        num_classes, num_features, in_chans, labels, input_spec: as those of a `TPNClassifier`.
        about: all that the file says of itself: also "architecture", "model_args" and "tpn_version".

    Shape:
        (B, C, T, S, S) float of the size that was exported → logits (B, K) float32, on the same device
    """

    def __init__(self, run: Callable[[Tensor], Tensor], about: dict[str, Any]) -> None:
        super().__init__()
        self.training = False
        self.run = run
        self.about = about
        self.num_classes: int = about["num_classes"]
        self.num_features: int = about["num_features"]
        self.in_chans: int = about["in_chans"]
        self.labels: tuple[str, ...] | None = None if about["labels"] is None else tuple(about["labels"])
        self.input_spec = InputSpec.from_dict(about["input_spec"])

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
            raise RuntimeError("an exported model is for inference only; train the one that it was made of")
        return self


def load(path: str | os.PathLike[str], *, providers: Sequence[str] = ("CPUExecutionProvider",)) -> ExportedClassifier:
    """Read a file of `export_onnx` or `export_pt2`; which of them is found out.

    An ONNX file holds data only. A `.pt2` is read by `torch.export.load`, which may execute what a file contains: load those that
    you trust.

    Args:
        path: of the file.
        providers: where onnxruntime is to run an ONNX file, see its documentation.

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
    """Return how far logits of an exported file are from the model's: the largest difference, relative to the largest logit.

    Random clips, in batches of 2 and of 1, on the CPU in float32. The model is left as it is.
    """
    exported = load(path)
    clips = torch.randn(2, *_clip_shape(exported.in_chans, exported.input_spec), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = _for_inference(model)(clips)
        got = torch.stack((exported(clips), torch.cat((exported(clips[:1]), expected[1:]))))
    return float((got - expected).abs().max() / expected.abs().max())


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write to; what is written there, and beside it, takes its place when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".incomplete-") as folder:
        yield Path(folder, path.name)
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):  # the file itself comes last
            os.replace(file, path.parent / file.name)


def _prepare(model: TPNClassifier, size: int | None) -> tuple[TPNClassifier, Tensor, str]:
    """Return what is to be exported, clips to trace it with, and the metadata."""
    if isinstance(model, OptimizedClassifier):
        raise ValueError("an optimized model is made for one device; export the one that it was made of")
    if not isinstance(model, TPNClassifier):
        raise TypeError(f"only a TPNClassifier can be exported, got {type(model).__name__}")
    if model.input_spec is None:
        raise ValueError("the model has no input_spec; set model.input_spec = tpn.InputSpec(num_frames=..., ...)")
    spec = _resized(model.input_spec, size)
    # Two clips: PyTorch would take a batch of one for a constant.
    clips = torch.zeros(2, *_clip_shape(model.in_chans, spec))
    return _for_inference(model), clips, _describe(model, spec)


def _for_inference(model: TPNClassifier) -> TPNClassifier:
    ready = copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)
    ready.aux_head = None
    return ready


def _clip_shape(in_chans: int, spec: InputSpec) -> tuple[int, int, int, int]:
    return in_chans, spec.num_frames, spec.crop_size, spec.crop_size


def _resized(spec: InputSpec, size: int | None) -> InputSpec:
    published = spec.three_crop_size if spec.num_crops == 3 else spec.crop_size
    size = published if size is None else size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be a positive number of pixels, got {size!r}")
    short_side = max(round(spec.short_side * size / published), size)
    return replace(spec, crop_size=size, three_crop_size=size, short_side=short_side)


def _describe(model: TPNClassifier, spec: InputSpec) -> str:
    about = {
        "tpn_version": tpn.__version__,
        "architecture": getattr(model, "pretrained_cfg", {}).get("architecture"),
        "model_args": model.model_args,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "in_chans": model.in_chans,
        "labels": model.labels,
        "input_spec": spec.to_dict(),
    }
    return json.dumps(about, ensure_ascii=False)


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
        raise CheckpointError(f"{path}: not a model that tpn exported, it does not say how to feed it; write one with tpn export")
    try:
        return ExportedClassifier(run, json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata are not those of tpn {tpn.__version__}: {error}") from error
