"""Draw `pyramid.svg`, the picture in the README, from the published R101 model's own numbers.

python docs/figures/pyramid.py docs/figures/pyramid.svg
"""

import sys
from pathlib import Path

import torch

from tpn import create_model

INK, MUTED, FRAME, FINE, COARSE, OUT = "#57606a", "#8b949e", "#6e7781", "#2f81f7", "#db6d28", "#2da44e"


def box(x: float, y: float, w: float, h: float, color: str, title: str, sub: str = "") -> str:
    middle = y + h / 2 + (0 if sub else 5)
    text = f'<text x="{x + w / 2}" y="{middle}" class="t" text-anchor="middle" fill="{color}">{title}</text>'
    if sub:
        text += f'<text x="{x + w / 2}" y="{middle + 17}" class="s" text-anchor="middle">{sub}</text>'
    rect = f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="{color}" fill-opacity=".12" stroke="{color}"/>'
    return rect + text


def arrow(*points: tuple[float, float], color: str = INK) -> str:
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.6" marker-end="url(#a)"/>'


def label(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" class="s" text-anchor="{anchor}">{text}</text>'


def stack(x: float, y: float, count: int, w: float, h: float, color: str, gap: float) -> str:
    """Frames along time, the first one at the back."""
    return "".join(
        f'<rect x="{x + i * gap}" y="{y + i * gap * 0.55}" width="{w}" height="{h}" rx="3" '
        f'fill="{color}" fill-opacity=".18" stroke="{color}"/>'
        for i in range(count)
    )


def draw() -> str:
    with torch.device("meta"):
        neck = create_model("tpn_slowonly_r101_k400").neck
    frames, scales = neck.num_frames[0], neck.temporal_scales
    left = [f // s for f, s in zip(neck.num_frames, scales, strict=True)]
    fine, coarse = neck.in_channels
    parts = [
        stack(16, 86, frames, 56, 42, FRAME, 7),
        label(68, 180, f"{frames} frames"),
        arrow((128, 140), (152, 140)),
        box(158, 106, 104, 70, FRAME, "backbone", "SlowOnly, TSM"),
        arrow((262, 122), (284, 122), (284, 72), (306, 72)),
        arrow((262, 160), (284, 160), (284, 212), (306, 212)),
        box(312, 44, 120, 56, FINE, "c4, fine", f"{fine} ch, 1/16"),
        box(312, 184, 120, 56, COARSE, "c5, coarse", f"{coarse} ch, 1/32"),
        arrow((432, 72), (460, 72)),
        arrow((432, 212), (460, 212)),
        box(466, 44, 138, 56, FINE, "modulation", f"{frames} → {left[0]} in time"),
        box(466, 184, 138, 56, COARSE, "modulation", f"{frames} → {left[1]} in time"),
        label(535, 128, "each level has its own tempo"),
        arrow((604, 72), (648, 72)),
        arrow((604, 212), (648, 212)),
        box(654, 44, 72, 56, FINE, f"T = {left[0]}"),
        box(654, 184, 72, 56, COARSE, f"T = {left[1]}"),
        arrow((676, 184), (676, 106), color=COARSE),
        arrow((706, 100), (706, 178), color=FINE),
        label(668, 148, "top-down", "end"),
        label(714, 148, "bottom-up", "start"),
        arrow((726, 72), (848, 72), (848, 112)),
        arrow((726, 212), (848, 212), (848, 172)),
        box(802, 116, 92, 52, OUT, "fusion", f"{neck.out_channels} ch"),
        arrow((894, 142), (920, 142)),
        box(926, 116, 98, 52, OUT, "head", "class scores"),
    ]
    style = f"text{{font-family:system-ui,sans-serif}}.t{{font-size:15px;font-weight:600}}.s{{font-size:12px;fill:{MUTED}}}"
    marker = (
        '<marker id="a" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker>'
    )
    title = "Two feature levels of one backbone, pooled to two tempos, flow into each other and fuse"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1040 270" role="img" aria-label="{title}">'
        f"<title>{title}</title><style>{style}</style><defs>{marker}</defs>\n" + "\n".join(filter(None, parts)) + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(), encoding="utf-8")
