"""Draw `performance.svg`: the ratios in three tables of the page on performance.

python docs/figures/performance.py docs/pages/figures/performance.svg
"""

import re

from drawing import COARSE, FINE, FRAME, drawing, read_table, text, write

LEFT, UNIT, ROW, BAR = 222, 12, 24, 16
"""Start of the bars, the length of 1x, and the heights of a row and of its bar."""
TABLES = {
    "CPU with AVX512-BF16: one clip on two cores": "| TPN-SlowOnly R50 | 1 clip, ms |",
    "CPU with AMX: one clip on two cores": "| TPN-SlowOnly R50 | 2 cores, ms |",
    "H200 GPU: 32 clips": "| TPN-SlowOnly R50 | 32 clips, ms |",
}
COLORS = {"MMAction2": FRAME, "tpn": FRAME, "OpenVINO": COARSE}


def bar(y: float, name: str, cell: str) -> list[str]:
    """Draw a row of a table. cell: milliseconds and ratio, such as `470 (1.49x)`."""
    ms, ratio = re.fullmatch(r"(\S+) \((\S+)x\)", cell).groups()
    width, color = UNIT * float(ratio), COLORS.get(name.split()[0], FINE)
    return [
        text(LEFT - 12, y + 5, name, anchor="end"),
        f'<rect x="{LEFT}" y="{y - BAR / 2:g}" width="{width:g}" height="{BAR}" rx="3" fill="{color}" fill-opacity=".75"/>',
        text(LEFT + width + 8, y + 5, f"{float(ratio):.1f}x, {ms} ms", anchor="start"),
    ]


def draw() -> str:
    parts, y = [], 14
    for title, head in TABLES.items():
        parts.append(text(8, y + 5, title, bold=True, anchor="start"))
        for name, (cell, *_) in read_table("performance.md", head).items():
            y += ROW
            parts += bar(y, name, cell)
        y += 1.5 * ROW
    title = "Speed of TPN-SlowOnly R50 in each precision, on two CPUs and a GPU"
    return drawing(500, int(y) - ROW // 2, title, parts, sizes=(15, 14), shrinks=True)


if __name__ == "__main__":
    write(draw)
