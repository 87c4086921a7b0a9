"""Train `tpn_slowonly_tiny_motion`, the model in the wheel, on rendered motion and rendered people.

    python examples/bundled_model/train.py --output bundled

Writes 17,320 videos, trains a model of 36 classes, keeps the 14 classes of `tpn.video.motion`, saves them as `bundled/model` in
float16, and tests them. The people are there for the weights: what they teach helps on real videos. Takes two hours on two busy
cores; the same command resumes.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import figures

import tpn
from tpn.cli.script import run_cli
from tpn.video import motion

PARTS = {"train": (1, 300, 500), "val": (2, 20, 20), "test": (3, 100, 0)}
"""Seed of each part of the data, and clips for each class of motion and of people."""
OPTIONS: dict[str, Any] = {"recipe": "motion", "checkpoint_interval": 200}


def write_videos(root: Path) -> None:
    """Write all parts, except the clips that exist, two at a time."""
    jobs = []
    with ProcessPoolExecutor(2) as pool:
        for part, (seed, motions, people) in PARTS.items():
            jobs.append(pool.submit(figures.write_dataset, root / part, people, seed=seed))
            jobs.append(pool.submit(motion.write_dataset, root / part, motions, seed=seed))
    for job in jobs:
        job.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    write_videos(output / "videos")
    result = tpn.train(output / "videos", output=output / "run", resume=True, **OPTIONS)
    rows = [result.model.labels.index(name) for name in motion.CLASSES]
    model = tpn.create_model("tpn_slowonly_tiny_motion")
    model.load_state_dict({key: value[rows] if ".fc." in key else value for key, value in result.model.state_dict().items()})
    folder = tpn.save_pretrained(model.half(), output / "model")
    print(tpn.evaluate(folder, output / "videos" / "test").metrics)


if __name__ == "__main__":
    run_cli(main)
