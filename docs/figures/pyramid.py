"""Draw `pyramid.svg`, the overview in the README, with the sizes of `tpn_slowonly_r101_k400`, whose levels have two tempos.

python docs/figures/pyramid.py docs/pages/figures/pyramid.svg
"""

import torch
from drawing import COARSE, FINE, FRAME, OUT, arrow, box, drawing, text, write

from tpn import create_model


def stack(x: float, y: float, count: int, w: float, h: float, color: str, gap: float) -> str:
    """Draw frames along time, with the first one at the back."""
    return "".join(
        f'<rect x="{x + i * gap:g}" y="{y + i * gap * 0.55:g}" width="{w:g}" height="{h:g}" rx="3" '
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
        stack(8, 82, frames, 50, 40, FRAME, 6),
        text(54, 176, f"{frames} frames"),
        arrow((112, 140), (136, 140)),
        box(142, 104, 120, 72, FRAME, "backbone", "SlowOnly R101"),
        arrow((262, 122), (280, 122), (280, 70), (298, 70)),
        arrow((262, 160), (280, 160), (280, 212), (298, 212)),
        box(304, 40, 134, 60, FINE, "c4, fine", f"{fine} ch, 1/16"),
        box(304, 182, 134, 60, COARSE, "c5, coarse", f"{coarse} ch, 1/32"),
        arrow((438, 70), (462, 70)),
        arrow((438, 212), (462, 212)),
        box(468, 40, 136, 60, FINE, "modulation", f"{frames} → {left[0]} in time"),
        box(468, 182, 136, 60, COARSE, "modulation", f"{frames} → {left[1]} in time"),
        text(452, 146, "each level has its own tempo"),
        arrow((604, 70), (638, 70)),
        arrow((604, 212), (638, 212)),
        box(644, 40, 80, 60, FINE, f"T = {left[0]}"),
        box(644, 182, 80, 60, COARSE, f"T = {left[1]}"),
        arrow((668, 182), (668, 106), color=COARSE),
        arrow((700, 100), (700, 176), color=FINE),
        text(660, 146, "top-down", anchor="end"),
        text(709, 146, "bottom-up", anchor="start"),
        arrow((724, 70), (852, 70), (852, 108)),
        arrow((724, 212), (852, 212), (852, 174)),
        box(804, 114, 96, 54, OUT, "fusion", f"{neck.out_channels} ch"),
        arrow((900, 141), (922, 141)),
        box(928, 114, 106, 54, OUT, "head", "class scores"),
    ]
    title = (
        "TPN-SlowOnly R101: the last two stages of the backbone are pooled to two tempos, exchange features in two flows, "
        "and are fused and classified"
    )
    return drawing(1040, 270, title, parts, sizes=(18, 15))


if __name__ == "__main__":
    write(draw)
