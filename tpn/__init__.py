"""Temporal Pyramid Networks for action recognition: models, published weights, video in, class names out.

Every model of `list_models()` is also a function: `tpn.tpn_slowonly_r50_k400(pretrained=True)`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tpn.config import HeadConfig, InputDefaults, InputSpec, ModelConfig, PartConfig
from tpn.errors import CheckpointError, UnknownModelError, UploadError, WeightsUnavailableError
from tpn.models.backbones import ResNet3dSlowOnly, ResNetTSM
from tpn.models.classifier import TPNClassifier
from tpn.models.heads import AuxHead, ClassificationHead
from tpn.models.neck import TemporalPyramid
from tpn.models.registry import register_backbone, register_neck
from tpn.optimization import OptimizedClassifier, optimize
from tpn.version import __version__
from tpn.zoo import entrypoints
from tpn.zoo.create import build, create_model, input_spec, list_models, model_info
from tpn.zoo.publish import push_to_hub
from tpn.zoo.saved import save_pretrained

if TYPE_CHECKING:
    from tpn.predict import Prediction, VideoClassifier

__all__ = [
    "AuxHead",
    "CheckpointError",
    "ClassificationHead",
    "HeadConfig",
    "InputDefaults",
    "InputSpec",
    "ModelConfig",
    "OptimizedClassifier",
    "PartConfig",
    "Prediction",
    "ResNet3dSlowOnly",
    "ResNetTSM",
    "TPNClassifier",
    "TemporalPyramid",
    "UnknownModelError",
    "UploadError",
    "VideoClassifier",
    "WeightsUnavailableError",
    "__version__",
    "build",
    "create_model",
    "input_spec",
    "list_models",
    "model_info",
    "optimize",
    "push_to_hub",
    "register_backbone",
    "register_neck",
    "save_pretrained",
]

_NEEDS_DECODER = {"VideoClassifier", "Prediction"}
"""Imported on first use: models build and run where no video decoder is installed."""


def __getattr__(name: str) -> Any:
    if name in _NEEDS_DECODER:
        return getattr(import_module("tpn.predict"), name)
    if name in entrypoints.__all__ and name != "tpn":
        return getattr(entrypoints, name)
    raise AttributeError(f"module 'tpn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *entrypoints.__all__} - {"tpn"})
