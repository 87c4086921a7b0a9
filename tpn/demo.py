"""Classify a video along time and draw the result, for `tpn demo`."""

import importlib.util
import os
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tpn.models.heads import class_probs
from tpn.predict import Prediction, VideoClassifier
from tpn.video import decode, motion
from tpn.video.encode import write_video

SCENES = (("moving right", 2.0), ("turning clockwise", 4.0), ("swinging up and down", 3.0), ("growing", 2.5), ("blinking", 5.0))
"""Motion and tempo of each scene of the rendered video."""
SCENE_FRAMES = 60
NUM_CLIPS, NUM_PICTURES, NUM_CURVES = 40, 10, 5


@dataclass(frozen=True)
class Analysis:
    """The predictions for a video along time.

    Attributes:
        prediction: the mean over all clips.
        times: center of each clip in seconds (V,).
        probs: probabilities of each clip (V, K).
        pictures: evenly spaced frames, uint8 (N, 3, H, W).
        picture_times: their times in seconds (N,).
        duration: of the video, in seconds.
    """

    prediction: Prediction
    times: NDArray[np.float64]
    probs: NDArray[np.float32]
    pictures: Tensor
    picture_times: NDArray[np.float64]
    duration: float


def render_video(path: str | os.PathLike[str]) -> None:
    """Write a video of one shape that moves as `SCENES` says."""
    parts = [(motion.CLASSES.index(name), tempo, SCENE_FRAMES) for name, tempo in SCENES]
    write_video(path, motion.render_sequence(parts, seed=12), fps=motion.FPS)


def analyze(classifier: VideoClassifier, video: str | os.PathLike[str]) -> Analysis:
    """Classify evenly spaced clips of a video.

    Raises:
        ValueError: the model samples segments of the whole video instead of clips.
        VideoError, OSError: the video cannot be read.
    """
    spec = classifier.spec
    if spec.sampling != "dense":
        raise ValueError("the model samples segments of a whole video and gives no predictions along time; use tpn predict")
    info = decode.probe(video)
    prediction = classifier(video, num_clips=NUM_CLIPS, num_crops=1)
    fps = info.fps or motion.FPS
    clips = replace(spec, num_clips=NUM_CLIPS).indices(info.num_frames)
    picture_indices = ((np.arange(NUM_PICTURES) + 0.5) / NUM_PICTURES * info.num_frames).astype(int)
    pictures = decode.read_frames(video, picture_indices.tolist())
    probs = class_probs(prediction.view_logits, multi_label=classifier.multi_label, temperature=classifier.temperature)
    return Analysis(prediction, clips.mean(axis=1) / fps, probs.numpy(), pictures, picture_indices / fps, info.num_frames / fps)


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(analysis: Analysis, path: str | os.PathLike[str]) -> None:
    """Write one picture: frames and class probabilities along time, and the most probable classes of the whole video."""
    from matplotlib.figure import Figure

    labels = analysis.prediction.labels
    best = analysis.prediction.probs.topk(min(NUM_CURVES, len(labels))).indices.tolist()
    colors = {k: f"C{i}" for i, k in enumerate(best)}

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    strip, curves, bars = figure.subplots(3, 1, height_ratios=(1.15, 2.4, 1.5))
    height, width = analysis.pictures.shape[2:]
    for i, (picture, time) in enumerate(zip(analysis.pictures, analysis.picture_times, strict=True)):
        strip.imshow(picture.permute(1, 2, 0).numpy(), extent=(i + 0.03, i + 0.97, 0, 0.94 * height / width))
        strip.annotate(f"{time:.1f} s", (i + 0.5, height / width), ha="center", fontsize=9, color="0.35", annotation_clip=False)
    strip.set(xlim=(0, len(analysis.pictures)), ylim=(0, height / width), aspect="equal")
    strip.axis("off")

    for k in best:
        probs = analysis.probs[:, k]
        curves.plot(analysis.times, probs, color=colors[k], linewidth=2)
        curves.fill_between(analysis.times, probs, color=colors[k], alpha=0.15, linewidth=0)
        if probs.max() > 0.3:
            label_time = np.average(analysis.times, weights=probs**4)
            curves.annotate(labels[k], (label_time, 1.04), color=colors[k], ha="center", fontweight="bold", annotation_clip=False)
    curves.set(xlim=(0, analysis.duration), ylim=(0, 1.12), yticks=(0, 0.5, 1), ylabel="probability", xlabel="time, s")
    curves.spines[["top", "right"]].set_visible(False)

    values = analysis.prediction.probs[best].tolist()
    containers = bars.barh(range(len(best)), values, color=list(colors.values()))
    bars.bar_label(containers, [f"{value:.1%}  {labels[k]}" for k, value in zip(best, values, strict=True)], padding=6)
    bars.set(xlim=(0, 1), xticks=(), yticks=(), title="the whole video")
    bars.invert_yaxis()
    bars.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(path, dpi=130)
