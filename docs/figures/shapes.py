"""Draw `shapes.svg`: the steps of TPN-SlowOnly R50 with the shapes of their outputs, taken from the model.

python docs/figures/shapes.py docs/pages/figures/shapes.svg
"""

import torch
from drawing import COARSE, FINE, FRAME, OUT, arrow, box, drawing, text, write

from tpn import create_model, input_spec

LEFT, RIGHT, WIDE, TALL = 36, 384, 300, 52
STEPS = (("spatial_modulation", 232), ("temporal_modulation", 322), ("top_down", 412), ("bottom_up", 502))


def shapes() -> dict[str, str]:
    """Return C x T x H x W of the clip and of all feature maps, by name."""
    with torch.device("meta"):
        model = create_model("tpn_slowonly_r50_k400").eval()
        spec = input_spec(model)
        clip = torch.empty(1, 3, spec.num_frames, spec.crop_size, spec.crop_size)
        _, tensors = model.forward_intermediates(clip)
        tensors |= {"clip": clip, "logits": model(clip)}
    return {name: " × ".join(map(str, tensor.shape[1:])) for name, tensor in tensors.items()}


def draw() -> str:
    shape = shapes()
    fine, coarse = LEFT + WIDE / 2, RIGHT + WIDE / 2
    gap_left, gap_right = LEFT + WIDE, RIGHT
    parts = [
        text(712, 16, "channels × frames × height × width", anchor="end"),
        box(210, 28, WIDE, TALL, FRAME, "clip", shape["clip"]),
        arrow((290, 80), (290, 110), (fine, 110), (fine, 136)),
        arrow((430, 80), (430, 110), (coarse, 110), (coarse, 136)),
        text(360, 106, "backbone"),
        box(LEFT, 142, WIDE, TALL, FINE, "c4", shape["c4"]),
        box(RIGHT, 142, WIDE, TALL, COARSE, "c5", shape["c5"]),
    ]
    above = 142
    for name, y in STEPS:
        for level, (x, middle, color) in enumerate(((LEFT, fine, FINE), (RIGHT, coarse, COARSE))):
            parts += [
                arrow((middle, above + TALL), (middle, y - 6)),
                box(x, y, WIDE, TALL, color, f"{name}.{level}", shape[f"{name}.{level}"]),
            ]
        above = y
    middle = 412 + TALL / 2
    parts += [
        arrow((gap_right, middle), (gap_left + 6, middle), color=COARSE),
        text(360, middle - 10, "+"),
        arrow((gap_left, middle + 90), (gap_right - 6, middle + 90), color=FINE),
        text(360, middle + 80, "+"),
        # the arrow from the top-down flow passes the bottom-up flow on the left
        arrow((LEFT, middle), (14, middle), (14, 618), (LEFT - 6, 618)),
        arrow((coarse, 554), (coarse, 586)),
        arrow((fine, 554), (fine, 574), (RIGHT + 60, 574), (RIGHT + 60, 586)),
        arrow((RIGHT + WIDE, middle), (706, middle), (706, 664), (fine, 664), (fine, 650)),
        box(LEFT, 592, WIDE, TALL, OUT, "top_down_fusion", shape["top_down_fusion"]),
        box(RIGHT, 592, WIDE, TALL, OUT, "bottom_up_fusion", shape["bottom_up_fusion"]),
        arrow((LEFT + 60, 644), (LEFT + 60, 708), (204, 708)),
        arrow((RIGHT + WIDE - 60, 644), (RIGHT + WIDE - 60, 708), (516, 708)),
        box(210, 682, WIDE, TALL, OUT, "pyramid_fusion", shape["pyramid_fusion"]),
        arrow((360, 734), (360, 766)),
        box(210, 772, WIDE, TALL, OUT, "head", f"{shape['logits']} logits"),
    ]
    title = "The steps of TPN-SlowOnly R50 from the clip to the class scores, with the shape of each result"
    return drawing(720, 836, title, parts)


if __name__ == "__main__":
    write(draw)
