"""Compare accuracy and probabilities in bfloat16 and int8 with those in float32.

    python examples/benchmarks/int8.py fights --models runs/fold0 runs/fold1 runs/fold2 --output exported
    python examples/benchmarks/int8.py motion --models tpn_slowonly_tiny_motion --output exported

A dataset is a folder with the lists fold0_train.txt and fold0_test.txt, fold1_train.txt, ... The first model is calibrated with
the first training list and tested with the first test list, and so on. If the folder motion does not exist, it is rendered, 20
videos of each class in each list.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import tpn
from tpn import export
from tpn.cli.script import run_cli
from tpn.video import motion
from tpn.video.datasets import open_dataset


def render(folder: Path) -> None:
    for seed, part in enumerate(("train", "test")):
        motion.write_dataset(folder / part, 20, seed=1000 + seed)
        files = sorted((folder / part).rglob("*.mp4"))
        lines = [f"{file.relative_to(folder)} {motion.CLASSES.index(file.parent.name)}\n" for file in files]
        (folder / f"fold0_{part}.txt").write_text("".join(lines), encoding="utf-8")


def run_fold(model: str, data: Path, fold: int, folder: Path) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float32]]]:
    """Return the labels (N,) of the test videos, and by precision the probabilities (N, K) of the middle clip of each."""
    folder.mkdir(parents=True, exist_ok=True)
    network = tpn.create_model(model, pretrained=True).eval()
    network.input_spec = network.input_spec.with_views(1, 1)
    export.export_openvino(network, folder / "float32.xml")
    report = export.export_openvino(network, folder / "int8.xml", calibrate=data / f"fold{fold}_train.txt")
    print(f"{model}: {report}")
    compared = {
        "float32": network,
        "bfloat16, tpn.optimize": tpn.optimize(network, "bfloat16"),
        "bfloat16, OpenVINO": export.load(folder / "float32.xml", precision="bfloat16"),
        "int8, OpenVINO": export.load(folder / "int8.xml"),
    }
    test = open_dataset(data / f"fold{fold}_test.txt", network.input_spec, train=False, classes=network.labels)
    pairs = [test[i] for i in range(len(test))]  # where a video is damaged, another one with its label
    clips = [test.spec.normalize(frames).unsqueeze(0) for frames, _ in pairs]
    with torch.inference_mode():
        probs = {name: torch.cat([each(clip) for clip in clips]).softmax(dim=1).numpy() for name, each in compared.items()}
    return np.array([label for _, label in pairs]), probs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", required=True, help="names or folders of saved models, one for each fold")
    parser.add_argument("--output", type=Path, required=True, help="folder for the exported files")
    args = parser.parse_args()

    if args.data.name == "motion" and not args.data.exists():
        render(args.data)
    folds = [run_fold(model, args.data, fold, args.output / f"fold{fold}") for fold, model in enumerate(args.models)]
    table = Table(box=None)
    for column in ("", "top-1 %, by fold", "mean", "same top-1 %", "largest change of a probability"):
        table.add_column(column, justify="left" if not column else "right")
    expected = np.concatenate([probs["float32"] for _, probs in folds])
    for name in folds[0][1]:
        top1 = [100 * float((probs[name].argmax(axis=1) == labels).mean()) for labels, probs in folds]
        by_fold = " ".join(f"{each:.1f}" for each in top1)
        got = np.concatenate([probs[name] for _, probs in folds])
        same = 100 * (got.argmax(axis=1) == expected.argmax(axis=1)).mean()
        change = abs(got - expected).max()
        table.add_row(name, by_fold, f"{statistics.mean(top1):.1f}", f"{same:.1f}", f"{change:.3f}")
    Console(width=110).print(table, highlight=False)
    print(f"{len(expected)} videos, one clip each")


if __name__ == "__main__":
    run_cli(main)
