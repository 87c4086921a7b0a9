"""Line charts as inline SVG."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 42
"""Margins of the plot."""
MAX_POINTS = 200

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: for the legend.
        points: (x, y), in the order of x.
        dots: draw each point, with its value on hover.
    """

    name: str
    points: Sequence[Point]
    dots: bool = False


def line_chart(title: str, lines: Sequence[Line], *, x_name: str, unit: str = "", highest: float | None = None) -> str:
    """Return an HTML figure with a legend and an SVG chart, whose y axis starts at 0.

    Args:
        title: of the figure.
        lines: at most four; those without points are left out.
        x_name: name of the x axis.
        unit: written after the numbers of the y axis.
        highest: end of the y axis. Default: from the values.
    """
    drawn = [(number, line) for number, line in enumerate(lines) if line.points]
    xs = [x for _, line in drawn for x, _ in line.points]
    ys = [y for _, line in drawn for _, y in line.points]
    x_ticks, y_ticks = ticks(max(xs), 5), ticks(highest or max(ys), 5)
    x_end, y_end = max(xs) or 1, highest or y_ticks[-1]

    def place(point: Point) -> Point:
        x = LEFT + point[0] / x_end * (WIDTH - LEFT - RIGHT)
        return round(x, 1), round(HEIGHT - BOTTOM - min(point[1] / y_end, 1) * (HEIGHT - TOP - BOTTOM), 1)

    parts = []
    for value in y_ticks:
        _, y = place((0, value))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{value:g}{unit}</text>')
    for value in (tick for tick in x_ticks if tick <= x_end):
        x, _ = place((value, 0))
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_short(value)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(x_name)}</text>')
    for number, line in drawn:
        path = " ".join(f"{x},{y}" for x, y in map(place, thinned(line.points)))
        parts.append(f'<polyline class="line line-{number}" points="{path}"/>')
        for point in line.points if line.dots and len(line.points) <= MAX_POINTS else ():
            (x, y), hover = place(point), f"{line.name}: {point[1]:.4g}{unit} at {x_name} {point[0]:g}"
            parts.append(
                f'<circle class="dot line-{number}" cx="{x}" cy="{y}" r="3.5"><title>{html.escape(hover)}</title></circle>'
            )
    legend = "".join(f'<span><i class="key key-{number}"></i>{html.escape(line.name)}</span>' for number, line in drawn)
    title = html.escape(title)
    return (
        f'<figure class="chart"><figcaption><b>{title}</b>{legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg></figure>'
    )


def ticks(highest: float, count: int) -> list[float]:
    """Return about `count` round numbers from 0 up to the first one that is not below `highest`."""
    highest = highest or 1
    raw = highest / count
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(highest / step - 1e-9) + 1)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most `MAX_POINTS` points: means of neighbors if there are more."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"
