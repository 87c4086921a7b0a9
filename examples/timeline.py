"""Find the actions in a long video and print one line for each.

    python examples/timeline.py video.mp4
    python examples/timeline.py video.mp4 --model local-dir:runs/mine --min-probability 0.3

`tpn timeline` also reads cameras and pipes, and writes JSON and a plot.
"""

import argparse

import tpn
from tpn import tempo
from tpn.cli.script import run_cli
from tpn.video import decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video")
    parser.add_argument("--model", default="tpn_slowonly_r50_k400", help="model name, local-dir:FOLDER or hf-hub:OWNER/NAME")
    parser.add_argument("--stride", type=int, help="frames between clips; default: a quarter of a clip")
    parser.add_argument("--min-probability", type=float, default=0.5, help="lowest probability of an action, otherwise -")
    args = parser.parse_args()

    fps, _ = decode.header(args.video)
    if fps is None:
        raise ValueError(f"{args.video} has no frame rate")
    classifier = tpn.VideoClassifier(args.model, pretrained=True)
    clips = tempo.slide(classifier, args.video, stride=args.stride)  # lazy
    for segment in tempo.segments(clips, fps=fps, min_probability=args.min_probability):
        name = "-" if segment.label is None else classifier.labels[segment.label]
        print(f"{segment.start:7.1f} s – {segment.end:.1f} s  {name}  {segment.probability:.1%}", flush=True)


if __name__ == "__main__":
    run_cli(main)
