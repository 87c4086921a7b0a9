"""`tpn evaluate` and `tpn.evaluate`: every video counts once, with several processes and after an interruption, too."""

import csv
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import small
import torch
from forks import run_forked
from PIL import Image
from test_cli import run

import tpn
from tpn.predict import VideoClassifier
from tpn.training import evaluation
from tpn.video import motion
from tpn.video.datasets import open_dataset
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
    return ["evaluate", "model", "list.txt", "--output", str(output), "--max-bad", "0.2", *map(str, args)]


def evaluate(folder, output, *args):
    done = run(*arguments(folder, output, *args), cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "summary.json").read_text())


def test_results(folder, tmp_path):
    done = run(*arguments(folder, tmp_path, "--dump", tmp_path / "d.npz"), cwd=folder)
    summary = json.loads((tmp_path / "summary.json").read_text())
    classify = VideoClassifier(folder / "model")
    readable = [i for i in range(7) if i != 2]
    probs = np.stack([classify(folder / f"video {i}.mp4").probs.numpy() for i in readable])
    labels = np.array(LABELS)[readable]
    dump = np.load(tmp_path / "d.npz")
    assert np.array_equal(dump["probs"], probs)
    assert np.array_equal(dump["label"], labels)
    assert [os.path.basename(path) for path in dump["path"]] == [f"video {i}.mp4" for i in readable]
    assert tuple(dump["class"]) == motion.CLASSES

    hits = probs.argmax(axis=1) == labels
    assert (summary["videos"], summary["views"], summary["model"], summary["data"]) == (6, 3, "model", "list.txt")
    assert summary["top1"] == pytest.approx(100 * hits.mean(), abs=1e-3)
    ranks = (probs > probs[np.arange(6), labels][:, None]).sum(axis=1)
    assert summary["top5"] == pytest.approx(100 * (ranks < 5).mean(), abs=1e-3)
    per_class = [hits[labels == k].mean() for k in sorted(set(labels.tolist()))]
    assert summary["mean_class"] == pytest.approx(100 * np.mean(per_class), abs=1e-3)
    (path, reason), *others = summary["failed"].items()
    assert path.endswith("video 2.mp4")
    assert "not a video" in reason
    assert not others
    first, header, *rows = done.stdout.splitlines()
    assert first.startswith(f"6 videos, 3 views each: top-1 {summary['top1']:.2f}, ")
    assert header.split()[:3] == ["class", "videos", "top1"]
    assert [row[:20].strip() for row in rows] == [name[:20].strip() for name in motion.CLASSES]
    assert f"not counted: {path}: " in done.stderr

    rows = list(csv.DictReader((tmp_path / "per_class.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == list(motion.CLASSES)
    assert {row["class"]: row["videos"] for row in rows if row["videos"] != "0"} == {
        "moving left": "2", "turning clockwise": "2", "shrinking": "1", "blinking": "1"
    }  # fmt: skip
    report = (tmp_path / "report.html").read_text()
    assert all(text in report for text in ("turning clockwise", "<dd>list.txt</dd>", "<dd>3 views of each video</dd>"))
    assert done.stderr.splitlines()[1:3] == [f"wrote {tmp_path / 'd.npz'}", f"wrote {tmp_path}"]


def test_nothing_is_written_without_output(folder, tmp_path):
    done = run("evaluate", folder / "model", folder / "list.txt", "--views", "1x1", "--max-bad", "0.2", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["videos"] == 6
    assert list(tmp_path.iterdir()) == []


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


def test_function_and_validation_agree(folder):
    """They use the same views, of a model in any mode, which they restore."""
    model = tpn.create_model(folder / "model").train()
    model.neck.eval()
    seen = []
    wrapped = torch.nn.DataParallel(model)
    result = tpn.evaluate(wrapped, folder / "list.txt", views="2x1", progress=lambda *done: seen.append(done))
    assert seen == [(done, 7) for done in range(8)]
    assert model.training
    assert not model.neck.training
    assert model.input_spec == tpn.input_spec(folder / "model")
    assert (result.views, len(result.items)) == (2, 6)
    spec = tpn.InputSpec.from_dict(model.input_spec.to_dict() | {"num_clips": 2, "num_crops": 1})
    validation = evaluation.validate(model, open_dataset(folder / "list.txt", spec, train=False, classes=model.labels))
    assert np.array_equal(validation.probs, result.probs)
    assert validation.metrics == result.metrics
    by_name = tpn.evaluate(str(folder / "model"), folder / "list.txt", views="2x1")
    assert by_name.metrics["top1"] == result.metrics["top1"]
    np.testing.assert_allclose(by_name.probs, result.probs, atol=1e-5)


def run_processes(count, *args, cwd, before):
    """Run `tpn` in several processes, as torchrun does; `before` is code that changes `evaluation` first."""
    script = f"import os\nfrom tpn.training import evaluation\n{before}\nfrom tpn.cli import main\nmain()\n"
    return run_forked(script, count, args, cwd)


RECORD = """
def record(classifier, data, indices, original=evaluation.classify_dataset, **kwargs):
    open(f"read by {os.environ['RANK']}", "w").write(" ".join(map(str, indices)))
    return original(classifier, data, indices, **kwargs)
evaluation.classify_dataset = record
"""


@pytest.mark.slow
def test_three_processes_give_the_results_of_one(folder, tmp_path):
    evaluate(folder, tmp_path / "one", "--dump", tmp_path / "one.json")
    options = arguments(folder, tmp_path / "three", "--dump", tmp_path / "three.json")
    done = run_processes(3, *options, cwd=folder, before=RECORD)
    assert done.returncode == 0, done.stderr
    assert [(folder / f"read by {rank}").read_text() for rank in range(3)] == ["0 3 6", "1 4", "2 5"]
    assert done.stdout.count("6 videos, 3 views each") == 1
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "three.json").read_bytes()
    assert (tmp_path / "one" / "summary.json").read_bytes() == (tmp_path / "three" / "summary.json").read_bytes()


FAIL = """
def fail(*args, original=evaluation.classify_dataset, **kwargs):
    for number, each in enumerate(original(*args, **kwargs)):
        if number == 1 and os.environ["RANK"] == "1":
            raise ValueError("the second process fails")
        yield each
evaluation.classify_dataset = fail
"""


@pytest.mark.slow
def test_all_processes_end_when_one_fails(folder, tmp_path):
    done = run_processes(2, *arguments(folder, tmp_path), cwd=folder, before=FAIL)
    assert done.returncode != 0
    assert "error: the second process fails\n" in done.stderr
    assert not (tmp_path / "summary.json").exists()


KILL = """
import os, signal
from tpn import cli
from tpn.training.evaluation import Journal
def killing(self, index, probs, add=Journal.add):
    add(self, index, probs)
    if index == 3:
        with self.file.open("a") as file:
            file.write('{"index": 4, "pro')
        os.kill(os.getpid(), signal.SIGKILL)
Journal.add = killing
"""


@pytest.mark.slow
def test_a_killed_run_resumes(folder, tmp_path, monkeypatch):
    assert run_forked(f"{KILL}\ncli.main()", argv=arguments(folder, tmp_path / "run"), cwd=folder).returncode < 0
    other = run(*arguments(folder, tmp_path / "run", "--views", "1x1"), cwd=folder)
    assert other.returncode == 1
    assert "other weights, videos, or settings" in other.stderr
    read, done = evaluated(folder, tmp_path / "run", monkeypatch)
    assert read == [2, 4, 5, 6]  # an unreadable video is read again
    assert "resuming: 3 of 7 videos" in done.stderr
    result = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert evaluate(folder, tmp_path / "whole", "--dump", tmp_path / "whole.json") == result
    assert (tmp_path / "run.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def evaluated(folder, output, monkeypatch):
    """Run the evaluation; return the indices of the videos that it read, and what it printed."""
    read = []

    def classify(*args, original=evaluation.classify_dataset, **kwargs):
        for index, result in original(*args, **kwargs):
            read.append(index)
            yield index, result

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "classify_dataset", classify)
        done = run(*arguments(folder, output, "--dump", f"{output}.json"), cwd=folder)
    return read, done


def test_only_a_repaired_video_is_read_again(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "copy")
    broken, output = tmp_path / "copy" / "video 2.mp4", tmp_path / "run"
    done = run(*arguments(tmp_path / "copy", output, "--max-bad", "0.1"), cwd=tmp_path / "copy")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: 1 unreadable")
    assert json.loads((output / "summary.json").read_text())["videos"] == 6
    broken.write_bytes((folder / "video 1.mp4").read_bytes())
    read, _ = evaluated(tmp_path / "copy", output, monkeypatch)
    assert read == [2]
    assert json.loads((output / "summary.json").read_text())["videos"] == 7
    assert not (output / "unfinished").exists()


def test_unreadable_videos_do_not_raise(folder, tmp_path):
    result = tpn.evaluate(folder / "model", folder / "list.txt", views="1x1")
    assert [os.path.basename(path) for path in result.failed] == ["video 2.mp4"]
    assert result.unreadable_share == pytest.approx(1 / 7)
    (tmp_path / "bad.txt").write_text(f"{folder / 'video 2.mp4'} 0\n")
    with pytest.raises(ValueError, match="all 1 videos are unreadable.*not a video"):
        tpn.evaluate(folder / "model", tmp_path / "bad.txt")


def test_half_precision(folder, tmp_path):
    probs = []
    for precision in ("float32", "bfloat16"):
        evaluate(folder, tmp_path / precision, "--views", "1x1", "--precision", precision, "--dump", tmp_path / "d.npz")
        probs.append(np.load(tmp_path / "d.npz")["probs"])
    assert not np.array_equal(*probs)
    np.testing.assert_allclose(*probs, atol=0.02)


def test_checkpoint(folder, tmp_path):
    """The weights of a file, in the network of a name."""
    other = tpn.create_model("tpn_slowonly_tiny_motion", pretrained=True)
    tpn.save_pretrained(other, tmp_path)
    file = str(tmp_path / "model.safetensors")
    results = [
        tpn.evaluate("tpn_slowonly_tiny_motion", folder / "list.txt", views="1x1", checkpoint=checkpoint).probs
        for checkpoint in (None, file)
    ]
    assert np.array_equal(*results)
    with pytest.raises(ValueError, match="checkpoint.*model"):
        tpn.evaluate(other, folder / "list.txt", checkpoint=file)


def test_frames(folder, tmp_path):
    """Extracted frames give the probabilities of the video."""
    frames = read_frames(folder / "video 0.mp4", range(50))
    (tmp_path / "v").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / "v" / f"{i + 1:03d}.png")
    (tmp_path / "frames.txt").write_text("v 50 0\n")
    (tmp_path / "videos.txt").write_text("video 0.mp4 0\n")
    from_frames = tpn.evaluate(folder / "model", tmp_path / "frames.txt", frames="{:03d}.png")
    from_video = tpn.evaluate(folder / "model", tmp_path / "videos.txt", root=folder)
    assert np.array_equal(from_frames.probs, from_video.probs)
    slower = tpn.evaluate(folder / "model", tmp_path / "videos.txt", root=folder, target_fps=12)
    assert not np.array_equal(slower.probs, from_video.probs)


def test_frame_interval(folder, tmp_path):
    """Of a video at twice the speed, half the interval reads the same frames."""
    for i, frame in enumerate(read_frames(folder / "video 0.mp4", range(31))):
        for name, step in (("normal", 1), ("fast", 2)):
            if i % step == 0:
                (tmp_path / name).mkdir(exist_ok=True)
                Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i // step + 1:03d}.png")
    (tmp_path / "normal.txt").write_text("normal 31 0\n")
    (tmp_path / "fast.txt").write_text("fast 16 0\n")
    assert tpn.input_spec(folder / "model").frame_interval == 2
    normal = tpn.evaluate(folder / "model", tmp_path / "normal.txt", frames="{:03d}.png")
    fast = tpn.evaluate(folder / "model", tmp_path / "fast.txt", frames="{:03d}.png", frame_interval=1)
    assert np.array_equal(fast.probs, normal.probs)
    assert (normal.frame_interval, fast.frame_interval) == (2, 1)
    options = ["--frames", "{:03d}.png", "--frame-interval", "1", "--output", "out", "--json"]
    done = run("evaluate", folder / "model", "fast.txt", *options, cwd=tmp_path)
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert json.loads(done.stdout)["frame_interval"] == 1
    assert "<dt>Frame interval</dt><dd>1</dd>" in (tmp_path / "out" / "report.html").read_text()


def test_a_frame_interval_is_refused_before_the_download(folder, server, monkeypatch):
    for name, interval, says in (
        (small.TSM, 2, "frame_interval.*8 segments.*got 2"),
        (small.SLOWONLY, 0, "frame_interval.*0"),
        (small.SLOWONLY, 10_001, "frame_interval.*10001"),
    ):
        small.serve(server, name, monkeypatch.setattr)
        with pytest.raises(ValueError, match=says):
            tpn.evaluate(name, folder / "list.txt", frame_interval=interval)
    model = tpn.create_model(small.TSM, base_channels=4)
    with pytest.raises(ValueError, match="frame_interval.*8 segments"):
        tpn.evaluate(model, folder / "list.txt", frame_interval=2)
    assert server.requests == []


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["model", "list.txt", "--views", "3"], 2, "CLIPSxCROPS"),
        (["model", "list.txt", "--dump", "x.csv"], 2, ".json, .pkl, .npz"),
        (["model", "list.txt", "--dump", "none/x.npz"], 1, "error: none: no such folder"),
        (["model", "list.txt", "--device", "warp"], 1, "error: device must be cpu, cuda, cuda:N, mps, or xpu, got 'warp'"),
        (["model", "nowhere.txt"], 1, "error: nowhere.txt: No such file or directory"),
        (["nothing", "list.txt"], 1, "error: unknown model 'nothing'"),
        (["./nothing", "list.txt"], 1, "error: unknown model './nothing'; there is no such folder"),
        ([".", "list.txt"], 1, "error: unknown model '.'"),
        (["tpn_slowonly_tiny_motion", "two.txt"], 1, "error: two.txt: unknown classes: one, two"),
        (["unnamed", "two.txt"], 1, "error: two.txt has 2 classes, but the model has 14"),
    ],
)
def test_errors(folder, args, code, message):
    (folder / "two.txt").write_text("video 0.mp4 one\nvideo 1.mp4 two\n")
    model = tpn.create_model(folder / "model")
    model.labels = None
    tpn.save_pretrained(model, folder / "unnamed")
    done = run("evaluate", *args, cwd=folder)
    assert done.returncode == code
    assert message in " ".join(done.stderr.split())
    assert code == 2 or len(done.stderr.splitlines()) == 1


def test_a_model_without_class_names_is_reported(folder, tmp_path, caplog):
    model = tpn.create_model(folder / "model")
    rows = [f"{folder}/video 0.mp4,{name}\n" for name in model.labels]
    (tmp_path / "names.csv").write_text("path,label\n" + "".join(rows))
    (tmp_path / "numbers.txt").write_text("".join(f"{folder}/video 0.mp4 {number}\n" for number in range(len(rows))))
    for labels, data, reported in ((model.labels, "names.csv", 0), (None, "numbers.txt", 0), (None, "names.csv", 1)):
        caplog.clear()
        model.labels = labels
        tpn.evaluate(model, tmp_path / data, views="1x1")
        assert ["names.csv" in record.getMessage() for record in caplog.records] == [True] * reported


def test_bad_arguments(folder):
    for model, options, error, says in (
        (torch.nn.Linear(1, 1), {}, TypeError, "model.*Linear"),
        (3, {}, TypeError, "model.*int"),
        (folder / "model", {"workers": 0}, ValueError, "workers.*0"),
        (folder / "model", {"views": "1x2"}, ValueError, "views.*1x2"),
        (folder / "model", {"target_fps": 0}, ValueError, "target_fps.*0"),
    ):
        with pytest.raises(error, match=says):
            tpn.evaluate(model, folder / "list.txt", **options)
