"""Draw `ablation_study.svg`: the accuracy of every variant of `examples/ablations.py`, seed by seed.

python docs/figures/ablation_study.py docs/pages/figures/ablation_study.svg
"""

import runpy
from pathlib import Path

from drawing import COARSE, FINE, FRAME, drawing, line, text, write

ROOT = Path(__file__).parents[2]
LEFT, RIGHT, ROW, GAP = 180, 470, 22, 12
LOWEST, HIGHEST = 0, 100


def x_of(top1: float) -> float:
    return round(LEFT + (RIGHT - LEFT) * (top1 - LOWEST) / (HIGHEST - LOWEST), 1)


def draw() -> str:
    study = runpy.run_path(str(ROOT / "examples" / "ablations.py"))
    rows = study["read_rows"](ROOT / "docs" / "pages")
    top1 = {name: [row["top1"] for _, row in sorted(runs.items())] for name, runs in rows.items()}
    parts, marks, y, drawn = [], [], 30, set()
    for title, names in study["TABLES"].items():
        y += GAP
        parts.append(text(8, y + 5, title, bold=True, anchor="start"))
        y += ROW
        for name in (name for name in names if name in top1 and name not in drawn):
            drawn.add(name)
            mean, color = sum(top1[name]) / len(top1[name]), COARSE if "no pyramid" in name else FINE
            parts.append(text(LEFT - 12, y + 5, name, anchor="end"))
            parts.append(line((LEFT, y), (RIGHT, y), color=FRAME, width=0.4))
            marks += [f'<circle cx="{x_of(each):g}" cy="{y}" r="4" fill="{color}" fill-opacity=".45"/>' for each in top1[name]]
            marks.append(line((x_of(mean), y - 8), (x_of(mean), y + 8), color=color, width=3))
            y += ROW
    means = {name: sum(top1[name]) / len(top1[name]) for name in ("pyramid", "no pyramid")}
    for name, mean in means.items():
        parts.append(line((x_of(mean), 24), (x_of(mean), y - 6), color=FINE if name == "pyramid" else COARSE, dash="4 3"))
        side = -1 if mean == min(means.values()) else 1
        parts.append(text(x_of(mean) + 3 * side, 16, name, anchor="end" if side < 0 else "start"))
    for tick in range(LOWEST, HIGHEST + 1, 20):
        parts.append(text(x_of(tick), y + 14, f"{tick}%"))
    title = "Top-1 of each variant: one dot for each seed, and a bar at their mean"
    return drawing(515, y + 24, title, [*parts, *marks], sizes=(14, 13), shrinks=True)


if __name__ == "__main__":
    write(draw)
