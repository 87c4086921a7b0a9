import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from tpn import InputSpec
from tpn.video import transforms
from tpn.video.transforms import adjust_hue, center_crop, normalize, resize_short_side, three_crop

PIXELS = np.load(Path(__file__).parent / "fixtures" / "pixels.npz")


def chw(name):
    return torch.from_numpy(PIXELS[name]).movedim(-1, -3)


@pytest.mark.parametrize("case", json.loads(str(PIXELS["meta"])), ids=lambda c: f"{c['w']}x{c['h']}")
def test_equal_to_the_reference(case):
    i = case["i"]
    resized = resize_short_side(chw(f"in_{i}"), case["short_side"])
    assert torch.equal(resized, chw(f"resized_{i}"))
    assert torch.equal(three_crop(resized, case["three_crop"]), chw(f"three_crop_{i}"))
    assert torch.equal(center_crop(resized, case["center_crop"]), chw(f"center_crop_{i}"))


@pytest.mark.parametrize(("height", "width", "size"), [(31, 47, 20), (20, 20, 33), (64, 17, 16), (9, 200, 8)])
def test_devices_other_than_the_cpu_give_the_same_pixels(monkeypatch, height, width, size):
    x = torch.randint(0, 256, (2, 4, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = resize_short_side(x, size)
    monkeypatch.setattr(transforms, "_resize_with_numpy", transforms._resize_with_torch)
    assert torch.equal(resize_short_side(x, size), expected)


def test_crops_are_start_end_center_and_keep_leading_dimensions():
    x = torch.arange(9, dtype=torch.uint8).expand(2, 5, 3, 4, 9)
    assert three_crop(x, 4)[:, 0, 0, 0, 0, 0].tolist() == [0, 4, 2]
    assert three_crop(x, 4).shape == (3, 2, 5, 3, 4, 4)
    assert three_crop(x.mT, 4)[:, 0, 0, 0, 0, 0].tolist() == [0, 4, 2]
    assert center_crop(x, 3)[0, 0, 0, 0].tolist() == [3, 4, 5]
    assert resize_short_side(x, 4) is x
    assert resize_short_side(x, 2).shape == (2, 5, 3, 2, 5)


def test_normalize():
    x = torch.randint(0, 256, (2, 4, 3, 5, 6), dtype=torch.uint8)
    y = normalize(x, (10.0, 20.0, 30.0), (1.0, 2.0, 4.0))
    assert y.shape == (2, 3, 4, 5, 6)
    assert y.dtype == torch.float32
    assert torch.equal(y[:, 2], (x[:, :, 2].float() - 30) / 4)


def test_spec_crops():
    x = torch.randint(0, 256, (2, 3, 40, 60), dtype=torch.uint8)
    spec = InputSpec(8, num_crops=3, flip=True, short_side=20, three_crop_size=20, crop_size=16)
    crops = spec.crops(x)
    assert crops.shape == (6, 2, 3, 20, 20)
    assert torch.equal(crops[3:], crops[:3].flip(-1))
    assert InputSpec(8, num_crops=1, short_side=20, crop_size=16).crops(x).shape == (1, 2, 3, 16, 16)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: resize_short_side(torch.zeros(3, 4, 4), 2), TypeError, "uint8.*torch.float32"),
        (lambda: center_crop(torch.zeros(4, 4, 3, dtype=torch.uint8), 2), ValueError, r"\(\.\.\., 3, H, W\), got \(4, 4, 3\)"),
        (lambda: center_crop(torch.zeros(3, 4, 4, dtype=torch.uint8), 5), ValueError, "5x5.*4x4"),
        (lambda: three_crop(torch.zeros(3, 6, 8, dtype=torch.uint8), 4), ValueError, "must be 4, got .*8x6"),
        (lambda: resize_short_side(torch.zeros(3, 4, 4, dtype=torch.uint8), 0), ValueError, "size.*got 0"),
    ],
)
def test_bad_frames(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("turns", [-0.5, -0.1, -0.03, 0.0, 0.07, 0.1, 0.49])
def test_hue_is_that_of_torchvision(turns):
    rng = np.random.default_rng(1)
    noise = torch.from_numpy(rng.integers(0, 256, (2, 3, 60, 50), dtype=np.uint8))
    gray = noise[:, :1].repeat(1, 3, 1, 1)
    pure = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 0, 0], [255, 255, 255]], dtype=torch.uint8)
    for x in (noise, gray, pure.view(6, 3, 1, 1)):
        ours = adjust_hue(x, turns)
        assert (ours.dtype, ours.shape) == (x.dtype, x.shape)
        assert (ours.int() - functional.adjust_hue(x, turns).int()).abs().max() <= 1
    assert torch.equal(adjust_hue(noise, 0), noise)
    assert torch.equal(adjust_hue(gray, turns), gray)
