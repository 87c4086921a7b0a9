"""Rank videos by the cosine similarity of their features to those of the first video.

python examples/features.py query.mp4 *.mp4
"""

import argparse

import torch
import torch.nn.functional as F

import tpn
from tpn.cli.script import run_cli
from tpn.features import FeatureModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="+", help="the query, then the videos to rank")
    parser.add_argument("--model", default="tpn_slowonly_r50_k400")
    parser.add_argument("--feature", help="c4, c5, top_down_fusion, ...; default: the input of the classifier")
    args = parser.parse_args()

    model = tpn.create_model(args.model, pretrained=True).eval()
    # For clips as tensors, model.forward_intermediates(clips) returns all feature maps by name.
    extract = tpn.VideoClassifier(FeatureModel(model, args.feature))
    features = {}
    for video, result in zip(args.videos, extract.predict_each(args.videos, num_clips=4, num_crops=1), strict=True):
        if isinstance(result, tpn.Prediction):
            features[video] = result.view_logits.mean(dim=0)  # (C,), mean over the views
        else:
            print(result)

    if args.videos[0] not in features:
        raise ValueError(f"cannot read the query {args.videos[0]}")
    query, *others = features
    similarity = {video: F.cosine_similarity(features[query], features[video], dim=0).item() for video in others}
    for video in sorted(others, key=similarity.__getitem__, reverse=True):
        print(f"{similarity[video]:.3f}  {video}")
    print(f"{len(features)} videos, {torch.numel(features[query])} features each")


if __name__ == "__main__":
    run_cli(main)
