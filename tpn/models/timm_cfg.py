"""The description of a model's input in timm's terms."""

from typing import Any

from tpn.config import InputSpec


def input_cfg(spec: InputSpec) -> dict[str, Any]:
    """Return the part of an input spec that timm's configs have fields for."""
    return {
        "input_size": (spec.in_chans, spec.crop_size, spec.crop_size),
        "test_input_size": (spec.in_chans, spec.view_size, spec.view_size),
        "interpolation": "bilinear",
        "crop_pct": spec.crop_size / spec.short_side,
        "mean": tuple(round(v / 255, 6) for v in spec.mean),
        "std": tuple(round(v / 255, 6) for v in spec.std),
        "paper_name": "Temporal Pyramid Network for Action Recognition",
        "paper_ids": "arXiv:2004.03548",
    }
