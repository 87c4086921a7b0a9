"""Draw `flows.svg`: the input of the bottom-up flow with `flow_order` "cascade" and "parallel".

python docs/figures/flows.py docs/pages/figures/flows.svg
"""

from drawing import COARSE, FINE, OUT, arrow, box, drawing, text, write


def panel(y: float, order: str, caption: str) -> list[str]:
    """Draw one pyramid. y: its upper edge."""
    fine, coarse = y + 62, y + 166
    middle = {"fine": fine + 24, "coarse": coarse + 24}
    parts = [text(14, y + 16, f'flow_order="{order}"', bold=True, anchor="start"), text(706, y + 16, caption, anchor="end")]
    for level, top, color in (("fine", fine, FINE), ("coarse", coarse, COARSE)):
        parts += [
            box(14, top, 130, 48, color, "modulated", f"{level} level"),
            arrow((144, middle[level]), (198, middle[level])),
            box(204, top, 110, 48, color, "top-down"),
            box(384, top, 110, 48, color, "bottom-up"),
            arrow((494, middle[level]), (540, middle[level]), (540, fine + 76), (578, fine + 76)),
        ]
        if order == "cascade":
            parts.append(arrow((314, middle[level]), (378, middle[level])))
    parts += [
        arrow((259, coarse), (259, fine + 54), color=COARSE),
        text(252, fine + 80, "upsample, +", anchor="end"),
        arrow((439, fine + 48), (439, coarse - 6), color=FINE),
        text(432, fine + 80, "pool, +", anchor="end"),
        box(584, fine + 52, 122, 48, OUT, "fusion"),
    ]
    if order == "parallel":  # around the top-down flow
        under = coarse + 60
        parts += [
            arrow((164, middle["fine"]), (164, fine - 12), (350, fine - 12), (350, middle["fine"]), (378, middle["fine"])),
            arrow((164, middle["coarse"]), (164, under), (350, under), (350, middle["coarse"]), (378, middle["coarse"])),
        ]
    # from the top-down flow directly to the fusion
    bottom = coarse + 76
    parts.append(arrow((290, coarse + 48), (290, bottom), (645, bottom), (645, fine + 106)))
    parts.append(arrow((290, fine), (290, fine - 22), (645, fine - 22), (645, fine + 46)))
    return parts


def draw() -> str:
    parts = panel(0, "cascade", "bottom-up starts from top-down's result")
    parts += panel(278, "parallel", "bottom-up starts from the same levels as top-down")
    return drawing(720, 526, "The two flows of the pyramid, one after the other (cascade) or side by side (parallel)", parts)


if __name__ == "__main__":
    write(draw)
