"""`examples/evaluate.py`: every video counts once, with several processes and after an interruption, too."""

import csv
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import call_example, example, run_example

import tpn
from tpn.predict import VideoClassifier
from tpn.video import motion
from tpn.video.decode import read_frames
from tpn.video.encode import write_video

LABELS = [0, 4, 12, 0, 7, 4, 12]


pytestmark = pytest.mark.usefixtures("one_thread")  # as under torchrun


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a model and a list of seven videos, one of them unreadable."""
    root = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(3)
    model = tpn.create_model("tpn_slowonly_tiny_motion", base_channels=4)
    torch.nn.init.normal_(model.head.fc.weight)  # otherwise all predictions are the same class
    tpn.save_pretrained(model, root / "model")
    for i, label in enumerate(LABELS):
        write_video(root / f"video {i}.mp4", motion.render(label, tempo=3, seed=i, num_frames=50), fps=24)
    (root / "video 2.mp4").write_bytes(b"broken")
    (root / "list.txt").write_text("".join(f"video {i}.mp4 {label}\n" for i, label in enumerate(LABELS)))
    return root


def arguments(folder, output, *args):
    model = f"local-dir:{folder / 'model'}"
    return ["--model", model, "--data", folder / "list.txt", "--output", output, "--max-bad", "0.2", *args]


def evaluate(folder, output, *args):
    example("evaluate").main([str(a) for a in arguments(folder, output, *args)])
    return json.loads((output / "summary.json").read_text())


def test_results(folder, tmp_path, capsys):
    summary = evaluate(folder, tmp_path, "--dump", tmp_path / "d.npz")
    classify = VideoClassifier(f"local-dir:{folder / 'model'}")
    readable = [i for i in range(7) if i != 2]
    probs = np.stack([classify(folder / f"video {i}.mp4").probs.numpy() for i in readable])
    labels = np.array(LABELS)[readable]
    dump = np.load(tmp_path / "d.npz")
    assert np.array_equal(dump["probs"], probs)
    assert np.array_equal(dump["label"], labels)
    assert [os.path.basename(path) for path in dump["path"]] == [f"video {i}.mp4" for i in readable]
    assert tuple(dump["class"]) == motion.CLASSES

    hits = probs.argmax(axis=1) == labels
    assert (summary["videos"], summary["views"]) == (6, 3)
    assert summary["top1"] == pytest.approx(100 * hits.mean(), abs=1e-3)
    ranks = (probs > probs[np.arange(6), labels][:, None]).sum(axis=1)
    assert summary["top5"] == pytest.approx(100 * (ranks < 5).mean(), abs=1e-3)
    per_class = [hits[labels == k].mean() for k in sorted(set(labels.tolist()))]
    assert summary["mean_class"] == pytest.approx(100 * np.mean(per_class), abs=1e-3)
    (path, reason), *others = summary["failed"].items()
    assert path.endswith("video 2.mp4")
    assert "not a video" in reason
    assert not others
    printed = capsys.readouterr().out
    assert "6 videos, 3 views each: top1" in printed
    assert f"not counted: {path}: " in printed

    rows = list(csv.DictReader((tmp_path / "per_class.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == list(motion.CLASSES)
    assert {row["class"]: row["videos"] for row in rows if row["videos"] != "0"} == {
        "moving left": "2", "turning clockwise": "2", "shrinking": "1", "blinking": "1"
    }  # fmt: skip
    assert (tmp_path / "confusion.png").stat().st_size > 10_000


def test_formats(folder, tmp_path):
    for suffix in (".json", ".pkl", ".npz"):
        evaluate(folder, tmp_path, "--views", "1x1", "--dump", tmp_path / f"d{suffix}")
    arrays = np.load(tmp_path / "d.npz")
    with open(tmp_path / "d.pkl", "rb") as file:
        pickled = pickle.load(file)
    parsed = json.loads((tmp_path / "d.json").read_text())
    for name in ("path", "label", "probs", "class"):
        assert np.array_equal(arrays[name], pickled[name])
        assert arrays[name].tolist() == parsed[name]


def test_three_processes_give_the_results_of_one(folder, tmp_path):
    evaluate(folder, tmp_path / "one", "--dump", tmp_path / "one.json")
    run_example("evaluate", *arguments(folder, tmp_path / "three", "--dump", tmp_path / "three.json"), processes=3)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "three.json").read_bytes()
    assert (tmp_path / "one" / "summary.json").read_bytes() == (tmp_path / "three" / "summary.json").read_bytes()


KILL = """
import os, signal
add = example.Journal.add
def killing(self, row):
    add(self, row)
    if row["index"] == 3:
        with self.file.open("a") as file:
            file.write('{"index": 4, "pro')
        os.kill(os.getpid(), signal.SIGKILL)
example.Journal.add = killing
"""


def test_a_killed_run_resumes(folder, tmp_path, monkeypatch, capsys):
    killed = run_example("evaluate", *arguments(folder, tmp_path / "run"), before=KILL, check=False)
    assert killed.returncode < 0
    with pytest.raises(ValueError, match="unfinished .*other weights, videos or views"):
        evaluate(folder, tmp_path / "run", "--views", "1x1")
    assert evaluated(folder, tmp_path / "run", monkeypatch) == [2, 4, 5, 6]  # an unreadable video is read again
    assert "resuming: 3 of 7 videos" in capsys.readouterr().out
    run = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert evaluate(folder, tmp_path / "whole", "--dump", tmp_path / "whole.json") == run
    assert (tmp_path / "run.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def evaluated(folder, output, monkeypatch):
    """Run the evaluation; return the indices of the videos that it read."""
    read, module = [], example("evaluate")

    def classify(classifier, data, indices, workers, original=module.classify):
        for row in original(classifier, data, indices, workers):
            read.append(row["index"])
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(module, "classify", classify)
        evaluate(folder, output, "--dump", f"{output}.json")
    return read


def test_only_a_repaired_video_is_read_again(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "copy")
    broken, output = tmp_path / "copy" / "video 2.mp4", tmp_path / "run"
    done = call_example("evaluate", *arguments(tmp_path / "copy", output, "--max-bad", "0.1"))
    assert done.returncode == 1
    assert re.match("error: .*1 of 7 videos.*--max-bad", done.stderr)
    assert json.loads((output / "summary.json").read_text())["videos"] == 6
    broken.write_bytes((folder / "video 1.mp4").read_bytes())
    assert evaluated(tmp_path / "copy", output, monkeypatch) == [2]
    assert json.loads((output / "summary.json").read_text())["videos"] == 7
    assert not (output / "unfinished").exists()


def test_half_precision(folder, tmp_path):
    summaries = []
    for precision in ("float32", "bfloat16"):
        evaluate(folder, tmp_path / precision, "--views", "1x1", "--precision", precision, "--dump", tmp_path / "d.npz")
        summaries.append(np.load(tmp_path / "d.npz")["probs"])
    assert not np.array_equal(*summaries)
    np.testing.assert_allclose(*summaries, atol=0.02)


def test_fewer_than_five_classes(tmp_path):
    probs = np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7]], dtype=np.float32)
    accuracy, confusion = example("evaluate").measure(probs, np.array([1, 1, 2]), 3)
    assert accuracy == {"top1": 66.6667, "top5": 100.0, "mean_class": 75.0}
    assert confusion.tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_frames(folder, tmp_path):
    """Extracted frames give the probabilities of the video."""
    frames = read_frames(folder / "video 0.mp4", range(50))
    (tmp_path / "v").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / "v" / f"{i + 1:03d}.png")
    (tmp_path / "frames.txt").write_text("v 50 0\n")
    (tmp_path / "videos.txt").write_text("video 0.mp4 0\n")
    common = ["--dump", tmp_path / "d.npz"]
    evaluate(folder, tmp_path / "a", "--data", tmp_path / "frames.txt", "--frames", "{:03d}.png", *common)
    from_frames = np.load(tmp_path / "d.npz")["probs"]
    evaluate(folder, tmp_path / "a", "--data", tmp_path / "videos.txt", "--root", folder, *common)
    assert np.array_equal(from_frames, np.load(tmp_path / "d.npz")["probs"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--views", "3"], "error: .*views.*CLIPSxCROPS"),
        (["--dump", "x.csv"], r"--dump.*\.json, \.pkl, \.npz.*x\.csv"),
        (["--model", "nothing"], "error: .*'nothing'"),
    ],
)
def test_errors(folder, tmp_path, options, message):
    done = call_example("evaluate", *arguments(folder, tmp_path, *options))
    assert done.returncode in (1, 2)
    assert re.search(message, done.stderr)
