import collections.abc

from . import config, errors, models, training, video, zoo
from .config import HeadConfig, InputDefaults, InputSpec, ModelConfig, PartConfig
from .errors import CheckpointError, UnknownModelError, UploadError, WeightsUnavailableError
from .models.backbones import ResNet3dSlowOnly, ResNetTSM
from .models.classifier import TPNClassifier
from .models.heads import AuxHead, ClassificationHead
from .models.neck import TemporalPyramid
from .models.registry import register_backbone, register_neck
from .optimization import OptimizedClassifier, optimize
from .predict import Prediction, VideoClassifier
from .training.config import TrainConfig
from .training.evaluation import evaluate
from .training.loop import TrainResult, train
from .version import __version__
from .zoo.create import build, create_model, input_spec
from .zoo.names import list_models, model_info
from .zoo.publish import push_to_hub
from .zoo.saved import save_pretrained

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
    "config",
    "create_model",
    "errors",
    "evaluate",
    "input_spec",
    "list_models",
    "model_info",
    "models",
    "optimize",
    "push_to_hub",
    "register_backbone",
    "register_neck",
    "save_pretrained",
    "train",
    "training",
    "video",
    "zoo",
]

def __getattr__(name: str) -> collections.abc.Callable[..., TPNClassifier]: ...  # a model of list_models()
