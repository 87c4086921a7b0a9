"""Tracks in `tpn predict --tracks` and `tpn timeline --tracks`."""

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpn.cli.console import err, progress_bars
from tpn.cli.drawing import Curves, draw
from tpn.cli.results import PredictionPrinter, clip_entry, print_segment, segment_entry
from tpn.cli.script import one_line_message
from tpn.files import atomic_write, require_writable

if TYPE_CHECKING:
    from tpn.predict import VideoClassifier
    from tpn.tempo import Clip, Segment
    from tpn.video.annotate import Caption
    from tpn.video.tracks import Track

FACTS = ("track", "first", "last", "start", "end")
"""Entries about a track in JSON objects and CSV rows."""
MAX_PANELS = 12
"""Tracks in the picture of a timeline."""

TracksOption = Annotated[
    Path | None,
    typer.Option(help="Boxes of people or objects over time, MOT text or CSV: classify each track instead of the whole frame."),
]
AnnotateOption = Annotated[
    Path | None, typer.Option(help="With --tracks: video to write, with boxes, ids, and classes. .mp4, .mkv, or .mov.")
]


def open_tracks(videos: Sequence[str | Path | None], tracks: Path | None, annotate: Path | None) -> "list[Track] | None":
    """Return the tracks of --tracks, None without it, and check --annotate, before the model is downloaded. The video exists."""
    if tracks is None:
        if annotate is not None:
            raise typer.BadParameter("needs --tracks", param_hint="--annotate")
        return None
    if len(videos) != 1 or videos[0] in (None, "-"):
        raise typer.BadParameter("is valid for one video file", param_hint="--tracks")
    from tpn.video.annotate import check_output
    from tpn.video.tracks import read_tracks

    (video,) = videos
    assert video is not None
    if annotate is not None:
        require_writable(annotate)
        check_output(video, annotate)
    found = read_tracks(tracks)
    if not found:
        raise ValueError(f"{tracks}: the file has no tracks")
    return found


def predict_tracks(
    classifier: "VideoClassifier",
    video: Path,
    tracks: "list[Track]",
    printer: PredictionPrinter,
    *,
    annotate: Path | None,
    **views: Any,
) -> bool:
    """Print the classes of each track, and write the annotated video. Return whether all tracks could be classified."""
    from tpn.predict import Prediction
    from tpn.video import decode
    from tpn.video.annotate import Caption

    fps, _ = decode.header(video)
    if annotate is not None and fps is None:
        raise ValueError(f"{video}: the file does not state its frame rate, which an annotated video needs; leave out --annotate")
    with progress_bars() as progress:
        task = progress.add_task("tracks", total=len(tracks))
        results = classifier.tracks(
            video, tracks, progress=lambda done, total: progress.update(task, completed=done, total=total), **views
        )
    captions: list[tuple[Track, list[Caption]]] = []
    for track, result in zip(tracks, results, strict=True):
        facts = _facts(track, fps)
        if isinstance(result, Prediction):
            where = f"  track {track.id}, frames {track.first}–{track.last}"
            where += f", {facts['start']:.1f} s – {facts['end']:.1f} s" if fps else ""
            printer.prediction(video, result, where, **facts)
            best = [f"{label} {probability:.0%}" for label, probability in result.top(1, min_probability=printer.min_probability)]
            captions.append((track, [Caption(track.first, track.last, text) for text in best or ["-"]]))
        else:
            printer.failure(video, result, **facts)
            captions.append((track, []))
    if annotate is not None and fps is not None:
        _annotate(video, annotate, captions, fps)
    return all(isinstance(result, Prediction) for result in results)


def timeline_tracks(
    classifier: "VideoClassifier",
    video: str,
    tracks: "list[Track]",
    *,
    fps: float,
    min_probability: float,
    top: int,
    metadata: dict[str, Any],
    json_output: Path | None,
    picture: Path | None,
    annotate: Path | None,
    **sliding: Any,
) -> bool:
    """Print the segments of each track when it ends, and write the files. Return whether all tracks could be classified.

    Args:
        metadata: first entries of the JSON object.
        picture: to draw, with a panel for each of the first `MAX_PANELS` tracks that end.
        sliding: arguments of `tpn.tracks.slide`.
    """
    from tpn import tracks as tracking

    captions: list[tuple[Track, list[Caption]]] = []
    panels: list[tuple[str, Curves]] = []
    all_read, separator = True, "\n"
    with (
        progress_bars() as progress,
        atomic_write(json_output) if json_output else nullcontext(Path(os.devnull)) as path,
        path.open("w", encoding="utf-8") as file,
    ):
        file.write(json.dumps(metadata)[:-1] + ', "tracks": [')
        results = tracking.slide(classifier, video, tracks, **sliding)
        for track, clips, error in progress.track(results, total=len(tracks), description="tracks"):
            found = tracking.segments(track, clips, fps=fps, min_probability=min_probability)
            segments = [(each, None if each.label is None else classifier.labels[each.label]) for each in found]
            for segment, label in segments:
                print_segment(segment, label, f"track {track.id}  ")
            if error is not None:
                all_read = False
                err.print(f"error: {one_line_message(error)}")
            file.write(separator + json.dumps(_entry(track, clips, segments, error, fps)))
            separator = ",\n"
            if clips and picture is not None and len(panels) < MAX_PANELS:
                curves = Curves(classifier.labels, fps)
                for clip in clips:
                    curves.add(clip)
                panels.append((f"track {track.id}", curves))
            captions.append((track, [_caption(*each, fps) for each in segments]))
        file.write("\n]}\n")
    if json_output:
        err.print(f"wrote {json_output}")
    if panels and picture is not None:
        draw(panels, top, picture, min_probability=min_probability)
    if annotate is not None:
        _annotate(video, annotate, captions, fps)
    return all_read


def _entry(
    track: "Track", clips: "Sequence[Clip]", segments: "Sequence[tuple[Segment, str | None]]", error: Exception | None, fps: float
) -> dict[str, Any]:
    """Return the JSON object of a track, with clips and segments as in that of a video."""
    return {
        **_facts(track, fps),
        "clips": [clip_entry(clip, fps) for clip in clips],
        "segments": [segment_entry(*each) for each in segments],
        "error": None if error is None else one_line_message(error),
    }


def _facts(track: "Track", fps: float | None) -> dict[str, Any]:
    """Return the `FACTS` of a track. Frames are numbered from 0, `last` is included, `end` is its end."""
    seconds = (track.first / fps, (track.last + 1) / fps) if fps else (None, None)
    return dict(zip(FACTS, (track.id, track.first, track.last, *seconds), strict=True))


def _caption(segment: "Segment", label: str | None, fps: float) -> "Caption":
    from tpn.video.annotate import Caption

    text = "-" if label is None else f"{label} {segment.probability:.0%}"
    return Caption(round(segment.start * fps), round(segment.end * fps) - 1, text)


def _annotate(video: str | Path, output: Path, captions: "list[tuple[Track, list[Caption]]]", fps: float) -> None:
    from tpn.video import decode
    from tpn.video.annotate import annotate

    with progress_bars() as progress:
        task = progress.add_task("frames written", total=decode.header(video)[1])
        annotate(video, output, captions, fps=fps, progress=lambda done: progress.update(task, completed=done))
    err.print(f"wrote {output}")
