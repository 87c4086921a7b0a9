"""Devices by name, and the precision in which each is fastest."""

from collections.abc import Mapping
from typing import Any, cast

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device of a name. Raises ValueError if it is not available."""
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda, cuda:N, mps, or xpu, got {device!r}") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"cannot use device {str(device)!r}: {reason}") from error
    return torch.device(device)


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Return float16 on CUDA, bfloat16 on CPUs with AMX or AVX512-BF16, otherwise float32."""
    if device.type == "cuda":
        return torch.float16
    half = device.type == "cpu" and any(_cpu_has().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if half else torch.float32


def cpu_has_amx() -> bool:
    """Return whether this computer's CPU multiplies matrices of bfloat16 in AMX."""
    return bool(_cpu_has().get("amx_bf16"))


def _cpu_has() -> Mapping[str, Any]:
    cpu: Any = torch.cpu
    if hasattr(cpu, "get_capabilities"):
        return cast("Mapping[str, Any]", cpu.get_capabilities())
    return {"avx512_bf16": cpu._is_avx512_bf16_supported(), "amx_bf16": cpu._is_amx_tile_supported()}  # older versions of PyTorch


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a dtype of `DTYPES`, also given by its name. Raises ValueError."""
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted is None or wanted not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return wanted
