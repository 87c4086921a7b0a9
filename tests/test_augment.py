"""Transforms for training and evaluation."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import tpn
from tpn.video import augment

SPEC = tpn.input_spec("tpn_slowonly_r50_k400")
LEFT_RIGHT = replace(SPEC, flip_label_pairs=(("left", "right"), ("left turn", "right turn")), crop_size=64)


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


def noise(num_frames=5, size=72):
    return torch.randint(0, 256, (num_frames, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_rand_augment_and_erasing_have_one_draw_for_all_frames():
    """Each frame of a clip is changed as it would be alone."""
    clip = noise()
    transform = replace(SPEC, crop_size=64).train_transform(rand_augment=20, random_erasing=0.5, normalize=False)
    results = set()
    for seed in range(40):
        torch.manual_seed(seed)
        out = transform(clip)
        assert (out.shape, out.dtype) == ((5, 3, 64, 64), torch.uint8)
        torch.manual_seed(seed)
        assert torch.equal(transform(clip[3:4])[0], out[3])
        results.add(out.numpy().tobytes())
    assert len(results) == 40


def test_rand_augment_without_magnitude_and_erasing_without_probability_change_nothing(clip):
    """They do not draw random numbers either."""
    crop = augment.v2.RandomResizedCrop(224, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), antialias=False)
    jitter = augment.ColorJitter()
    for seed in range(4):
        torch.manual_seed(seed)
        expected = SPEC.normalize(jitter(crop(clip.flip(-1) if torch.rand(()) < 0.5 else clip)))
        state = torch.get_rng_state()
        for options in ({}, {"rand_augment": 0, "random_erasing": 0.0}):
            torch.manual_seed(seed)
            assert torch.equal(SPEC.train_transform(**options)(clip), expected)
            assert torch.equal(torch.get_rng_state(), state)


def test_magnitude_of_rand_augment():
    clip = noise(1) // 2 + 64

    def change(magnitude):
        transform = [replace(SPEC, crop_size=64).train_transform(rand_augment=m, color_jitter=False) for m in (0, magnitude)]
        total = 0.0
        for seed in range(60):
            out = []
            for each in transform:
                torch.manual_seed(seed)
                out.append(each(clip))
            total += float((out[0] - out[1]).abs().mean())
        return total

    changes = [change(magnitude) for magnitude in (1, 8, 30)]
    assert changes[0] * 1.2 < changes[1] < changes[2] / 1.2


def test_rand_augment_moves_the_mean_color_into_the_picture():
    clip = torch.full((1, 3, 64, 64), 250, dtype=torch.uint8)
    transform = replace(SPEC, crop_size=64).train_transform(rand_augment=20, color_jitter=False)
    torch.manual_seed(0)
    assert 10 < sum(bool((transform(clip).abs() < 0.01).all(dim=0).any()) for _ in range(40)) < 36


def test_random_erasing():
    """A rectangle in the mean color of the spec, 0 after normalization, in a share of the clips."""
    clip = torch.full((4, 3, 64, 64), 250, dtype=torch.uint8)
    transform = replace(SPEC, crop_size=64).train_transform(random_erasing=0.3, color_jitter=False)
    torch.manual_seed(0)
    areas = []
    for _ in range(200):
        erased = (transform(clip).abs() < 0.01).all(dim=0)  # T, H, W
        assert (erased == erased[0]).all()
        rows, columns = erased[0].any(dim=1), erased[0].any(dim=0)
        assert erased[0].sum() == rows.sum() * columns.sum()
        areas.append(float(erased[0].float().mean()))
    areas = np.array(areas)
    assert 40 < (areas > 0).sum() < 80
    assert 0.01 < areas[areas > 0].min() < 0.1
    assert 0.25 < areas.max() < 0.34


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
    options = {"rand_augment": 9, "random_erasing": 1}
    transform = pickle.loads(pickle.dumps(SPEC.train_transform(**options)))
    torch.manual_seed(7)
    first = transform(clip)
    torch.manual_seed(7)
    assert torch.equal(SPEC.train_transform(**options)(clip), first)


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


@pytest.fixture
def half():
    """A clip whose left half is black."""
    clip = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    clip[..., 32:] = 255
    return clip


def only_flips(classes, **kwargs):
    transform = LEFT_RIGHT.train_transform(classes=classes, normalize=False, **kwargs)
    transform.augment = torch.nn.Identity()
    return transform


@pytest.mark.parametrize(
    "classes", [("left", "right", "up", "left turn", "right turn"), ("up", "right turn", "right", "left turn", "left")]
)
def test_flips_exchange_labels_by_name(half, classes):
    transform = only_flips(classes)
    torch.manual_seed(0)
    seen = [(name, *is_flipped(transform, half, classes.index(name))) for name in classes for _ in range(40)]
    swap = {"left": "right", "right": "left", "left turn": "right turn", "right turn": "left turn", "up": "up"}
    for before, flipped, after in seen:
        assert classes[after] == (swap[before] if flipped else before)
    assert 70 < sum(flipped for _, flipped, _ in seen) < 130
    never = only_flips(None, flip_prob=0)
    assert not any(is_flipped(never, half)[0] for _ in range(20))
    label = torch.tensor(classes.index("left"))
    assert only_flips(classes, flip_prob=1)(half, label)[1] == classes.index("right")


def test_flips_keep_the_labels_of_other_classes(half):
    transform = only_flips([f"class {i}" for i in range(60)], flip_prob=1)
    assert [is_flipped(transform, half, label) for label in range(60)] == [(True, label) for label in range(60)]
    assert is_flipped(transform, half) == (True, None)


def test_a_class_without_its_counterpart_is_not_flipped(half):
    transform = only_flips(["up", "left", "right turn", "left turn"], flip_prob=1)
    assert [is_flipped(transform, half, label) for label in range(4)] == [(True, 0), (False, 1), (True, 3), (True, 2)]


def test_flips_of_clips_with_several_classes(half):
    transform = only_flips(["up", "left", "right turn", "left turn", "down"], flip_prob=1)
    for classes, flipped, after in (
        ([0, 2], True, [0, 3]),
        ([2, 3], True, [2, 3]),
        ([], True, []),
        ([1], False, [1]),
        ([1, 2], False, [1, 2]),
    ):
        before = torch.zeros(5).index_fill_(0, torch.tensor(classes, dtype=torch.int64), 1)
        is_mirrored, label = is_flipped(transform, half, before)
        assert (is_mirrored, label.nonzero().flatten().tolist()) == (flipped, after)
        assert before.nonzero().flatten().tolist() == classes
    label = torch.eye(5)[2]
    assert torch.equal(only_flips(["a", "b", "c", "d", "e"], flip_prob=1)(half, label)[1], label)


def test_flips_that_exchange_labels_need_classes_and_a_label(clip):
    with pytest.raises(ValueError, match="classes.*'left' and 'right'.*flip_prob=0"):
        LEFT_RIGHT.train_transform()
    transform = LEFT_RIGHT.train_transform(classes=("left", "up", "right"))
    with pytest.raises(ValueError, match="0, 2.*flip_prob=0"):
        transform(clip)
    assert transform(clip, 1)[1] == 1
    LEFT_RIGHT.train_transform(flip_prob=0)(clip)


def test_flip_pairs_of_models():
    """Those of the published code, by index."""
    expected = {"tsm_r50_sthv1": [(2, 4), (30, 41), (52, 66)], "tsm_r50_sthv2": [(86, 87), (93, 94), (166, 167)]}
    for name, pairs in {**expected, "tpn_slowonly_r50_k400": []}.items():
        model = tpn.create_model(name, base_channels=4)
        flipped = model.input_spec.train_transform(classes=model.labels).flipped_labels
        assert flipped == {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    model = tpn.create_model("tsm_r50_sthv1", base_channels=4, num_classes=5)
    with pytest.raises(ValueError, match="classes"):  # the names of the new classes are not known
        model.input_spec.train_transform(classes=model.labels)
    model.labels = tuple("abcde")
    assert model.input_spec.train_transform(classes=model.labels).flipped_labels == {}


def test_flip_pairs_of_saved_models(tmp_path):
    model = tpn.create_model("tpn_tsm_r50_sthv1", base_channels=4, num_classes=5)
    model.input_spec = replace(model.input_spec, flip_label_pairs=(("a", "b"),))
    tpn.save_pretrained(model, tmp_path)
    assert tpn.input_spec(f"local-dir:{tmp_path}") == model.input_spec
    assert tpn.create_model(f"local-dir:{tmp_path}").input_spec == model.input_spec


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
    for magnitude in (-1, 31, 4.5):
        with pytest.raises(ValueError, match=f"rand_augment.*{magnitude}"):
            SPEC.train_transform(rand_augment=magnitude)
    with pytest.raises(ValueError, match="random_erasing.*1.5"):
        SPEC.train_transform(random_erasing=1.5)
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
