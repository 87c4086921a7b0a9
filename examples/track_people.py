"""Find the people in a video, follow them, and print what each of them does.

    python examples/track_people.py video.mp4
    python examples/track_people.py video.mp4 --model local-dir:runs/mine --tracks tracks.txt

torchvision's Faster R-CNN finds people in every frame; a box that overlaps a box of the frame before continues its track. The
first run downloads 74 MB of weights. `tpn predict video.mp4 --tracks tracks.txt --annotate out.mp4` then draws the result.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import detection
from torchvision.ops import box_iou

import tpn
from tpn.cli.script import run_cli
from tpn.video import decode
from tpn.video.tracks import MAX_GAP, read_tracks

PERSON, MIN_SCORE = 1, 0.7
"""Class of the detector, and the score from which a box counts."""
MIN_IOU = 0.3
"""Overlap with which a box continues a track."""

Detector = Callable[[Tensor], Tensor]
"""Returns the boxes (N, 4) of the people in a frame, uint8 (3, H, W)."""


def load_detector() -> Detector:
    network = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights="DEFAULT").eval()

    @torch.inference_mode()
    def detect(frame: Tensor) -> Tensor:
        (found,) = network([frame / 255])
        return found["boxes"][(found["labels"] == PERSON) & (found["scores"] >= MIN_SCORE)]

    return detect


def follow(video: str, detect: Detector) -> Iterator[str]:
    """Yield lines of MOT text. The pairs of a track and a box that overlap most are matched first."""
    latest: dict[int, tuple[int, Tensor]] = {}  # id: its last frame and box there
    next_id = 1
    for number, frame in enumerate(decode.iter_frames(video)):
        boxes = detect(frame)
        latest = {id: seen for id, seen in latest.items() if number - seen[0] <= MAX_GAP}
        ids: dict[int, int] = {}
        if latest and len(boxes):
            overlaps = box_iou(torch.stack([box for _, box in latest.values()]), boxes)
            for place in overlaps.flatten().argsort(descending=True).tolist():
                row, box = divmod(place, len(boxes))
                id = list(latest)[row]
                if overlaps[row, box] >= MIN_IOU and id not in ids.values() and box not in ids:
                    ids[box] = id
        for i, box in enumerate(boxes):
            if i not in ids:
                ids[i], next_id = next_id, next_id + 1
            latest[ids[i]] = (number, box)
            left, top, right, bottom = box.tolist()
            yield f"{number + 1},{ids[i]},{left:.1f},{top:.1f},{right - left:.1f},{bottom - top:.1f},1,-1,-1,-1\n"


def main(detect: Detector | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video")
    parser.add_argument("--tracks", type=Path, default=Path("tracks.txt"), help="file to write, MOT text")
    parser.add_argument("--model", default="tpn_slowonly_r50_k400", help="model name, local-dir:FOLDER or hf-hub:OWNER/NAME")
    args = parser.parse_args()

    args.tracks.write_text("".join(follow(args.video, detect or load_detector())))
    tracks = read_tracks(args.tracks) if args.tracks.stat().st_size else []
    for track, result in zip(tracks, tpn.VideoClassifier(args.model).tracks(args.video, tracks), strict=True):
        text = f"{result.top(1)[0][0]}  {result.top(1)[0][1]:.1%}" if isinstance(result, tpn.Prediction) else str(result)
        print(f"person {track.id}, frames {track.first} to {track.last}: {text}")


if __name__ == "__main__":
    run_cli(main)
