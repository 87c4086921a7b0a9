"""The numbers of the two reference code bases, from the same weights and clips: see `recipe`."""

import json

import numpy as np
import pytest
import torch
from recipe import FIXTURES, MODEL_OF, clip, fill, our_names, upstream_state_dict
from scripts import example

import tpn

EVAL = sorted(path.stem for path in FIXTURES.glob("*.npz") if path.stem.startswith(("mmaction2_", "original_")))
TRAIN = sorted(path.stem for path in FIXTURES.glob("*_train_s0.json"))

# mmaction2's fully convolutional test mode classifies with a 1x1x1 convolution, a module of its own with a name of its
# own. The recipe filled it under that name, so these logits belong to other classifier weights than fc_cls's.
CLASSIFIER = {
    "mmaction2_tpn_slowonly_r50_8x8_k400_s0_224x224": "cls_head.new_cls",
    "mmaction2_tpn_tsm_r50_sthv1_s0_224x224": "cls_head.new_cls",
}


def load(name, state_dict, tmp_path, **kwargs):
    path = tmp_path / "upstream.pth"
    torch.save({"state_dict": state_dict, "meta": {}}, path)
    try:
        return tpn.create_model(name, checkpoint_path=path, **kwargs)
    finally:
        path.unlink()


def assert_close(got, expected, what, tolerance=2e-5):
    error = np.abs(got.numpy() - expected).max() / np.abs(expected).max()
    assert got.shape == expected.shape, what
    assert error < tolerance, f"{what}: {error:.1e} of the largest value"


def test_fixtures_are_here():
    assert len(EVAL) == 15
    assert len(TRAIN) == 2


@pytest.mark.parametrize("case", EVAL)
def test_eval(case, tmp_path):
    fixture = np.load(FIXTURES / f"{case}.npz")
    meta = json.loads(str(fixture["meta"]))
    source, seed = meta["model"], meta["seed"]
    state = upstream_state_dict(source, seed)
    if case in CLASSIFIER:
        k, c = state["cls_head.fc_cls.weight"].shape
        weight = fill(f"{CLASSIFIER[case]}.weight", (k, c, 1, 1, 1), seed).reshape(k, c)
        state["cls_head.fc_cls.weight"] = torch.from_numpy(weight)
        state["cls_head.fc_cls.bias"] = torch.from_numpy(fill(f"{CLASSIFIER[case]}.bias", (k,), seed))
    kwargs = {"flow_order": meta["flow_type"]} if "flow_type" in meta else {}
    model = load(MODEL_OF[source], state, tmp_path, **kwargs).eval()
    del state
    x = torch.from_numpy(clip(tuple(meta["input"]), seed))
    with torch.inference_mode():
        maps, (logits, aux_logits) = model.backbone(x), model.forward_with_aux(x)
        got = {"logits": logits, "c5_mean": maps[-1].mean((2, 3, 4))}
        if model.neck is not None:
            got |= {"aux_logits": aux_logits, "c4_mean": maps[0].mean((2, 3, 4))}
            got["neck_mean"] = model.forward_features(x).mean((2, 3, 4))
    assert got.keys() == set(fixture.files) - {"meta"}
    for name, value in got.items():
        assert_close(value, fixture[name], name)


@pytest.fixture
def two_threads():
    """With two threads or more, sums are taken in the order in which the reference took them.

    Another order flips some ReLUs of values that are zero but for rounding, which moves gradients of these small clips by 3e-3;
    so does float64.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, 2))
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("case", TRAIN)
def test_train_step(case, tmp_path):
    expected = json.loads((FIXTURES / f"{case}.json").read_text())
    source = expected["model"]
    model = load(MODEL_OF[source], upstream_state_dict(source, expected["seed"]), tmp_path, drop_rate=0.0).train()
    labels = torch.tensor(expected["labels"])
    clips = torch.from_numpy(clip(tuple(expected["input"]), expected["clip_seed"]))
    loss, aux_loss, _ = example("train").TrainingLoss(model).losses(clips, labels)
    (loss + aux_loss).backward()
    assert loss.item() == pytest.approx(expected["loss_cls"], rel=1e-4)
    assert aux_loss.item() == pytest.approx(expected["loss_aux"], rel=1e-4)

    ours = our_names(source)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert {ours[name] for name in expected["grad_norm"]} == parameters.keys()
    got = {name: parameters[ours[name]].grad.norm().item() for name in expected["grad_norm"]}
    assert got == pytest.approx(expected["grad_norm"], rel=1e-3)
    got = {name: buffers[ours[name]].norm().item() for name in expected["running_mean_norm_after"]}
    assert got == pytest.approx(expected["running_mean_norm_after"], rel=1e-4)
