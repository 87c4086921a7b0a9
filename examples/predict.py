"""Classify videos and print the five most probable classes of each.

python examples/predict.py video.mp4 another.mp4
python examples/predict.py video.mp4 --model tpn_slowonly_tiny_motion
"""

import argparse

import tpn
from tpn.cli.script import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--model", default="tpn_slowonly_r50_k400", help="model name, local-dir:FOLDER or hf-hub:OWNER/NAME")
    parser.add_argument("--clips", type=int, default=1, help="clips along time; the published accuracies use 10")
    parser.add_argument("--crops", type=int, default=1, choices=(1, 3))
    args = parser.parse_args()

    classify = tpn.VideoClassifier(args.model, pretrained=True)
    # predict_each reads videos ahead, and yields an error instead of a prediction for an unreadable video.
    results = classify.predict_each(args.videos, num_clips=args.clips, num_crops=args.crops)
    for video, result in zip(args.videos, results, strict=True):
        print(video)
        if isinstance(result, tpn.Prediction):
            for label, probability in result.top(5):
                print(f"  {probability:6.1%}  {label}")
        else:
            print(f"  {result}")


if __name__ == "__main__":
    run_cli(main)
