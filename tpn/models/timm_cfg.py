"""The description of a model in timm's terms."""

from typing import Any

from tpn.config import InputSpec


def timm_cfg(spec: InputSpec, num_classes: int, *, has_aux_head: bool, first_conv: str) -> dict[str, Any]:
    """Return what timm's configs have fields for."""
    return {
        "num_classes": num_classes,
        "first_conv": first_conv,
        "classifier": ("head.fc", "aux_head.fc") if has_aux_head else "head.fc",
        "input_size": (spec.in_chans, spec.crop_size, spec.crop_size),
        "test_input_size": (spec.in_chans, spec.view_size, spec.view_size),
        "interpolation": "bilinear",
        "crop_pct": spec.crop_size / spec.short_side,
        "mean": tuple(round(v / 255, 6) for v in spec.mean),
        "std": tuple(round(v / 255, 6) for v in spec.std),
        "paper_name": "Temporal Pyramid Network for Action Recognition",
        "paper_ids": "arXiv:2004.03548",
    }
