"""Write a report of a training or an evaluation: one HTML file that needs no network and opens from the disk."""

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tpn.errors import plural, printable
from tpn.files import StrPath, atomic_write
from tpn.training import wording
from tpn.training.charts import Line, line_chart
from tpn.training.metrics import Evaluation
from tpn.training.plan import PlanLine
from tpn.training.wording import METRIC_NAMES, metric
from tpn.version import __version__
from tpn.video.datasets import Item, VideoDataset
from tpn.video.decode import VideoError

if TYPE_CHECKING:
    from tpn.training.loop import Run

MAX_MISTAKES = 24
STRIP_FRAMES = 6
FRAME_SIZE = 184
"""Longer side of a frame in pixels: twice its size on the page, for dense screens."""
MAX_PICTURES = 2_000_000
"""Characters of all pictures; the file stays below 3 MB."""
MAX_MATRIX = 20
"""Classes in a confusion matrix."""
MAX_OPEN, MAX_ROWS = 30, 1000
"""Rows of a table that are shown at once, and rows that are written at all."""

Row = Sequence[str]
"""Cells of a table, in HTML."""


def write_report(
    path: StrPath,
    evaluation: Evaluation | None = None,
    data: VideoDataset | None = None,
    *,
    title: str = "Evaluation",
    facts: Mapping[str, str] | None = None,
    plan: Sequence[PlanLine] = (),
    metrics: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write a self-contained HTML report.

    Args:
        path: of the file.
        evaluation: of a model on labeled videos. None leaves out its parts.
        data: dataset of the evaluation, from which the frames of mistakes are read.
        title: heading, in plain text.
        facts: what else is known, text by name.
        plan: settings with their reasons.
        metrics: lines of `metrics.jsonl`, for the curves.
    """
    parts = [f"<h1>{_text(title)}</h1>", _numbers(evaluation) if evaluation is not None else "", _facts(facts or {})]
    parts.append(_curves(metrics))
    if evaluation is not None:
        parts += [_confusion(evaluation), _classes(evaluation)]
        parts.append(_mistakes(evaluation, data) if data is not None else "")
        parts.append(_unreadable(evaluation.failed))
    parts.append(_plan(plan))
    page = _PAGE.format(
        title=_text(title),
        style=Path(__file__).with_suffix(".css").read_text(encoding="utf-8"),
        body="\n".join(filter(None, parts)),
        version=__version__,
    )
    with atomic_write(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")


def write_run_report(run: "Run") -> None:
    """Write `report.html` to the folder of a training run."""
    train, val, config = run.data.train, run.data.val, run.config
    facts = {
        "Model": config.model,
        "Start": wording.weights_line(run.weights, run.new_classifier, len(train.classes)),
        "Training": f"{plural(len(train), 'video')} of {plural(len(train.classes), 'class')}: "
        + wording.class_counts(train.classes, run.facts.class_counts),
        "Validation": f"{plural(len(val), 'video')} ({run.data.split})" if val else run.data.split,
        "Length": f"{run.step:,} of {run.total_steps:,} steps of {plural(run.batch, 'clip')}",
    }
    if run.evaluation is not None:
        facts["Views"] = f"{plural(run.evaluation.views, 'view')} of each video in validation"
    if run.skipped:
        facts["Skipped"] = f"{plural(run.skipped, 'step')} whose gradient was not finite"
    facts["Folder"] = str(run.folder.absolute())
    lines = run.log.lines if run.log else ()
    title = f"Training run {run.folder.absolute().name}"
    write_report(run.folder / "report.html", run.evaluation, val, title=title, facts=facts, plan=run.plan, metrics=lines)


@dataclass(frozen=True)
class Mistake:
    """A video with a wrong prediction.

    Attributes:
        item: the video.
        true: its classes, each with its probability.
        predicted: the wrong class with the highest probability.
        probability: of `predicted`.
    """

    item: Item
    true: tuple[tuple[str, float], ...]
    predicted: str
    probability: float


def find_mistakes(evaluation: Evaluation) -> list[Mistake]:
    """Return the videos with a wrong prediction, the most confident first.

    A wrong prediction is the most probable class, or for multi-label data a class with a probability of 0.5 or more.
    """
    wrong = np.where(evaluation.targets > 0, -1, evaluation.probs)
    worst = wrong.argmax(axis=1)
    highest = wrong.max(axis=1)
    is_wrong = highest >= 0.5 if evaluation.multi_label else evaluation.probs.argmax(axis=1) == worst
    order = [int(i) for i in np.argsort(-highest, kind="stable") if is_wrong[i]]
    names = evaluation.classes
    return [
        Mistake(
            evaluation.items[i],
            tuple((names[k], float(evaluation.probs[i, k])) for k in np.flatnonzero(evaluation.targets[i])),
            names[worst[i]],
            float(highest[i]),
        )
        for i in order
    ]


def _text(text: object) -> str:
    """Return any text as HTML."""
    return html.escape(printable(text))


def _section(title: str, note: str, *content: str) -> str:
    return f'<section><h2>{title}</h2><p class="soft">{note}</p>{"".join(content)}</section>'


def _numbers(evaluation: Evaluation) -> str:
    """Return the key numbers."""
    values = evaluation.metrics
    shown = [name for name in ("top1", "mAP", "mean_class", "top5", "loss", "ece") if name in values]
    if len(evaluation.classes) <= 5 and "top5" in shown:
        shown.remove("top5")
    cells = [(metric(name, values[name]), METRIC_NAMES[name]) for name in shown]
    cells.append((f"{len(evaluation.items):,}", "videos"))
    return '<div class="numbers">' + "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in cells) + "</div>"


def _facts(facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    return "<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items()) + "</dl>"


def _plan(plan: Sequence[PlanLine]) -> str:
    if not plan:
        return ""
    rows = [(f"<code>{_text(name)}</code>", _text(value), _text(reason)) for name, value, reason in wording.plan_rows(plan)]
    return _section("Plan", "Settings of this run, and where each comes from.", _table(("setting", "value", "reason"), rows))


def _table(heads: Sequence[str], rows: Sequence[Row], numbers: Sequence[int] = ()) -> str:
    """Return a table. Of many rows, the first are shown, and all others on a click.

    Args:
        heads: of the columns; "" for one of bars, which a phone does not show.
        rows: cells in HTML.
        numbers: columns of numbers.
    """
    kinds = [
        'class="number"' if i in numbers else 'class="name"' if i == 0 else "" if head else 'class="bars"'
        for i, head in enumerate(heads)
    ]

    def table(some: Sequence[Row]) -> str:
        head = "".join(f'<th scope="col" {kind}>{name}</th>' for kind, name in zip(kinds, heads, strict=True))
        body = "".join(
            "<tr>" + "".join(f"<td {kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>" for row in some
        )
        return f'<div class="scroll"><table class="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

    if len(rows) <= MAX_OPEN:
        return table(rows)
    rest = rows[MAX_OPEN:MAX_ROWS]
    left_out = f'<p class="soft">{len(rows) - MAX_ROWS:,} more are left out.</p>' if len(rows) > MAX_ROWS else ""
    return f"{table(rows[:MAX_OPEN])}<details><summary>{len(rest):,} more</summary>{table(rest)}{left_out}</details>"


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return charts of loss and accuracy in training and validation."""

    def points(name: str) -> list[tuple[float, float]]:
        return [(line["step"], line[name]) for line in metrics if line.get(name) is not None]

    losses = [Line("training", points("loss")), Line("validation", points("val_loss"), dots=True)]
    shares = [Line("training top-1", points("top1")), Line("validation top-1", points("val_top1"), dots=True)]
    shares += [Line("validation mean class", points("val_mean_class")), Line("validation mAP", points("val_mAP"), dots=True)]
    charts = [line_chart("Loss", losses, x_name="step")] if any(line.points for line in losses) else []
    if any(line.points for line in shares):
        charts.append(line_chart("Accuracy", shares, x_name="step", unit="%", highest=100))
    note = "Training values are means over augmented clips, validation values are those of whole videos. "
    note += "The training loss includes label smoothing and the auxiliary loss, if they are on."
    return _section("Curves", note, '<div class="charts">', *charts, "</div>") if charts else ""


def _confusion(evaluation: Evaluation) -> str:
    """Return the confusion matrix; of many classes, those that are confused most often."""
    if evaluation.multi_label:
        return ""
    counts = evaluation.confusion
    names = [_text(name) for name in evaluation.classes]
    order = _most_confused(counts)
    note = "Rows are true classes, columns are predictions, numbers are videos."
    matrix, heads = counts[np.ix_(order, order)], [names[k] for k in order]
    if len(names) > MAX_MATRIX:
        matrix = np.column_stack((matrix, counts[order].sum(axis=1) - matrix.sum(axis=1)))
        heads.append("others")
        note += f" Of {len(names):,} classes, those with the most frequent confusions are shown."
    head = "".join(f'<th scope="col" title="{name}"><span>{name}</span></th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row" title="{names[k]}">{names[k]}</th>{"".join(_matrix_cells(row, i))}</tr>'
        for i, (k, row) in enumerate(zip(order, matrix, strict=True))
    )
    table = f'<table class="matrix"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'
    return _section("Confusion matrix", note, f'<div class="scroll">{table}</div>')


def _most_confused(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return at most `MAX_MATRIX` classes, in their order: those of the most frequent confusions."""
    if len(counts) <= MAX_MATRIX:
        return np.arange(len(counts))
    errors = counts.copy()
    np.fill_diagonal(errors, 0)
    pairs = np.column_stack(np.unravel_index(np.argsort(-errors, axis=None, kind="stable"), errors.shape))
    classes = dict.fromkeys(pairs[: MAX_MATRIX * MAX_MATRIX].ravel().tolist())  # without repetitions, in this order
    return np.sort(list(classes)[:MAX_MATRIX])


def _matrix_cells(row: NDArray[np.int64], own: int) -> Iterator[str]:
    """Yield the cells of a row; the stronger a color, the larger the share of the class."""
    for i, count in enumerate(row.tolist()):
        share = count / max(row.sum(), 1)
        kind = ("good" if i == own else "bad") + (" strong" if share >= 0.5 else "")
        yield f'<td class="{kind}" style="--share:{0.12 + 0.88 * share:.2f}">{count:,}</td>' if count else "<td></td>"


def _classes(evaluation: Evaluation) -> str:
    """Return the table of classes, the weakest first."""
    videos = evaluation.targets.sum(axis=0).astype(int)
    if evaluation.multi_label:
        scores, name = evaluation.average_precision, "average precision"
        said = evaluation.probs >= 0.5
        missed, wrong = ((evaluation.targets > 0) & ~said).sum(axis=0), ((evaluation.targets == 0) & said).sum(axis=0)
        details: list[Row] = [(f"{m:,}", f"{w:,}") for m, w in zip(missed.tolist(), wrong.tolist(), strict=True)]
        heads: Row = ("videos missed", "wrong videos")
        note = "Missed and wrong videos are counted at a probability of 50%. "
    else:
        scores, name = evaluation.class_accuracy, "accuracy"
        details = [
            (f"{_text(error)} <span class=soft>({plural(count, 'video')})</span>" if error else "",)
            for error, count in evaluation.frequent_errors
        ]
        heads, note = ("most frequent error",), ""
    rows = []
    for k in np.argsort(scores, kind="stable").tolist():  # NaN last
        score = 100 * scores[k]
        bar = f'<span class="bar"><i style="width:{score:.1f}%"></i></span>' if videos[k] else ""
        rows.append((_text(evaluation.classes[k]), f"{videos[k]:,}", f"{score:.1f}%" if videos[k] else "–", bar, *details[k]))
    numbers = (1, 2, 4, 5) if evaluation.multi_label else (1, 2)
    return _section(
        "Classes", f"{note}The weakest classes come first.", _table(("class", "videos", name, "", *heads), rows, numbers)
    )


def _mistakes(evaluation: Evaluation, data: VideoDataset) -> str:
    """Return the most confident mistakes, each with frames of its video."""
    found = find_mistakes(evaluation)
    if not found:
        return _section("Mistakes", "No video has a wrong prediction.")
    entries: list[str] = []
    size = 0
    for mistake in found[:MAX_MISTAKES]:
        strip = _strip(data, mistake.item)
        size += len(strip)
        if size > MAX_PICTURES:
            break
        entries.append(_mistake(mistake, strip))
    shown = f"{len(entries)} of {len(found):,}" if len(entries) < len(found) else f"All {len(found):,}"
    return _section(
        "Mistakes", f"{shown} wrong predictions, the most confident first.", '<ol class="mistakes">', *entries, "</ol>"
    )


def _mistake(mistake: Mistake, strip: str) -> str:
    item = mistake.item
    address, name = Path(item.path).absolute().as_uri(), "/".join(Path(item.path).parts[-2:])
    if item.start is not None and item.end is not None:
        address += f"#t={item.start:g},{item.end:g}"
        name += f", {item.start:g} to {item.end:g} s"
    if item.track is not None:
        name += f", track {item.track}"
    true = ", ".join(f"<b>{_text(label)}</b> {probability:.1%}" for label, probability in mistake.true) or "no class"
    return (
        f'<li><div class="strip">{strip}</div><div>'
        f'<p><span class="soft">predicted</span> <b class="wrong">{_text(mistake.predicted)}</b> {mistake.probability:.1%}</p>'
        f'<p><span class="soft">true</span> {true}</p>'
        f'<p><a href="{html.escape(address)}" title="{_text(item.path)}">{_text(name)}</a></p></div></li>'
    )


def _strip(data: VideoDataset, item: Item) -> str:
    """Return frames of a video, evenly spread, as pictures; or why they cannot be read."""

    def middles(total_frames: int) -> NDArray[np.int64]:
        return ((np.arange(STRIP_FRAMES) + 0.5) * total_frames / STRIP_FRAMES).astype(np.int64)[None]

    try:
        frames, positions = data.read(item, middles, short_side=2 * FRAME_SIZE)
    except (VideoError, OSError) as error:
        return f"<p>The frames cannot be read: {_text(error)}</p>"
    pictures = []
    for frame in frames[positions[0]]:
        picture, file = Image.fromarray(frame.permute(1, 2, 0).numpy()), io.BytesIO()
        picture.thumbnail((FRAME_SIZE, FRAME_SIZE))
        picture.save(file, "JPEG", quality=72, optimize=True)
        source = base64.b64encode(file.getvalue()).decode()
        pictures.append(
            f'<img src="data:image/jpeg;base64,{source}" width="{picture.width}" height="{picture.height}" alt="" loading="lazy">'
        )
    return "".join(pictures)


def _unreadable(failed: Mapping[str, str]) -> str:
    if not failed:
        return ""
    rows = [(_text(path), _text(reason)) for path, reason in failed.items()]
    return _section("Unreadable videos", "They are not counted in any number above.", _table(("file", "reason"), rows))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
<footer>Written by tpn {version}.</footer>
</body>
</html>
"""
