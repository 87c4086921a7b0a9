"""The picture of `tpn demo` and `tpn timeline`: frames, curves, and segments along time, in constant memory."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpn.cli.app import require_picture_path
from tpn.cli.console import err
from tpn.files import atomic_write
from tpn.validation import need_packages

if TYPE_CHECKING:
    from torch import Tensor

    from tpn.tempo import Clip

MAX_POINTS = 2000
"""Points of each curve. A longer video has the mean of several neighboring clips at each point."""
NUM_PICTURES, MAX_KEPT, PICTURE_SIZE = 10, 40, 160
WIDTH = 13.0
"""Of the figure, in inches."""


def require_picture(output: Path | None, default: str) -> Path | None:
    """Return the path of a picture, checked before the model is downloaded.

    Without matplotlib and --output, print a message and return None.
    """
    try:
        need_packages("matplotlib", extra="viz")
    except ModuleNotFoundError as error:
        if output is not None:
            raise
        err.print(f"no picture: {error}")
        return None
    output = output or Path(default)
    require_picture_path(output)
    return output


class Curves:
    """The clips of a video, at most `MAX_POINTS` for any number of clips.

    When there are more, each pair of neighbors is merged.

    Attributes:
        num_clips: clips added so far.
    """

    def __init__(self, labels: tuple[str, ...], fps: float) -> None:
        import numpy as np

        self.labels, self.fps = labels, fps
        self.num_clips = 0
        # Arrays: small tensors, kept between the model's large ones, would fragment the memory, and it would grow.
        self._spans = np.empty((MAX_POINTS, 2), np.int64)
        self._probs = np.empty((MAX_POINTS, len(labels)), np.float32)
        self._num_points, self._clips_per_point, self._clips_in_last = 0, 1, 0

    @property
    def clips(self) -> "list[Clip]":
        """One clip for each point, with the mean probabilities of the clips that it stands for."""
        import torch

        from tpn.tempo import Clip

        spans = self._spans[: self._num_points].tolist()
        return [Clip(first, last, torch.from_numpy(probs)) for (first, last), probs in zip(spans, self._probs, strict=False)]

    @property
    def duration(self) -> float:
        """End of the last clip in seconds."""
        return float(self._spans[self._num_points - 1, 1] + 1) / self.fps if self.num_clips else 0.0

    def add(self, clip: "Clip") -> None:
        self.num_clips += 1
        count, probs = self._num_points, clip.probs.numpy()
        if count and self._clips_in_last < self._clips_per_point:
            self._clips_in_last += 1
            self._spans[count - 1, 1] = clip.last
            self._probs[count - 1] += (probs - self._probs[count - 1]) / self._clips_in_last
            return
        if count == MAX_POINTS:
            count //= 2
            self._spans[:count] = self._spans.reshape(count, 4)[:, [0, 3]]
            self._probs[:count] = self._probs.reshape(count, 2, -1).mean(axis=1)
            self._clips_per_point *= 2
        self._spans[count], self._probs[count] = (clip.first, clip.last), probs
        self._num_points, self._clips_in_last = count + 1, 1


class Strip:
    """Small frames at equal distances in a video, at most `MAX_KEPT` for any number of frames."""

    def __init__(self) -> None:
        self.num_frames = 0
        self._kept: dict[int, Tensor] = {}
        self._step = 1

    def watch(self, frames: Iterable[Any]) -> Iterator[Any]:
        """Yield the frames of a video, and keep some of them."""
        from tpn.video.sources import channels_first
        from tpn.video.transforms import resize_short_side

        for number, frame in enumerate(frames):
            self.num_frames = number + 1
            if number % self._step == 0 and len(self._kept) == MAX_KEPT:
                self._step *= 2
                self._kept = {i: picture for i, picture in self._kept.items() if i % self._step == 0}
            if number % self._step == 0:
                self._kept[number] = resize_short_side(channels_first(frame[None])[0], PICTURE_SIZE)
            yield frame

    def pictures(self) -> "dict[int, Tensor]":
        """Return up to `NUM_PICTURES` frames, uint8 (3, H, W), by number, from the middles of equal parts of the video."""
        middles = [(part + 0.5) / NUM_PICTURES * self.num_frames for part in range(NUM_PICTURES)]
        kept = dict(self._kept)  # the thread of a camera may still add some
        nearest = {min(kept, key=lambda number: abs(number - middle)) for middle in middles}
        return {number: kept[number] for number in sorted(nearest)}


def draw(
    panels: Sequence[tuple[str, Curves]], top: int, path: Path, *, min_probability: float, strip: Strip | None = None
) -> None:
    """Draw frames of a video, and for each name its curves with the segments below them, all along the same time axis.

    Args:
        top: number of curves, those of the classes with the highest mean probability.
        min_probability: of the segments, see `tempo.segments`.
    """
    from matplotlib.figure import Figure

    duration = max(strip.num_frames / panels[0][1].fps if strip else 0.0, *(curves.duration for _, curves in panels))
    pictures = strip.pictures() if strip else {}
    heights = [2.4 if len(panels) == 1 else 1.6, 0.35] * len(panels)
    if pictures:
        height, width = next(iter(pictures.values())).shape[1:]
        heights.insert(0, 0.8 * WIDTH / len(pictures) * height / width)
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5 + 0.3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0].tolist()
    if pictures:
        _draw_pictures(axes.pop(0), pictures, duration, panels[0][1].fps)
    colors = dict[int, str]()  # by class, the same in all panels
    for (name, curves), above, below in zip(panels, axes[::2], axes[1::2], strict=True):
        _draw_curves(above, name, curves, top, colors)
        _draw_segments(below, curves, colors, min_probability)
    axes[-1].set(xlim=(0, duration), xlabel="time, s")
    axes[-1].tick_params(labelbottom=True)
    figure.draw_without_rendering()  # places bars and names
    for below in axes[1::2]:
        for bar, name in zip(below.patches, below.texts, strict=True):
            name.set_visible(name.get_window_extent().width < bar.get_window_extent().width)
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, dpi=130)
    err.print(f"wrote {path}")


def _draw_pictures(axes: Any, pictures: "dict[int, Tensor]", duration: float, fps: float) -> None:
    cell = duration / len(pictures)
    for place, (number, picture) in enumerate(pictures.items()):
        left, right = (place + 0.02) * cell, (place + 0.98) * cell
        axes.imshow(picture.permute(1, 2, 0).cpu().numpy(), extent=(left, right, 0, 1), aspect="auto")
        axes.annotate(f"{number / fps:.1f} s", ((left + right) / 2, 1.03), ha="center", annotation_clip=False)
    height, width = picture.shape[1:]
    axes.set(ylim=(0, 1), aspect=0.96 * cell * height / width, anchor="S")  # a cell has the proportions of a picture
    axes.axis("off")


def _draw_curves(axes: Any, name: str, curves: Curves, top: int, colors: dict[int, str]) -> None:
    """Draw the curves of the most probable classes. Add the colors of new classes to `colors`."""
    from tpn import tempo

    times, probs = tempo.curves(curves.clips, fps=curves.fps)
    best = (-probs.mean(axis=0)).argsort(kind="stable")[:top].tolist()
    for k in best:
        color = colors.setdefault(k, f"C{len(colors)}")
        axes.plot(times, probs[:, k], marker="o" if len(times) == 1 else None, color=color, linewidth=2, label=curves.labels[k])
        axes.fill_between(times, probs[:, k], color=color, alpha=0.15, linewidth=0)
    axes.set(ylim=(0, 1.02), yticks=(0, 0.5, 1), ylabel=f"{name}\nprobability".lstrip())
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, labelcolor="linecolor")


def _draw_segments(axes: Any, curves: Curves, colors: dict[int, str], min_probability: float) -> None:
    """Draw the segments of a video as bars, with a name in each."""
    from tpn import tempo

    first = curves.clips[0].first / curves.fps  # a track starts later than its video
    for segment in tempo.segments(curves.clips, fps=curves.fps, min_probability=min_probability):
        if segment.label is None:
            continue
        start, name = max(segment.start, first), curves.labels[segment.label]
        color = colors.get(segment.label, "0.5")
        axes.barh(0, segment.end - start, left=start, height=1, color=color, edgecolor="white")
        middle = (start + segment.end) / 2
        axes.text(middle, 0, name, ha="center", va="center", color="white", fontsize=8.5, fontweight="bold")
    axes.set(ylim=(-0.5, 0.5), yticks=())
    axes.spines[["top", "right", "left"]].set_visible(False)
