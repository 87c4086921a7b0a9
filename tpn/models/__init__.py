"""Networks and blocks: plain nn.Modules on torch alone. The backbones and the neck are registered by this import."""

from tpn.lazy import submodules
from tpn.models import backbones, neck

__all__ = ["backbones", "neck"]
__getattr__ = submodules(__name__)
