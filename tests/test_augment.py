"""Transforms for training and evaluation."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import tpn
from tpn.video import augment

SPEC = tpn.input_spec("tpn_slowonly_r50_k400")
LEFT_RIGHT = replace(SPEC, mirrored=((2, 4), (30, 41)))


@pytest.fixture
def clip():
    """Frames that are all the same, and not symmetric: what differs between them afterwards was drawn per frame."""
    rng = np.random.default_rng(0)
    frame = torch.from_numpy(rng.integers(0, 256, (1, 3, 90, 120), dtype=np.uint8))
    return frame.repeat(8, 1, 1, 1)


def test_shapes_and_types(clip):
    assert SPEC.train_transform()(clip).shape == (3, 8, 224, 224)
    assert SPEC.train_transform()(clip).dtype == torch.float32
    raw = SPEC.train_transform(normalize=False)(clip)
    assert (raw.shape, raw.dtype) == ((8, 3, 224, 224), torch.uint8)
    assert SPEC.eval_transform()(clip).shape == (3, 8, 224, 224)
    assert SPEC.eval_transform(3)(clip).shape == (3, 3, 8, 256, 256)
    assert SPEC.eval_transform(3, normalize=False)(clip).shape == (3, 8, 3, 256, 256)


def test_one_draw_for_all_frames(clip):
    torch.manual_seed(0)
    transform = SPEC.train_transform(normalize=False)
    seen = [transform(clip) for _ in range(8)]
    for out in seen:
        assert (out == out[:1]).all()
    assert len({out.numpy().tobytes() for out in seen}) == 8


def test_colours(clip, monkeypatch):
    """Each of the four is used once a clip, in any order, over its whole range."""
    seen = []
    for name in ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue"):
        module = augment if name == "adjust_hue" else augment.functional
        change = getattr(module, name)

        def record(frame, amount, name=name, change=change):
            seen.append((name, amount))
            return change(frame, amount)

        monkeypatch.setattr(module, name, record)
    torch.manual_seed(0)
    clips = []
    for _ in range(200):
        seen.clear()
        SPEC.train_transform()(clip[:1])
        clips.append([*seen])
    assert {len(changes) for changes in clips} == {4}
    assert len({tuple(name for name, _ in changes) for changes in clips}) == 24
    for name, low, high in [(f"adjust_{what}", 0.5, 1.5) for what in ("brightness", "contrast", "saturation")] + [
        ("adjust_hue", -0.1, 0.1)
    ]:
        amounts = [dict(changes)[name] for changes in clips]
        assert low <= min(amounts) < low + 0.1 * (high - low)
        assert high >= max(amounts) > high - 0.1 * (high - low)


def test_seeds_give_the_same_clip(clip):
    transform = pickle.loads(pickle.dumps(SPEC.train_transform()))
    torch.manual_seed(7)
    first = transform(clip)
    torch.manual_seed(7)
    assert torch.equal(SPEC.train_transform()(clip), first)


def test_normalisation_is_the_specs(clip):
    torch.manual_seed(3)
    raw = SPEC.train_transform(normalize=False)(clip)
    torch.manual_seed(3)
    assert torch.equal(SPEC.train_transform()(clip), SPEC.normalize(raw))


def test_evaluation_is_what_the_classifier_sees(clip):
    for crops in (1, 3):
        spec = replace(SPEC, num_crops=crops)
        expected = spec.normalize(spec.crops(clip))
        assert torch.equal(SPEC.eval_transform(crops)(clip), expected if crops == 3 else expected[0])
    mirrored = replace(SPEC, flip=True)
    assert torch.equal(mirrored.eval_transform(3)(clip), SPEC.eval_transform(3)(clip))


def is_flipped(transform, clip, *label):
    """Whether the left half, black in `clip`, is now on the right; and the label."""
    out = transform(clip, *label)
    pixels = out[0] if label else out
    return bool(pixels[..., 0].float().mean() > pixels[..., -1].float().mean()), (out[1] if label else None)


def test_flip_and_labels():
    clip = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    clip[..., 32:] = 255
    spec = replace(LEFT_RIGHT, crop_size=64)
    transform = spec.train_transform(color_jitter=False, normalize=False)
    transform.augment = torch.nn.Identity()
    torch.manual_seed(0)
    seen = [(label, *is_flipped(transform, clip, label)) for label in (2, 4, 30, 41, 5) for _ in range(40)]
    swap = {2: 4, 4: 2, 30: 41, 41: 30, 5: 5}
    for before, flipped, after in seen:
        assert after == (swap[before] if flipped else before)
    always = spec.train_transform(flip_prob=1)
    assert always(clip, torch.tensor(2))[1] == 4
    with pytest.raises(ValueError, match="for RGB clips, this spec is for 2 channels"):
        spec.for_channels(2).train_transform()
    assert 70 < sum(flipped for _, flipped, _ in seen) < 130
    never = spec.train_transform(flip_prob=0, normalize=False)
    never.augment = torch.nn.Identity()
    assert not any(is_flipped(never, clip)[0] for _ in range(20))


def test_labels_that_a_flip_would_make_wrong(clip):
    transform = LEFT_RIGHT.train_transform()
    with pytest.raises(ValueError, match=r"a flip swaps labels \(\(2, 4\), \(30, 41\)\).*transform\(clip, label\).*flip_prob=0"):
        transform(clip)
    assert transform(clip, 7)[1] == 7
    LEFT_RIGHT.train_transform(flip_prob=0)(clip)


def test_which_models_know_of_mirrored_classes():
    assert tpn.input_spec("tpn_tsm_r50_sthv1").mirrored == ((2, 4), (30, 41), (52, 66))
    assert tpn.input_spec("tpn_slowonly_r50_k400").mirrored == ()
    model = tpn.create_model("tpn_tsm_r50_sthv1", base_channels=4)
    assert model.input_spec.mirrored == tpn.input_spec("tpn_tsm_r50_sthv1").mirrored
    assert tpn.create_model("tpn_tsm_r50_sthv1", base_channels=4, num_classes=5).input_spec.mirrored == ()
    model.reset_classifier(174)
    assert model.input_spec.mirrored == ()


def test_saved_models_know_too(tmp_path):
    model = tpn.create_model("tpn_tsm_r50_sthv1", base_channels=4)
    tpn.save_pretrained(model, tmp_path)
    assert tpn.input_spec(f"local-dir:{tmp_path}") == model.input_spec
    assert tpn.create_model(f"local-dir:{tmp_path}").input_spec == model.input_spec
    own = tpn.create_model("tpn_tsm_r50_sthv1", base_channels=4, num_classes=5)
    own.input_spec = replace(own.input_spec, mirrored=((0, 1),))
    tpn.save_pretrained(own, tmp_path)
    assert tpn.create_model(f"local-dir:{tmp_path}").input_spec.mirrored == ((0, 1),)
    assert tpn.create_model(f"local-dir:{tmp_path}", num_classes=6).input_spec.mirrored == ()


@pytest.mark.parametrize(
    "bad", [torch.zeros(8, 90, 120, 3, dtype=torch.uint8), torch.zeros(8, 3, 90, 120), torch.zeros(3, 90, 120, dtype=torch.uint8)]
)
def test_other_input(bad):
    for transform in (SPEC.train_transform(), SPEC.eval_transform()):
        with pytest.raises(ValueError, match=r"expected a uint8 RGB clip \(T, 3, H, W\), got torch\.\w+ \("):
            transform(bad)


def test_other_arguments():
    with pytest.raises(ValueError, match="flip_prob must be within 0..1, got 2"):
        SPEC.train_transform(flip_prob=2)
    with pytest.raises(ValueError, match="num_crops must be 1"):
        SPEC.eval_transform(2)


def test_crop_area(clip):
    torch.manual_seed(0)
    gradient = torch.arange(120, dtype=torch.uint8).expand(8, 3, 90, 120)
    for low, high in ((0.5, 1.0), (0.08, 0.2)):
        transform = SPEC.train_transform(crop_area=(low, high), color_jitter=False, flip_prob=0, normalize=False)
        widths = [int(out.max()) - int(out.min()) + 1 for out in (transform(gradient) for _ in range(30))]
        # of 120 columns, a crop of that area and an aspect of 3/4 to 4/3 shows between
        assert np.sqrt(low * 90 * 120 * 3 / 4) - 2 <= min(widths)
        assert max(widths) <= np.sqrt(high * 90 * 120 * 4 / 3) + 2
    for area in ((0, 1), (0.5, 0.4), (0.5, 1.5)):
        with pytest.raises(ValueError, match="crop_area must be two shares of the picture"):
            SPEC.train_transform(crop_area=area)
