"""Say what happens when in a long video: one line for each action.

    python examples/timeline.py video.mp4
    python examples/timeline.py video.mp4 --model local-dir:runs/mine --threshold 0.3

`tpn timeline` does the same for cameras and pipes, too, and writes JSON and a picture.
"""

import argparse

import tpn
from tpn import tempo
from tpn.training import command
from tpn.video import decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video")
    parser.add_argument("--model", default="tpn_slowonly_r50_k400", help="name, local-dir:FOLDER or hf-hub:OWNER/NAME")
    parser.add_argument("--stride", type=int, help="frames from clip to clip; default: a quarter of a clip")
    parser.add_argument("--threshold", type=float, default=0.5, help="probability from which on an action is named")
    args = parser.parse_args()

    fps, _ = decode.header(args.video)
    if fps is None:
        raise ValueError(f"{args.video}: the file does not state its frame rate")
    classifier = tpn.VideoClassifier(args.model, pretrained=True)
    clips = tempo.slide(classifier, args.video, stride=args.stride)  # computed as they are asked for, none is kept
    for segment in tempo.segments(clips, fps=fps, threshold=args.threshold):
        name = classifier.labels[segment.label]
        print(f"{segment.start:7.1f} s – {segment.end:.1f} s  {name}  {segment.probability:.1%}", flush=True)


if __name__ == "__main__":
    command(main)
