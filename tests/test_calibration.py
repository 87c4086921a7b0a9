"""The temperature of a model: fitted to held-out videos, kept with its classifier, applied wherever probabilities are."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_cli import run
from test_metrics import evaluation

import tpn
from tpn import VideoClassifier, exported, tempo
from tpn.explain import explain
from tpn.models.features import FeatureModel
from tpn.models.heads import ClassificationHead, change_temperature, class_probs
from tpn.training import setup
from tpn.training.metrics import calibration_error
from tpn.video import motion
from tpn.video.encode import write_video
from tpn.zoo.publish import model_card
from tpn.zoo.saved import save_temperature

NAME = "tpn_slowonly_tiny_motion"
CLASSES = ("left", "blinking", "growing")
NUM_VIDEOS = 24
VIEWS = {"num_clips": 2, "num_crops": 1}

pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(**kwargs):
    torch.manual_seed(0)
    model = tpn.create_model(NAME, num_classes=3, base_channels=4, **kwargs).eval()
    torch.nn.init.normal_(model.head.fc.weight)
    model.labels = CLASSES
    model.input_spec = model.input_spec.with_views(1, 1)
    return model


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def hot(model):
    """A model at a temperature of 2.5."""
    copy = small_model()
    copy.temperature = 2.5
    return copy


@pytest.fixture(scope="module")
def videos(tmp_path_factory, model):
    """A folder with a list of videos; the model is right about two thirds of them."""
    root = tmp_path_factory.mktemp("calibrate")
    lines, classify = [], VideoClassifier(model)
    for i in range(NUM_VIDEOS):
        frames = motion.render(i % 14, tempo=3, seed=i, num_frames=18)
        write_video(root / f"{i}.mp4", frames, fps=24)
        label = int(classify(root / f"{i}.mp4").probs.argmax())
        lines.append(f"{i}.mp4 {CLASSES[(label + (i % 3 == 0)) % 3]}\n")
    (root / "list.txt").write_text("".join(lines))
    return root


def drawn(multi_label=False, sharpness=3.0, number=2000, num_classes=4):
    """Logits of calibrated predictions, of which a model that is too confident gives `sharpness` times as much."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 1.5, (number, num_classes)))
    true = class_probs(logits, multi_label=multi_label).numpy()
    if multi_label:
        labels = [tuple(np.flatnonzero(row)) for row in rng.random(true.shape) < true]
    else:
        labels = [int(rng.choice(num_classes, p=row)) for row in true]
    return evaluation(class_probs(sharpness * logits, multi_label=multi_label).numpy(), labels, multi_label=multi_label)


# The measure and the fit


def test_calibration_error():
    """Two bins: four videos at 0.8 of which two are right, one at 0.6 that is right."""
    probs, targets = np.full((5, 2), 0.2), np.eye(2)[[0, 0, 1, 1, 0]]
    probs[:, 0] = (0.8, 0.8, 0.8, 0.8, 0.65)
    assert calibration_error(probs, targets, multi_label=False) == pytest.approx((4 * 0.3 + 0.35) / 5)
    # all pairs: four at 0.8 with two positives, one at 0.65, five at 0.2 with two
    assert calibration_error(probs, targets, multi_label=True) == pytest.approx((4 * 0.3 + 0.35 + 5 * 0.2) / 10)
    assert calibration_error(np.eye(2), np.eye(2), multi_label=True) == 0


def test_calibration_error_is_that_of_the_paper():
    """Guo et al.: the weighted sum over 15 bins (m - 1) / 15 < p <= m / 15."""
    result = drawn()
    p, right = result.probs.max(axis=1), result.probs.argmax(axis=1) == result.targets.argmax(axis=1)
    bins = [(p > m / 15) & (p <= (m + 1) / 15) for m in range(15)]
    expected = sum(abs(right[b].mean() - p[b].mean()) * b.mean() for b in bins if b.any())
    assert result.metrics["ece"] == pytest.approx(100 * expected, abs=1e-4)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("sharpness", [0.4, 3.0])
def test_the_fit_finds_the_temperature(multi_label, sharpness):
    """Too confident or too cautious; and no other temperature has a smaller loss."""
    before = drawn(multi_label, sharpness)
    after = before.calibrate()
    assert after.temperature == pytest.approx(sharpness, rel=0.05)
    assert after.metrics["ece"] < 0.4 * before.metrics["ece"]
    assert after.metrics["loss"] < before.metrics["loss"]
    for factor in (0.98, 1.02):
        assert before.at_temperature(after.temperature * factor).metrics["loss"] > after.metrics["loss"]
    assert np.array_equal(after.probs.argsort(axis=1), before.probs.argsort(axis=1))
    assert after.metrics[before.main_metric] == before.metrics[before.main_metric]
    assert after.calibrate().temperature == pytest.approx(after.temperature, rel=1e-4)


def test_too_few_videos():
    few = drawn(number=19)
    with pytest.raises(ValueError, match=r"20.*19"):
        few.calibrate()
    with pytest.raises(ValueError, match="two or more classes"):
        evaluation([[0.9, 0.1]] * 15 + [[0.2, 0.8]] * 15, [0] * 30).calibrate()


@pytest.mark.parametrize("right", [1.0, 0.0], ids=["always right", "always wrong"])
@pytest.mark.parametrize("highest", [0.9, 1.0])
def test_no_temperature_fits(right, highest):
    labels = [i % 2 for i in range(30)]
    probs = [[highest, 1 - highest] if (label == 0) == right else [1 - highest, highest] for label in labels]
    with pytest.raises(ValueError, match=rf"30 videos.*top1 {100 * right:.2f}"):
        evaluation(probs, labels).calibrate()


@pytest.mark.parametrize("multi_label", [False, True])
def test_extreme_probabilities(multi_label):
    """0 and 1, which are logits that float32 cannot tell from infinity."""
    probs = torch.tensor([[1.0, 0.0, 1e-30], [0.5, 0.25, 0.25]])
    changed = change_temperature(probs, 2.0, multi_label=multi_label)
    assert changed.isfinite().all()
    assert changed[0, 0] > changed[0, 2] > changed[0, 1] == 0
    odds = probs[1] / (1 - probs[1]) if multi_label else probs[1]
    expected = odds.sqrt() / (1 + odds.sqrt()) if multi_label else odds.sqrt() / odds.sqrt().sum()
    torch.testing.assert_close(changed[1], expected)


# Where probabilities are


def test_predictions(model, hot, videos):
    """Logits stay, the mean over views is raised to the power of 1 / T, and one view has the softmax of logits / T."""
    before, after = (VideoClassifier(each)(videos / "0.mp4", **VIEWS) for each in (model, hot))
    assert torch.equal(before.view_logits, after.view_logits)
    assert torch.equal(before.probs.argsort(), after.probs.argsort())
    powers = before.view_logits.softmax(dim=1).mean(dim=0) ** (1 / 2.5)
    torch.testing.assert_close(after.probs, powers / powers.sum())
    one = VideoClassifier(hot)(videos / "0.mp4")
    torch.testing.assert_close(one.probs, (one.view_logits[0] / 2.5).softmax(dim=0))
    clip, *_ = tempo.slide(VideoClassifier(hot), videos / "0.mp4")
    torch.testing.assert_close(clip.probs, one.probs)
    assert VideoClassifier(FeatureModel(hot)).temperature == 1


def test_multi_label(videos):
    model = small_model(multi_label=True)
    before = VideoClassifier(model)(videos / "0.mp4", **VIEWS).probs
    model.temperature = 0.5
    after = VideoClassifier(model)(videos / "0.mp4", **VIEWS).probs
    torch.testing.assert_close(after, (before.logit() / 0.5).sigmoid())


def test_training_loss_does_not_use_it(hot):
    clips = torch.randn(1, 3, 16, 32, 32)
    with torch.no_grad():
        assert torch.equal(hot(clips), small_model()(clips))


def test_explanations(hot, videos):
    explanation = explain(hot, videos / "0.mp4", target="growing")
    one = VideoClassifier(hot)(videos / "0.mp4")
    assert explanation.probability == pytest.approx(float(one.probs[2]), abs=1e-5)


def test_optimized(hot, videos):
    expected = VideoClassifier(hot)(videos / "0.mp4")
    fast = VideoClassifier(hot, precision="float32")
    assert fast.temperature == 2.5
    torch.testing.assert_close(fast(videos / "0.mp4").probs, expected.probs, rtol=0, atol=1e-5)
    clips = torch.randn(2, 3, 16, 64, 64, generator=torch.Generator().manual_seed(0))
    half = tpn.optimize(hot, "bfloat16", sample=clips)
    with torch.inference_mode():
        difference = ((half(clips) / 2.5).softmax(dim=1) - (hot(clips) / 2.5).softmax(dim=1)).abs().max()
    assert half.report.max_difference == pytest.approx(float(difference), abs=1e-6)


def test_exported(hot, videos):
    """The metadata of a file has it, unless an earlier version wrote the file."""
    network, _, about = exported.prepare_export(hot, None)
    classify = VideoClassifier(exported.ExportedClassifier(network, about))
    torch.testing.assert_close(classify(videos / "0.mp4").probs, VideoClassifier(hot)(videos / "0.mp4").probs)
    with pytest.raises(ValueError, match="temperature.*0"):
        exported.ExportedClassifier(network, {**about, "temperature": 0})
    del about["temperature"]
    assert exported.ExportedClassifier(network, about).temperature == 1
    with pytest.raises(ValueError, match="calibrate.*export it again"):
        tpn.evaluate(exported.ExportedClassifier(network, about), videos / "list.txt", calibrate=True)


# Where it is kept


def test_saved(hot, tmp_path):
    tpn.save_pretrained(hot, tmp_path)
    loaded = tpn.create_model(tmp_path)
    assert loaded.temperature == loaded.config.head.temperature == 2.5
    assert loaded.aux_head.temperature == 1
    assert tpn.create_model(NAME, checkpoint_path=tmp_path / "model.safetensors", base_channels=4).temperature == 2.5
    assert "| temperature | 2.5 |" in model_card(loaded.config, "me/x")
    assert "temperature" not in model_card(small_model().config, "me/x")
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"temperature": 2.5', '"temperature": 1.5'))
    with pytest.raises(tpn.CheckpointError, match=r"head\.temperature is 1\.5.*2\.5"):
        tpn.create_model(tmp_path)


def test_saving_it_changes_nothing_else(hot, tmp_path):
    tpn.save_pretrained(hot.half(), tmp_path)
    weights, about = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | {"comment": "north entrance"}))
    save_temperature(tmp_path, 1.5)
    after = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: tensor.dtype for name, tensor in weights.items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    about["model"]["head"]["temperature"] = 1.5
    got = json.loads((tmp_path / "config.json").read_text())
    assert got.pop("weights_sha256") != about.pop("weights_sha256")
    assert got == about | {"comment": "north entrance"}
    assert tpn.create_model(tmp_path).temperature == 1.5


def test_files_of_earlier_versions(model, tmp_path):
    tpn.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for head in ("head", "aux_head"):
        assert config["model"][head].pop("temperature") == 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert tpn.create_model(tmp_path).temperature == 1


def test_it_belongs_to_the_classifier(hot, tmp_path):
    """As the labels do: another classifier has none."""
    tpn.save_pretrained(hot, tmp_path)
    assert tpn.create_model(tmp_path, num_classes=3).temperature == 2.5
    assert tpn.create_model(tmp_path, drop_rate=0.1).temperature == 2.5
    assert tpn.create_model(tmp_path, num_classes=5).temperature == 1
    assert tpn.create_model(tmp_path, num_classes=0).temperature == 1
    assert tpn.create_model(tmp_path, multi_label=True).temperature == 1
    assert tpn.create_model(NAME, checkpoint_path=tmp_path / "model.safetensors", base_channels=4, num_classes=2).temperature == 1
    assert tpn.create_model(NAME, pretrained=True).temperature == 1
    loaded = tpn.create_model(tmp_path)
    loaded.head.fc = torch.nn.Linear(loaded.num_features, 3)
    assert loaded.temperature == 1
    hot.reset_classifier(3)
    assert hot.temperature == 1
    for value, error in ((0, ValueError), (101, ValueError), ("1", TypeError)):
        with pytest.raises(error, match=f"temperature.*{value}"):
            hot.temperature = value
    assert ClassificationHead(4, 2, temperature=3.0).temperature == 3


@pytest.mark.parametrize("classes", [CLASSES, ("a", "b")], ids=["the same classes", "new classes"])
def test_training_starts_without_it(hot, tmp_path, monkeypatch, classes):
    """A classifier that learns further is no longer the one that the temperature was fitted to."""
    tpn.save_pretrained(hot, tmp_path)
    data = SimpleNamespace(train=SimpleNamespace(classes=classes, multi_label=False))
    monkeypatch.setattr(setup, "open_data", lambda *args: data)
    trained, *_ = setup.build("data", tpn.TrainConfig(model=f"local-dir:{tmp_path}"))
    assert (trained.temperature, trained.labels) == (1, classes)


# The command


def saved(model, videos, folder):
    return tpn.save_pretrained(model, folder), videos / "list.txt"


def test_evaluate_saves_it(model, videos, tmp_path):
    folder, data = saved(model, videos, tmp_path / "model")
    done = run("evaluate", folder, data, "--calibrate", "--views", "2x1", "--output", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = tpn.create_model(folder)
    assert 0.1 < loaded.temperature < 100
    assert loaded.temperature != 1
    assert loaded.input_spec == model.input_spec  # not the views of this evaluation
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["temperature"] == 1
    assert summary["calibrated"]["temperature"] == round(loaded.temperature, 4)
    assert summary["calibrated"]["loss"] < summary["loss"]
    line = done.stdout.splitlines()[1]
    values = (summary["ece"], summary["calibrated"]["ece"])
    assert "calibration error {:.1f}% → {:.1f}%".format(*values) in line
    assert line.startswith(f"saved: temperature 1 → {loaded.temperature:.3g}; on the videos it was fitted to, ")
    assert line.removeprefix("saved: ") in (tmp_path / "out" / "report.html").read_text()
    again = tpn.evaluate(folder, data, views="2x1")
    assert again.temperature == loaded.temperature
    assert again.metrics["top1"] == pytest.approx(summary["top1"], abs=1e-4)
    assert again.metrics["loss"] == pytest.approx(summary["calibrated"]["loss"], abs=1e-4)
    assert again.metrics["ece"] == pytest.approx(summary["calibrated"]["ece"], abs=1e-2)
    twice = tpn.evaluate(folder, data, views="2x1", calibrate=True)
    assert twice.calibrated.temperature == pytest.approx(loaded.temperature, rel=1e-3)


def test_evaluate_sets_it_in_a_model(videos):
    other = small_model()
    result = tpn.evaluate(other, videos / "list.txt", calibrate=True)
    assert result.temperature == 1
    assert result.calibrated.temperature == other.temperature != 1
    assert tpn.evaluate(other, videos / "list.txt").metrics["loss"] < result.metrics["loss"]


def test_results_of_another_temperature_are_not_resumed(videos, tmp_path):
    """Unreadable videos leave the evaluation unfinished. A model put together by hand has no config."""
    (tmp_path / "list.txt").write_text((videos / "list.txt").read_text() + "missing.mp4 left\n")
    other = small_model()
    other.neck = torch.nn.Sequential(other.neck)
    args = {"root": videos, "output": tmp_path / "out"}
    before = tpn.evaluate(other, tmp_path / "list.txt", **args)
    fitted = tpn.evaluate(other, tmp_path / "list.txt", calibrate=True, **args).calibrated
    after = tpn.evaluate(other, tmp_path / "list.txt", **args)
    assert after.failed
    assert before.metrics["loss"] > after.metrics["loss"] == pytest.approx(fitted.metrics["loss"], abs=1e-4)
    other.temperature = 1
    with pytest.raises(ValueError, match="other weights"):
        tpn.evaluate(other, tmp_path / "list.txt", **args)


@pytest.mark.parametrize(
    ("name", "message"),
    [(NAME, "not a folder.*save_pretrained"), ("hf-hub:me/x", "not a folder"), ("model.onnx", "export it again")],
)
def test_models_that_cannot_be_written(videos, name, message):
    """Refused before a video is read, or a file fetched."""
    with pytest.raises(ValueError, match=f"calibrate.*{message}"):
        tpn.evaluate(name, videos / "list.txt", calibrate=True)


def test_weights_of_another_file(model, videos, tmp_path):
    tpn.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="calibrate.*checkpoint"):
        tpn.evaluate(tmp_path, videos / "list.txt", calibrate=True, checkpoint=tmp_path / "model.safetensors")


def test_too_few_videos_are_refused_before_one_is_classified(model, videos, tmp_path, monkeypatch):
    folder, _ = saved(model, videos, tmp_path)
    before = (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_bytes()
    monkeypatch.setattr("tpn.training.evaluation._classify_all", None)
    (videos / "few.txt").write_text("0.mp4 left\n1.mp4 growing\n")
    done = run("evaluate", folder, videos / "few.txt", "--calibrate", cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "error: calibration needs at least 20 videos, got 2")
    assert ((folder / "model.safetensors").read_bytes(), (folder / "config.json").read_bytes()) == before


def test_a_fit_that_fails_leaves_the_model(model, videos, tmp_path):
    """No temperature fits a model that is wrong about every video."""
    folder, data = saved(model, videos, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = tpn.evaluate(folder, data)
    wrong = [CLASSES[(label + 1) % 3] for label in result.probs.argmax(axis=1)]
    lines = [f"{item.name} {label}\n" for item, label in zip(result.items, wrong, strict=True)]
    (videos / "wrong.txt").write_text("".join(lines))
    with pytest.raises(ValueError, match=f"{NUM_VIDEOS} videos"):
        tpn.evaluate(folder, videos / "wrong.txt", calibrate=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# None of the classes


def test_top_above_a_probability(model, videos):
    prediction = VideoClassifier(model)(videos / "0.mp4")
    (best, highest), *_ = prediction.top()
    assert prediction.top(min_probability=highest) == [(best, highest)]
    assert prediction.top(min_probability=1) == []
    assert len(prediction.top(2)) == 2
    with pytest.raises(ValueError, match=r"min_probability.*1\.5"):
        prediction.top(min_probability=1.5)


def test_predict_prints_a_dash(model, videos, tmp_path):
    folder, _ = saved(model, videos, tmp_path)
    options = ("predict", videos / "0.mp4", "--model", folder, "--min-probability")
    assert run(*options, "1", cwd=tmp_path).stdout.splitlines()[1:] == ["  -"]
    assert json.loads(run(*options, "1", "--json", cwd=tmp_path).stdout)["top"] == []
    assert len(run(*options, "0", cwd=tmp_path).stdout.splitlines()) == 4
    assert run(*options, "50", cwd=tmp_path).returncode == 2
