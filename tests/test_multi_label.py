"""Models whose videos may have several classes: the probabilities are sigmoids of the logits, wherever a model goes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from test_cli import run

import tpn
from tpn import VideoClassifier, export, tempo
from tpn.explain import explain
from tpn.models.features import FeatureModel
from tpn.models.heads import class_probs
from tpn.training import evaluation
from tpn.video import motion
from tpn.video.decode import read_frames
from tpn.video.encode import write_video

NAME = "tpn_slowonly_tiny_motion"
CLASSES = ("left", "blinking", "growing")
ONE_VIEW = {"num_clips": 1, "num_crops": 1}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = tpn.create_model(NAME, num_classes=3, multi_label=True, base_channels=4)
    torch.nn.init.normal_(model.head.fc.weight)
    torch.nn.init.constant_(model.head.fc.bias, 1.0)
    model.labels = CLASSES
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    root = tmp_path_factory.mktemp("multi")
    tpn.save_pretrained(model, root / "model")
    for i in range(5):
        write_video(root / f"{i}.mp4", motion.render(i, tempo=3, seed=i, num_frames=40), fps=24)
    (root / "list.txt").write_text("".join(f"{i}.mp4 {CLASSES[i % 3]}\n" for i in range(5)))
    return root


def test_class_probs():
    logits = torch.tensor([[1.0, 2.0, -torch.inf]])
    assert torch.equal(class_probs(logits, multi_label=False), logits.softmax(dim=1))
    assert torch.equal(class_probs(logits, multi_label=True), logits.sigmoid())


def test_probabilities(model, folder):
    """They are the mean of the sigmoids of the views, and not those of a single-label model with the same weights."""
    classify = VideoClassifier(model)
    prediction = classify(folder / "0.mp4")
    assert classify.multi_label
    assert len(prediction.view_logits) == 3
    assert torch.equal(prediction.probs, prediction.view_logits.sigmoid().mean(dim=0))
    assert prediction.probs.sum() > 1.05
    (each,) = classify.predict_each([folder / "0.mp4"])
    assert torch.equal(each.probs, prediction.probs)
    single = VideoClassifier(folder / "model", multi_label=False)
    assert not single.multi_label
    torch.testing.assert_close(single(folder / "0.mp4").probs, prediction.view_logits.softmax(dim=1).mean(dim=0))


def test_infinite_logits_are_an_error(model, folder):
    """The sigmoid of infinity is a number."""
    other = tpn.create_model(folder / "model")
    for value, fails in ((torch.inf, True), (-torch.inf, False)):
        torch.nn.init.constant_(other.head.fc.bias, value)
        if fails:
            with pytest.raises(ValueError, match="NaN or infinite"):
                VideoClassifier(other)(folder / "0.mp4", **ONE_VIEW)
        else:
            assert VideoClassifier(other)(folder / "0.mp4", **ONE_VIEW).probs.tolist() == [0, 0, 0]


def test_saved_and_changed(model, folder, tmp_path):
    loaded = tpn.create_model(folder / "model")
    assert loaded.multi_label
    assert loaded.aux_head.multi_label
    assert loaded.config.head == tpn.HeadConfig(3, model.config.head.drop_rate, multi_label=True)
    weights = folder / "model" / "model.safetensors"
    assert tpn.create_model(NAME, checkpoint_path=weights, base_channels=4).multi_label
    assert not tpn.create_model(NAME, checkpoint_path=weights, base_channels=4, multi_label=False).multi_label
    assert not tpn.create_model(NAME).multi_label
    assert not tpn.create_model(folder / "model", multi_label=False).multi_label
    loaded.reset_classifier(5)
    assert (loaded.num_classes, loaded.multi_label) == (5, True)
    loaded.reset_classifier(5, multi_label=False)
    assert not loaded.config.head.multi_label
    assert not loaded.config.aux_head.multi_label
    with pytest.raises(TypeError, match="multi_label.*'yes'"):
        tpn.create_model(NAME, multi_label="yes")


def test_files_of_earlier_versions(folder, tmp_path):
    """They have no "multi_label", and classes that exclude each other."""
    model = tpn.create_model(folder / "model", multi_label=False)
    tpn.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for head in ("head", "aux_head"):
        assert config["model"][head].pop("multi_label") is False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not tpn.create_model(tmp_path).multi_label
    about = {"num_classes": 3, "num_features": 8, "in_chans": 3, "labels": None, "input_spec": model.input_spec.to_dict()}
    assert not export.ExportedClassifier(lambda x: x, about).multi_label


def test_optimized(model, folder):
    expected = VideoClassifier(model)(folder / "0.mp4", **ONE_VIEW)
    fast = VideoClassifier(model, precision="float32")
    assert fast.multi_label
    torch.testing.assert_close(fast(folder / "0.mp4", **ONE_VIEW).probs, expected.probs, rtol=0, atol=1e-5)
    clips = torch.randn(2, 3, 16, 64, 64, generator=torch.Generator().manual_seed(0))
    half = tpn.optimize(model, "bfloat16", sample=clips)
    with torch.inference_mode():
        difference = (half(clips).sigmoid() - model(clips).sigmoid()).abs().max()
    assert half.report.max_difference == pytest.approx(float(difference), abs=1e-6)
    assert difference > 0


@pytest.mark.slow
def test_exported(model, folder, tmp_path):
    expected = VideoClassifier(model)(folder / "0.mp4", **ONE_VIEW)
    export.export_pt2(model, tmp_path / "model.pt2", size=model.input_spec.crop_size)
    exported = export.load(tmp_path / "model.pt2")
    assert exported.multi_label
    classify = VideoClassifier(exported)
    assert torch.equal(classify(folder / "0.mp4").probs, classify(folder / "0.mp4").view_logits.sigmoid().mean(dim=0))
    torch.testing.assert_close(classify(folder / "0.mp4", **ONE_VIEW).probs, expected.probs, rtol=0, atol=1e-5)


def test_features_have_no_classes(model):
    assert not VideoClassifier(FeatureModel(model)).multi_label


def test_explanations_and_timelines(model, folder):
    explanation = explain(model, folder / "0.mp4", target="growing")
    prediction = VideoClassifier(model)(folder / "0.mp4", **ONE_VIEW)
    assert explanation.probability == pytest.approx(float(prediction.view_logits[0, 2].sigmoid()), abs=1e-5)
    clip = next(tempo.slide(VideoClassifier(model), folder / "0.mp4"))
    frames = read_frames(folder / "0.mp4", range(clip.first, clip.last + 1))
    logits = VideoClassifier(model)(frames, **ONE_VIEW).view_logits[0]
    torch.testing.assert_close(clip.probs, logits.sigmoid())


def test_predict_prints_the_most_probable_classes(model, folder):
    expected = VideoClassifier(model)(folder / "0.mp4").top(3)
    done = run("predict", "0.mp4", "--model", "./model", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == [f"  {value:7.2%}  {name}" for name, value in expected]
    rows = json.loads(run("predict", "0.mp4", "--model", "model", "--json", cwd=folder).stdout)["top"]
    assert [(row["label"], pytest.approx(row["probability"], abs=1e-5)) for row in rows] == expected


def test_evaluate(model, folder, tmp_path):
    """Average precision, whether or not a video of the list has several classes."""
    done = run("evaluate", "model", "list.txt", "--output", tmp_path, "--views", "1x1", cwd=folder)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    classify = VideoClassifier(folder / "model")
    probs = np.stack([classify(folder / f"{i}.mp4", **ONE_VIEW).probs.numpy() for i in range(5)])
    expected = 100 * average_precision_score(np.eye(3)[[0, 1, 2, 0, 1]], probs, average=None)
    assert summary["mAP"] == pytest.approx(expected.mean(), abs=1e-3)
    assert "top1" not in summary
    first, header, *rows = done.stdout.splitlines()
    assert f"mAP {expected.mean():.2f}" in first
    assert header.split() == ["class", "videos", "average", "precision"]
    assert [row.split() for row in rows] == [
        [name, count, f"{value:.2f}"] for name, count, value in zip(CLASSES, "221", expected, strict=True)
    ]
    assert "report.html" in [path.name for path in tmp_path.iterdir()]


def test_data_with_several_classes_needs_a_multi_label_model(model):
    data = SimpleNamespace(classes=CLASSES, multi_label=True)
    evaluation._check_classes(model, data, "list.csv")
    single = SimpleNamespace(num_classes=3, multi_label=False)
    with pytest.raises(ValueError, match=r"list\.csv.*several classes.*multi-label"):
        evaluation._check_classes(single, data, "list.csv")
