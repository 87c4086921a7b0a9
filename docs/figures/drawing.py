"""Parts of the drawings: boxes, arrows, labels, and colors for light and dark pages.

The site inlines the drawings, so their text has the color of the page. Elsewhere, as in the README, it has the color `INK`.
"""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

PAGES = Path(__file__).parents[1] / "pages"
INK, FRAME, FINE, COARSE, OUT = "#6e7681", "#6e7781", "#2f81f7", "#db6d28", "#2da44e"
"""Colors of text and arrows, the clip, the fine level, the coarse level, and the fused features."""


def text(x: float, y: float, content: str, *, bold: bool = False, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{"t" if bold else "s"}" text-anchor="{anchor}">{content}</text>'


def box(x: float, y: float, w: float, h: float, color: str, title: str, sub: str = "") -> str:
    middle = y + h / 2 + (-3 if sub else 5)
    rect = f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="8" fill="{color}" fill-opacity=".13" stroke="{color}"/>'
    return rect + text(x + w / 2, middle, title, bold=True) + (text(x + w / 2, middle + 18, sub) if sub else "")


def arrow(*points: tuple[float, float], color: str = "") -> str:
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    stroke = f'stroke="{color}"' if color else 'class="l"'
    return f'<path d="{path}" fill="none" {stroke} stroke-width="1.6" marker-end="url(#arrow)"/>'


def line(*points: tuple[float, float], color: str, width: float = 1.6, dash: str = "") -> str:
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"{dashed}/>'


def drawing(
    width: int, height: int, title: str, parts: Iterable[str], sizes: tuple[float, float] = (15, 13), *, shrinks: bool = False
) -> str:
    """Return an SVG document. sizes: font sizes of bold and of plain text, in pixels. shrinks: fit a phone, do not scroll."""
    limits = f' style="min-width:0;max-width:{1.3 * width:g}px"' if shrinks else ""
    ink = f"var(--md-typeset-color, {INK})"
    style = (
        f"svg.drawing text{{font-family:system-ui,sans-serif;fill:{ink}}}svg.drawing .t{{font-size:{sizes[0]}px;font-weight:600}}"
        f"svg.drawing .s{{font-size:{sizes[1]}px}}svg.drawing .l{{stroke:{ink}}}svg.drawing .h{{fill:{ink}}}"
    )
    marker = (
        '<marker id="arrow" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" class="h"/></marker>'
    )
    return (
        f'<svg class="drawing"{limits} xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{title}"><title>{title}</title><style>{style}</style><defs>{marker}</defs>\n'
        + "\n".join(filter(None, parts))
        + "\n</svg>\n"
    )


def read_table(page: str, head: str) -> dict[str, list[str]]:
    """Return the rows of the table on a page whose first line starts with `head`, by their first cell."""
    markdown = (PAGES / page).read_text(encoding="utf-8")
    table = re.search(rf"^ *{re.escape(head)}.*\n *\|[-:| ]+\n((?: *\|.*\n)+)", markdown, re.MULTILINE)
    rows = [[cell.strip().replace("`", "") for cell in line.strip(" |").split("|")] for line in table[1].splitlines()]
    return {name: cells for name, *cells in rows}


def write(draw: Callable[[], str]) -> None:
    """Write a drawing to the file in the first command line argument."""
    Path(sys.argv[1]).write_text(draw(), encoding="utf-8")
