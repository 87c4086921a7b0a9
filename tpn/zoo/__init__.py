"""Names, weights and where they come from."""

from tpn.lazy import submodules

__getattr__ = submodules(__name__)
