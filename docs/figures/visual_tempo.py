"""Draw `visual_tempo.svg`: one motion at three tempos, and the frames that the two levels of the R101 model pool.

python docs/figures/visual_tempo.py docs/pages/figures/visual_tempo.svg
"""

import math

import torch
from drawing import COARSE, FINE, FRAME, drawing, line, text, write

from tpn import create_model

LEFT, STEP, SWING = 150, 66, 30


def curve(y: float, cycles: float, frames: int) -> list[str]:
    """Draw the position of a swinging object over time, and its position in each frame."""

    def position(t: float) -> tuple[float, float]:
        return round(LEFT + STEP * (t + 0.5), 1), round(y - SWING * math.sin(2 * math.pi * cycles * (t + 0.5) / frames), 1)

    in_frames = [position(t) for t in range(frames)]
    dots = "".join(f'<circle cx="{x:g}" cy="{height:g}" r="5" fill="{FRAME}"/>' for x, height in in_frames)
    return [line(*(position(i / 16 - 0.5) for i in range(16 * frames + 1)), color=FRAME, width=1.4, dash="4 3"), dots]


def windows(y: float, scale: int, frames: int, color: str, name: str, result: str) -> list[str]:
    """Draw the groups of frames that temporal modulation pools at one level."""
    parts = [text(LEFT - 14, y + 17, name, bold=True, anchor="end")]
    for start in range(0, frames, scale):
        x, w = LEFT + STEP * start + 3, STEP * scale - 6
        parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="26" rx="6" fill="{color}" fill-opacity=".13" stroke="{color}"/>')
        parts.append(text(x + w / 2, y + 18, f"maximum over {scale} frames"))
    return [*parts, text(LEFT + STEP * frames / 2, y + 44, result)]


def draw() -> str:
    with torch.device("meta"):
        neck = create_model("tpn_slowonly_r101_k400").neck
    frames, (fine, coarse) = neck.num_frames[0], neck.temporal_scales
    parts = []
    for row, (name, cycles) in enumerate((("slow", 1), ("twice as fast", 2), ("four times as fast", 4))):
        y = 44 + 84 * row
        parts += [text(LEFT - 14, y + 5, name, anchor="end"), *curve(y, cycles, frames)]
    parts += windows(262, fine, frames, FINE, "fine level", f"{frames // fine} steps left: order in time is kept")
    parts += windows(324, coarse, frames, COARSE, "coarse level", f"{frames // coarse} step left: the whole clip at once")
    title = "A motion of one, two, and four cycles per clip, and the frames that each of the two levels pools into one step"
    return drawing(720, 376, title, parts)


if __name__ == "__main__":
    write(draw)
