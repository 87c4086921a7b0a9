"""Print and write predictions, clips, and segments."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tpn.cli.console import err, print_result
from tpn.cli.script import one_line_message
from tpn.errors import plural

if TYPE_CHECKING:
    from tpn.predict import Prediction
    from tpn.tempo import Clip, Segment


@dataclass
class PredictionPrinter:
    """Print the classes of videos, or of parts of them, and the errors of unreadable ones.

    Attributes:
        form: "csv" has one row per class, and one for an error or a video without classes.
        top: number of classes.
        min_probability: of the classes, 0..1.
        facts: names of the columns that say which part of a video a row is about.
    """

    form: Literal["text", "json", "csv"]
    top: int
    min_probability: float = 0.0
    facts: Sequence[str] = ()
    _has_header: bool = field(default=False, init=False)

    def prediction(self, video: Path, prediction: "Prediction", part: str = "", **facts: Any) -> None:
        """Print a prediction; `facts` are about the part of the video, which the text calls `part`."""
        best = prediction.top(self.top, min_probability=self.min_probability)
        num_views = len(prediction.view_logits)
        if self.form == "json":
            scores = [{"label": label, "probability": probability} for label, probability in best]
            print_result(json.dumps({"file": str(video), **facts, "views": num_views, "top": scores}))
        elif self.form == "csv":
            classes: list[dict[str, Any]] = [
                {"rank": rank, "label": label, "probability": probability}
                for rank, (label, probability) in enumerate(best, start=1)
            ]
            self._print_rows({"path": str(video), **facts}, classes or [{}])
        else:
            print_result(f"{video}{part}  ({plural(num_views, 'view')})")
            for label, probability in best:
                print_result(f"  {probability:7.2%}  {label}")
            if not best:
                print_result("  -")

    def failure(self, video: Path, error: Exception, **facts: Any) -> None:
        message = one_line_message(error)
        if self.form == "json":
            print_result(json.dumps({"file": str(video), **facts, "error": message}))
        elif self.form == "csv":
            self._print_rows({"path": str(video), **facts}, [{"error": message}])
        err.print(f"error: {message}")

    def _print_rows(self, common: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        text = io.StringIO()
        columns = ("path", *self.facts, "rank", "label", "probability", "error")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        if not self._has_header:
            writer.writeheader()
            self._has_header = True
        writer.writerows(common | row for row in rows)
        print_result(text.getvalue().removesuffix("\n"))


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
