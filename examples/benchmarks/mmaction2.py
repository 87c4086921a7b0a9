"""The reference implementation, MMAction2's TPN on SlowOnly R50 8x8, for comparison with the same weights."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tpn
from tpn.zoo.convert import convert_state_dict, load_strict

NEEDED = 'pip install mmaction2 "mmcv-lite<2.2" mmengine importlib_metadata, without transformers, whose import fails there'

# mmaction2's __init__ imports a module that its package on PyPI lacks: https://github.com/open-mmlab/mmaction2/issues/2714
for missing in ("mmaction.models.localizers.drn", "mmaction.models.localizers.drn.drn"):
    sys.modules.setdefault(missing, types.ModuleType(missing)).DRN = None  # type: ignore[attr-defined]


def build(num_classes: int) -> nn.Module:
    """Build the recognizer from MMAction2's registry, with random weights."""
    try:
        import mmaction.models  # noqa: F401
        from mmaction.registry import MODELS
        from mmengine.registry import init_default_scope
    except ImportError as error:
        raise ValueError(f"cannot import MMAction2 ({error}). Run {NEEDED}") from error

    init_default_scope("mmaction")
    backbone = {"type": "ResNet3dSlowOnly", "depth": 50, "pretrained": None, "lateral": False, "out_indices": (2, 3)}
    backbone |= {"conv1_kernel": (1, 7, 7), "inflate": (0, 0, 1, 1), "norm_eval": False}
    fusion = {"in_channels": (1024, 1024), "mid_channels": (1024, 1024), "out_channels": 2048}
    neck = {
        "type": "TPN",
        "in_channels": (1024, 2048),
        "out_channels": 1024,
        "spatial_modulation_cfg": {"in_channels": (1024, 2048), "out_channels": 2048},
        "temporal_modulation_cfg": {"downsample_scales": (8, 8)},
        "upsample_cfg": {"scale_factor": (1, 1, 1)},
        "downsample_cfg": {"downsample_scale": (1, 1, 1)},
        "level_fusion_cfg": fusion | {"downsample_scales": ((1, 1, 1), (1, 1, 1))},
        "aux_head_cfg": {"out_channels": num_classes, "loss_weight": 0.5},
    }
    head = {"type": "TPNHead", "num_classes": num_classes, "in_channels": 2048, "dropout_ratio": 0.5}
    recognizer = {"type": "Recognizer3D", "backbone": backbone, "neck": neck, "cls_head": head, "data_preprocessor": None}
    model: nn.Module = MODELS.build(recognizer)
    return model


class Reference(nn.Module):
    """MMAction2's recognizer with the interface of `TPNClassifier`: clips (B, 3, T, H, W) to logits and auxiliary logits."""

    def __init__(self, recognizer: Any) -> None:
        super().__init__()
        self.recognizer = recognizer

    def forward(self, x: Tensor) -> Tensor:
        features, _ = self.recognizer.extract_feat(x[:, None])
        logits: Tensor = self.recognizer.cls_head(features)
        return logits

    def forward_with_aux(self, x: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.recognizer.backbone(x)
        features, _ = self.recognizer.neck(levels)
        return self.recognizer.cls_head(features), self.recognizer.neck.aux_head(levels[-2])


def build_reference(model: tpn.TPNClassifier) -> Reference:
    """Build the reference, and load its random weights into `model`.

    Raises ValueError if their logits then differ.
    """
    torch.manual_seed(0)
    reference = Reference(build(model.num_classes)).eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    ours, _ = convert_state_dict(reference.recognizer.state_dict())
    load_strict(model, ours)
    clips = torch.randn(2, 3, model.input_spec.num_frames, 64, 64)
    with torch.inference_mode():
        for a, b in zip(reference.forward_with_aux(clips), model.eval().forward_with_aux(clips), strict=True):
            if (difference := float((a - b).abs().max() / a.abs().max())) > 2e-5:
                raise ValueError(f"the logits of mmaction2 and tpn differ by {difference:.1e} of the largest")
    print("mmaction2 and tpn give the same logits")
    return reference


def reader(spec: tpn.InputSpec) -> Callable[[Path], np.ndarray[Any, Any]]:
    """Return a function that reads all views of a video in MMAction2: uint8 (views, 3, T, S, S), ordered by crop, then clip."""
    import mmaction.datasets.transforms  # noqa: F401
    from mmaction.registry import TRANSFORMS

    sample = {"type": "SampleFrames", "clip_len": spec.num_frames, "frame_interval": spec.frame_interval}
    sample |= {"num_clips": spec.num_clips, "test_mode": True}
    steps = [{"type": "DecordInit"}, sample, {"type": "DecordDecode"}, {"type": "Resize", "scale": (-1, spec.short_side)}]
    steps += [{"type": "ThreeCrop", "crop_size": spec.view_size}, {"type": "FormatShape", "input_format": "NCTHW"}]
    transforms = [TRANSFORMS.build(step) for step in steps]

    def read(path: Path) -> np.ndarray[Any, Any]:
        results: dict[str, Any] = {"filename": str(path), "start_index": 0, "modality": "RGB"}
        for transform in transforms:
            results = transform(results)
        images: np.ndarray[Any, Any] = results["imgs"]
        return images

    return read
