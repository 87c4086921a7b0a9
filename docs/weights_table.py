"""Write the table of all published checkpoints into `weights.md`, between its two markers.

python docs/weights_table.py docs/weights.md
"""

import sys
from pathlib import Path

from tpn.zoo.weights import WEIGHTS

BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def table() -> str:
    rows = ["| weights | frames | data | top-1 | top-5 | measured | from | link |", "|---|---|---|---|---|---|---|---|"]
    for entry in WEIGHTS.values():
        spec = entry.input
        frames = f"{spec.num_frames} x {spec.frame_interval}" if spec.sampling == "dense" else f"{spec.num_frames} segments"
        top5 = "" if entry.reported_top5 is None else f"{entry.reported_top5:.2f}"
        measured = "" if entry.measured_top1 is None else f"{entry.measured_top1:.2f}"
        top1 = "" if entry.reported_top1 is None else f"{entry.reported_top1:.2f}"
        link = f"[by hand]({entry.url})" if entry.manual else f"[direct]({entry.url})"
        if entry.embedded:
            link = "in the package"
        facts = (f"`{entry.name}`", frames, entry.dataset.title, top1, top5, measured, entry.source, link)
        rows.append(f"| {' | '.join(facts)} |")
    return "\n".join(rows) + "\n"


def main(path: Path) -> None:
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
