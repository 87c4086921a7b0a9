"""Compare accuracy and probabilities in bfloat16 and int8 with those in float32.

    python examples/benchmarks/int8.py fights --models runs/fold0 runs/fold1 runs/fold2 --output exported
    python examples/benchmarks/int8.py motion --models tpn_slowonly_tiny_motion --views 1x1 --output exported

A dataset is a folder with the lists fold0_train.txt and fold0_test.txt, fold1_train.txt, ... The first model is calibrated with
the first training list and tested with the first test list, and so on. If the folder motion does not exist, it is rendered, 20
videos of each class in each list.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import tpn
from tpn import export
from tpn.cli.script import run_cli
from tpn.training.metrics import Evaluation
from tpn.video import motion

COMPARED: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "bfloat16, tpn.optimize": {"precision": "bfloat16"},
    "bfloat16, OpenVINO": {"file": "float32.xml", "precision": "bfloat16"},
    "int8, OpenVINO": {"file": "int8.xml"},
}


def render(folder: Path) -> None:
    for seed, part in enumerate(("train", "test")):
        motion.write_dataset(folder / part, 20, seed=1000 + seed)
        files = sorted((folder / part).rglob("*.mp4"))
        lines = [f"{file.relative_to(folder)} {motion.CLASSES.index(file.parent.name)}\n" for file in files]
        (folder / f"fold0_{part}.txt").write_text("".join(lines), encoding="utf-8")


def evaluate_fold(model: str, data: Path, fold: int, folder: Path, views: str | None) -> dict[str, Evaluation]:
    folder.mkdir(parents=True, exist_ok=True)
    network = tpn.create_model(model, pretrained=True).eval()
    export.export_openvino(network, folder / "float32.xml")
    report = export.export_openvino(network, folder / "int8.xml", calibrate=data / f"fold{fold}_train.txt")
    print(f"{model}: {report}")
    test = data / f"fold{fold}_test.txt"
    return {
        name: tpn.evaluate(folder / how["file"] if "file" in how else model, test, views=views, precision=how.get("precision"))
        for name, how in COMPARED.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", required=True, help="names or folders of saved models, one for each fold")
    parser.add_argument("--views", help="CLIPSxCROPS; default: those of the model")
    parser.add_argument("--output", type=Path, required=True, help="folder for the exported files")
    args = parser.parse_args()

    if args.data.name == "motion" and not args.data.exists():
        render(args.data)
    folds = [
        evaluate_fold(model, args.data, fold, args.output / f"fold{fold}", args.views) for fold, model in enumerate(args.models)
    ]
    table = Table(box=None)
    for column in ("", "top-1 %, by fold", "mean", "same top-1 %", "largest change of a probability"):
        table.add_column(column, justify="left" if not column else "right")
    expected = np.concatenate([fold["float32"].probs for fold in folds])
    for name in COMPARED:
        top1 = [fold[name].metrics["top1"] for fold in folds]
        by_fold = " ".join(f"{each:.1f}" for each in top1)
        probs = np.concatenate([fold[name].probs for fold in folds])
        same = 100 * (probs.argmax(axis=1) == expected.argmax(axis=1)).mean()
        change = abs(probs - expected).max()
        table.add_row(name, by_fold, f"{statistics.mean(top1):.1f}", f"{same:.1f}", f"{change:.3f}")
    Console(width=110).print(table, highlight=False)
    print(f"{len(expected)} videos")


if __name__ == "__main__":
    run_cli(main)
