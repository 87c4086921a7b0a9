"""Backbones, one file per family: clips (B, C, T, H, W) → feature maps (B, C_i, T_i, H_i, W_i), finest first.

Every file of this folder is imported, so that what it registers is known.
"""

from importlib import import_module
from pkgutil import iter_modules

from tpn.models.backbones.slowonly import ResNet3dSlowOnly
from tpn.models.backbones.timm import FoldedBackbone, TemporalShift
from tpn.models.backbones.torchvision import StagedBackbone
from tpn.models.backbones.tsm import ResNetTSM

__all__ = ["FoldedBackbone", "ResNet3dSlowOnly", "ResNetTSM", "StagedBackbone", "TemporalShift"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
