"""Measure what the documentation says about the bundled model, on rendered motion with seeds that its training did not have.

    python examples/bundled_model/measure.py

Prints one table for how well explanations point at the shape, and one for how well a timeline measures durations.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F

import tpn
from tpn import tempo
from tpn.cli.script import run_cli
from tpn.explain import grad_cam, occlusion
from tpn.video import motion

SECONDS = (0.5, 1, 1.5, 2, 4, 6)


def print_explanations(classifier: tpn.VideoClassifier, clips_per_class: int) -> None:
    """Print how much of a map lies on the shape, relative to an even map, with a 95% interval from resampling the clips."""
    spec, rng, clips, masks = classifier.spec, np.random.default_rng(0), [], []
    labels = [label for label in range(len(motion.CLASSES)) for _ in range(clips_per_class)]
    for i, label in enumerate(labels):
        tempo_, seed = float(np.exp(rng.uniform(0, np.log(8)))), (9002, i)
        frames = torch.from_numpy(motion.render(label, tempo=tempo_, seed=seed, num_frames=31)[::2])
        clips.append(spec.normalize(spec.crops(frames.permute(0, 3, 1, 2))[0]))
        mask = torch.from_numpy(motion.masks(label, tempo=tempo_, seed=seed, num_frames=31)[::2]).float()
        masks.append(F.interpolate(mask[:, None], clips[0].shape[-2:], mode="area")[:, 0])
    batch, shape = torch.stack(clips), torch.stack(masks)
    print(f"{len(labels)} clips; the shape covers {shape.mean():.1%} of the pixels")
    print("\n| map | times the even map | clips above it |\n|---|---:|---:|")
    for method in (occlusion, grad_cam, _random_maps):
        for level, maps in enumerate(method(classifier.model, batch, torch.tensor(labels))):
            maps = torch.where(maps.sum(dim=(1, 2, 3), keepdim=True) > 0, maps, 1.0)
            inside = (maps * shape).sum(dim=(1, 2, 3)) / maps.sum(dim=(1, 2, 3))
            times = (inside / shape.mean(dim=(1, 2, 3))).numpy()
            means = rng.choice(times, (10_000, len(times))).mean(axis=1)
            low, high = np.quantile(means, (0.025, 0.975))
            interval = f"{times.mean():.2f} ({low:.2f} to {high:.2f})"
            print(f"| {method.__name__.strip('_')}, level {level} | {interval} | {(times > 1).mean():.0%} |", flush=True)


def _random_maps(model: tpn.TPNClassifier, clips: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what says nothing: random numbers of the size of occlusion's."""
    cells = torch.rand(len(clips), 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(cells, clips.shape[2:], mode="trilinear")[:, 0],)


def print_durations(classifier: tpn.VideoClassifier, seeds: int) -> None:
    """Print the durations that are measured of "growing" between two other motions."""
    label, rows = motion.CLASSES.index("growing"), []
    others = [motion.CLASSES.index(name) for name in ("turning clockwise", "blinking")]
    for seconds in SECONDS:
        frames = round(seconds * motion.FPS)
        measured = []
        for seed in range(seeds):
            video = motion.render_sequence([(others[0], 4, 60), (label, 4, frames), (others[1], 4, 60)], seed=9000 + seed)
            clips = list(tempo.slide(classifier, video, stride=4))
            measured.append(tempo.instance_tempo(clips, label, fps=motion.FPS))
        rows.append(measured)
    print(f"\n| rendered for | {' | '.join(f'{seconds:g} s' for seconds in SECONDS)} |\n|---|{'---:|' * len(SECONDS)}")
    for name, function in (("measured, mean", np.mean), ("least", np.min), ("most", np.max)):
        print(f"| {name} | {' | '.join(f'{function(row):.2f} s' for row in rows)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tpn_slowonly_tiny_motion")
    parser.add_argument("--clips", type=int, default=4, help="for each class")
    parser.add_argument("--seeds", type=int, default=6)
    args = parser.parse_args()
    classifier = tpn.VideoClassifier(args.model)
    print_explanations(classifier, args.clips)
    print_durations(classifier, args.seeds)


if __name__ == "__main__":
    run_cli(main)
