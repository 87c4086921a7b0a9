"""Write a model as ONNX, and classify a video with the file: the same probabilities.

python examples/export.py video.mp4
python examples/export.py video.mp4 --model local-dir:runs/mine --output mine.onnx
"""

import argparse

import tpn
from tpn import export
from tpn.training import command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video")
    parser.add_argument("--model", default="tpn_slowonly_tiny_motion")
    parser.add_argument("--output", default="model.onnx", help="*.pt2 for a program of torch.export")
    args = parser.parse_args()

    model = tpn.create_model(args.model, pretrained=True).eval()
    write = export.export_pt2 if args.output.endswith(".pt2") else export.export_onnx
    write(model, args.output)
    print(f"largest difference of a logit: {export.max_difference(model, args.output):.0e} of the largest")

    # From here on, the file is all that is needed: it knows classes, sampling and transform.
    exported = export.load(args.output)
    for classify in (tpn.VideoClassifier(model), tpn.VideoClassifier(exported)):
        ((name, probability),) = classify(args.video).top(1)
        print(f"{probability:.4%}  {name}")


if __name__ == "__main__":
    command(main)
