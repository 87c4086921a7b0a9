"""`tpn timeline` with files, pipes, and cameras."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import two_motions
from PIL import Image
from scripts import example
from terminal import run_in_terminal, screen
from test_cli import run
from two_motions import FPS, NAME, SPAN, numbers, raw
from videos import write_video as write_numbered

import tpn
from tpn import demo, predict, tempo
from tpn.cli import timeline
from tpn.video import live, motion

ROOT = Path(__file__).parents[1]
OF_TINY = ("--model", NAME, "--device", "cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    yield from two_motions.one_thread()


@pytest.fixture(scope="module")
def classifier():
    return two_motions.classifier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return two_motions.write(tmp_path_factory.mktemp("both"))


def command_line(*args, cwd):
    return run("timeline", *args, *OF_TINY, cwd=cwd)


def check_document(document, classifier, clips, stride):
    assert document["model"] == NAME
    assert (document["fps"], document["stride"], document["clip_span"]) == (FPS, stride, SPAN)
    assert document["labels"] == list(classifier.labels)
    assert [(entry["first"], entry["last"]) for entry in document["clips"]] == numbers(clips)
    for entry, clip in zip(document["clips"], clips, strict=True):
        assert entry["time"] == pytest.approx((clip.first + clip.last) / 2 / FPS, abs=1e-4)
        np.testing.assert_allclose(entry["probs"], clip.probs, atol=1e-6)


def test_file(classifier, folder, tmp_path):
    done = command_line(folder / "both.mp4", "--stride", 16, "--json", "a.json", "--output", "a.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "wrote a.json\nwrote a.png\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]
    document = json.loads((tmp_path / "a.json").read_text())
    clips = list(tempo.slide(classifier, folder / "both.mp4", stride=16))
    check_document(document, classifier, clips, 16)
    found = list(tempo.segments(clips, fps=FPS))
    assert len(found) >= 2
    assert done.stdout.splitlines() == [
        f"{s.start:.1f} s – {s.end:.1f} s  {motion.CLASSES[s.label]}  {s.probability:.1%}" for s in found
    ]
    assert [s["label"] for s in document["segments"]] == [motion.CLASSES[s.label] for s in found]
    assert [s["end"] for s in document["segments"]] == pytest.approx([s.end for s in found], abs=1e-4)
    assert document["error"] is None
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 400


def test_standard_input_and_an_array_give_the_same(classifier, folder, tmp_path, monkeypatch):
    frames = np.load(folder / "frames.npy")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw(frames))))
    options = ("--size", "112x112", "--fps", FPS, "--stride", 16, "--json", "a.json")
    done = command_line("-", *options, "--threshold", 0.99, "--top", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "a.json").read_text())
    check_document(document, classifier, list(tempo.slide(classifier, frames, stride=16)), 16)
    assert all(s["probability"] >= 0.99 for s in document["segments"])
    assert (tmp_path / "tpn-timeline.png").exists()


def test_without_matplotlib(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "has_matplotlib", lambda: False)
    done = command_line(folder / "both.mp4", "--stride", 100, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, 'no picture without matplotlib: pip install "tpn[viz]"\n')
    assert not list(tmp_path.iterdir())


def test_clips_before_an_error_are_written(folder, tmp_path, monkeypatch):
    frames = np.load(folder / "frames.npy")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw(frames[:60])[:-5])))
    options = ("--size", "112x112", "--fps", FPS, "--stride", 16, "--json", "a.json")
    done = command_line("-", *options, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[:2] == ["wrote a.json", "wrote tpn-timeline.png"]
    (error,) = done.stderr.splitlines()[2:]
    assert error.startswith("error: the pipe: ends within frame 59")
    document = json.loads((tmp_path / "a.json").read_text())
    assert [entry["first"] for entry in document["clips"]] == [0, 16]
    assert f"error: {document['error']}" == error
    assert len(document["segments"]) == 1


def test_an_error_before_the_first_clip_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    done = command_line("-", "--size", "4x4", "--fps", 24, "--json", "a.json", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: the pipe: no frames received\n")
    assert not list(tmp_path.iterdir())


def test_live_frames_do_not_wait_for_a_batch(folder, tmp_path, monkeypatch):
    asked = []

    def refuse(*args, batch_size, **kwargs):
        asked.append(batch_size)
        raise ValueError("enough")

    monkeypatch.setattr(predict, "VideoClassifier", refuse)
    for args in ((folder / "both.mp4",), ("-", "--size", "4x4", "--fps", 24), ("--camera", 0)):
        assert command_line(*args, cwd=tmp_path).stderr == "error: enough\n"
    assert asked == [None, 1, 1]


@pytest.mark.parametrize("while_writing", [False, True])
def test_interrupted_pipe(folder, tmp_path, monkeypatch, while_writing):
    """Ctrl-C while waiting for a frame that never arrives, and while writing a clip."""
    frames = io.BytesIO(raw(np.load(folder / "frames.npy")[:50]))

    def read(size):
        if not while_writing and not (data := frames.read(size)):
            signal.raise_signal(signal.SIGINT)
            pytest.fail("Ctrl-C did not stop the wait")
        return frames.read(size) if while_writing else data

    add = timeline._JsonWriter.add_clip

    def interrupted(document, clip, time):
        if while_writing:
            signal.raise_signal(signal.SIGINT)
        add(document, clip, time)

    monkeypatch.setattr(timeline._JsonWriter, "add_clip", interrupted)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=read)))
    before = signal.getsignal(signal.SIGINT)
    done = command_line("-", "--size", "112x112", "--fps", FPS, "--stride", 16, "--json", "a.json", cwd=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "a.json").read_text())
    assert [entry["first"] for entry in document["clips"]] == [0] if while_writing else [0, 16]
    assert document["error"] is None
    assert len(document["segments"]) == done.stdout.count("\n") == 1
    assert (tmp_path / "tpn-timeline.png").exists()


def test_interrupted_camera_that_hangs(folder, tmp_path, monkeypatch):
    frames, seen, gone = torch.from_numpy(np.load(folder / "frames.npy")), threading.Event(), threading.Event()

    class Hanging:
        fps = FPS

        def __init__(self, device, *, size, fps):
            assert (device, size, fps) == ("7", (112, 112), None)

        def __iter__(self):
            yield from frames[:40]
            assert seen.wait(20)
            os.kill(os.getpid(), signal.SIGINT)
            gone.wait(20)

    add = timeline._JsonWriter.add_clip
    monkeypatch.setattr(timeline._JsonWriter, "add_clip", lambda *args: (add(*args), seen.set()))
    monkeypatch.setattr(live, "Camera", Hanging)
    done = command_line("--camera", "7", "--size", "112x112", "--stride", 100, "--json", "a.json", cwd=tmp_path)
    (reader,) = (thread for thread in threading.enumerate() if thread.name == "tpn-live")
    assert reader.daemon  # a daemon does not keep the process alive
    gone.set()
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "a.json").read_text())
    assert (document["source"], [entry["first"] for entry in document["clips"]]) == ("7", [0])
    assert (tmp_path / "tpn-timeline.png").exists()


def test_interrupted_before_the_first_clip(folder, tmp_path, monkeypatch):
    frames = io.BytesIO(raw(np.load(folder / "frames.npy")[:20]))
    read = lambda size: frames.read(size) or signal.raise_signal(signal.SIGINT)  # noqa: E731
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=read)))
    done = command_line("-", "--size", "112x112", "--fps", FPS, "--json", "a.json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert re.fullmatch(r"wrote a\.json\nstopped before the first clip of 31 frames .*\n", done.stderr)
    document = json.loads((tmp_path / "a.json").read_text())
    assert (document["clips"], document["segments"]) == ([], [])


def test_an_interrupted_file_writes_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(timeline._JsonWriter, "add_clip", lambda *args: signal.raise_signal(signal.SIGINT))
    done = command_line(folder / "both.mp4", "--json", "a.json", cwd=tmp_path)
    assert done.returncode == 130
    assert not list(tmp_path.iterdir())


def start_live(script, *args, cwd, **kwargs):
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    arguments = ["tpn", "timeline", *map(str, args), *OF_TINY, "--threshold", "0", "--json", "a.json"]
    script = f"import sys\nsys.argv = {arguments}\n{script}\nfrom tpn import cli\ncli.main()"
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs
    )


def interrupt(process):
    """Send Ctrl-C after the first segment. Return standard output and error."""
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, complaints = process.communicate(timeout=60)
    assert process.returncode == 0, complaints
    return (first + out).decode(), complaints.decode()


@pytest.mark.slow
def test_interrupted_camera(folder, tmp_path):
    """The real program with a camera that FFmpeg simulates, endless and in real time."""
    camera = f"movie={folder / 'both.mp4'}:loop=0,setpts=N/FRAME_RATE/TB,realtime=speed=3"
    script = "from tpn.video import live\nlive.FORMATS[sys.platform] = 'lavfi'"
    output, messages = interrupt(start_live(script, "--camera", camera, cwd=tmp_path))
    assert messages.splitlines()[-2:] == ["wrote a.json", "wrote tpn-timeline.png"]
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["source"] == camera
    assert len(document["clips"]) >= 2
    assert output.splitlines() == [
        f"{s['start']:.1f} s – {s['end']:.1f} s  {s['label']}  {s['probability']:.1%}" for s in document["segments"]
    ]
    assert (tmp_path / "tpn-timeline.png").exists()


@pytest.mark.slow
def test_interrupted_standard_input(folder, tmp_path):
    """The real program with a pipe that stays open without new frames."""
    process = start_live("", "-", "--size", "112x112", "--fps", FPS, "--stride", 20, cwd=tmp_path, stdin=subprocess.PIPE)
    process.stdin.write(raw(np.load(folder / "frames.npy")))
    process.stdin.flush()
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0, process.stderr.read()
    process.stdin.close()
    document = json.loads((tmp_path / "a.json").read_text())
    assert 2 <= len(document["clips"]) <= 5
    assert document["segments"][0]["label"] in first.decode()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "VIDEO, - for standard input, or --camera"),
        (["a.mp4", "--camera", "0"], 2, "VIDEO, - for standard input, or --camera"),
        (["-", "--fps", "24"], 2, "--size WIDTHxHEIGHT and --fps"),
        (["-", "--fps", "24", "--size", "640"], 2, "'640'"),
        (["-", "--fps", "0", "--size", "4x4"], 2, "got 0.0"),
        (["both.mp4", "--fps", "inf"], 2, "got inf"),
        (["a.mp4", "--size", "4x4"], 2, "--size"),
        (["a.mp4", "--output", "picture"], 2, "'picture'"),
        (["a.mp4", "--output", "nowhere/a.png"], 1, "nowhere: no such folder"),
        (["missing.mp4"], 1, "missing.mp4: No such file"),
        (["missing.mp4", "--json", "nowhere/a.json"], 1, "missing.mp4: No such file"),
        (["text.mp4"], 1, "error: text.mp4: not a video"),
        (["--camera", "/dev/null/9"], 1, "cannot open this camera"),
        (["a.mp4", "--json", "nowhere/a.json"], 1, "nowhere: no such folder"),
    ],
)
def test_errors_are_one_line(tmp_path, args, code, message):
    (tmp_path / "text.mp4").write_text("no video\n" * 50)
    write_numbered(tmp_path / "a.mp4", num_frames=3)
    done = command_line(*args, cwd=tmp_path)
    assert done.returncode == code
    assert message in " ".join(done.stderr.replace("│", "").split())
    assert not done.stdout
    if code == 1:
        assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "text.mp4"]


def test_models_of_segments_need_an_interval(folder, tmp_path):
    tpn.save_pretrained(tpn.create_model("tpn_tsm_r50_sthv1", base_channels=4), tmp_path / "model")
    video = str(folder / "both.mp4")
    done = run("timeline", video, "--model", "local-dir:model", cwd=tmp_path)
    assert done.returncode == 1
    assert "pass frame_interval (--frame-interval)" in done.stderr
    options = ("--frame-interval", 4, "--stride", 40, "--json", "a.json", "--device", "cpu")
    done = run("timeline", video, "--model", "local-dir:model", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "a.json").read_text())
    assert (document["clip_span"], [entry["last"] for entry in document["clips"]]) == (29, [28, 68, 108])


def test_a_long_timeline_is_drawn_with_few_points(monkeypatch, tmp_path):
    monkeypatch.setattr(timeline, "MAX_POINTS", 8)
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(3), size=50).astype(np.float32)
    curves = timeline._Curves(("a", "b", "c"))
    for i, row in enumerate(probs):
        curves.add(float(i), row, i + 1.0)
    times, means = curves.means()
    # 50 clips: 6 points of 8 clips, and one of the last 2
    np.testing.assert_allclose(times, [3.5, 11.5, 19.5, 27.5, 35.5, 43.5, 48.5])
    np.testing.assert_allclose(means[:6], probs[:48].reshape(6, 8, 3).mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(means[6], probs[48:].mean(axis=0), atol=1e-6)
    assert (curves.num_clips, curves.duration) == (50, 50.0)
    timeline._draw(curves, 2, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_segments_are_printed_above_the_progress_bar(folder, tmp_path):
    _, _, text = run_in_terminal("timeline", folder / "both.mp4", *OF_TINY, "--stride", 16, "--threshold", 0, cwd=tmp_path)
    assert "\x1b[2K" in text
    *segments, wrote = [line for line in screen(text) if line]
    assert wrote == "wrote tpn-timeline.png"
    assert len(segments) >= 2
    assert all(re.fullmatch(r"\d+\.\d s – \d+\.\d s  [a-z -]+  \d+\.\d%", line) for line in segments)


def test_example(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["timeline.py", str(folder / "both.mp4"), "--model", NAME, "--stride", "16"])
    example("timeline").main()
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.strip().startswith("0.0 s – ")
    assert "turning clockwise" in first
    assert "blinking" in last
