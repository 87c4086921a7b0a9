"""Temporal Pyramid Networks for action recognition: models, published weights, video in, class names out.

Every model of `list_models()` is also a function: `tpn.tpn_slowonly_r50_k400(pretrained=True)`.

`__init__.pyi` lists the names, which are imported at first use, and with them PyTorch. timm knows the models as soon as both
packages are imported.
"""

import sys
from importlib import import_module
from typing import Any

import lazy_loader

from tpn.after_timm import AfterTimm
from tpn.version import __version__ as __version__

_getattr, _dir, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    try:
        return _getattr(name)
    except AttributeError:
        if name not in _model_names():
            raise
    return getattr(import_module("tpn.zoo.entrypoints"), name)


def __dir__() -> list[str]:
    return sorted([*_dir(), *_model_names()])


def _model_names() -> list[str]:
    from tpn.zoo.names import list_models

    return list_models()


if "timm" in sys.modules:
    import_module("tpn.zoo.entrypoints")
else:
    sys.meta_path.insert(0, AfterTimm("tpn.zoo.entrypoints"))
