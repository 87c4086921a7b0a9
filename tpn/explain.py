"""Why a model says what it says: where in a clip the evidence lies, and how much each part of the pyramid adds.

All of it is measured by leaving something out: a part of the clip, for a map; a level or a flow, for its share. Grad-CAM
(Selvaraju et al., ICCV 2017; captum's) needs two passes instead of one for every part, and points less well.
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tpn.models.classifier import TPNClassifier
from tpn.models.layers import evaluating
from tpn.models.neck import TemporalPyramid
from tpn.optimize import OptimizedClassifier
from tpn.predict import Source, VideoClassifier, read_clips
from tpn.video.encode import write_video

Method = Literal["occlusion", "grad-cam"]

COLUMNS = 8
"""Frames of a contact sheet, at most."""
SHORT_SIDE = 224
"""Pixels that pictures in a video have at least."""


@dataclass(frozen=True)
class Share:
    """What one part of the pyramid adds to a class.

    Attributes:
        logit: the class's logit, less what it is without the part; negative if the part speaks against the class.
        share: `logit` divided by the sum of their absolute values over the parts of the same kind.
    """

    logit: float
    share: float


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why a model gives a clip a class.

    Attributes:
        frames: what the model saw, uint8 RGB (T, 3, S, S).
        maps: for each level, finest first, the evidence for the class, float32 (T, S, S) >= 0; zeros for a level that has none.
        target, label, probability: the class, its name, and its probability for this clip.
        levels: the share of each level; none without a `TemporalPyramid`.
        flows: the share of each flow, "top_down" and "bottom_up".
    """

    frames: Tensor
    maps: tuple[Tensor, ...]
    target: int
    label: str
    probability: float
    levels: tuple[Share, ...]
    flows: Mapping[str, Share]

    def save_png(self, path: str | os.PathLike[str]) -> None:
        """Write a contact sheet: the frames, and below them each level's map on them; each map has its own scale."""
        from matplotlib.figure import Figure

        shown = np.unique(np.linspace(0, len(self.frames) - 1, COLUMNS).round().astype(int))
        rows = [_pictures(self.frames), *(overlay(self.frames, heat) for heat in self.maps)]
        figure = Figure(figsize=(0.9 + 1.45 * len(shown), 0.75 + 1.45 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), len(shown), squeeze=False)
        for axes, row, title in zip(grid, rows, ["clip", *self._titles()], strict=True):
            axes[0].set_ylabel(title, fontsize=9)
            for cell, frame in zip(axes, shown, strict=True):
                cell.imshow(row[frame])
                cell.set(xticks=(), yticks=())
                cell.spines[:].set_visible(False)
        for cell, frame in zip(grid[0], shown, strict=True):
            cell.set_title(f"frame {frame}", fontsize=8, color="0.4")
        flows = ",  ".join(
            f"{name.replace('_', '-')} flow: logit {share.logit:+.1f}, {share.share:.0%}" for name, share in self.flows.items()
        )
        figure.suptitle(f"{self.label}  {self.probability:.1%}" + (f"      {flows}" if flows else ""), fontsize=11)
        figure.savefig(Path(path), dpi=130)

    def save_mp4(self, path: str | os.PathLike[str], *, fps: int = 4) -> None:
        """Write a video of the frames and, to the right of them, each level's map on them."""
        panels = [_pictures(self.frames), *(overlay(self.frames, heat) for heat in self.maps)]
        times = -(-SHORT_SIDE // self.frames.shape[-1])
        video = np.concatenate(panels, axis=2).repeat(times, axis=1).repeat(times, axis=2)
        even = [(0, 0), *((0, length % 2) for length in video.shape[1:3]), (0, 0)]  # what the codec needs
        write_video(path, np.pad(video, even), fps=fps)

    def _titles(self) -> list[str]:
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
    """Say where in a clip a model sees a class, and what each level and flow of its pyramid adds to it.

    The model is left as it was: modes, gradients, parameters.

    Args:
        model: any `TPNClassifier` with an `input_spec`, or a `VideoClassifier` with one.
        source: a path, or frames as `VideoClassifier` takes them.
        target: the class, its number or name. Default: the most probable one of this clip.
        clip: which of the `num_clips` clips of the model's protocol, from 0. Default: one from the middle of the video. Its
            centre crop is explained.
        method: of the maps: "occlusion", or "grad-cam", which is faster and points less well.

    Returns:
        An `Explanation`, on the CPU. A level's share is how much the logit falls when its map is zero after temporal modulation;
        a flow's, when its fused map is. This is what the trained network makes of a part that is suddenly missing,
        which it has never seen; not what a network trained without it would do. Parts stand in for each other,
        so the differences do not add up to the logit. With the flow order "cascade", all levels still pass through the top-down
        flow to the bottom-up flow, whichever flow's result is left out.

    Raises:
        ImportError: captum is missing, for "grad-cam".
        TypeError, ValueError: no such clip or class; a model that cannot be explained.
        VideoError, FileNotFoundError: the source cannot be read.
    """
    classifier = model if isinstance(model, VideoClassifier) else VideoClassifier(model)
    network = _explainable(classifier.model)
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(map(repr, get_args(Method)))}, got {method!r}")
    num_clips = 1 if clip is None else classifier.spec.num_clips
    if clip is not None and clip not in range(num_clips):
        raise ValueError(f"clip must be in 0..{num_clips - 1}, got {clip}")
    spec = replace(classifier.spec, num_clips=num_clips, num_crops=1, flip=False)
    frames, places = read_clips(source, spec, classifier.device)
    (crop,) = spec.crop_views(frames.to(classifier.device))
    shown = crop[places[clip or 0]]
    clips = spec.normalize(shown)[None].to(next(network.parameters()).dtype)
    with _at_rest(network), torch.no_grad():
        logits = network(clips)[0].float()
        chosen = _class_number(target, classifier.labels) if target is not None else int(logits.argmax())
        levels, flows = _parts(network, clips, chosen)
    maps = (occlusion if method == "occlusion" else grad_cam)(network, clips, chosen)
    return Explanation(
        frames=shown.cpu(),
        maps=tuple(each[0].cpu() for each in maps),
        target=chosen,
        label=classifier.labels[chosen],
        probability=float(logits.softmax(dim=0)[chosen]),
        levels=levels,
        flows=flows,
    )


def occlusion(model: TPNClassifier, clips: Tensor, target: int | Tensor, *, cells: int = 4) -> tuple[Tensor, ...]:
    """Return how much the logit of a class falls where a part of a clip is painted over, a map for each level.

    Time, height and width are cut into `cells` each. Every box in turn gets its mean colour, and one level is told, while the
    others see the whole clip. (captum's Occlusion, which knows one output, would run the backbone anew for every level.)

    Args:
        model: it is left as it was.
        clips: (B, C, T, H, W), normalised, where the model is and in its dtype.
        target: number of the class, or one for each clip, int64 (B,).
        cells: for 4, the backbone sees 64 more clips for each one, 4 at once.

    Returns:
        For each level, finest first, float32 (B, T, H, W) >= 0, in logits; where a part speaks against the class, it is 0.
    """
    model = _explainable(model)
    size = clips.shape[2:]
    times, rows, columns = (_cuts(length, min(cells, length)) for length in size)
    with _at_rest(model), torch.no_grad():
        count = len(columns)  # a row of boxes at once
        targets = torch.as_tensor(target, device=clips.device).expand(len(clips)).repeat(count)
        maps = [each.repeat(count, 1, 1, 1, 1) for each in _levels(model, clips)]
        whole = _logit(model, maps, targets)
        falls = whole.new_zeros(len(maps), len(clips), len(times), len(rows), count)
        for t, y in np.ndindex(len(times), len(rows)):
            covered = [_painted_over(clips, (..., times[t], rows[y], column)) for column in columns]
            for level, changed in enumerate(_levels(model, torch.cat(covered))):
                mixed = [*maps[:level], changed, *maps[level + 1 :]]
                falls[level, :, t, y] = (whole - _logit(model, mixed, targets)).view(count, len(clips)).T
    return tuple(F.interpolate(each[:, None], size, mode="trilinear")[:, 0] for each in falls.clamp(min=0))


def grad_cam(model: TPNClassifier, clips: Tensor, target: int | Tensor, *, layer: nn.Module | None = None) -> tuple[Tensor, ...]:
    """Return Grad-CAM maps of a class, one for each map that a layer gives.

    Each channel is weighted by the mean over time and space of the gradient of the class's logit; what of the sum is above zero
    is enlarged.

    Args:
        model, clips, target: as for `occlusion`.
        layer: what gives the maps, (B, C', T', H', W') each. Default: the backbone, whose maps are the levels of the pyramid
            before spatial modulation brings them to the size of the coarsest.

    Returns:
        For each map, float32 (B, T, H, W) >= 0, in units of its own.
    """
    model = _explainable(model)
    if importlib.util.find_spec("captum") is None:
        raise ModuleNotFoundError('Grad-CAM needs captum: pip install "tpn[explain]"')
    from captum.attr import LayerGradCam

    with _at_rest(model):
        found = LayerGradCam(model, model.maps if layer is None else layer).attribute(clips, target, relu_attributions=True)
    maps = found if isinstance(found, tuple | list) else (found,)
    size = tuple(clips.shape[2:])
    return tuple(F.interpolate(each.detach().float(), size, mode="trilinear")[:, 0] for each in maps)


def overlay(frames: Tensor, heat: Tensor) -> NDArray[np.uint8]:
    """Paint a map (T, H, W) over frames, uint8 (T, 3, H, W); return uint8 (T, H, W, 3). The map's maximum is the brightest."""
    from matplotlib import colormaps

    strength = (heat / heat.max().clamp_min(torch.finfo(heat.dtype).tiny)).numpy()
    gray = _pictures(frames).mean(axis=3, keepdims=True) / 255
    colors = colormaps["inferno"](strength)[..., :3]
    weight = 0.75 * strength[..., None]
    return np.uint8(255 * ((1 - weight) * 0.85 * gray + weight * colors) + 0.5)


def _pictures(frames: Tensor) -> NDArray[np.uint8]:
    return frames.permute(0, 2, 3, 1).numpy()


def _explainable(model: nn.Module) -> TPNClassifier:
    if not isinstance(model, TPNClassifier):
        raise TypeError(f"{type(model).__name__} has no levels to look into; explain the model that it was made of")
    if isinstance(model, OptimizedClassifier) and model.report.compiled:
        raise ValueError("a compiled model cannot be looked into; explain the one that it was made of")
    if not model.num_classes:
        raise ValueError("the model has no classes to explain, num_classes is 0")
    return model


def _class_number(target: int | str, labels: Sequence[str]) -> int:
    if isinstance(target, str):
        if target not in labels and target.isdecimal():
            return _class_number(int(target), labels)
        if target not in labels:
            near = get_close_matches(target, labels, 3, 0) or labels[:3]
            raise ValueError(f"the model has no class {target!r}; the nearest are {', '.join(map(repr, near))}")
        return labels.index(target)
    if isinstance(target, bool) or target not in range(len(labels)):
        raise ValueError(f"target must be a name or a number in 0..{len(labels) - 1}, got {target}")
    return target


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients of parameters, which would keep every activation; then all is as before."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _cuts(length: int, count: int) -> list[slice]:
    return [slice(int(a), int(b)) for a, b in pairwise(np.linspace(0, length, count + 1).round())]


def _painted_over(clips: Tensor, box: tuple[Any, ...]) -> Tensor:
    covered = clips.clone()
    covered[box] = clips[box].mean(dim=(2, 3, 4), keepdim=True)
    return covered


def _levels(model: TPNClassifier, clips: Tensor) -> list[Tensor]:
    """The maps that matter: all of a pyramid, else the last."""
    maps = list(model.maps(model.backbone(clips)))
    return maps[-1:] if model.neck is None else maps


def _logit(model: TPNClassifier, maps: Sequence[Tensor], target: int | Tensor) -> Tensor:
    """Logits (B,) of a class."""
    logits: Tensor = model.forward_head(maps[-1] if model.neck is None else model.neck(maps))
    return logits.float()[torch.arange(len(logits), device=logits.device), target]


def _parts(model: TPNClassifier, clips: Tensor, target: int) -> tuple[tuple[Share, ...], dict[str, Share]]:
    """Return the shares of levels and flows."""
    neck = model.neck
    if not isinstance(neck, TemporalPyramid):
        return (), {}
    maps = _levels(model, clips)
    whole = float(_logit(model, maps, target))

    def loss_without(part: nn.Module) -> float:
        hook = part.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        try:
            return whole - float(_logit(model, maps, target))
        finally:
            hook.remove()

    flows = [name for name in ("top_down", "bottom_up") if hasattr(neck, f"{name}_fusion")]
    levels = [loss_without(modulation) for modulation in neck.temporal_modulation]
    by_flow = [loss_without(getattr(neck, f"{name}_fusion")) for name in flows]
    return tuple(_shares(levels)), dict(zip(flows, _shares(by_flow), strict=True))


def _shares(differences: Sequence[float]) -> list[Share]:
    total = sum(map(abs, differences)) or 1.0
    return [Share(difference, difference / total) for difference in differences]
