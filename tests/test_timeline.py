"""`tpn timeline` with files, pipes, and cameras."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from servers import ROOT
from terminal import run_in_terminal, screen
from test_cli import run
from two_motions import FPS, NAME, SPAN, numbers, raw
from videos import write_video as write_numbered

import tpn
from tpn import predict, tempo
from tpn.cli import drawing, follow
from tpn.video import live, motion

pytestmark = pytest.mark.usefixtures("one_thread")
PIPE = ("-", "--size", "112x112", "--fps", FPS, "--json", "a.json")
OF_TINY = ("--model", NAME, "--device", "cpu")


def command_line(*args, cwd):
    return run("timeline", *args, *OF_TINY, cwd=cwd)


def set_stdin(monkeypatch, read):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=read)))


def read_document(folder):
    return json.loads((folder / "a.json").read_text())


def check_document(document, classifier, clips, stride):
    assert document["model"] == NAME
    assert (document["fps"], document["stride"], document["clip_span"]) == (FPS, stride, SPAN)
    assert document["labels"] == list(classifier.labels)
    assert [(entry["first"], entry["last"]) for entry in document["clips"]] == numbers(clips)
    for entry, clip in zip(document["clips"], clips, strict=True):
        assert entry["time"] == pytest.approx((clip.first + clip.last) / 2 / FPS, abs=1e-4)
        np.testing.assert_allclose(entry["probs"], clip.probs, atol=1e-6)


def test_file(classifier, motions, tmp_path):
    done = command_line(motions / "both.mp4", "--stride", 16, "--json", "a.json", "--output", "a.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "wrote a.json\nwrote a.png\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]
    document = read_document(tmp_path)
    clips = list(tempo.slide(classifier, motions / "both.mp4", stride=16))
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


def test_standard_input_and_an_array_give_the_same(classifier, motions, tmp_path, monkeypatch):
    frames = np.load(motions / "frames.npy")
    set_stdin(monkeypatch, io.BytesIO(raw(frames)).read)
    done = command_line(*PIPE, "--stride", 16, "--min-probability", 0.99, "--top", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = read_document(tmp_path)
    check_document(document, classifier, list(tempo.slide(classifier, frames, stride=16)), 16)
    assert {s["label"] for s in document["segments"] if s["probability"] < 0.99} == {None}
    assert {line.split("  ")[1] for line in done.stdout.splitlines()} == {s["label"] or "-" for s in document["segments"]}
    assert (tmp_path / "tpn-timeline.png").exists()


def test_without_matplotlib(motions, tmp_path, monkeypatch):
    """The plot is left out, unless it was asked for."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    missing = 'matplotlib missing: pip install "tpn[viz]"\n'
    done = command_line(motions / "both.mp4", "--stride", 30, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, f"no picture: {missing}")
    done = command_line(motions / "both.mp4", "--output", "plot.png", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, f"error: {missing}")
    assert not list(tmp_path.iterdir())


def test_a_stride_that_skips_frames_is_reported(motions, tmp_path):
    for stride, note in ((SPAN, ""), (SPAN + 1, "--stride 32 is longer than a clip of 31 frames")):
        done = command_line(motions / "both.mp4", "--stride", stride, cwd=tmp_path)
        assert (done.returncode, done.stderr.startswith(note or "wrote")) == (0, True), done.stderr


def test_pictures_are_spaced_evenly_and_few():
    strip = drawing.Strip()
    frames = (torch.full((3, 4, 4), i % 256, dtype=torch.uint8) for i in range(3000))
    for i, frame in enumerate(strip.watch(frames)):
        assert int(frame[0, 0, 0]) == i % 256
        assert len(strip._kept) <= drawing.MAX_KEPT
    found = strip.pictures()
    assert len(found) == drawing.NUM_PICTURES
    assert list(found) == pytest.approx([150 + 300 * i for i in range(10)], abs=64)
    assert all(int(picture[0, 0, 0]) == i % 256 for i, picture in found.items())
    short = drawing.Strip()
    assert len(list(short.watch(iter(torch.zeros(3, 3, 4, 4, dtype=torch.uint8))))) == 3
    assert list(short.pictures()) == [0, 1, 2]


def test_clips_before_an_error_are_written(motions, tmp_path, monkeypatch):
    frames = np.load(motions / "frames.npy")
    set_stdin(monkeypatch, io.BytesIO(raw(frames[:60])[:-5]).read)
    done = command_line(*PIPE, "--stride", 16, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[:2] == ["wrote a.json", "wrote tpn-timeline.png"]
    (error,) = done.stderr.splitlines()[2:]
    assert error.startswith("error: the pipe: ends within frame 59")
    document = read_document(tmp_path)
    assert [entry["first"] for entry in document["clips"]] == [0, 16]
    assert f"error: {document['error']}" == error
    assert len(document["segments"]) == 1


def test_an_error_before_the_first_clip_writes_nothing(tmp_path, monkeypatch):
    set_stdin(monkeypatch, io.BytesIO().read)
    done = command_line(*PIPE, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: the pipe: no frames received\n")
    assert not list(tmp_path.iterdir())


def test_live_frames_do_not_wait_for_a_batch(motions, tmp_path, monkeypatch):
    asked = []

    def refuse(*args, batch_size, **kwargs):
        asked.append(batch_size)
        raise ValueError("enough")

    monkeypatch.setattr(predict, "VideoClassifier", refuse)
    for args in ((motions / "both.mp4",), ("-", "--size", "4x4", "--fps", 24), ("--camera", 0)):
        assert command_line(*args, cwd=tmp_path).stderr == "error: enough\n"
    assert asked == [None, 1, 1]


@pytest.mark.parametrize(("num_frames", "num_clips"), [(50, 2), (20, 0)])
def test_interrupt_while_waiting_for_a_frame(motions, tmp_path, monkeypatch, num_frames, num_clips):
    frames = io.BytesIO(raw(np.load(motions / "frames.npy")[:num_frames]))

    def read(size):
        if not (data := frames.read(size)):
            signal.raise_signal(signal.SIGINT)
            pytest.fail("Ctrl-C did not stop the wait")
        return data

    set_stdin(monkeypatch, read)
    before = signal.getsignal(signal.SIGINT)
    done = command_line(*PIPE, "--stride", 16, cwd=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert done.returncode == 0, done.stderr
    document = read_document(tmp_path)
    assert [entry["first"] for entry in document["clips"]] == [0, 16][:num_clips]
    assert document["error"] is None
    assert len(document["segments"]) == done.stdout.count("\n") == (num_clips > 0)
    assert (tmp_path / "tpn-timeline.png").exists() == (num_clips > 0)
    if num_clips == 0:
        assert re.fullmatch(r"wrote a\.json\nstopped before the first clip of 31 frames .*\n", done.stderr)


def test_interrupt_while_writing_a_clip(motions, tmp_path, monkeypatch):
    """Of a pipe, the clip is kept; of a file, nothing is."""
    add = follow._JsonWriter.add_clip
    monkeypatch.setattr(follow._JsonWriter, "add_clip", lambda *args: (signal.raise_signal(signal.SIGINT), add(*args)))
    done = command_line(motions / "both.mp4", "--json", "a.json", cwd=tmp_path)
    assert done.returncode == 130
    assert not list(tmp_path.iterdir())
    set_stdin(monkeypatch, io.BytesIO(raw(np.load(motions / "frames.npy")[:50])).read)
    done = command_line(*PIPE, "--stride", 16, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = read_document(tmp_path)
    assert ([entry["first"] for entry in document["clips"]], document["error"]) == ([0], None)
    assert (tmp_path / "tpn-timeline.png").exists()


def test_interrupted_camera_that_hangs(motions, tmp_path, monkeypatch):
    frames, seen, gone = torch.from_numpy(np.load(motions / "frames.npy")), threading.Event(), threading.Event()

    class Hanging:
        fps = FPS

        def __init__(self, device, *, size, fps):
            assert (device, size, fps) == ("7", (112, 112), None)

        def __iter__(self):
            yield from frames[:40]
            assert seen.wait(20)
            os.kill(os.getpid(), signal.SIGINT)
            gone.wait(20)

    add = follow._JsonWriter.add_clip
    monkeypatch.setattr(follow._JsonWriter, "add_clip", lambda *args: (add(*args), seen.set()))
    monkeypatch.setattr(live, "Camera", Hanging)
    done = command_line("--camera", "7", "--size", "112x112", "--stride", 100, "--json", "a.json", cwd=tmp_path)
    (reader,) = (thread for thread in threading.enumerate() if thread.name == "tpn-live")
    assert reader.daemon  # a daemon does not keep the process alive
    gone.set()
    assert done.returncode == 0, done.stderr
    document = read_document(tmp_path)
    assert (document["source"], [entry["first"] for entry in document["clips"]]) == ("7", [0])
    assert (tmp_path / "tpn-timeline.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["camera", "pipe"])
def test_interrupt_of_the_real_program(motions, tmp_path, source):
    """FFmpeg simulates an endless camera in real time. The pipe stays open without new frames."""
    camera = f"movie={motions / 'both.mp4'}:loop=0,setpts=N/FRAME_RATE/TB,realtime=speed=3"
    arguments = [*PIPE, "--stride", "20"] if source == "pipe" else ["--camera", camera, "--json", "a.json"]
    program = f"""
import sys
from tpn import cli
from tpn.video import live
live.FORMATS[sys.platform] = "lavfi"
sys.argv = {["tpn", "timeline", *map(str, arguments), *OF_TINY, "--min-probability", "0"]}
cli.main()
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=env, **streams)
    if source == "pipe":
        process.stdin.write(raw(np.load(motions / "frames.npy")))
        process.stdin.flush()
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    code = process.wait(60)  # standard input is still open
    output, messages = (text.decode() for text in process.communicate())
    assert code == 0, messages
    assert messages.splitlines()[-2:] == ["wrote a.json", "wrote tpn-timeline.png"]
    document = read_document(tmp_path)
    assert len(document["clips"]) >= 2
    assert (first.decode() + output).splitlines() == [
        f"{s['start']:.1f} s – {s['end']:.1f} s  {s['label']}  {s['probability']:.1%}" for s in document["segments"]
    ]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "VIDEO, - for standard input, or --camera"),
        (["a.mp4", "--camera", "0"], 2, "VIDEO, - for standard input, or --camera"),
        (["-", "--fps", "24"], 2, "--size WIDTHxHEIGHT and --fps"),
        (["-", "--fps", "24", "--size", "640"], 2, "'640'"),
        (["both.mp4", "--fps", "inf"], 2, "got inf"),
        (["a.mp4", "--size", "4x4"], 2, "--size"),
        (["a.mp4", "--output", "picture"], 2, "'picture'"),
        (["missing.mp4"], 1, "missing.mp4: No such file"),
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


def test_models_of_segments_need_an_interval(motions, tmp_path):
    tpn.save_pretrained(tpn.create_model("tpn_tsm_r50_sthv1", base_channels=4), tmp_path / "model")
    model = ("timeline", motions / "both.mp4", "--model", "local-dir:model", "--device", "cpu")
    done = run(*model, cwd=tmp_path)
    assert done.returncode == 1
    assert "pass frame_interval (tpn timeline --frame-interval)" in done.stderr
    done = run(*model, "--frame-interval", 4, "--stride", 40, "--json", "a.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = read_document(tmp_path)
    assert (document["clip_span"], [entry["last"] for entry in document["clips"]]) == (29, [28, 68, 108])


def test_curves_keep_no_tensors():
    """Small tensors, kept between the model's large ones, fragment the memory, and it grows with the video."""
    curves, probs = drawing.Curves(("a", "b"), 1.0), torch.tensor([0.25, 0.75])
    kept = weakref.ref(probs)
    curves.add(tempo.Clip(0, 15, probs))
    del probs
    assert kept() is None
    assert [(clip.first, clip.last, clip.probs.tolist()) for clip in curves.clips] == [(0, 15, [0.25, 0.75])]


def test_a_long_timeline_is_drawn_with_few_points(monkeypatch, tmp_path):
    monkeypatch.setattr(drawing, "MAX_POINTS", 8)
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(3), size=50).astype(np.float32)
    curves = drawing.Curves(("a", "b", "c"), 1.0)
    for i, row in enumerate(probs):
        curves.add(tempo.Clip(i, i, torch.from_numpy(row)))
    times, means = tempo.curves(curves.clips, fps=1.0)
    # 50 clips: 6 points of 8 clips, and one of the last 2
    np.testing.assert_allclose(times, [3.5, 11.5, 19.5, 27.5, 35.5, 43.5, 48.5])
    np.testing.assert_allclose(means[:6], probs[:48].reshape(6, 8, 3).mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(means[6], probs[48:].mean(axis=0), atol=1e-6)
    assert (curves.num_clips, curves.duration) == (50, 50.0)
    drawing.draw([("", curves)], 2, tmp_path / "a.png", min_probability=0.5)
    assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.fixture
def figures(monkeypatch):
    """The figures that are written, in a list."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs)))
    return figures


def test_bars_have_the_names_that_fit(figures, tmp_path):
    curves = drawing.Curves(("short", "wide", "a name that is much too long for its bar"), 1.0)
    for i in range(40):
        curves.add(tempo.Clip(i, i, torch.eye(3)[0 if i < 10 else 2 if i == 25 else 1]))
    drawing.draw([("", curves)], 3, tmp_path / "a.png", min_probability=0.5)
    names = [(text.get_text(), text.get_visible()) for text in figures[0].axes[1].texts]
    assert names == [("short", True), ("wide", True), (curves.labels[2], False), ("wide", True)]


def test_a_class_has_one_color_in_all_panels(figures, tmp_path):
    panels = []
    for i, probs in enumerate([(0.7, 0.2, 0.1), (0.1, 0.3, 0.6)]):
        curves = drawing.Curves(("a", "b", "c"), 1.0)
        curves.add(tempo.Clip(0, 15, torch.tensor(probs)))
        panels.append((f"track {i}", curves))
    drawing.draw(panels, 2, tmp_path / "a.png", min_probability=0.5)
    first, second = ({line.get_label(): line.get_color() for line in axes.lines} for axes in figures[0].axes[::2])
    assert (first.keys(), second.keys()) == ({"a", "b"}, {"b", "c"})
    assert first["b"] == second["b"]
    assert len({*first.values(), *second.values()}) == 3


@pytest.mark.slow
def test_segments_are_printed_above_the_progress_bar(motions, tmp_path):
    _, _, text = run_in_terminal("timeline", motions / "both.mp4", *OF_TINY, "--stride", 16, "--min-probability", 0, cwd=tmp_path)
    assert "\x1b[2K" in text
    *segments, wrote = [line for line in screen(text) if line]
    assert wrote == "wrote tpn-timeline.png"
    assert len(segments) >= 2
    assert all(re.fullmatch(r"\d+\.\d s – \d+\.\d s  [a-z -]+  \d+\.\d%", line) for line in segments)
