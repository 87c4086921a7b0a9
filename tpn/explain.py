"""Explain a prediction: where in a clip the evidence for a class is, and how much each part of the pyramid adds to it.

Occlusion maps and shares measure how far the logit of a class falls when something is removed: the motion in a box, a level, or a
flow. Grad-CAM maps (Selvaraju et al., ICCV 2017, from captum) need two passes instead of one per box, but are less precise.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tpn.errors import nearest
from tpn.files import StrPath, atomic_write
from tpn.models.classifier import TPNClassifier, unwrapped
from tpn.models.heads import class_probs
from tpn.models.layers import evaluating
from tpn.models.neck import TemporalPyramid
from tpn.optimization import OptimizedClassifier
from tpn.predict import VideoClassifier
from tpn.validation import need_packages
from tpn.video.encode import write_video
from tpn.video.sources import Source, read_clips

Method = Literal["occlusion", "grad-cam"]

MAX_COLUMNS = 8
"""Maximum number of frames in the picture."""
RESOLUTION = 1e-5
"""Share of a logit below which its fall is rounding, not evidence."""
MIN_PANEL_SIZE = 224
"""Minimum side of each panel of the video, in pixels."""


@dataclass(frozen=True)
class Share:
    """What one part of the pyramid adds to a class.

    Attributes:
        logit: the logit of the class minus its logit without the part. Negative if the part is evidence against the class.
        share: `logit` divided by the sum of the absolute values of all levels, or of all flows.
    """

    logit: float
    share: float


@dataclass(frozen=True, eq=False)
class Explanation:
    """The evidence for a class in a clip.

    Attributes:
        frames: the input of the model before normalization, uint8 RGB (T, 3, S, S).
        maps: the evidence at each level, finest first, float32 (T, S, S) >= 0. All zeros for a level without evidence.
        target: index of the class.
        label: name of the class.
        probability: probability of the class for this clip, 0..1.
        levels: the share of each level. Empty for models without a `TemporalPyramid`.
        flows: the shares of the flows "top_down" and "bottom_up", as far as the model has them.
    """

    frames: Tensor
    maps: tuple[Tensor, ...]
    target: int
    label: str
    probability: float
    levels: tuple[Share, ...]
    flows: Mapping[str, Share]

    def save_png(self, path: StrPath) -> None:
        """Write a picture of up to 8 frames with the map of each level below them. Each map has its own scale."""
        from matplotlib.figure import Figure

        indices = np.unique(np.linspace(0, len(self.frames) - 1, MAX_COLUMNS).round().astype(int))
        rows = self._panels()
        figure = Figure(figsize=(0.9 + 1.45 * len(indices), 0.75 + 1.45 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), len(indices), squeeze=False)
        for axes, row, title in zip(grid, rows, ["clip", *self._map_titles()], strict=True):
            axes[0].set_ylabel(title, fontsize=9)
            for cell, index in zip(axes, indices, strict=True):
                cell.imshow(row[index])
                cell.set(xticks=(), yticks=())
                cell.spines[:].set_visible(False)
        for cell, index in zip(grid[0], indices, strict=True):
            cell.set_title(f"frame {index}", fontsize=8)
        flows = ",  ".join(
            f"{name.replace('_', '-')} flow: logit {share.logit:+.1f}, {share.share:.0%}" for name, share in self.flows.items()
        )
        figure.suptitle(f"{self.label}  {self.probability:.1%}" + (f"      {flows}" if flows else ""), fontsize=11)
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, dpi=130)

    def save_mp4(self, path: StrPath, *, fps: int = 4) -> None:
        """Write a video of all frames with the map of each level to the right."""
        zoom = -(-MIN_PANEL_SIZE // self.frames.shape[-1])
        video = np.concatenate(self._panels(), axis=2).repeat(zoom, axis=1).repeat(zoom, axis=2)
        write_video(path, video, fps=fps)

    def _panels(self) -> list[NDArray[np.uint8]]:
        """Return the frames and the overlay of each map, uint8 (T, S, S, 3) each."""
        return [_channels_last(self.frames), *(overlay(self.frames, heat) for heat in self.maps)]

    def _map_titles(self) -> list[str]:
        if not self.levels:
            return [f"level {i}" for i in range(len(self.maps))] if len(self.maps) > 1 else ["last map"]
        return [f"level {i}\nlogit {level.logit:+.1f}, {level.share:.0%}" for i, level in enumerate(self.levels)]


def explain(
    model: VideoClassifier | TPNClassifier,
    source: Source,
    *,
    target: int | str | None = None,
    clip: int | None = None,
    method: Method = "occlusion",
) -> Explanation:
    """Return where in a clip the evidence for a class is, and what each level and flow of the pyramid adds to it.

    The share of a level is how far the logit falls when its map is set to zero after temporal modulation. The share of a flow is
    how far the logit falls when its fused map is set to zero. Parts can replace each other, so the differences do not add up to
    the logit. They do not show how a network that is trained without the part would perform. With `flow_order="cascade"`, all
    levels still pass through the top-down flow to the bottom-up flow when the fused map of one of them is zero.

    Parameters, gradients, and training modes of the model do not change.

    Args:
        model: a `TPNClassifier` with an `input_spec`, or a `VideoClassifier` of one.
        source: a path, or frames as in `VideoClassifier`.
        target: name or index of the class. Default: the most probable class of this clip.
        clip: index of a clip of the model's `num_clips` clips, from 0; its center crop is explained. Default: one clip from the
            middle of the video.
        method: "occlusion", or "grad-cam", which is faster but less precise.

    Returns:
        An `Explanation` on the CPU.

    Raises:
        TypeError: the model is not a `TPNClassifier`.
        ValueError: no such clip, class, or method; the model is compiled or has no classes.
        ImportError: `method` is "grad-cam" and captum is missing.
        VideoError, OSError: the source cannot be read.
    """
    if not isinstance(model, VideoClassifier):
        with evaluating(_require_explainable(unwrapped(model))):
            return explain(VideoClassifier(model), source, target=target, clip=clip, method=method)
    classifier, network = model, _require_explainable(model.model)
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(map(repr, get_args(Method)))}, got {method!r}")
    num_clips = 1 if clip is None else classifier.spec.num_clips
    if clip is not None and clip not in range(num_clips):
        raise ValueError(f"clip must be in 0..{num_clips - 1}, got {clip}")
    class_index = None if target is None else _class_index(target, classifier.labels)
    if method == "grad-cam":
        need_packages("captum", extra="explain")
    spec = classifier.spec.with_views(num_clips, 1)
    video, indices = read_clips(source, spec, classifier.device)
    (crop,) = spec.crop_views(video.to(classifier.device))
    frames = crop[indices[clip or 0]]
    clips = spec.normalize(frames)[None].to(next(network.parameters()).dtype)
    with _frozen(network), torch.no_grad():
        logits = network(clips)[0].float()
        class_index = int(logits.argmax()) if class_index is None else class_index
        levels, flows = _level_and_flow_shares(network, clips, class_index)
        probs = class_probs(logits, multi_label=network.multi_label, temperature=network.temperature)
    maps = (occlusion if method == "occlusion" else grad_cam)(network, clips, class_index)
    return Explanation(
        frames=frames.cpu(),
        maps=tuple(heat[0].cpu() for heat in maps),
        target=class_index,
        label=classifier.labels[class_index],
        probability=float(probs[class_index]),
        levels=levels,
        flows=flows,
    )


def occlusion(model: TPNClassifier, clips: Tensor, target: int | Tensor, *, cells: int = 4) -> tuple[Tensor, ...]:
    """Return how far the logit of a class falls when a part of a clip stands still, as one map per level.

    Each clip is cut into `cells` boxes along time, height, and width. One box at a time shows the mean of all frames, in which
    whatever moves is blurred. (A box of one color appears and disappears, which is a motion of its own.) One level receives the
    features of that clip, the others those of the whole clip. Occlusion from captum supports one output per pass, so it would run
    the backbone again for each level.

    Args:
        model: a `TPNClassifier`. It does not change.
        clips: (B, C, T, H, W), normalized, with the device and dtype of the model.
        target: index of the class, or one index per clip, int64 (B,).
        cells: the backbone runs on `cells ** 3` changed copies of each clip, in batches of `cells`.

    Returns:
        One map per level, finest first, float32 (B, T, H, W) in logits. 0 where the part is evidence against the class, and for
        falls below 0.001% of the logit, which are rounding: the maps of a still clip are 0.
    """
    model = _require_explainable(model)
    size = clips.shape[2:]
    times, rows, columns = (_split(length, min(cells, length)) for length in size)
    with _frozen(model), torch.no_grad():
        batch = len(columns)  # all boxes of a row at once
        targets = torch.as_tensor(target, device=clips.device).expand(len(clips)).repeat(batch)
        features = [level.repeat(batch, 1, 1, 1, 1) for level in _head_features(model, clips)]
        still = clips.mean(dim=2, keepdim=True).expand_as(clips)
        whole = _target_logits(model, features, targets)
        falls = whole.new_zeros(len(features), len(clips), len(times), len(rows), batch)
        for t, y in np.ndindex(len(times), len(rows)):
            changed_clips = []
            for column in columns:
                box = (..., times[t], rows[y], column)
                changed_clips.append(clips.clone())
                changed_clips[-1][box] = still[box]
            for i, changed in enumerate(_head_features(model, torch.cat(changed_clips))):
                mixed = [*features[:i], changed, *features[i + 1 :]]
                falls[i, :, t, y] = (whole - _target_logits(model, mixed, targets)).view(batch, len(clips)).T
    falls[falls < RESOLUTION * whole[: len(clips)].abs().view(-1, 1, 1, 1)] = 0
    return tuple(F.interpolate(level[:, None], size, mode="trilinear")[:, 0] for level in falls)


def grad_cam(model: TPNClassifier, clips: Tensor, target: int | Tensor, *, layer: nn.Module | None = None) -> tuple[Tensor, ...]:
    """Return the Grad-CAM maps of a class, one for each output of a layer.

    Each channel is weighted with the mean over time and space of the gradient of the logit. Negative sums are set to zero.

    Args:
        model: as in `occlusion`.
        clips: as in `occlusion`.
        target: as in `occlusion`.
        layer: a module whose outputs have the shape (B, C', T', H', W'). Default: the backbone, whose outputs are the levels of
            the pyramid before spatial modulation resizes them.

    Returns:
        One map per output, float32 (B, T, H, W) >= 0, without a unit.

    Raises:
        ImportError: captum is missing.
    """
    model = _require_explainable(model)
    need_packages("captum", extra="explain")
    from captum.attr import LayerGradCam

    with _frozen(model):
        found = LayerGradCam(model, model.feature_maps if layer is None else layer).attribute(
            clips, target, relu_attributions=True
        )
    maps = found if isinstance(found, tuple | list) else (found,)
    size = tuple(clips.shape[2:])
    return tuple(F.interpolate(heat.detach().float(), size, mode="trilinear")[:, 0] for heat in maps)


def overlay(frames: Tensor, heat: Tensor) -> NDArray[np.uint8]:
    """Draw a map over gray frames. The maximum of the map is the brightest.

    Args:
        frames: uint8 (T, 3, H, W).
        heat: float (T, H, W) >= 0.

    Returns:
        uint8 (T, H, W, 3).
    """
    from matplotlib import colormaps

    strength = (heat / heat.max().clamp_min(torch.finfo(heat.dtype).tiny)).numpy()
    gray = _channels_last(frames).mean(axis=3, keepdims=True) / 255
    colors = colormaps["inferno"](strength)[..., :3]
    weight = 0.75 * strength[..., None]
    return np.uint8(255 * ((1 - weight) * 0.85 * gray + weight * colors) + 0.5)


def _channels_last(frames: Tensor) -> NDArray[np.uint8]:
    return frames.permute(0, 2, 3, 1).numpy()


def _require_explainable(model: nn.Module) -> TPNClassifier:
    if not isinstance(model, TPNClassifier):
        raise TypeError(f"model must be a TPNClassifier, got {type(model).__name__}; explain the model that it was made from")
    if isinstance(model, OptimizedClassifier) and model.report.compiled:
        raise ValueError("a compiled model cannot be explained; explain the model that it was made from")
    if not model.num_classes:
        raise ValueError("the model has no classes to explain (num_classes=0)")
    return model


def _class_index(target: int | str, labels: Sequence[str]) -> int:
    if isinstance(target, str) and target in labels:
        return labels.index(target)
    if isinstance(target, str) and target.isdecimal():
        target = int(target)
    if isinstance(target, str):
        raise ValueError(f"the model has no class {target!r}; the nearest are {nearest(target, labels)}")
    if isinstance(target, bool) or target not in range(len(labels)):
        raise ValueError(f"target must be a class name or an index in 0..{len(labels) - 1}, got {target}")
    return target


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode and without gradients of parameters, which would keep every activation in memory."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _split(length: int, count: int) -> list[slice]:
    return [slice(int(a), int(b)) for a, b in pairwise(np.linspace(0, length, count + 1).round())]


def _head_features(model: TPNClassifier, clips: Tensor) -> list[Tensor]:
    """Return the backbone's outputs that the rest of the model uses: all levels of a pyramid, otherwise the last one."""
    return list(model.feature_maps(model.backbone(clips)))


def _target_logits(model: TPNClassifier, features: Sequence[Tensor], target: int | Tensor) -> Tensor:
    """Return the logit of the target class for each clip, float32 (B,)."""
    logits: Tensor = model.forward_head(features[-1] if model.neck is None else model.neck(features))
    return logits.float()[torch.arange(len(logits), device=logits.device), target]


def _level_and_flow_shares(model: TPNClassifier, clips: Tensor, target: int) -> tuple[tuple[Share, ...], dict[str, Share]]:
    neck = model.neck
    if not isinstance(neck, TemporalPyramid):
        return (), {}
    features = _head_features(model, clips)
    whole = float(_target_logits(model, features, target))

    def fall_without(part: nn.Module) -> float:
        hook = part.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        try:
            return whole - float(_target_logits(model, features, target))
        finally:
            hook.remove()

    levels = [fall_without(modulation) for modulation in neck.temporal_modulation]
    flow_names = [name for name in ("top_down", "bottom_up") if hasattr(neck, f"{name}_fusion")]
    flows = [fall_without(getattr(neck, f"{name}_fusion")) for name in flow_names]
    return tuple(_shares(levels)), dict(zip(flow_names, _shares(flows), strict=True))


def _shares(falls: Sequence[float]) -> list[Share]:
    total = sum(map(abs, falls)) or 1.0
    return [Share(fall, fall / total) for fall in falls]
