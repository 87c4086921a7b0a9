"""Entry points of torch.hub: torch.hub.load("org/tpn", "tpn_slowonly_r50_k400", pretrained=True)."""

from tpn.zoo.custom import tpn
from tpn.zoo.factories import (
    slowonly_r50_16x4_k400,
    slowonly_r50_32x2_k400,
    slowonly_r50_k400,
    slowonly_r101_16x4_k400,
    slowonly_r101_32x2_k400,
    slowonly_r101_k400,
    tpn_slowonly_r50_16x4_k400,
    tpn_slowonly_r50_32x2_k400,
    tpn_slowonly_r50_k400,
    tpn_slowonly_r101_16x4_k400,
    tpn_slowonly_r101_32x2_k400,
    tpn_slowonly_r101_k400,
    tpn_slowonly_tiny_motion,
    tpn_tsm_r50_sthv1,
    tpn_tsm_r50_sthv2,
    tsm_r50_sthv1,
    tsm_r50_sthv2,
)

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors", "einops", "numpy", "requests"]

__all__ = [
    "slowonly_r50_16x4_k400",
    "slowonly_r50_32x2_k400",
    "slowonly_r50_k400",
    "slowonly_r101_16x4_k400",
    "slowonly_r101_32x2_k400",
    "slowonly_r101_k400",
    "tpn",
    "tpn_slowonly_r50_16x4_k400",
    "tpn_slowonly_r50_32x2_k400",
    "tpn_slowonly_r50_k400",
    "tpn_slowonly_r101_16x4_k400",
    "tpn_slowonly_r101_32x2_k400",
    "tpn_slowonly_r101_k400",
    "tpn_slowonly_tiny_motion",
    "tpn_tsm_r50_sthv1",
    "tpn_tsm_r50_sthv2",
    "tsm_r50_sthv1",
    "tsm_r50_sthv2",
]
