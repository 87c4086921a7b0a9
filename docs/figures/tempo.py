"""Draw `tempo.svg`: the accuracy of each variant over the tempo of the test clips, from the table of the page on tempo.

python docs/figures/tempo.py docs/pages/figures/tempo.svg
"""

import math

from drawing import COARSE, FINE, FRAME, OUT, drawing, line, read_table, text, write

LEFT, STEP, BOTTOM, HEIGHT = 54, 50, 330, 300
"""Position of the first tempo, distance between tempos, position of 0%, and height of 100%."""
COLORS = {"no pyramid": FRAME, "top-down": OUT, "bottom-up": "#8250df", "parallel": FINE, "cascade": COARSE}
TRAINED, CHANCE = ("0.5x", "2x"), 100 / 14


def y_of(percent: float) -> float:
    return round(BOTTOM - HEIGHT * percent / 100, 1)


def x_of(tempo: str) -> float:
    return round(LEFT + 2 * STEP * math.log2(float(tempo.rstrip("x")) / 0.25), 1)


def draw() -> str:
    rows = read_table("tempo.md", "| variant |")
    tempos = [f"{0.25 * 2 ** (i / 2):.2f}".rstrip("0").rstrip(".") + "x" for i in range(9)]
    low, high = map(x_of, TRAINED)
    right = x_of(tempos[-1])
    parts = [
        f'<rect x="{low:g}" y="{y_of(100):g}" width="{high - low:g}" height="{HEIGHT}" fill="{FRAME}" fill-opacity=".13"/>',
        text((low + high) / 2, y_of(100) - 8, "tempos of the training clips"),
        text(LEFT + (right - LEFT) / 2, BOTTOM + 44, "tempo of the test clips"),
        line((LEFT, y_of(CHANCE)), (right, y_of(CHANCE)), color=FRAME, dash="2 4"),
        text(right, y_of(CHANCE) - 6, "chance", anchor="end"),
    ]
    for percent in range(0, 101, 25):
        parts.append(line((LEFT, y_of(percent)), (right, y_of(percent)), color=FRAME, width=0.4))
        parts.append(text(LEFT - 10, y_of(percent) + 5, f"{percent}%", anchor="end"))
    parts += [text(x_of(tempo), BOTTOM + 20, tempo) for tempo in tempos]
    for i, (name, color) in enumerate(COLORS.items()):
        points = [(x_of(tempo), y_of(float(cell.split()[0]))) for tempo, cell in zip(tempos, rows[name], strict=True)]
        parts.append(line(*points, color=color, width=2.2, dash="6 4" if name == "no pyramid" else ""))
        parts += [f'<circle cx="{x:g}" cy="{y:g}" r="3.5" fill="{color}"/>' for x, y in points]
        x, y = x_of("0.71x"), y_of(62 - 8 * i)
        parts.append(line((x, y), (x + 26, y), color=color, width=2.2, dash="6 4" if name == "no pyramid" else ""))
        parts.append(text(x + 34, y + 5, name, anchor="start"))
    title = "Top-1 over the tempo of the test clips: each pyramid is ahead of the backbone alone, except at the fastest tempo"
    return drawing(490, BOTTOM + 54, title, parts, sizes=(15, 14), shrinks=True)


if __name__ == "__main__":
    write(draw)
