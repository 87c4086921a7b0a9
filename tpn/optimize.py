"""A trained model, made fast, for inference only.

Batch norms are folded into the convolutions before them; weights and clips are stored channels-last, in half precision where
the device computes faster in it; and the whole is compiled, if asked for.
"""

import copy
import importlib
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tpn.models.classifier import TPNClassifier
from tpn.models.layers import channels_last
from tpn.models.resnet import ResidualBlock

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SMALL_BATCH = 4
"""Up to so many clips a GPU waits for kernels to be started, which CUDA graphs do all at once."""


@dataclass(frozen=True)
class OptimizationReport:
    """What `optimize` did.

    Attributes:
        dtype: that the model computes in; the classifier keeps float32.
        compiled: whether it is compiled; if so, that happens in the first call for a shape of clips.
        folded_norms: batch norms that are now part of a convolution.
        max_difference: the largest difference of a probability from the given model's, on the sample; for a model without
            classifier, of a feature, relative to the largest one.
        same_top1: whether each clip of the sample has the same most probable class.
    """

    dtype: torch.dtype
    compiled: bool
    folded_norms: int
    max_difference: float
    same_top1: bool


class OptimizedClassifier(TPNClassifier):
    """What `optimize` returns: a `TPNClassifier` for inference. It takes clips of any float dtype; logits are float32.

    Attributes:
        report: what was done, and what it changed.
    """

    report: OptimizationReport
    _compiled: dict[bool, Callable[[Tensor], Tensor]] | None = None

    def compile_forward(self) -> None:
        """Compile `forward`, for a GPU a second time with CUDA graphs, for small batches."""
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
            # A copy, so that all calls are alike, whether the caller's tensors know gradients or not: one compilation.
            logits = self._compiled[graphs](self._as_stored(x, copy=True))
        return logits.clone()  # the next run of a graph writes where the last one wrote

    def train(self, mode: bool = True) -> "OptimizedClassifier":
        if mode:
            raise RuntimeError(
                "an optimized model is for inference only; train the one that it was made of, and optimize it again"
            )
        super().train(False)
        return self

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        raise RuntimeError("an optimized model cannot be changed; change the one that it was made of, and optimize it again")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(x.float(), pre_logits)

    def forward_with_aux(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        logits, aux_logits = super().forward_with_aux(x)
        return logits, None if aux_logits is None else aux_logits.float()

    def _feature_maps(self, x: Tensor) -> Any:
        return super()._feature_maps(self._as_stored(x))

    def _as_stored(self, x: Tensor, copy: bool = False) -> Tensor:
        """Clips in the dtype and layout of the weights; what is no clip is an error later, as it is for any model."""
        if not x.is_floating_point() or x.ndim != 5:
            return x
        return x.to(next(self.parameters()).dtype, copy=copy, memory_format=torch.channels_last_3d)


def optimize(
    model: TPNClassifier,
    dtype: torch.dtype | str | None = None,
    *,
    compile: bool = False,
    device: str | torch.device | None = None,
    sample: Tensor | None = None,
) -> OptimizedClassifier:
    """Return a copy of a trained model that computes the same, faster, for inference. The given model is left as it is.

    Args:
        model: any TPNClassifier, in training mode or not.
        dtype: what to compute in: torch.float32, float16, bfloat16, or these names. Default: `fastest_dtype`.
        compile: also `torch.compile` it, on a GPU with CUDA graphs for small batches. The first call for a shape of clips then
            takes up to a minute, so give all of them the same shape. There are no gradients, not even those of the clips, and
            calls must come from one thread.
        device: where to run. Default: where the model is.
        sample: normalised clips (B, C, T, H, W) to compare on. Default: a clip of random numbers, as large as
            `model.input_spec` says.

    Returns:
        A model that takes clips of any float dtype and layout and returns float32 logits, with a `report`. It cannot
        be trained, changed or saved.

    Raises:
        TypeError, ValueError: an unknown dtype; no sample, where the model has no input_spec; the model is optimized already;
            its logits on the sample are finite, and are not in this dtype (float16 ends at 65,504).

    Example:
        >>> fast = tpn.optimize(tpn.create_model("tpn_slowonly_r50_k400", pretrained=True))
        >>> fast.report.max_difference
    """
    if not isinstance(model, TPNClassifier):
        raise TypeError(f"only a TPNClassifier can be optimized, got {type(model).__name__}")
    if isinstance(model, OptimizedClassifier):
        raise ValueError("the model is optimized already; optimize the one that it was made of")
    where = next(model.parameters()).device if device is None else usable_device(device)
    wanted = fastest_dtype(where) if dtype is None else _as_dtype(dtype)
    given = copy.deepcopy(model).to(device=where, dtype=torch.float32).eval().requires_grad_(False)
    clips = _random_clip(given) if sample is None else sample
    clips = clips.to(device=where, dtype=torch.float32)
    with torch.inference_mode():
        expected, pairs = _run(given, clips)

    # From here on `given` is taken apart.
    fast = OptimizedClassifier(given.backbone, given.neck, given.head, given.aux_head).eval()
    fast.labels, fast.input_spec, fast.in_chans = given.labels, given.input_spec, given.in_chans
    for conv, norm in pairs:
        fast.set_submodule(conv, _folded(fast.get_submodule(conv), fast.get_submodule(norm)))
        fast.set_submodule(norm, nn.Identity())
    for module in fast.modules():
        if isinstance(module, ResidualBlock):
            module.sum_in_place = True
    channels_last(fast)
    fast.to(wanted).requires_grad_(False)
    fast.head.float()  # a logit of 8 would have steps of 1/16 in bfloat16; the classifier costs next to nothing
    if compile:
        fast.compile_forward()
    with torch.inference_mode():
        got = fast(clips)
    if expected.isfinite().all() and not got.isfinite().all():
        raise ValueError(f"the model's result is not finite in {wanted}; pass dtype=torch.bfloat16 or torch.float32")
    difference = _difference(expected, got, classes=bool(given.num_classes))
    same = bool((expected.argmax(dim=1) == got.argmax(dim=1)).all())
    fast.report = OptimizationReport(wanted, compile, len(pairs), difference, same)
    return fast


def _weights_as_constants(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU, let the compiler store weights as its convolutions read them, and fuse what follows into these.

    The setting is the one that PyTorch's guides for CPUs name; `torch.compile` has no argument for it.
    """
    if device.type != "cpu":
        return nullcontext()
    context: AbstractContextManager[Any] = importlib.import_module("torch._inductor.config").patch(freezing=True)
    return context


def _folded(conv: Any, norm: Any) -> nn.Module:
    return fuse_conv_bn_eval(conv, norm)


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device of that name. Raises ValueError if it cannot be used here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"cannot use device {str(device)!r}: {reason}") from error
    return torch.device(device)


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Return half precision where the device's own instructions make it faster: float16 on CUDA, bfloat16 on CPUs with AMX or
    AVX512-BF16; else float32."""
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if device.type == "cpu" and _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    cpu: Any = torch.cpu
    if hasattr(cpu, "get_capabilities"):
        has = cpu.get_capabilities()
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())  # in older versions of PyTorch


def _as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted is None or wanted not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return wanted


def _random_clip(model: TPNClassifier) -> Tensor:
    if model.input_spec is None:
        raise ValueError("the model has no input_spec that says how large its clips are; pass some as sample")
    spec = model.input_spec
    shape = (1, model.in_chans, spec.num_frames, spec.crop_size, spec.crop_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@dataclass
class _ConvResult:
    """Tied to the tensor that a convolution gave."""

    conv: nn.Module
    reads: int = 0


class _CountReads(TorchFunctionMode):
    """Counts how many operations read the result of each convolution."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # not x.shape and the like
            for source in {id(leaf): getattr(leaf, "source", None) for leaf in tree_leaves((args, kwargs))}.values():
                if isinstance(source, _ConvResult):
                    source.reads += 1
        return result


def _run(model: TPNClassifier, clips: Tensor) -> tuple[Tensor, list[tuple[str, str]]]:
    """Return the model's result, and the names of convolutions with those of the batch norms that alone read what they give.

    These are found by running the model, whatever it is made of.
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


def _difference(expected: Tensor, got: Tensor, *, classes: bool) -> float:
    """The largest difference of a probability, or without classes of a feature, relative to the largest."""
    if classes:
        return float((expected.softmax(dim=1) - got.softmax(dim=1)).abs().max())
    return float((expected - got).abs().max() / expected.abs().max())
