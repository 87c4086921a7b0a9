"""Networks and blocks: plain nn.Modules. The backbones and the neck are registered by this import."""

from pkgutil import iter_modules

import lazy_loader

from tpn.models import backbones as backbones
from tpn.models import neck as neck

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, [module.name for module in iter_modules(__path__)])
