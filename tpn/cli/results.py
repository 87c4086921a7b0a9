"""How commands print, write, and draw what they found in videos."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpn.cli.app import err, print_result
from tpn.cli.script import one_line_message
from tpn.files import atomic_write

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tpn.predict import Prediction
    from tpn.tempo import Clip, Segment

MAX_POINTS = 2000
"""Points of each curve in the picture. A longer video has the mean of several neighboring clips at each point."""


def print_failure(video: Path, error: Exception, as_json: bool, **facts: Any) -> None:
    if as_json:
        print_result(json.dumps({"file": str(video), **facts, "error": one_line_message(error)}))
    err.print(f"error: {one_line_message(error)}")


def print_prediction(
    video: Path, prediction: "Prediction", top: int, as_json: bool, part: str = "", *, min_probability: float = 0.0, **facts: Any
) -> None:
    """Print the classes of a video, or of a part of it; JSON has `facts` about the part instead of the text."""
    from tpn.training.wording import plural

    best, num_views = prediction.top(top, min_probability=min_probability), len(prediction.view_logits)
    if as_json:
        scores = [{"label": label, "probability": probability} for label, probability in best]
        print_result(json.dumps({"file": str(video), **facts, "views": num_views, "top": scores}))
        return
    print_result(f"{video}{part}  ({plural(num_views, 'view')})")
    for label, probability in best:
        print_result(f"  {probability:7.2%}  {label}")
    if not best:
        print_result("  -")


def print_segment(segment: "Segment", label: str | None, part: str = "") -> None:
    print_result(f"{part}{segment.start:.1f} s – {segment.end:.1f} s  {label or '-'}  {segment.probability:.1%}")


def clip_entry(clip: "Clip", fps: float) -> dict[str, Any]:
    """Return the JSON object of a clip."""
    probs = [round(p, 6) for p in clip.probs.tolist()]
    return {"first": clip.first, "last": clip.last, "time": round(clip.time(fps), 4), "probs": probs}


def segment_entry(segment: "Segment", label: str | None) -> dict[str, Any]:
    """Return the JSON object of a segment."""
    start, end, probability = round(segment.start, 4), round(segment.end, 4), round(segment.probability, 6)
    return {"start": start, "end": end, "label": label, "probability": probability}


class Curves:
    """Probabilities of all classes along time, in at most `MAX_POINTS` points for any number of clips.

    When all points are used, each pair of neighbors is merged.

    Attributes:
        num_clips: clips added so far.
        duration: end of the last clip in seconds.
    """

    def __init__(self, labels: tuple[str, ...]) -> None:
        import numpy as np

        self.labels = labels
        self.num_clips, self.duration = 0, 0.0
        self._clips_per_point = 1
        # Sums over the clips of each point.
        self._probs, self._times, self._counts = np.zeros((MAX_POINTS, len(labels))), np.zeros(MAX_POINTS), np.zeros(MAX_POINTS)

    def add(self, clip: "Clip", fps: float) -> None:
        if self.num_clips == MAX_POINTS * self._clips_per_point:
            for sums in (self._probs, self._times, self._counts):
                sums[: MAX_POINTS // 2] = sums[::2] + sums[1::2]
                sums[MAX_POINTS // 2 :] = 0
            self._clips_per_point *= 2
        point = self.num_clips // self._clips_per_point
        self._probs[point] += clip.probs.numpy()
        self._times[point] += clip.time(fps)
        self._counts[point] += 1
        self.num_clips += 1
        self.duration = (clip.last + 1) / fps

    def means(self) -> "tuple[NDArray[np.float64], NDArray[np.float64]]":
        """Return times in seconds (N,) and probabilities (N, K)."""
        used = int((self._counts > 0).sum())
        return self._times[:used] / self._counts[:used], self._probs[:used] / self._counts[:used, None]


def draw(panels: Sequence[tuple[str, Curves]], top: int, path: Path) -> None:
    """Draw a panel for each name and its curves, those of the `top` classes with the highest mean probability."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4 if len(panels) == 1 else 2.5 * len(panels)), layout="constrained")
    duration = max(curves.duration for _, curves in panels)
    for axes, (name, curves) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        times, probs = curves.means()
        for k in (-probs.mean(axis=0)).argsort(kind="stable")[:top].tolist():
            axes.plot(times, probs[:, k], marker="o" if len(times) == 1 else None, label=curves.labels[k])
        axes.set(xlim=(0, duration), ylim=(0, 1.02), yticks=(0, 0.5, 1), ylabel=f"{name}\nprobability".lstrip())
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.set(xlabel="time, s")
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, dpi=130)
    err.print(f"wrote {path}")
