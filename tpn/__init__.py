"""Temporal Pyramid Networks for action recognition: models, published weights, video in, class names out.

Every model of `list_models()` is also a function: `tpn.tpn_slowonly_r50_k400(pretrained=True)`.
"""

import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if os.path.basename("".join(sys.orig_argv[-len(sys.argv) :][:1])) == "tpn" and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    # In the program tpn, until `run_cli`: Ctrl-C during these imports, which take seconds, ends it without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

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
    from tpn.training.config import TrainConfig
    from tpn.training.evaluation import evaluate
    from tpn.training.loop import TrainResult, train

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

_LAZY = {
    "Prediction": "tpn.predict",
    "TrainConfig": "tpn.training.config",
    "TrainResult": "tpn.training.loop",
    "VideoClassifier": "tpn.predict",
    "evaluate": "tpn.training.evaluation",
    "train": "tpn.training.loop",
}
"""Modules that are imported on first use: models build and run where no video decoder is installed."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in entrypoints.__all__ and name != "tpn":
        return getattr(entrypoints, name)
    raise AttributeError(f"module 'tpn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *entrypoints.__all__} - {"tpn"})
