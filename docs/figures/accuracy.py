"""Draw `accuracy.svg`: the reported accuracy of the models of Kinetics-400 over their cost, from the table of checkpoints.

python docs/figures/accuracy.py docs/pages/figures/accuracy.svg
"""

import math

from drawing import COARSE, FINE, FRAME, drawing, line, text, write

from tpn import list_models, model_info

LEFT, RIGHT, TOP, BOTTOM = 76, 640, 40, 330
COSTS, ACCURACIES = (40, 400), (74, 79.5)
SERIES = (
    ("TPN-SlowOnly R101", "tpn_slowonly_r101_*.original", FINE, (400, 75)),
    ("TPN-SlowOnly R50", "tpn_slowonly_r50_*.original", COARSE, (180, 158)),
    ("SlowOnly R101, no pyramid", "slowonly_r101_*.original", FRAME, (530, 200)),
    ("SlowOnly R50, no pyramid", "slowonly_r50_*.original", FRAME, (300, 290)),
)


def point(gmacs: float, top1: float) -> tuple[float, float]:
    """Return the place of a model. The cost is on a logarithmic scale."""
    along = math.log(gmacs / COSTS[0]) / math.log(COSTS[1] / COSTS[0])
    up = (top1 - ACCURACIES[0]) / (ACCURACIES[1] - ACCURACIES[0])
    return round(LEFT + along * (RIGHT - LEFT), 1), round(BOTTOM - up * (BOTTOM - TOP), 1)


def draw() -> str:
    parts = [
        line((LEFT, BOTTOM), (RIGHT, BOTTOM), color=FRAME, width=1),
        text((LEFT + RIGHT) / 2, BOTTOM + 44, "GMACs for one clip"),
        text(LEFT - 44, TOP - 18, "top-1, %", anchor="start"),
    ]
    for gmacs in (40, 50, 100, 200, 400):
        x, _ = point(gmacs, ACCURACIES[0])
        parts += [line((x, BOTTOM), (x, BOTTOM + 5), color=FRAME, width=1), text(x, BOTTOM + 22, str(gmacs))]
    for top1 in range(74, 80):
        _, y = point(COSTS[0], top1)
        parts += [
            line((LEFT, y), (RIGHT, y), color=FRAME, width=0.5, dash="2 5"),
            text(LEFT - 10, y + 5, str(top1), anchor="end"),
        ]
    for title, pattern, color, place in SERIES:
        models = sorted((model_info(name) for name in list_models(pattern, pretrained=True)), key=lambda model: model.gmacs)
        points = [point(model.gmacs, model.checkpoint.reported_top1) for model in models]
        parts.append(line(*points, color=color, width=2.5, dash="" if color != FRAME else "7 4"))
        for model, (x, y) in zip(models, points, strict=True):
            spec = model.checkpoint.config.input_spec
            parts += [
                f'<circle cx="{x:g}" cy="{y:g}" r="5" fill="{color}"><title>{model.checkpoint.model}, {spec.num_frames} x '
                f"{spec.frame_interval}: {model.checkpoint.reported_top1:.1f}%, {model.gmacs:.1f} GMACs</title></circle>",
            ]
        parts.append(text(*place, title, bold=True))
    return drawing(660, 385, "Reported accuracy of TPN and of its backbones over their cost on Kinetics-400", parts)


if __name__ == "__main__":
    write(draw)
