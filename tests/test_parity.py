"""Results equal those of the two reference code bases, with the same weights and clips; see `recipe`."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recipe import FIXTURES, MODEL_OF, clip, fill, our_names, upstream_state_dict

import tpn
from tpn.training.loss import TrainingLoss
from tpn.zoo.load import load_weights, read_weights

EVAL = sorted(path.stem for path in FIXTURES.glob("*.npz") if path.stem.startswith(("mmaction2_", "original_")))
SLOW = re.compile("224x224|16x4|32x2|r101|parallel|_train")
"""Other sizes and lengths of networks that are compared anyway, and a second training step."""
TRAIN = sorted(path.stem for path in FIXTURES.glob("*_train_s0.json"))

# mmaction2's fully convolutional test mode classifies with another module, a 1x1x1 convolution. The recipe filled it under the
# name of that module, so these logits belong to other weights than those of fc_cls.
CLASSIFIER = {
    "mmaction2_tpn_slowonly_r50_8x8_k400_s0_224x224": "cls_head.new_cls",
    "mmaction2_tpn_tsm_r50_sthv1_s0_224x224": "cls_head.new_cls",
}

GRADIENT_TOLERANCE = 1e-3 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1e-2
"""Of the norm of a gradient. The reference ran on a CPU with AVX-512, whose order of sums only such a CPU repeats. In float64, the
norms differ from the reference's float32 by up to 6e-3, on a CPU with AVX2 by up to 7e-3."""


def each(cases):
    return pytest.mark.parametrize(
        "case", [pytest.param(case, marks=[pytest.mark.slow] if SLOW.search(case) else []) for case in cases]
    )


def load(name, state_dict, **kwargs):
    with torch.device("meta"):  # every tensor is overwritten: do not initialize them
        model = tpn.create_model(name, **kwargs)
    load_weights(model.to_empty(device="cpu"), read_weights(state_dict))
    return model


def assert_close(got, expected, what, tolerance=2e-5):
    error = np.abs(got.numpy() - expected).max() / np.abs(expected).max()
    assert got.shape == expected.shape, what
    assert error < tolerance, f"{what}: {error:.1e} of the largest value"


def test_number_of_fixtures():
    assert len(EVAL) == 15
    assert len(TRAIN) == 2


@each(EVAL)
def test_eval(case):
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
    model = load(MODEL_OF[source], state, **kwargs).eval()
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
    """Use two threads or more, as the reference did: the number of threads determines the order of sums.

    Another order changes the sign of some values near zero before a ReLU, which changes the gradients of these small clips; see
    `GRADIENT_TOLERANCE`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, 2))
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
@each(TRAIN)
def test_train_step(case):
    expected = json.loads((FIXTURES / f"{case}.json").read_text())
    source = expected["model"]
    model = load(MODEL_OF[source], upstream_state_dict(source, expected["seed"]), drop_rate=0.0).train()
    labels = torch.tensor(expected["labels"])
    clips = torch.from_numpy(clip(tuple(expected["input"]), expected["clip_seed"]))
    loss, aux_loss, _ = TrainingLoss(model).losses(clips, F.one_hot(labels, model.num_classes).float())
    (loss + aux_loss).backward()
    assert loss.item() == pytest.approx(expected["loss_cls"], rel=1e-4)
    assert aux_loss.item() == pytest.approx(expected["loss_aux"], rel=1e-4)

    ours = our_names(source)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert {ours[name] for name in expected["grad_norm"]} == parameters.keys()
    got = {name: parameters[ours[name]].grad.norm().item() for name in expected["grad_norm"]}
    assert got == pytest.approx(expected["grad_norm"], rel=GRADIENT_TOLERANCE)
    got = {name: buffers[ours[name]].norm().item() for name in expected["running_mean_norm_after"]}
    assert got == pytest.approx(expected["running_mean_norm_after"], rel=1e-4)
