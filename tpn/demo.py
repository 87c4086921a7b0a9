"""`tpn demo`: one picture of what a model sees in a video, and when."""

import importlib.util
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tpn.predict import Prediction, VideoClassifier
from tpn.video import decode, motion
from tpn.video.encode import write_video

SCENES = (("moving right", 2.0), ("turning clockwise", 4.0), ("swinging up and down", 3.0), ("growing", 2.5), ("blinking", 5.0))
"""What the rendered video shows, one after the other: motion and tempo."""
SCENE_FRAMES = 60
NUM_CLIPS, NUM_PICTURES, NUM_CURVES = 40, 10, 5


@dataclass(frozen=True)
class Seen:
    """A video and what a model says of it.

    prediction: of the whole video, the mean over its clips.
    times, probs: centre of each clip in seconds (V,), and its probabilities (V, K).
    pictures, picture_times: frames spread evenly, uint8 (N, 3, H, W), and their seconds (N,).
    duration: seconds.
    """

    prediction: Prediction
    times: NDArray[np.float64]
    probs: NDArray[np.float32]
    pictures: Tensor
    picture_times: NDArray[np.float64]
    duration: float


def render_video(path: str | os.PathLike[str]) -> None:
    """Write a video of one shape that moves in several ways in turn."""
    parts = [(motion.CLASSES.index(name), tempo, SCENE_FRAMES) for name, tempo in SCENES]
    write_video(path, motion.render_sequence(parts, seed=12), fps=motion.FPS)


def look(classifier: VideoClassifier, video: str | os.PathLike[str]) -> Seen:
    """Classify clips spread evenly over a video.

    Raises ValueError for models that see one clip of the whole video; VideoError, FileNotFoundError.
    """
    spec = classifier.spec
    if spec.sampling != "dense":
        raise ValueError("the model sees a whole video at once, from segments; there is no prediction along it to draw")
    info = decode.probe(video)
    prediction = classifier(video, num_clips=NUM_CLIPS, num_crops=1)
    fps = info.fps or motion.FPS
    clips = replace(spec, num_clips=NUM_CLIPS).indices(info.num_frames)
    shown = ((np.arange(NUM_PICTURES) + 0.5) / NUM_PICTURES * info.num_frames).astype(int)
    pictures = decode.read_frames(video, shown.tolist())
    probs = prediction.view_logits.softmax(dim=1).numpy()
    return Seen(prediction, clips.mean(axis=1) / fps, probs, pictures, shown / fps, info.num_frames / fps)


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(seen: Seen, path: str | os.PathLike[str]) -> None:
    """Write one picture: frames along time, the most probable classes along time, and the five of the whole video."""
    from matplotlib.figure import Figure

    labels = seen.prediction.labels
    best = seen.prediction.probs.topk(min(NUM_CURVES, len(labels))).indices.tolist()
    colors = {k: f"C{i}" for i, k in enumerate(best)}

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    strip, curves, bars = figure.subplots(3, 1, height_ratios=(1.15, 2.4, 1.5))
    height, width = seen.pictures.shape[2:]
    for i, (picture, time) in enumerate(zip(seen.pictures, seen.picture_times, strict=True)):
        strip.imshow(picture.permute(1, 2, 0).numpy(), extent=(i + 0.03, i + 0.97, 0, 0.94 * height / width))
        strip.annotate(f"{time:.1f} s", (i + 0.5, height / width), ha="center", fontsize=9, color="0.35", annotation_clip=False)
    strip.set(xlim=(0, len(seen.pictures)), ylim=(0, height / width), aspect="equal")
    strip.axis("off")

    for k in best:
        probs = seen.probs[:, k]
        curves.plot(seen.times, probs, color=colors[k], linewidth=2)
        curves.fill_between(seen.times, probs, color=colors[k], alpha=0.15, linewidth=0)
        if probs.max() > 0.3:
            middle = np.average(seen.times, weights=probs**4)
            curves.annotate(labels[k], (middle, 1.04), color=colors[k], ha="center", fontweight="bold", annotation_clip=False)
    curves.set(xlim=(0, seen.duration), ylim=(0, 1.12), yticks=(0, 0.5, 1), ylabel="probability", xlabel="time, s")
    curves.spines[["top", "right"]].set_visible(False)

    values = seen.prediction.probs[best].tolist()
    places = bars.barh(range(len(best)), values, color=list(colors.values()))
    bars.bar_label(places, [f"{value:.1%}  {labels[k]}" for k, value in zip(best, values, strict=True)], padding=6)
    bars.set(xlim=(0, 1), xticks=(), yticks=(), title="the whole video")
    bars.invert_yaxis()
    bars.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(Path(path), dpi=130)
