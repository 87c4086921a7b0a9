"""`tpn.training.loop`: what a run writes, and options."""

import json
import shutil
import threading

import pytest
import torch
from runs import CLASSES, SMALL, fit, metrics, steps, weights

import tpn
from tpn.predict import VideoClassifier
from tpn.training import evaluation, loop
from tpn.training.config import RECIPES, TrainConfig
from tpn.training.loop import train
from tpn.training.observer import Observer
from tpn.video import motion
from tpn.video.datasets import VideoFolder

# What a run writes


def test_training_writes_metrics_and_models(videos, tmp_path):
    threads = threading.active_count()
    result = fit(videos, tmp_path, epochs=3, warmup=1 / 3, lr=0.04, lr_batch=16)
    assert threading.active_count() == threads
    lines = metrics(tmp_path)
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 10))
    assert trained[0]["lr"] == pytest.approx(0.0001)  # warm-up
    assert trained[3]["lr"] > trained[8]["lr"] > 0
    assert all(line["clips_per_s"] > 0 and 0 <= line["data_wait"] <= 1 and line["grad_norm"] > 0 for line in trained)
    validations = [line for line in lines if "val_loss" in line]
    assert [(line["step"], line["val_top5"]) for line in validations] == [(3, 100), (6, 100), (9, 100)]
    assert json.loads((tmp_path / "train.json").read_text())["lr"] == 0.04

    for folder in (tmp_path, tmp_path / "best"):
        model = tpn.create_model(f"local-dir:{folder}")
        assert model.labels == tuple(sorted(CLASSES))
        assert model.input_spec.crop_size == 32
    saved = weights(tmp_path)
    assert all(torch.equal(value, saved[name]) for name, value in result.model.state_dict().items())
    video = next((videos / "val").rglob("*.mp4"))
    assert {name for name, _ in VideoClassifier(model)(video).top(5)} == set(CLASSES)


def test_of_equal_validations_the_last_is_the_best(videos, tmp_path, monkeypatch):
    validate = loop.validate
    fixed: list[evaluation.Evaluation] = []

    def validated(*args, **kwargs):
        fixed.append(validate(*args, **kwargs))
        return fixed[0]

    monkeypatch.setattr(loop, "validate", validated)
    fit(videos, tmp_path, epochs=3)
    assert len(fixed) == 3
    assert all(torch.equal(value, weights(tmp_path / "best")[name]) for name, value in weights(tmp_path).items())


def test_validation_and_evaluation_agree(videos, tmp_path):
    """Both use the views that are saved with the model."""
    result = fit(videos, tmp_path, epochs=1, views="2x3", short_side=40)
    model = tpn.create_model(f"local-dir:{tmp_path}").eval()
    assert (model.input_spec.num_clips, model.input_spec.num_crops) == (2, 3)
    data = VideoFolder(videos / "val", model.input_spec, train=False, classes=model.labels)
    again = evaluation.validate(model, data)
    assert again.views == result.evaluation.views == 6
    assert again.metrics == result.evaluation.metrics
    assert metrics(tmp_path)[-1]["val_loss"] == pytest.approx(again.metrics["loss"])
    classify = VideoClassifier(model)
    for item, probs in zip(again.items, again.probs, strict=True):
        assert torch.equal(classify(item.path).probs, torch.from_numpy(probs))


def test_a_loaded_classifier_and_the_order_of_its_classes_are_kept(tmp_path):
    motion.write_dataset(tmp_path / "videos", 1, seed=1, num_frames=34)
    options = {"weights": "pretrained", "model_args": {}}
    result = fit(tmp_path / "videos", tmp_path / "run", epochs=1, batch_size=8, val_fraction=0, **options)
    assert result.model.labels == motion.CLASSES != tuple(sorted(motion.CLASSES))
    assert tpn.create_model(f"local-dir:{tmp_path / 'run'}").labels == motion.CLASSES


@pytest.mark.parametrize("start", ["saved", "random"])
def test_whether_a_loaded_classifier_is_replaced(videos, tmp_path, start):
    tpn.save_pretrained(tpn.create_model("tpn_slowonly_tiny_motion", base_channels=4), tmp_path / "start")
    files = sorted((videos / "train").rglob("*.mp4"))
    (tmp_path / "list.txt").write_text("".join(f"{file.relative_to(videos)} {i % 3}\n" for i, file in enumerate(files)))
    seen = []
    observer = Observer()
    observer.planned = seen.append
    options = {"model": f"local-dir:{tmp_path / 'start'}", "model_args": {}, "weights": None} if start == "saved" else {}
    fit(tmp_path / "list.txt", tmp_path / "run", root=str(videos), epochs=1, observer=observer, **options)
    assert seen[0].new_classifier == (start == "saved")
    assert tpn.create_model(f"local-dir:{tmp_path / 'run'}").labels == ("class 0", "class 1", "class 2")


def test_numeric_labels_keep_the_models_classes_only_if_asked(videos, tmp_path):
    files = sorted((videos / "train").rglob("*.mp4"))
    (tmp_path / "list.txt").write_text("".join(f"{files[i % 12].relative_to(videos)} {i}\n" for i in range(14)))
    for keep, expected in ((True, motion.CLASSES), (False, tuple(f"class {i}" for i in range(14)))):
        result = fit(tmp_path / "list.txt", tmp_path / str(keep), root=str(videos), epochs=1, val_fraction=0, keep_classes=keep)
        assert result.model.labels == expected


def test_dry_run_trains_nothing(videos, tmp_path):
    result = train(videos, output=tmp_path / "run", dry_run=True, **SMALL)
    assert {line.name: line.reason for line in result.plan}["batch_size"] == "given"
    assert not (tmp_path / "run").exists()


# Options


@pytest.mark.parametrize("freeze", ["none", "bn", "backbone"])
def test_freezing(videos, tmp_path, freeze):
    torch.manual_seed(5)
    tpn.save_pretrained(tpn.create_model("tpn_slowonly_tiny_motion", base_channels=4), tmp_path / "start")
    options = {"model": f"local-dir:{tmp_path / 'start'}", "model_args": {}, "weights": None}
    fit(videos, tmp_path / "end", epochs=1, freeze=freeze, **options)
    before, after = weights(tmp_path / "start"), weights(tmp_path / "end")
    changed = {name for name in before if before[name].shape == after[name].shape and not torch.equal(before[name], after[name])}
    statistics = {name for name in changed if "running" in name or "num_batches" in name}
    assert bool(statistics) == (freeze != "bn")
    assert any(name.startswith("backbone.") for name in changed) == (freeze != "backbone")
    assert any(name.startswith("neck.") for name in changed - statistics)


@pytest.mark.parametrize(
    "options",
    [
        {"aux_weight": 0.0},
        {"amp": "bfloat16", "ema": 0.9, "layer_decay": 0.8},
        # deterministic fills uninitialized memory with NaN
        {"amp": "float16", "channels_last": False, "clip_grad": 0.0, "optimizer": "sgd", "deterministic": True},
        {"schedule": "multistep", "milestones": (1,), "accumulate": 2, "batch_size": 2, "warmup": 0.0},
    ],
)
def test_options(videos, tmp_path, options):
    try:
        fit(videos, tmp_path, epochs=2, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    lines = steps(tmp_path)
    assert len(lines) == 6
    assert all(0 < line["loss"] < 20 for line in lines)
    if "milestones" in options:
        assert [line["lr"] for line in lines] == pytest.approx([0.01] * 3 + [0.001] * 3)
    if "ema" in options:
        saved, parts = weights(tmp_path), torch.load(tmp_path / "checkpoint.pt")["parts"]
        assert all(torch.equal(value, parts["ema"][name]) for name, value in saved.items())
        assert not torch.equal(saved["head.fc.weight"], parts["model"]["head.fc.weight"])
    if "aux_weight" in options:
        assert lines[0]["loss"] == pytest.approx(1.1, abs=0.2)  # ln 3, not 1.5 ln 3


@pytest.fixture(scope="module")
def plain(videos, tmp_path_factory):
    """Return the metrics of an epoch without options."""
    folder = tmp_path_factory.mktemp("plain")
    fit(videos, folder, epochs=1)
    return steps(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("balanced", True), ("label_smoothing", 0.1), ("layer_decay", 0.5), ("target_fps", 12.0), ("frame_interval", 1)),
        *(("crop_area", (0.9, 1.0)), ("flip_prob", 0.0), ("color_jitter", False), ("clip_grad", 0.1), ("weight_decay", 2.0)),
        *(("freeze", "bn"), ("seed", 1), ("backbone_lr", 0.1), ("class_weights", True), ("mixup", 0.8), ("cutmix", 1.0)),
        *(("rand_augment", 9), ("random_erasing", 1.0)),
    ],
)
def test_an_option_changes_something(videos, tmp_path, plain, option, value):
    data = videos
    if option == "class_weights":  # without effect on classes of one size
        shutil.copytree(videos, tmp_path / "data")
        extra = next((tmp_path / "data" / "train" / "blinking").iterdir())
        shutil.copy(extra, extra.with_name("again.mp4"))
        data = tmp_path / "data"
    fit(data, tmp_path / "run", epochs=1, **{option: value})
    lines = steps(tmp_path / "run")
    assert [line["loss"] for line in lines] != [line["loss"] for line in plain]
    assert lines[0]["lr"] == pytest.approx(plain[0]["lr"])  # with layer_decay, that of the classifier


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", [{"checkpointing": True}, {"channels_last": False}, {"compile": True}, {"deterministic": True}]
)
def test_an_option_does_not_change_the_result(videos, tmp_path, plain, monkeypatch, option):
    compiled, original = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or original(net, backend="eager"))  # no C++ compiler
    try:
        fit(videos, tmp_path, epochs=1, **option)
    finally:
        torch.use_deterministic_algorithms(False)
    lines = steps(tmp_path)
    if "channels_last" in option:  # sums have another order; small batches and steps magnify the difference
        lines, plain = lines[0]["loss"], pytest.approx(plain[0]["loss"], rel=1e-5)
    assert lines == plain
    assert len(compiled) == ("compile" in option)


COMMON = {"lr": 0.01, "schedule": "multistep", "optimizer": "sgd", "momentum": 0.9, "aux_weight": 0.5, "lr_batch": 64}


def test_recipes():
    expected = {"model": "tpn_tsm_r50_sthv1", "weights": "backbone", "epochs": 9, "weight_decay": 5e-4, "clip_grad": 20}
    config = TrainConfig.of("sthv1-tsm", epochs=9)
    assert {name: getattr(config, name) for name in COMMON | expected} == COMMON | expected
    for recipe in ("k400-scratch", "k400-in1k"):
        start = {"k400-scratch": "random", "k400-in1k": "backbone"}[recipe]
        expected = {"model": "tpn_slowonly_r50_k400", "weights": start, "epochs": 150, "weight_decay": 1e-4, "clip_grad": 40}
        expected |= {"milestones": (75, 125), "flip_prob": 0.5, "crop_area": (0.08, 1), "frame_interval": None}
        config = TrainConfig.of(recipe)
        assert {name: getattr(config, name) for name in COMMON | expected} == COMMON | expected


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_leaves_nothing_about_learning_to_the_plan(videos, tmp_path, recipe):
    overrides = {name: SMALL[name] for name in ("crop_size", "short_side", "workers", "threads", "batch_size")}
    overrides |= {"model": "tpn_slowonly_tiny_motion", "weights": "random"}
    result = train(videos, output=tmp_path, recipe=recipe, dry_run=True, **overrides)
    of_recipe = {line.name for line in result.plan if line.reason == f"recipe {recipe}"}
    given = {line.name for line in result.plan if line.reason == "given"}
    assert of_recipe | given >= RECIPES[recipe].keys()
    assert {line.name for line in result.plan} - RECIPES[recipe].keys() <= {"workers", "threads", "amp"}
    assert result.model.input_spec.frame_interval == 2
    assert result.model.input_spec.num_clips == 3
