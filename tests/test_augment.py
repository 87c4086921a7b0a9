"""Transforms for training and evaluation."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import tpn
from tpn.video import augment

SPEC = tpn.input_spec("tpn_slowonly_r50_k400")
LEFT_RIGHT = replace(SPEC, flip_label_pairs=((2, 4), (30, 41)))


@pytest.fixture
def clip():
    """Identical, asymmetric frames. They stay identical if a transform uses the same random choices for all of them."""
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


def test_all_frames_get_the_same_transform(clip):
    torch.manual_seed(0)
    transform = SPEC.train_transform(normalize=False)
    seen = [transform(clip) for _ in range(8)]
    for out in seen:
        assert (out == out[:1]).all()
    assert len({out.numpy().tobytes() for out in seen}) == 8


def test_color_jitter(clip, monkeypatch):
    """Each of the four operators is applied once per clip, in random order, over its whole range."""
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


def test_normalization_is_that_of_the_spec(clip):
    torch.manual_seed(3)
    raw = SPEC.train_transform(normalize=False)(clip)
    torch.manual_seed(3)
    assert torch.equal(SPEC.train_transform()(clip), SPEC.normalize(raw))


def test_eval_transform_returns_the_input_of_the_classifier(clip):
    for crops in (1, 3):
        spec = replace(SPEC, num_crops=crops)
        expected = spec.normalize(spec.crops(clip))
        assert torch.equal(SPEC.eval_transform(crops)(clip), expected if crops == 3 else expected[0])
    mirrored = replace(SPEC, flip=True)
    assert torch.equal(mirrored.eval_transform(3)(clip), SPEC.eval_transform(3)(clip))


def is_flipped(transform, clip, *label):
    """Return whether the black half, left in `clip`, is now on the right, and the label."""
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
    with pytest.raises(ValueError, match="2 channels"):
        spec.for_channels(2).train_transform()
    assert 70 < sum(flipped for _, flipped, _ in seen) < 130
    never = spec.train_transform(flip_prob=0, normalize=False)
    never.augment = torch.nn.Identity()
    assert not any(is_flipped(never, clip)[0] for _ in range(20))


def test_flips_that_swap_labels_need_a_label(clip):
    transform = LEFT_RIGHT.train_transform()
    with pytest.raises(ValueError, match="2, 4, 30, 41.*flip_prob=0"):
        transform(clip)
    assert transform(clip, 7)[1] == 7
    LEFT_RIGHT.train_transform(flip_prob=0)(clip)


def test_flip_pairs_of_models():
    assert tpn.input_spec("tpn_tsm_r50_sthv1").flip_label_pairs == ((2, 4), (30, 41), (52, 66))
    assert tpn.input_spec("tpn_slowonly_r50_k400").flip_label_pairs == ()
    model = tpn.create_model("tpn_tsm_r50_sthv1", base_channels=4)
    assert model.input_spec.flip_label_pairs == tpn.input_spec("tpn_tsm_r50_sthv1").flip_label_pairs
    assert tpn.create_model("tpn_tsm_r50_sthv1", base_channels=4, num_classes=5).input_spec.flip_label_pairs == ()
    model.reset_classifier(174)
    assert model.input_spec.flip_label_pairs == ()


def test_flip_pairs_of_saved_models(tmp_path):
    model = tpn.create_model("tpn_tsm_r50_sthv1", base_channels=4)
    tpn.save_pretrained(model, tmp_path)
    assert tpn.input_spec(f"local-dir:{tmp_path}") == model.input_spec
    assert tpn.create_model(f"local-dir:{tmp_path}").input_spec == model.input_spec
    custom = tpn.create_model("tpn_tsm_r50_sthv1", base_channels=4, num_classes=5)
    custom.input_spec = replace(custom.input_spec, flip_label_pairs=((0, 1),))
    tpn.save_pretrained(custom, tmp_path)
    assert tpn.create_model(f"local-dir:{tmp_path}").input_spec.flip_label_pairs == ((0, 1),)
    assert tpn.create_model(f"local-dir:{tmp_path}", num_classes=6).input_spec.flip_label_pairs == ()


@pytest.mark.parametrize(
    "bad", [torch.zeros(8, 90, 120, 3, dtype=torch.uint8), torch.zeros(8, 3, 90, 120), torch.zeros(3, 90, 120, dtype=torch.uint8)]
)
def test_invalid_clips(bad):
    for transform in (SPEC.train_transform(), SPEC.eval_transform()):
        with pytest.raises(ValueError, match=r"\(T, 3, H, W\), got torch\.\w+ \("):
            transform(bad)


def test_invalid_arguments():
    with pytest.raises(ValueError, match="flip_prob.*2"):
        SPEC.train_transform(flip_prob=2)
    with pytest.raises(ValueError, match="num_crops.*2"):
        SPEC.eval_transform(2)


def test_crop_area(clip):
    torch.manual_seed(0)
    gradient = torch.arange(120, dtype=torch.uint8).expand(8, 3, 90, 120)
    for low, high in ((0.5, 1.0), (0.08, 0.2)):
        transform = SPEC.train_transform(crop_area=(low, high), color_jitter=False, flip_prob=0, normalize=False)
        widths = [int(out.max()) - int(out.min()) + 1 for out in (transform(gradient) for _ in range(30))]
        # the columns, of 120, in a crop with this area and an aspect ratio from 3/4 to 4/3
        assert np.sqrt(low * 90 * 120 * 3 / 4) - 2 <= min(widths)
        assert max(widths) <= np.sqrt(high * 90 * 120 * 4 / 3) + 2
    for area in ((0, 1), (0.5, 0.4), (0.5, 1.5)):
        with pytest.raises(ValueError, match="crop_area"):
            SPEC.train_transform(crop_area=area)
