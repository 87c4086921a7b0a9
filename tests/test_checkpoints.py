"""The table of checkpoints: every entry, whatever entries there are."""

import re

import pytest
import torch

import tpn
from tpn.models.registry import BACKBONES, NECKS
from tpn.zoo.checkpoints import CHECKPOINTS, Embedded, HubFiles, Link, Page, get_checkpoint
from tpn.zoo.create import count


@pytest.mark.parametrize("entry", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_entry(entry):
    assert entry.name == f"{entry.model}.{entry.tag}"
    assert CHECKPOINTS[entry.name] is entry
    match entry.source:
        case Embedded():
            assert entry.source.path.is_file()
        case HubFiles():
            assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.source.repo_id)
            assert entry.source.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.source.sha256)
        case Link():
            assert re.fullmatch("[0-9a-f]{8,64}", entry.source.sha256)
            assert entry.source.url.startswith("https://")
        case Page():
            assert entry.source.url.startswith("https://")
    config = entry.config
    assert config.architecture == entry.model
    assert set(config.backbone.args) <= BACKBONES.arguments(config.backbone).keys()
    assert config.neck is None or set(config.neck.args) <= NECKS.arguments(config.neck).keys()
    assert (config.aux_head is None) == (config.neck is None)
    assert len(config.labels) == len(set(config.labels)) == config.num_classes
    assert all(label == label.strip() != "" for label in config.labels)
    for values in ((entry.reported_top1, entry.reported_top5), (entry.measured_top1, entry.measured_top5)):
        known = [value for value in values if value is not None]
        assert all(0 < value <= 100 for value in known)
        assert known == sorted(known)
    assert f"{config.input_spec.num_clips} clips x {config.input_spec.num_crops} crop" in entry.protocol


@pytest.mark.parametrize("name", dict.fromkeys(entry.model for entry in CHECKPOINTS.values()))
def test_model_of_the_table(name):
    info = tpn.model_info(name)
    assert info.checkpoint is get_checkpoint(name)
    with torch.device("meta"):
        model = getattr(tpn, name)()
    assert model.config == info.checkpoint.config


@pytest.mark.slow
@pytest.mark.parametrize("entry", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_recorded_size(entry):
    with torch.device("meta"):
        params, gmacs = count(tpn.TPNClassifier.from_config(entry.config))
    assert (entry.params, entry.gmacs) == (params, round(gmacs, 2)), "the entry must have the numbers on the right"


def test_published_protocols():
    """The published entries follow their names: frames, interval, variant, and two tempos for the R101 pyramids."""
    for entry in CHECKPOINTS.values():
        if entry.layout == "tpn":
            continue
        spec, (family, _, *middle, data) = entry.config.input_spec, entry.model.removeprefix("tpn_").split("_")
        if family == "tsm":
            assert (spec.sampling, spec.num_frames, spec.num_clips, spec.num_crops) == ("segments", 8, 2, 3)
            assert entry.config.backbone.args["shift_shortcut"] == (entry.layout == "original")
        else:
            frames, interval = map(int, (middle or ["8x8"])[0].split("x"))
            assert (spec.num_frames, spec.frame_interval, spec.num_clips, spec.num_crops) == (frames, interval, 10, 3)
            assert spec.flip == (entry.layout == "original")
        assert {"k400": "Kinetics-400", "sthv1": "Something-Something v1", "sthv2": "Something-Something v2"}[
            data
        ] == entry.dataset
        if entry.config.neck is not None:
            with torch.device("meta"):
                neck = tpn.create_model(entry.name).neck
            frames = spec.num_frames
            assert neck.temporal_scales == ((frames // 2, frames) if "r101" in entry.model else (frames, frames))
            assert neck.flow_order == "cascade"


def test_flip_pairs_are_left_and_right():
    for entry in CHECKPOINTS.values():
        labels = [label.lower() for label in entry.config.labels]
        for a, b in entry.config.input_spec.flip_label_pairs:
            words = {"left": "right", "right": "left", "clockwise": "counter-clockwise", "counter-clockwise": "clockwise"}
            flipped = re.sub(r"left|right|counter-clockwise|clockwise", lambda m: words[m[0]], a.lower())  # noqa: B023
            assert flipped == b.lower()
            assert {a.lower(), b.lower()} < set(labels)


@pytest.mark.parametrize("create", [tpn.create_model, tpn.input_spec, tpn.model_info])
def test_unknown_names(create):
    names = {
        "tpn_slowonly_r50": "'tpn_slowonly_r50'.*tpn_slowonly_r50_k400.*list_models",
        "tpn_slowonly_r50_k400.nope": "'nope'.*in1k, scratch",
        "resnet50": "'resnet50'",
        "": "''",
    }
    for name, says in names.items():
        with pytest.raises(tpn.UnknownModelError, match=says):
            create(name)
