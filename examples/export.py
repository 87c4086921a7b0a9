"""Export a model to ONNX, and classify a video with the exported file.

python examples/export.py video.mp4
python examples/export.py video.mp4 --model local-dir:runs/mine --output mine.onnx
"""

import argparse
from pathlib import Path

import tpn
from tpn import export
from tpn.cli.script import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video")
    parser.add_argument("--model", default="tpn_slowonly_tiny_motion")
    parser.add_argument("--output", default="model.onnx", help="*.onnx, *.pt2 for torch.export, or *.xml for OpenVINO")
    args = parser.parse_args()

    model = tpn.create_model(args.model, pretrained=True).eval()
    write = {".pt2": export.export_pt2, ".xml": export.export_openvino}.get(Path(args.output).suffix, export.export_onnx)
    write(model, args.output)
    print(f"largest relative difference of a logit: {export.max_difference(model, args.output):.0e}")

    # The file includes class names, sampling and transform.
    for classify in (tpn.VideoClassifier(model), tpn.VideoClassifier(args.output)):
        ((name, probability),) = classify(args.video).top(1)
        print(f"{probability:.4%}  {name}")


if __name__ == "__main__":
    run_cli(main)
