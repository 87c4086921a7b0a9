"""Deterministic weights and clips, from names, shapes and a seed, for comparisons with other implementations."""

import json
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from tpn.zoo.convert import convert_state_dict

FIXTURES = Path(__file__).parent / "fixtures"

MODEL_OF = {
    "mmaction2_tpn_slowonly_r50_8x8_k400": "tpn_slowonly_r50_k400.in1k",
    "mmaction2_tpn_tsm_r50_sthv1": "tpn_tsm_r50_sthv1.in1k",
    "original_slowonly_r50_8x8": "slowonly_r50_k400",
    "original_slowonly_r101_32x2": "slowonly_r101_32x2_k400",
    "original_tpn_slowonly_r50_8x8": "tpn_slowonly_r50_k400.original",
    "original_tpn_slowonly_r50_16x4": "tpn_slowonly_r50_16x4_k400",
    "original_tpn_slowonly_r50_32x2": "tpn_slowonly_r50_32x2_k400",
    "original_tpn_slowonly_r101_8x8": "tpn_slowonly_r101_k400.original",
    "original_tpn_slowonly_r101_16x4": "tpn_slowonly_r101_16x4_k400.original",
    "original_tpn_slowonly_r101_32x2": "tpn_slowonly_r101_32x2_k400.original",
    "original_tpn_tsm_r50_sthv2": "tpn_tsm_r50_sthv2",
    "original_tsm_r50_sthv2": "tsm_r50_sthv2",
}
"""Model name of each upstream network, by the name of its manifest."""


def _rng(key, seed):
    return np.random.default_rng([zlib.crc32(key.encode()), seed])


def fill(name, shape, seed=0):
    """Return the values of the upstream tensor `name`: float32, or int64 zeros for a batch counter."""
    rng, shape = _rng(name, seed), tuple(shape)
    kind = name.split(".")[-1]
    if kind == "num_batches_tracked":
        return np.zeros(shape, dtype=np.int64)
    if kind in ("running_mean", "bias"):
        values = rng.normal(0.0, 0.1, shape)
    elif kind == "running_var":
        values = rng.uniform(0.5, 1.5, shape)
    elif len(shape) == 1:
        values = rng.uniform(0.5, 1.0, shape)
    else:
        values = rng.normal(0.0, np.sqrt(2.0 / np.prod(shape[1:])), shape)
    return values.astype(np.float32)


def clip(shape, seed=0):
    """Return a batch of clips (B, C, T, H, W), float32: moving plane waves and noise with a variance of about 1."""
    batch, channels, frames, height, width = shape
    rng = _rng("clip", seed)
    y, x = (axis.astype(np.float32) for axis in np.mgrid[0:height, 0:width])
    waves = np.empty(shape, dtype=np.float32)
    for b in range(batch):
        phase = rng.uniform(0, 6.28, 3)
        speed = rng.uniform(0.1, 1.5, 3)
        freq = rng.uniform(0.02, 0.2, (3, 2))
        for c in range(channels):
            (fx, fy), p, s = freq[c % 3], phase[c % 3], speed[c % 3]
            for t in range(frames):
                waves[b, c, t] = np.sin(fx * x + fy * y + p + s * t)
    waves += rng.normal(0.0, 0.5, shape).astype(np.float32)
    return waves


def manifest(name):
    """Return the shapes of an upstream state dict by parameter name."""
    shapes = json.loads((FIXTURES / "manifests" / f"{name}.json").read_text())
    return {key: tuple(shape) for key, shape in shapes.items()}


def manifest_names():
    return sorted(path.stem for path in (FIXTURES / "manifests").glob("*.json"))


def upstream_state_dict(manifest_name, seed=0):
    """Return a state dict in its upstream layout with values from `fill`."""
    return dict(_filled(tuple(manifest(manifest_name).items()), seed))


@lru_cache(maxsize=1)  # consecutive networks often have the same names and shapes
def _filled(shapes, seed):
    return {name: torch.from_numpy(fill(name, shape, seed)) for name, shape in shapes}


def sketch_state_dict(manifest_name, dtype=torch.float32):
    """Return a state dict in its upstream layout that takes no memory: each tensor repeats one value, unique to it."""
    state = {}
    for i, (name, shape) in enumerate(manifest(manifest_name).items()):
        counter = name.endswith("num_batches_tracked")
        state[name] = torch.tensor(i if counter else (i + 1) / 1024, dtype=torch.int64 if counter else dtype).expand(shape)
    return state


def our_names(manifest_name):
    """Return the name in tpn of each upstream tensor of a manifest."""
    source = sketch_state_dict(manifest_name)
    ours = {id(tensor): name for name, tensor in convert_state_dict(source)[0].items()}
    return {name: ours[id(tensor)] for name, tensor in source.items()}
