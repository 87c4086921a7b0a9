"""Video files to tensors."""

from tpn.lazy import submodules

__getattr__ = submodules(__name__)
