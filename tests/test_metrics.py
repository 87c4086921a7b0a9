"""Accuracy and average precision of an `Evaluation`, and its files."""

import csv
import json
import pickle

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, log_loss

from tpn.training import metrics
from tpn.training.metrics import Evaluation, average_precision
from tpn.video.datasets import Item


def evaluation(probs, labels, multi_label=False, **kwargs):
    """An evaluation of videos whose labels are class indices, or tuples of them."""
    probs = np.array(probs, dtype=np.float32)
    targets = np.zeros_like(probs)
    for row, label in zip(targets, labels, strict=True):
        row[list(label) if isinstance(label, tuple) else label] = 1
    classes = tuple("abcdefghij"[: probs.shape[1]])
    items = tuple(Item(f"{i}.mp4", label) for i, label in enumerate(labels))
    return Evaluation(classes, items, probs, targets, views=3, multi_label=multi_label, **kwargs)


def test_fewer_than_five_classes():
    result = evaluation([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7]], [1, 1, 2])
    values = {name: round(value, 4) for name, value in result.metrics.items()}
    loss = -np.log([0.5, 0.3, 0.7]).mean()
    assert values == {"top1": 66.6667, "top5": 100.0, "mean_class": 75.0, "loss": pytest.approx(loss, abs=1e-4), "ece": 46.6667}
    assert result.confusion.tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert result.main_metric == "top1"


def test_top5():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(10), 50)
    labels = rng.integers(10, size=50)
    result = evaluation(probs, labels.tolist())
    ranks = (probs > probs[np.arange(50), labels][:, None]).sum(axis=1)
    assert result.metrics["top1"] == pytest.approx(100 * (ranks == 0).mean())
    assert result.metrics["top5"] == pytest.approx(100 * (ranks < 5).mean())
    assert result.metrics["loss"] == pytest.approx(log_loss(labels, probs, labels=range(10)), rel=1e-5)


@pytest.mark.parametrize("levels", [3, 10, 1000], ids=lambda levels: f"{levels} scores")
def test_average_precision(levels):
    """The values of scikit-learn; with few different scores, most of them are tied."""
    rng = np.random.default_rng(levels)
    for number in (1, 2, 7, 100):
        for share in (0.1, 0.5, 1.0):
            targets = (rng.random(number) < share).astype(np.float32)
            targets[rng.integers(number)] = 1
            scores = (rng.integers(levels, size=number) / levels).astype(np.float32)
            assert average_precision(targets, scores) == pytest.approx(average_precision_score(targets, scores), abs=1e-12)
    assert np.isnan(average_precision(np.zeros(3, np.float32), np.arange(3, dtype=np.float32)))


def test_multi_label_metrics():
    """mAP is the mean over classes that occur; no video needs to have a class."""
    rng = np.random.default_rng(1)
    labels = [tuple(np.flatnonzero(row).tolist()) for row in rng.random((40, 4)) < (0.3, 0.4, 0.7, 0.0)]
    assert () in labels
    assert max(map(len, labels)) == 3
    probs = rng.integers(5, size=(40, 4)) / 4
    result = evaluation(probs, labels, multi_label=True)
    expected = average_precision_score(result.targets[:, :3], result.probs[:, :3], average=None)
    np.testing.assert_allclose(result.average_precision, [*expected, np.nan], atol=1e-12)
    assert result.metrics["mAP"] == pytest.approx(100 * expected.mean())
    assert result.metrics.keys() == {"mAP", "loss", "ece"}
    assert np.isfinite(result.metrics["loss"])
    assert result.main_metric == "mAP"
    assert evaluation([[0.9, 0.2]], [(0,)], multi_label=True).metrics["loss"] == pytest.approx(-np.log([0.9, 0.8]).mean())


def test_unreadable_share():
    """A file counts once, whatever the number of its segments."""
    assert evaluation([[1, 0]] * 4, [0] * 4).unreadable_share == 0
    result = evaluation([[1, 0]] * 3, [0] * 3, failed={"bad.mp4": "damaged", "2.mp4": "a segment is damaged"})
    assert result.unreadable_share == 0.5


def test_files(tmp_path):
    result = evaluation([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.6, 0.2, 0.2]], [1, 1, 2], failed={"bad.mp4": "damaged"})
    metrics.write_results(result, tmp_path, model="my model", data="val.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["per_class.csv", "summary.json"]
    rows = list(csv.reader((tmp_path / "per_class.csv").read_text().splitlines()))
    assert rows == [
        ["class", "videos", "top1", "most frequent error"],
        ["a", "0", "", ""],
        ["b", "2", "50.00", "a"],
        ["c", "1", "0.00", "a"],
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.pop("loss") > 0
    assert summary == {
        "videos": 3, "top1": 33.3333, "top5": 100.0, "mean_class": 25.0, "ece": 56.6667,
        "views": 3, "frame_interval": None, "temperature": 1.0, "model": "my model", "data": "val.csv", "failed": {"bad.mp4": "damaged"},
    }  # fmt: skip


def test_files_of_multi_label_data(tmp_path):
    result = evaluation([[0.9, 0.8, 0.3], [0.6, 0.9, 0.1]], [(0, 1), ()], multi_label=True)
    metrics.write_results(result, tmp_path, model="m", data="val.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["per_class.csv", "summary.json"]
    rows = list(csv.reader((tmp_path / "per_class.csv").read_text().splitlines()))
    assert rows == [["class", "videos", "average precision"], ["a", "1", "100.00"], ["b", "1", "50.00"], ["c", "0", ""]]
    assert json.loads((tmp_path / "summary.json").read_text())["mAP"] == 75
    for suffix in metrics.PROBS_SUFFIXES:
        metrics.write_probs(result, tmp_path / f"d{suffix}")
    with open(tmp_path / "d.pkl", "rb") as file:
        contents = [np.load(tmp_path / "d.npz"), pickle.load(file), json.loads((tmp_path / "d.json").read_text())]
    for content in contents:
        assert np.array_equal(content["label"], [[1, 1, 0], [0, 0, 0]])
        assert np.array_equal(np.array(content["probs"], np.float32), result.probs)
