"""`ModelConfig` and `InputSpec`: what they accept, and that JSON keeps all of it."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

import tpn
from tpn.zoo.checkpoints import CHECKPOINTS

SPEC = tpn.InputSpec(8, 8)
HEAD = tpn.HeadConfig(3)
CONFIG = tpn.ModelConfig(tpn.PartConfig("slowonly"), tpn.PartConfig("tpn"), HEAD, SPEC, HEAD, ("a", "b", "c"))


@pytest.mark.parametrize("config", [CONFIG, *(entry.config for entry in CHECKPOINTS.values())], ids=["small", *CHECKPOINTS])
def test_json_keeps_everything(config):
    text = json.dumps(config.to_dict())
    assert tpn.ModelConfig.from_dict(json.loads(text)) == config
    assert tpn.InputSpec.from_dict(json.loads(text)["input_spec"]) == config.input_spec


def test_arguments_are_frozen():
    args = CHECKPOINTS["tpn_slowonly_r50_k400.in1k"].config.backbone.args
    for change in (lambda: args.update(depth=101), lambda: args.pop("depth"), lambda: args.__setitem__("depth", 101)):
        with pytest.raises(TypeError, match="dataclasses.replace"):
            change()
    assert copy.deepcopy(CONFIG) == pickle.loads(pickle.dumps(CONFIG)) == CONFIG
    assert len({CONFIG, copy.deepcopy(CONFIG)}) == 1
    assert isinstance(hash(tpn.PartConfig("a", {"b": {"c": [1, [2]]}})), int)
    with pytest.raises(TypeError, match=r"mapping.*\[1\]"):
        tpn.ModelConfig.from_dict([1])


def test_configs_are_frozen():
    for config, field in (
        (CONFIG, "neck"),
        (CHECKPOINTS["tpn_slowonly_r50_k400.in1k"], "source"),
        (SPEC, "num_frames"),
        (HEAD, "num_classes"),
        (CONFIG.backbone, "name"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(config, field, None)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"num_classes": -1}, ValueError, "num_classes.*-1"),
        ({"drop_rate": 1.0}, ValueError, "drop_rate.*1.0"),
        ({"name": ""}, TypeError, "name"),
        ({"args": {"x": object()}}, TypeError, "slowonly.*JSON"),
        ({"args": 3}, TypeError, "slowonly.*3"),
        ({"backbone": "slowonly"}, TypeError, "backbone.*PartConfig.*'slowonly'"),
        ({"neck": {}}, TypeError, "neck.*PartConfig"),
        ({"head": None}, TypeError, "head.*None"),
        ({"labels": ["a", "b", "c"]}, TypeError, "labels.*tuple"),
        ({"labels": ("a", "b")}, ValueError, "labels.*3.*2"),
        ({"neck": None}, ValueError, "aux_head.*neck=None"),
        ({"num_frames": 0}, ValueError, "num_frames.*1.*0"),
        ({"num_frames": "8"}, TypeError, "num_frames.*'8'"),
        ({"num_frames": True}, TypeError, "num_frames.*True"),
        ({"frame_interval": -1}, ValueError, "frame_interval.*-1"),
        ({"frame_interval": 1.5}, TypeError, "frame_interval.*1.5"),
        ({"num_clips": 0}, ValueError, "num_clips.*0"),
        ({"num_crops": True}, TypeError, "num_crops.*True"),
        ({"three_crop_size": False}, TypeError, "three_crop_size.*False"),
        ({"mean": (True, 1.0, 1.0)}, TypeError, "mean.*True"),
        ({"flip_label_pairs": 5}, TypeError, "flip_label_pairs.*5"),
        ({"flip_label_pairs": (("a", "b"), ("b", "c"))}, ValueError, "flip_label_pairs.*once.*'b'"),
        ({"num_crops": 2}, ValueError, "num_crops.*2"),
        ({"sampling": "uniform"}, ValueError, "sampling.*'uniform'"),
        ({"flip": 1}, TypeError, "flip.*1"),
        ({"short_side": None}, TypeError, "short_side.*None"),
        ({"short_side": 128}, ValueError, "crop_size.*short_side=128.*224"),
        ({"crop_size": 300}, ValueError, "crop_size.*short_side=256.*300"),
        ({"three_crop_size": 300}, ValueError, "three_crop_size.*short_side=256.*300"),
        ({"std": (58.0, 57.0, 0.0)}, ValueError, "std.*0"),
        ({"std": (58.0, 57.0)}, ValueError, "mean and std.*3 and 2"),
        ({"mean": ()}, ValueError, "mean and std.*0"),
        ({"mean": (1.0, 2.0, float("nan"))}, TypeError, "mean.*nan"),
        ({"mean": [1.0, 2.0, 3.0]}, TypeError, r"mean.*\[1.0"),
        ({"flip_label_pairs": (("a", "a"),)}, ValueError, "flip_label_pairs.*once.*'a', 'a'"),
        ({"flip_label_pairs": (("a", "b", "c"),)}, TypeError, "flip_label_pairs.*'c'"),
        ({"flip_label_pairs": ("ab",)}, TypeError, "flip_label_pairs.*'ab'"),
        ({"flip_label_pairs": ((0, 1),)}, TypeError, r"flip_label_pairs.*names.*\(0, 1\)"),
        ({"flip_label_pairs": (("a", "\ud800"),)}, TypeError, "flip_label_pairs.*names"),
        # limits
        ({"num_frames": 4097}, ValueError, "num_frames.*4096.*4097"),
        ({"num_frames": 10**4000}, ValueError, r"num_frames.*4096.*000\.\.\.000"),
        ({"num_frames": 3000}, ValueError, "num_frames=3000.*short_side=256.*589824000.*134217728"),
        ({"mean": (0.0,) * 300, "std": (1.0,) * 300}, ValueError, "300 channels"),
        ({"mean": (0.0,) * 1025, "std": (1.0,) * 1025}, ValueError, "1024.*1025"),
        ({"frame_interval": 10_001}, ValueError, "frame_interval.*10000.*10001"),
        ({"num_clips": 1001}, ValueError, "num_clips.*1000.*1001"),
        ({"short_side": 8193}, ValueError, "short_side.*8192.*8193"),
        ({"three_crop_size": 8193, "num_crops": 1}, ValueError, "three_crop_size.*8192.*8193"),
        ({"three_crop_size": -1}, ValueError, "three_crop_size.*-1"),
        ({"three_crop_size": 0.0}, TypeError, "three_crop_size.*0.0"),
        ({"target_fps": 0}, ValueError, "target_fps.*0.01.*1000.*0"),
        ({"target_fps": 1001.0}, ValueError, "target_fps.*1001"),
        ({"target_fps": True}, TypeError, "target_fps.*True"),
        ({"target_fps": "25"}, TypeError, "target_fps.*'25'"),
        ({"target_fps": float("inf")}, TypeError, "target_fps.*inf"),
        ({"mean": (1001.0,) * 3}, ValueError, "mean.*1000.*1001"),
        ({"mean": (10**400,) * 3}, ValueError, "mean.*1000"),
        ({"std": (1e-4,) * 3}, ValueError, "std.*0.001.*0.0001"),
        ({"num_classes": 1_000_001}, ValueError, "num_classes.*1000000.*1000001"),
        ({"drop_rate": float("nan")}, TypeError, "drop_rate.*nan"),
        ({"drop_rate": "0.5"}, TypeError, "drop_rate.*'0.5'"),
        ({"multi_label": 1}, TypeError, "multi_label.*1"),
        ({"temperature": 0}, ValueError, "temperature.*0"),
        ({"temperature": float("nan")}, TypeError, "temperature.*nan"),
        ({"temperature": "1"}, TypeError, "temperature.*'1'"),
        ({"name": "\udfff"}, TypeError, "name"),
        ({"args": {"x": float("nan")}}, ValueError, "slowonly.*JSON"),
        ({"args": {3: 1}}, TypeError, "slowonly.*names"),
        ({"labels": ("a", "b", "\ud83d")}, TypeError, "labels"),
        ({"architecture": ""}, ValueError, "architecture.*''"),
        ({"architecture": None}, TypeError, "architecture.*None"),
    ],
)
def test_fields_are_validated(changes, error, says):
    (config,) = (config for config in (SPEC, HEAD, CONFIG, CONFIG.backbone) if changes.keys() <= vars(config).keys())
    with pytest.raises(error, match=says):
        replace(config, **changes)


def test_numbers_of_numpy():
    assert tpn.HeadConfig(3, drop_rate=np.float64(0.25)) == tpn.HeadConfig(3, drop_rate=0.25)
    assert replace(SPEC, target_fps=np.float64(25)).target_fps == 25


def test_nested_arguments_have_a_limit():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="slowonly.*JSON"):
        tpn.PartConfig("slowonly", {"x": deep})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"head": {"num_classes": "x"}}, "head: num_classes.*'x'"),
        ({"aux_head": {"drop_rate": 0.5}}, "aux_head: num_classes.*missing.*HeadConfig"),
        ({"input_spec": {}}, "input_spec: num_frames.*missing.*InputSpec"),
        ({"input_spec": {"num_frames": 8, "flip_label_pairs": 5}}, "input_spec: flip_label_pairs.*5"),
        ({"input_spec": {"num_frames": 8, "mirrored": [[0]], "short_side": "x"}}, "input_spec: short_side.*'x'"),
        ({"backbone": {}}, "backbone: name.*missing.*PartConfig"),
        ({"neck": {"name": "tpn", "args": []}}, r"neck: args.*\(\)"),
        ({"labels": {"a": 1}}, "labels.*tuple.*{'a': 1}"),
    ],
)
def test_errors_name_the_field(changes, says):
    with pytest.raises((TypeError, ValueError), match=says):
        tpn.ModelConfig.from_dict({**json.loads(json.dumps(CONFIG.to_dict())), **changes})
    with pytest.raises(TypeError, match="head, input_spec: missing in ModelConfig"):
        tpn.ModelConfig.from_dict({"backbone": {"name": "tsm"}, "neck": None})


def test_three_crops_are_as_large_as_the_short_side_by_default():
    spec = tpn.InputSpec(8, short_side=128, crop_size=112)
    assert spec.view_size == 128
    assert replace(spec, short_side=120).view_size == 120
    assert replace(spec, three_crop_size=112).view_size == 112
    assert tpn.InputSpec(8, num_crops=1, three_crop_size=300).view_size == 224


def test_fields_of_a_later_version_are_skipped_with_a_warning(caplog):
    values = CONFIG.to_dict()
    values["new"] = values["input_spec"]["newer"] = 1
    values["head"] = values["head"] | {"newest": 1}
    values["backbone"] = values["backbone"] | {"latest": 1}
    assert tpn.ModelConfig.from_dict(values) == CONFIG
    assert [record.args[-1] for record in caplog.records] == ["new", "latest", "newest", "newer"]


@pytest.mark.parametrize(
    ("labels", "pairs"), [(("a", "b", "c"), (("a", "c"),)), (None, ()), (("a", "b"), ())], ids=["names", "no names", "too few"]
)
def test_flip_pairs_of_earlier_versions(labels, pairs, caplog):
    """They stored class indices."""
    values = json.loads(json.dumps(SPEC.to_dict() | {"flip_label_pairs": [[0, 2]]}))
    assert tpn.InputSpec.from_dict(values, labels) == replace(SPEC, flip_label_pairs=pairs)
    warnings = [record for record in caplog.records if "flip_label_pairs [[0, 2]]" in record.getMessage()]
    assert [record.levelname for record in warnings] == ([] if pairs else ["WARNING"])
    if labels != ("a", "b"):
        config = replace(CONFIG, labels=labels).to_dict() | {"input_spec": values}
        assert tpn.ModelConfig.from_dict(json.loads(json.dumps(config))).input_spec.flip_label_pairs == pairs
    named = replace(SPEC, flip_label_pairs=(("left", "right"),))
    assert tpn.InputSpec.from_dict(json.loads(json.dumps(named.to_dict())), labels) == named


def test_input_spec_for_other_channels():
    spec = SPEC.for_channels(2)
    assert (spec.in_chans, spec.mean, spec.std) == (2, (114.495,) * 2, (sum(SPEC.std) / 3,) * 2)
    assert SPEC.for_channels(3) is SPEC
    with pytest.raises(ValueError, match="in_chans.*0"):
        SPEC.for_channels(0)
    with pytest.raises(ValueError, match="RGB.*2"):
        spec.train_transform()
