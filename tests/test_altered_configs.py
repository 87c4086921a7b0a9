"""Altered config.json of a saved model: refused with the file and the field, or the model is the saved one.

TPN_FUZZ=10 runs ten times as many examples, and TPN_FUZZ_SEED=1 others.
"""

import copy
import json
import os

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import tpn

FUZZ, SEED = int(os.environ.get("TPN_FUZZ", 1)), os.environ.get("TPN_FUZZ_SEED")
SPEC = tpn.InputSpec(4, 2, num_clips=2, num_crops=1, short_side=36, crop_size=32, flip_label_pairs=(("left", "right"),))
MODELS = {
    "pyramid": lambda: tpn.create_model("tpn_slowonly_tiny_motion", base_channels=2, num_classes=3, input_spec=SPEC),
    "baseline": lambda: tpn.create_model("tsm_r50_sthv1", base_channels=2, num_classes=3, input_spec=SPEC),
    "timm": lambda: tpn.create_model(
        "tpn",
        backbone="timm/convnext_atto",
        num_classes=3,
        input_spec=SPEC,
        backbone_args={"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 8)},
    ),
}


def examples(count):
    """Settings of a test that runs `count` examples, the same in every run."""
    chosen = hypothesis.settings(max_examples=count * FUZZ, derandomize=SEED is None, deadline=None, database=None)
    return (lambda test: chosen(hypothesis.seed(int(SEED))(test))) if SEED else chosen


class Saved:
    """A folder with a saved model, its configuration, and its logits for a clip."""

    def __init__(self, folder, model):
        model.labels = ("left", "right", "neither")
        self.folder = tpn.save_pretrained(model, folder)
        self.path = folder / "config.json"
        self.text = self.path.read_text(encoding="utf-8")
        self.clip = torch.randn(2, 3, 4, 32, 32)
        self.logits = self.logits_of(model)

    def logits_of(self, model):
        with torch.no_grad():
            return model.eval()(self.clip)

    def check(self, config, where):
        """Load the model with another config.json, altered at `where`, the names on the way to the field."""
        self.path.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
        try:
            model = tpn.create_model(self.folder)
        except tpn.CheckpointError as error:
            message = str(error)
        else:
            assert torch.equal(self.logits_of(model), self.logits)
            return "loaded"
        finally:
            self.path.write_text(self.text, encoding="utf-8")
        assert message.startswith(f"{self.path}: ")
        assert any(name in message for name in where), (where, message)
        assert len(message) < 1500
        return "refused"


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Saved(tmp_path_factory.mktemp("saved"), MODELS[request.param]())
    torch.set_num_threads(before)


def places(values, at=()):
    """The place of every value in a JSON document: keys and indices, from the outside in."""
    children = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in children:
        yield (*at, key)
        yield from places(value, (*at, key))


def altered(values, place, change):
    """A copy of a JSON document in which `change(container, key)` has changed the value at a place."""
    values = copy.deepcopy(values)
    container = values
    for key in place[:-1]:
        container = container[key]
    change(container, place[-1])
    return values


NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 7, 2**16, 10**8, 2**31, 2**63, -(2**63), 10**400, 0.5, 1e-300, 1e300, 4.0]),
    st.integers(-5, 70),
    st.floats(),
)
SCALARS = st.one_of(NUMBERS, st.none(), st.booleans(), st.text(max_size=8), st.sampled_from(["tpn", "tsm", "slowonly", "\ud800"]))
VALUES = st.one_of(
    SCALARS,
    st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)),
)
EXTREMES = [None, True, "", "x" * 10**5, [], {}, [[]], -1, 0, 10**8, 2**62, 10**400, float("nan"), float("inf"), 1e-300]


@pytest.mark.slow
def test_every_field_with_extreme_values(saved):
    """Also those that take memory: a network or a clip of such a size is never built."""
    config, ends = json.loads(saved.text), []
    for number, place in enumerate(places(config)):
        if place[0] != "pretrained_cfg":  # timm's, which tpn does not read
            for value in EXTREMES if FUZZ > 1 else EXTREMES[number % 3 :: 3]:
                ends.append(
                    saved.check(
                        altered(config, place, lambda inside, key, v=value: inside.__setitem__(key, v)), place_names(place)
                    )
                )
    assert {"loaded", "refused"} == set(ends)
    assert ends.count("refused") > 3 * ends.count("loaded")


def place_names(place):
    """The names on the way to a value; messages leave out "model", which all have."""
    return [key for key in place if isinstance(key, str)][place[:1] == ("model",) and len(place) > 1 :]


@pytest.mark.slow
@examples(40)
@hypothesis.given(data=st.data())
def test_random_values(saved, data):
    config = json.loads(saved.text)
    place = data.draw(st.sampled_from(list(places(config))))
    value = data.draw(VALUES)
    saved.check(altered(config, place, lambda inside, key: inside.__setitem__(key, value)), place_names(place))


def add(inside, name, value):
    inside.update({name: value}) if isinstance(inside, dict) else inside.append(value)


@pytest.mark.slow
@examples(25)
@hypothesis.given(data=st.data())
def test_missing_and_further_fields(saved, data):
    config, names = json.loads(saved.text), set()
    for _ in range(data.draw(st.integers(1, 2))):
        place, name, value = data.draw(st.sampled_from(list(places(config)))), data.draw(st.text(max_size=8)), data.draw(VALUES)
        remove = data.draw(st.booleans())
        config = altered(config, place, lambda inside, key: inside.pop(key) if remove else add(inside, name, value))  # noqa: B023
        names |= {*place_names(place if remove else place[:-1]), *[name] * (not remove)}
    saved.check(config, names)


@examples(15)
@hypothesis.given(data=st.data())
def test_damaged_text(saved, data):
    text = saved.text
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        text = text[:at] + data.draw(st.text(max_size=2)) + text[at + data.draw(st.integers(0, 2)) :]
    saved.check(text, ["config.json"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "3",
        '"model"',
        "[" * 10**5,
        '{"model": ' * 10**5,
        '{"model": {"labels": ' + "[" * 10**5,
        "\ufeff{}",
        "{} {}",
        "1" * 5000,
    ],
    ids=["empty", "null", "number", "string", "deep list", "deep dictionary", "deep field", "mark", "two", "long number"],
)
def test_other_documents(saved, text):
    assert saved.check(text, ["config.json"]) == "refused"


def test_other_bytes(saved):
    saved.path.write_bytes(b'{"model": "\xff"}')
    with pytest.raises(tpn.CheckpointError, match=r"config\.json: not JSON"):
        tpn.create_model(saved.folder)
    saved.path.write_text(saved.text, encoding="utf-8")
