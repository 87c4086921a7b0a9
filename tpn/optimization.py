"""Fast inference with a trained model.

Batch norms are folded into the convolutions before them; weights and clips are stored channels-last, in half precision if the
device computes faster in it; and the model is compiled on request.
"""

import copy
import importlib
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tpn import openvino_runtime
from tpn.config import ModelConfig
from tpn.devices import as_dtype, fastest_dtype, resolve_device
from tpn.exported import ExportedClassifier, prepare_export
from tpn.models.backbones.resnet import ResidualBlock
from tpn.models.classifier import ClipsOrMaps, TPNClassifier
from tpn.models.heads import class_probs
from tpn.models.layers import channels_last, reference_tensor
from tpn.validation import need_packages

SMALL_BATCH = 4
"""Largest batch for CUDA graphs: with few clips, a GPU waits for the launch of kernels, which a graph does at once."""


@dataclass(frozen=True)
class OptimizationReport:
    """The result of `optimize`.

    Attributes:
        dtype: precision of the computation. The classifier stays in float32.
        compiled: whether the model is compiled. Compilation happens in the first call with each clip shape.
        folded_norms: number of batch norms folded into convolutions. 0 with OpenVINO, which does not count them.
        max_difference: largest difference of a probability from that of the original model, on the sample. For a model without
            classifier: of a feature, relative to the largest feature.
        same_top1: whether the most probable class of each clip of the sample is the same.
    """

    dtype: torch.dtype
    compiled: bool
    folded_norms: int
    max_difference: float
    same_top1: bool


class OptimizedClassifier(TPNClassifier):
    """A `TPNClassifier` for inference, made by `optimize`. It takes clips of any float dtype; logits are float32.

    Attributes:
        report: an `OptimizationReport`.
    """

    report: OptimizationReport
    _compiled: dict[bool, Callable[[Tensor], Tensor]] | None = None

    def compile_forward(self) -> None:
        """Compile `forward`; for small batches on a GPU also with CUDA graphs."""
        plain = super().forward
        self._compiled = {
            True: torch.compile(plain, mode="reduce-overhead", dynamic=False),
            False: torch.compile(plain, dynamic=False),
        }

    def forward(self, x: Tensor) -> Tensor:
        if self._compiled is None:
            return super().forward(x)
        graphs = x.device.type == "cuda" and len(x) <= SMALL_BATCH
        with torch.inference_mode(), _weights_as_constants(x.device):
            # A copy looks the same to the compiler whether or not the caller's tensor requires gradients: one compilation.
            logits = self._compiled[graphs](self._as_stored(x, copy=True))
        return logits.clone()  # the next run of a graph overwrites its output

    def train(self, mode: bool = True) -> "OptimizedClassifier":
        if mode:
            raise RuntimeError("an optimized model is for inference only; train the original model, and optimize it again")
        super().train(False)
        return self

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("an optimized model cannot be changed; change the original model, and optimize it again")

    @property
    def config(self) -> ModelConfig:
        raise ValueError("an optimized model has no config and cannot be saved; use the original model")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(x.float(), pre_logits)

    def forward_with_aux(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        logits, aux_logits = super().forward_with_aux(x)
        return logits, None if aux_logits is None else aux_logits.float()

    def forward_frames(self, x: Tensor) -> Sequence[Tensor]:
        return super().forward_frames(self._as_stored(x))

    def _backbone_maps(self, x: ClipsOrMaps) -> Sequence[Tensor]:
        return super()._backbone_maps(self._as_stored(x) if isinstance(x, Tensor) else x)

    def _as_stored(self, x: Tensor, copy: bool = False) -> Tensor:
        """Return clips in the dtype and layout of the weights."""
        if not x.is_floating_point() or x.ndim != 5:
            return x  # an error later, as for any model
        return x.to(next(self.parameters()).dtype, copy=copy, memory_format=torch.channels_last_3d)


@overload
def optimize(
    model: TPNClassifier,
    dtype: torch.dtype | str | None = None,
    *,
    compile: bool = False,
    device: str | torch.device | None = None,
    sample: Tensor | None = None,
    backend: Literal["torch"] = "torch",
) -> OptimizedClassifier: ...


@overload
def optimize(
    model: TPNClassifier,
    dtype: torch.dtype | str | None = None,
    *,
    compile: bool = False,
    device: str | torch.device | None = None,
    sample: Tensor | None = None,
    backend: str,
) -> OptimizedClassifier | ExportedClassifier: ...


def optimize(
    model: TPNClassifier,
    dtype: torch.dtype | str | None = None,
    *,
    compile: bool = False,
    device: str | torch.device | None = None,
    sample: Tensor | None = None,
    backend: str = "torch",
) -> OptimizedClassifier | ExportedClassifier:
    """Return a faster copy of a trained model for inference. The original model stays unchanged.

    Args:
        model: any TPNClassifier, in training or evaluation mode.
        dtype: torch.float32, float16, bfloat16, or their names. Default: `fastest_dtype`.
        compile: also use `torch.compile`, on a GPU with CUDA graphs for small batches. The first call with each clip shape then
            takes up to a minute, so use one shape. There are no gradients, and all calls must come from one thread.
        device: where to run. Default: where the model is.
        sample: normalized clips (B, C, T, H, W) for the comparison with the original. Default: one random clip of the size in
            `model.input_spec`.
        backend: "torch", or "openvino" for Intel and AMD CPUs, which is faster than PyTorch and needs no compiler. OpenVINO does
            not support float16, `compile`, and other devices, and the model needs an `input_spec`.
            `tpn.export.export_openvino` writes the same network to a file, also in int8.

    Returns:
        A model that takes clips of any float dtype and layout and returns float32 logits, with a `report`. It cannot be trained,
        changed, or saved. With OpenVINO an `ExportedClassifier`, for clips of the size of `sample`, or of the test views.

    Raises:
        TypeError: not a `TPNClassifier`.
        ValueError: an unknown dtype; no sample for a model without input_spec; an optimized model; logits on the sample that are
            finite in float32 but not in this dtype (float16 ends at 65,504).

    Example:
        >>> fast = tpn.optimize(tpn.create_model("tpn_slowonly_r50_k400", pretrained=True))
        >>> fast.report.max_difference
    """
    if not isinstance(model, TPNClassifier):
        raise TypeError(f"only a TPNClassifier can be optimized, got {type(model).__name__}")
    if isinstance(model, OptimizedClassifier):
        raise ValueError("the model is already optimized; optimize the original model")
    if backend not in ("torch", "openvino"):
        raise ValueError(f"backend must be torch or openvino, got {backend!r}")
    where = reference_tensor(model).device if device is None else resolve_device(device)
    if backend == "openvino":
        if compile or where.type != "cpu":
            raise ValueError(f"OpenVINO runs on the CPU and compiles nothing; got compile={compile}, device={str(where)!r}")
        return _with_openvino(model, fastest_dtype(where) if dtype is None else as_dtype(dtype), sample)
    wanted = fastest_dtype(where) if dtype is None else as_dtype(dtype)
    given = copy.deepcopy(model).to(device=where, dtype=torch.float32).eval().requires_grad_(False)
    if sample is None:
        if given.input_spec is None:
            raise ValueError("sample is needed: the model has no input_spec, which gives the size of its clips")
        sample = torch.randn(1, *given.input_spec.clip_shape, generator=torch.Generator().manual_seed(0))
    clips = sample.to(device=where, dtype=torch.float32)
    with torch.inference_mode():
        expected, pairs = _run(given, clips)

    # `given` must not be run below: its parts move into `fast`.
    if where.type == "cpu" and wanted != torch.float32 and hasattr(given.backbone, "unfolded"):
        given.backbone = cast("Any", given.backbone).unfolded()
    fast = OptimizedClassifier(given.backbone, given.neck, given.head, given.aux_head).eval()
    fast.labels, fast.input_spec, fast.architecture = given.labels, given.input_spec, given.architecture
    for conv, norm in pairs:
        fast.set_submodule(conv, fuse_conv_bn_eval(cast("Any", fast.get_submodule(conv)), cast("Any", fast.get_submodule(norm))))
        fast.set_submodule(norm, nn.Identity().eval())
    for module in fast.modules():
        if isinstance(module, ResidualBlock):
            module.sum_in_place = True
        elif where.type == "cuda" and wanted != torch.float32 and type(module) is nn.Conv3d:
            module.__class__ = fast_on_cuda(module)
    channels_last(fast)
    fast.to(wanted).requires_grad_(False)
    fast.head.float()  # bfloat16 has steps of 1/16 at a logit of 8; the classifier is cheap
    if compile:
        fast.compile_forward()
    with torch.inference_mode():
        got = fast(clips)
    if expected.isfinite().all() and not got.isfinite().all():
        raise ValueError(f"the model's logits are not finite in {wanted}; pass dtype=torch.bfloat16 or torch.float32")
    fast.report = OptimizationReport(wanted, compile, len(pairs), *_compare(given, expected, got))
    return fast


class FramesConv3d(nn.Conv3d):
    """A (1, k, k) convolution in 2D: only there, cuDNN has a fast kernel for three channels, four times as fast on an H200."""

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)
        y = F.conv2d(frames, self.weight.squeeze(2), self.bias, self.stride[1:], self.padding[1:], self.dilation[1:])
        return y.unflatten(0, (len(x), -1)).transpose(1, 2)


class GroupedConv3d(nn.Conv3d):
    """A (k, 1, 1) convolution of stride 1 in groups, as one batched matrix product: cuDNN runs one kernel per group."""

    def forward(self, x: Tensor) -> Tensor:
        pad, groups = cast("int", self.padding[0]), self.groups
        taps = F.pad(x, (0, 0, 0, 0, pad, pad)).unflatten(1, (groups, -1)).unfold(3, self.kernel_size[0], 1)
        y = torch.einsum("bgithwk,goik->bgothw", taps, self.weight.flatten(2).unflatten(0, (groups, -1))).flatten(1, 2)
        y = y if self.bias is None else y + self.bias[:, None, None, None]
        return y.contiguous(memory_format=torch.channels_last_3d)


def fast_on_cuda(conv: nn.Conv3d) -> type[nn.Conv3d]:
    """Return a class that computes the same as this convolution; measured in float16, on maps of ResNets."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return nn.Conv3d
    time, *space = zip(conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True)
    if conv.groups == 1 and conv.in_channels <= 4 and time == (1, 1, 0, 1):
        return FramesConv3d
    if conv.groups > 1 and conv.weight.shape[1] >= 16 and time[1::2] == (1, 1) and set(space) == {(1, 1, 0, 1)}:
        return GroupedConv3d
    return nn.Conv3d


def _with_openvino(model: TPNClassifier, dtype: torch.dtype, sample: Tensor | None) -> ExportedClassifier:
    need_packages("openvino", extra="openvino")
    precision = str(dtype).removeprefix("torch.")
    if precision not in openvino_runtime.PRECISIONS:
        raise ValueError(f"dtype must be one of {', '.join(openvino_runtime.PRECISIONS)} with OpenVINO, got {precision}")
    ready, clips, about = prepare_export(model, None if sample is None else sample.shape[-1])
    if sample is not None and sample.shape[1:] != clips.shape[1:]:
        raise ValueError(f"sample must be square clips (B, {', '.join(map(str, clips.shape[1:]))}), got {tuple(sample.shape)}")
    sample = torch.randn(clips[:1].shape, generator=torch.Generator().manual_seed(0)) if sample is None else sample.cpu().float()
    with torch.inference_mode():
        expected = ready(sample)
    about["id"] = uuid.uuid4().hex  # in place of the hash of a file
    fast = ExportedClassifier(openvino_runtime.runner(openvino_runtime.convert(ready, clips), precision), about, None, precision)
    got = fast(sample)
    fast.report = OptimizationReport(dtype, False, 0, *_compare(model, expected, got))
    return fast


def _weights_as_constants(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU, let the compiler store weights in the layout of its convolutions and fuse the following operations.

    PyTorch's guides for CPUs recommend this setting; `torch.compile` has no argument for it.
    """
    if device.type != "cpu":
        return nullcontext()
    context: AbstractContextManager[Any] = importlib.import_module("torch._inductor.config").patch(freezing=True)
    return context


@dataclass
class _ConvResult:
    """Attached to the output of a convolution."""

    conv: nn.Module
    reads: int = 0


class _CountReads(TorchFunctionMode):
    """Count the operations that read the output of each convolution."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # not x.shape and the like
            for source in {id(leaf): getattr(leaf, "source", None) for leaf in tree_leaves((args, kwargs))}.values():
                if isinstance(source, _ConvResult):
                    source.reads += 1
        return result


def _run(model: TPNClassifier, clips: Tensor) -> tuple[Tensor, list[tuple[str, str]]]:
    """Return the model's result, and the names of convolutions with the batch norm that is the only reader of their output.

    Running the model finds them in any network.
    """
    calls: Counter[nn.Module] = Counter()
    met: list[tuple[_ConvResult, nn.Module]] = []

    def after_conv(module: nn.Module, args: Any, result: Any) -> None:
        calls[module] += 1
        result.source = _ConvResult(module)

    def before_norm(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls[module] += 1
        if isinstance(source := getattr(args[0], "source", None), _ConvResult):
            met.append((source, module))

    hooks = []
    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.Conv3d):
            hooks.append(module.register_forward_hook(after_conv))
        elif type(module) in (nn.BatchNorm2d, nn.BatchNorm3d) and module.running_mean is not None:
            hooks.append(module.register_forward_pre_hook(before_norm))
    with _CountReads():
        result, _ = model.forward_with_aux(clips)
    for hook in hooks:
        hook.remove()
    names = {module: name for name, module in model.named_modules()}
    alone = [(source.conv, norm) for source, norm in met if source.reads == calls[source.conv] == calls[norm] == 1]
    return result, [(names[conv], names[norm]) for conv, norm in alone]


def _compare(model: TPNClassifier, expected: Tensor, got: Tensor) -> tuple[float, bool]:
    """Return `max_difference` and `same_top1` of an `OptimizationReport`."""
    same = bool((expected.argmax(dim=1) == got.argmax(dim=1)).all())
    if not model.num_classes:
        return float((expected - got).abs().max() / expected.abs().max()), same
    kind, temperature = model.multi_label, model.temperature
    probs = [class_probs(logits, multi_label=kind, temperature=temperature) for logits in (expected, got)]
    return float((probs[0] - probs[1]).abs().max()), same
