"""Devices by name, and the precision in which each is fastest."""

from typing import Any

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device of a name. Raises ValueError if it is not available."""
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
    return torch.bfloat16 if device.type == "cpu" and _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    cpu: Any = torch.cpu
    if hasattr(cpu, "get_capabilities"):
        has = cpu.get_capabilities()
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())  # in older versions of PyTorch


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a dtype of `DTYPES`, also given by its name. Raises ValueError."""
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted is None or wanted not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return wanted
