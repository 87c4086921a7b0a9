"""Compare the pyramid with none behind a frozen backbone, on the folds of a dataset, with several seeds.

    python examples/benchmarks/frozen_backbone.py fights --output frozen --seeds 3

The backbone runs once for each video, on ten training clips and a center crop; a training of neck and classifier then takes
seconds. A dataset is a folder of class folders, with the lists fold0_train.txt and fold0_test.txt, fold1_train.txt, ... The same
command resumes. `results.jsonl` in the output has the results.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from settings import fold_lists
from torch import Tensor, nn

import tpn
from tpn.cli.script import positive_int, run_cli
from tpn.video.datasets import VideoDataset, VideoFolder, open_dataset

FRAMES, INTERVAL, CROP, SHORT_SIDE = 8, 8, 112, 128
DRAWS = 10
"""Training clips of each video."""
STEPS, BATCH, LR = 375, 8, 1e-3

VARIANTS: dict[str, dict[str, Any]] = {
    "no pyramid": {"neck": None},
    "pyramid": {},
    "pyramid, batch norms start with bias 2": {"bias": 2.0},
    "pyramid, a tenth of the learning rate": {"neck_lr": 0.1},
    "pyramid and classifier, 0.3 of the learning rate": {"lr": 0.3},
    "no pyramid, 3 times the learning rate": {"neck": None, "lr": 3.0},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with fold lists")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--backbone", default="timm/tf_efficientnet_lite0")
    parser.add_argument("--seeds", type=positive_int, default=1)
    parser.add_argument("--threads", type=positive_int, default=1)
    return parser.parse_args()


def create(backbone: str, **kwargs: Any) -> tpn.TPNClassifier:
    return tpn.create_model("tpn", backbone=backbone, num_frames=FRAMES, **kwargs)


def compute_maps(data: VideoDataset, backbone: str, path: Path) -> list[NDArray[np.float16]]:
    """Return for each level an array (videos, DRAWS + 1, C, T, H, W), from the file if it is there."""
    files = [path / f"level{i}.npy" for i in range(2)]
    if not (path / "done").exists():
        model = create(backbone, num_classes=1, backbone_pretrained=True).eval()
        path.mkdir(parents=True, exist_ok=True)
        train, center = (
            data.spec.train_transform(crop_area=(0.3, 1.0), normalize=False),
            data.spec.eval_transform(normalize=False),
        )
        levels: list[NDArray[np.float16]] = []
        for i, item in enumerate(data.items):
            rng = np.random.default_rng(i)
            torch.manual_seed(i)
            clips = []
            for draw in range(DRAWS + 1):
                sample = data.spec.indices if draw == DRAWS else lambda total, rng=rng: data.spec.random_indices(total, rng)
                frames, positions = data.read(item, sample)
                clips.append((center if draw == DRAWS else train)(frames[positions[0]]))
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                maps = model.backbone(data.spec.normalize(torch.stack(clips)))
            if not levels:
                shapes = [(len(data), *level.shape) for level in maps]
                levels = [np.lib.format.open_memmap(f, "w+", np.float16, s) for f, s in zip(files, shapes, strict=True)]
            for array, level in zip(levels, maps, strict=True):
                array[i] = level.half().numpy()
        (path / "done").touch()
    return [np.load(file, mmap_mode="r") for file in files]


def train_and_test(
    levels: list[NDArray[np.float16]],
    targets: Tensor,
    fold: tuple[list[int], list[int]],
    backbone: str,
    variant: Mapping[str, Any],
    seed: int,
) -> float:
    """Train neck and classifier; return the top-1 accuracy on the test videos in percent."""
    train, test = fold
    labels = targets.argmax(dim=1)
    torch.manual_seed(seed)
    model = create(backbone, num_classes=targets.shape[1], **({"neck": None} if "neck" in variant else {}))
    for part in model.neck.modules() if model.neck is not None else ():
        if isinstance(part, nn.BatchNorm3d) and "bias" in variant:
            nn.init.constant_(part.bias, variant["bias"])
    groups: list[dict[str, Any]] = [{"params": [*model.head.parameters()], "scale": 1.0}]
    if model.neck is not None:
        groups.append({"params": [*model.neck.parameters()], "scale": variant.get("neck_lr", 1.0)})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05, fused=True)

    def logits(videos: Any, draws: Any) -> Tensor:
        maps = [torch.from_numpy(np.stack([level[v, d] for v, d in zip(videos, draws, strict=True)])).float() for level in levels]
        return model.forward_head(maps[-1] if model.neck is None else model.neck(maps))

    model.train()
    rng, order = np.random.default_rng(seed), list[int]()
    for step in range(STEPS):
        if len(order) < BATCH:
            order = rng.permutation(train).tolist()
        videos, order = order[:BATCH], order[BATCH:]
        for group in optimizer.param_groups:
            warmup, decay = min(1.0, (step + 1) / (0.1 * STEPS)), 0.5 * (1 + math.cos(math.pi * step / STEPS))
            group["lr"] = LR * variant.get("lr", 1.0) * group["scale"] * warmup * decay
        loss = F.cross_entropy(logits(videos, rng.integers(0, DRAWS, len(videos))), labels[videos], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 40.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([logits([video], [DRAWS]).argmax(1) for video in test])
    return 100 * float((predicted == labels[test]).float().mean())


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    spec = create(args.backbone, num_classes=1).input_spec
    assert spec is not None
    options = {"frame_interval": INTERVAL, "crop_size": CROP, "short_side": SHORT_SIDE, "num_clips": 1, "num_crops": 1}
    spec = tpn.InputSpec.from_dict(spec.to_dict() | options)
    data = VideoFolder(args.data, spec, train=False)
    levels = compute_maps(data, args.backbone, args.output)
    index = {Path(item.path).resolve(): i for i, item in enumerate(data.items)}
    results = args.output / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for seed in range(args.seeds):
        for name, variant in VARIANTS.items():
            for number, lists in enumerate(fold_lists(args.data)):
                row = {"settings": name, "seed": seed, "fold": number}
                if any(row.items() <= done.items() for done in rows):
                    continue
                train, test = (
                    [index[Path(i.path).resolve()] for i in open_dataset(path, spec, train=False).items] for path in lists
                )
                top1 = train_and_test(levels, data.targets, (train, test), args.backbone, variant, seed)
                rows.append(row | {"top1": top1})
                with results.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print("| settings | top-1, % | standard deviation over seeds |\n|---|---:|---:|")
    for name in VARIANTS:
        by_seed = defaultdict(list)
        for row in rows:
            if row["settings"] == name:
                by_seed[row["seed"]].append(row["top1"])
        means = [statistics.mean(values) for values in by_seed.values()]
        print(
            f"| {name} | {statistics.mean(means):.1f} | {statistics.stdev(means):.1f} |"
            if len(means) > 1
            else f"| {name} | {means} | |"
        )


if __name__ == "__main__":
    run_cli(main)
