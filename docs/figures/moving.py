"""Draw the moving picture of the motions that `tpn demo` renders: the video, and the probabilities up to the frame shown.

python docs/figures/moving.py docs/pages/figures/demo.webp
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

import tpn
from tpn import demo, tempo
from tpn.video import decode, motion

STEP, MILLISECONDS = 4, 83
"""Frames of the video from one picture to the next, and how long each is shown: twice the speed of the video."""
DPI = 100


class Curves:
    """Probabilities along time, colored up to a time and gray after it."""

    def __init__(self, times: NDArray[np.float64], probs: NDArray[np.float32], names: Sequence[str], duration: float) -> None:
        figure = Figure(figsize=(8.4, 4.6), dpi=DPI)
        self.canvas = FigureCanvasAgg(figure)
        self.picture = figure.add_axes((0.015, 0.12, 0.36, 0.76))
        self.picture.axis("off")
        self.title = figure.text(0.195, 0.925, "", ha="center", va="center", fontsize=14, fontweight="bold")
        axes = figure.add_axes((0.45, 0.12, 0.53, 0.76))
        axes.plot(times, probs, color="0.88", linewidth=1.5)
        self.times, self.probs, self.names = times, probs, names
        self.lines = [axes.plot([], [], color=f"C{i}", linewidth=2.5)[0] for i in range(len(names))]
        self.cursor = axes.axvline(0, color="0.3", linewidth=1)
        axes.set(xlim=(0, duration), ylim=(0, 1.03), yticks=(0, 0.5, 1), xlabel="time, s", ylabel="probability")
        axes.spines[["top", "right"]].set_visible(False)
        self.shown = None

    def draw(self, frame: NDArray[np.uint8], time: float) -> Image.Image:
        """Return the picture for a frame (H, W, 3) at a time in seconds."""
        now = [np.interp(time, self.times, column) for column in self.probs.T]
        best = int(np.argmax(now))
        sure = now[best] >= 0.5
        self.title.set(text=f"{self.names[best]}  {now[best]:.0%}" if sure else "-", color=f"C{best}" if sure else "0.5")
        for line, column, last in zip(self.lines, self.probs.T, now, strict=True):
            past = self.times < time
            line.set_data([*self.times[past], time], [*column[past], last])
        self.cursor.set_xdata([time, time])
        if self.shown is None:
            self.shown = self.picture.imshow(frame, interpolation="bicubic")
        self.shown.set_data(frame)
        self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())


def pictures(video: Path) -> Iterator[Image.Image]:
    """Yield the pictures of the animation, with the predictions of the bundled model."""
    classifier = tpn.VideoClassifier("tpn_slowonly_tiny_motion")
    times, probs = tempo.curves(tempo.slide(classifier, video, stride=4), fps=motion.FPS)
    scenes = [name for name, _ in demo.SCENES]
    frames = [frame.permute(1, 2, 0).numpy() for frame in decode.iter_frames(video)]
    curves = Curves(times, probs[:, [classifier.labels.index(name) for name in scenes]], scenes, len(frames) / motion.FPS)
    for i in range(0, len(frames), STEP):
        yield curves.draw(frames[i], i / motion.FPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        demo.render_video(Path(folder, "demo.mp4"))
        first, *others = pictures(Path(folder, "demo.mp4"))
    first.save(args.output, save_all=True, append_images=others, duration=MILLISECONDS, loop=0, quality=70, method=6)


if __name__ == "__main__":
    main()
