"""Say what happens in videos.

python examples/predict.py video.mp4 another.mp4
python examples/predict.py video.mp4 --model tpn_slowonly_tiny_motion
"""

import argparse

import tpn
from tpn.training import command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="+")
    parser.add_argument(
        "--model", default="tpn_slowonly_r50_k400", help="a name from tpn list, local-dir:FOLDER, hf-hub:OWNER/NAME"
    )
    parser.add_argument("--clips", type=int, default=1, help="clips along time; the published accuracies were measured with 10")
    parser.add_argument("--crops", type=int, default=1, choices=(1, 3))
    args = parser.parse_args()

    classify = tpn.VideoClassifier(args.model, pretrained=True)
    # Files are read ahead while the model works, and one that cannot be read does not stop the others.
    for video, result in zip(
        args.videos, classify.predict_each(args.videos, num_clips=args.clips, num_crops=args.crops), strict=True
    ):
        print(video)
        if isinstance(result, tpn.Prediction):
            for label, probability in result.top(5):
                print(f"  {probability:6.1%}  {label}")
        else:
            print(f"  {result}")


if __name__ == "__main__":
    command(main)
