"""Temporal Pyramid Networks for action recognition: models, published weights, video in, class names out.

Every model of `list_models()` is also a function: `tpn.tpn_slowonly_r50_k400(pretrained=True)`.

Names and modules are imported at first use, and with them PyTorch. timm knows the models as soon as both packages are imported.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tpn.lazy import AfterTimm, submodules
from tpn.version import __version__

if TYPE_CHECKING:
    from tpn.config import HeadConfig, InputDefaults, InputSpec, ModelConfig, PartConfig
    from tpn.errors import CheckpointError, UnknownModelError, UploadError, WeightsUnavailableError
    from tpn.models.backbones import ResNet3dSlowOnly, ResNetTSM
    from tpn.models.classifier import TPNClassifier
    from tpn.models.heads import AuxHead, ClassificationHead
    from tpn.models.neck import TemporalPyramid
    from tpn.models.registry import register_backbone, register_neck
    from tpn.optimization import OptimizedClassifier, optimize
    from tpn.predict import Prediction, VideoClassifier
    from tpn.training.config import TrainConfig
    from tpn.training.evaluation import evaluate
    from tpn.training.loop import TrainResult, train
    from tpn.zoo.create import build, create_model, input_spec
    from tpn.zoo.names import list_models, model_info
    from tpn.zoo.publish import push_to_hub
    from tpn.zoo.saved import save_pretrained

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
    "TrainConfig",
    "TrainResult",
    "UnknownModelError",
    "UploadError",
    "VideoClassifier",
    "WeightsUnavailableError",
    "__version__",
    "build",
    "create_model",
    "evaluate",
    "input_spec",
    "list_models",
    "model_info",
    "optimize",
    "push_to_hub",
    "register_backbone",
    "register_neck",
    "save_pretrained",
    "train",
]

_MODULES = {
    "AuxHead": "tpn.models.heads",
    "CheckpointError": "tpn.errors",
    "ClassificationHead": "tpn.models.heads",
    "HeadConfig": "tpn.config",
    "InputDefaults": "tpn.config",
    "InputSpec": "tpn.config",
    "ModelConfig": "tpn.config",
    "OptimizedClassifier": "tpn.optimization",
    "PartConfig": "tpn.config",
    "Prediction": "tpn.predict",
    "ResNet3dSlowOnly": "tpn.models.backbones",
    "ResNetTSM": "tpn.models.backbones",
    "TPNClassifier": "tpn.models.classifier",
    "TemporalPyramid": "tpn.models.neck",
    "TrainConfig": "tpn.training.config",
    "TrainResult": "tpn.training.loop",
    "UnknownModelError": "tpn.errors",
    "UploadError": "tpn.errors",
    "VideoClassifier": "tpn.predict",
    "WeightsUnavailableError": "tpn.errors",
    "build": "tpn.zoo.create",
    "create_model": "tpn.zoo.create",
    "evaluate": "tpn.training.evaluation",
    "input_spec": "tpn.zoo.create",
    "list_models": "tpn.zoo.names",
    "model_info": "tpn.zoo.names",
    "optimize": "tpn.optimization",
    "push_to_hub": "tpn.zoo.publish",
    "register_backbone": "tpn.models.registry",
    "register_neck": "tpn.models.registry",
    "save_pretrained": "tpn.zoo.saved",
    "train": "tpn.training.loop",
}
"""Where each public name is defined."""

_submodule = submodules(__name__)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    try:
        return _submodule(name)
    except AttributeError:
        if name not in _model_names():
            raise
    return getattr(import_module("tpn.zoo.entrypoints"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_model_names()])


def _model_names() -> list[str]:
    from tpn.zoo.names import list_models

    return list_models()


if "timm" in sys.modules:
    import_module("tpn.zoo.entrypoints")
else:
    sys.meta_path.insert(0, AfterTimm("tpn.zoo.entrypoints"))
