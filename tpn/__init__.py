"""Temporal Pyramid Networks for action recognition: models, published weights, video in, class names out."""

from typing import TYPE_CHECKING, Any

from tpn.models.classifier import TPNClassifier
from tpn.models.heads import AuxHead, ClassificationHead
from tpn.models.neck import TemporalPyramid
from tpn.models.resnet3d import ResNet3dSlowOnly
from tpn.models.resnet_tsm import ResNetTSM
from tpn.optimize import OptimizedClassifier, optimize
from tpn.video.spec import InputSpec
from tpn.zoo.convert import CheckpointError
from tpn.zoo.custom import build
from tpn.zoo.hub import UploadError, WeightsUnavailableError
from tpn.zoo.publish import push_to_hub
from tpn.zoo.registry import create_model, input_spec, list_models, model_info
from tpn.zoo.saved import save_pretrained
from tpn.zoo.weights import UnknownModelError

if TYPE_CHECKING:
    from tpn.predict import Prediction, VideoClassifier

__version__ = "0.1.0"

__all__ = [
    "AuxHead",
    "CheckpointError",
    "ClassificationHead",
    "InputSpec",
    "OptimizedClassifier",
    "Prediction",
    "ResNet3dSlowOnly",
    "ResNetTSM",
    "TPNClassifier",
    "TemporalPyramid",
    "UnknownModelError",
    "UploadError",
    "VideoClassifier",
    "WeightsUnavailableError",
    "build",
    "create_model",
    "input_spec",
    "list_models",
    "model_info",
    "optimize",
    "push_to_hub",
    "save_pretrained",
]

_NEED_A_DECODER = {"VideoClassifier": "tpn.predict", "Prediction": "tpn.predict"}
"""Imported on first use: models build and run where no video decoder is installed."""


def __getattr__(name: str) -> Any:
    if name in _NEED_A_DECODER:
        import importlib

        return getattr(importlib.import_module(_NEED_A_DECODER[name]), name)
    raise AttributeError(f"module 'tpn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
