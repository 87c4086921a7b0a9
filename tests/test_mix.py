"""MixUp and CutMix: clips and targets are mixed in the same proportion."""

import random

import numpy as np
import pytest
import torch

from tpn.training.mix import Mix

BATCH, CLASSES = 4, 6
CLIPS = torch.arange(1.0, BATCH + 1).view(BATCH, 1, 1, 1, 1).expand(BATCH, 3, 5, 16, 24).contiguous()
"""Each clip has the same value, 1 to 4, in all pixels."""
ONE_CLASS = torch.eye(CLASSES)[:BATCH]
SEVERAL = torch.tensor([[1.0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 1]])


def mixed(mix, targets=ONE_CLASS, draws=60):
    """The results for several seeds."""
    for seed in range(draws):
        torch.manual_seed(seed)
        clips, result = mix(CLIPS, targets)
        assert (type(clips), clips.shape, clips.dtype) == (torch.Tensor, CLIPS.shape, torch.float32)
        assert (result.shape, result.dtype) == (targets.shape, torch.float32)
        yield clips, result


def shares(targets):
    """The share of each clip (columns) in each mixed one (rows)."""
    return targets[:, :BATCH]


def is_cut(clips):
    """Whether every pixel is that of one clip, by the values of the batch."""
    return torch.isin(clips, CLIPS[:, 0, 0, 0, 0]).all()


def test_mixup():
    own = []
    for clips, targets in mixed(Mix(0.8, 0, CLASSES)):
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(BATCH))
        expected = shares(targets) @ CLIPS.flatten(1)
        torch.testing.assert_close(clips.flatten(1), expected)
        assert ((targets > 0).sum(dim=1) <= 2).all()
        own.append(float(targets[0, 0]))
    assert min(own) < 0.3
    assert max(own) > 0.7


def test_cutmix():
    """The same rectangle in all frames; the targets are its share of the area."""
    own = []
    for clips, targets in mixed(Mix(0, 1.0, CLASSES)):
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(BATCH))
        areas = torch.stack([(clips == value).flatten(1).float().mean(dim=1) for value in range(1, BATCH + 1)], dim=1)
        torch.testing.assert_close(shares(targets), areas)
        assert (clips == clips[:, :1, :1]).all()
        inside = clips[0, 0, 0] != 1
        assert inside.sum() == inside.any(dim=0).sum() * inside.any(dim=1).sum()
        own.append(float(targets[0, 0]))
    assert min(own) < 0.5
    assert max(own) > 0.9


@pytest.mark.parametrize("alphas", [(0.8, 0), (0, 1.0)], ids=["MixUp", "CutMix"])
def test_several_classes(alphas):
    """Targets of several classes are mixed like those of one."""
    one, several = (list(mixed(Mix(*alphas, CLASSES), targets)) for targets in (ONE_CLASS, SEVERAL))
    for (clips, single), (same, targets) in zip(one, several, strict=True):
        assert torch.equal(clips, same)
        torch.testing.assert_close(targets, shares(single) @ SEVERAL)
        assert targets.min() >= 0
        assert targets.max() <= 1


def test_both():
    cut = [bool(is_cut(clips)) for clips, _ in mixed(Mix(1000.0, 1.0, CLASSES))]  # an alpha of 1000: halves
    assert 15 < sum(cut) < 45
    for clips, targets in mixed(Mix(1000.0, 1.0, CLASSES)):
        if not is_cut(clips):
            torch.testing.assert_close(targets[0, 0], torch.tensor(0.5), atol=0.05, rtol=0)


def test_draws_depend_on_torchs_seed_only():
    mix = Mix(0.8, 1.0, CLASSES)
    first = list(mixed(mix))
    random.seed(1)
    np.random.seed(1)
    for (clips, targets), (again, same) in zip(first, mixed(Mix(0.8, 1.0, CLASSES)), strict=True):
        assert torch.equal(clips, again)
        assert torch.equal(targets, same)
    assert len({targets.numpy().tobytes() for _, targets in first}) > 50


def test_compiled():
    mix = Mix(0.8, 1.0, CLASSES)

    def doubled(clips, targets):
        clips, targets = mix(clips * 2, targets)
        return clips / 2, targets

    compiled = torch.compile(doubled, backend="eager")  # no C++ compiler
    for seed in range(8):  # both methods
        results = []
        for run in (doubled, compiled):
            torch.manual_seed(seed)
            results.append(run(CLIPS, ONE_CLASS))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_inputs_stay_unchanged_and_the_module_has_no_state():
    clips, targets = CLIPS.clone(), SEVERAL.clone()
    for alphas in ((1.0, 0), (0, 1.0)):
        mix = Mix(*alphas, CLASSES)
        mix(clips, targets)
        assert not mix.state_dict()
    assert torch.equal(clips, CLIPS)
    assert torch.equal(targets, SEVERAL)


def test_invalid_arguments():
    with pytest.raises(ValueError, match="mixup_alpha.*-1"):
        Mix(-1, 0, CLASSES)
    with pytest.raises(ValueError, match="cutmix_alpha.*nan"):
        Mix(0, float("nan"), CLASSES)
