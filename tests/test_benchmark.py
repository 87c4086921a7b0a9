"""`examples/benchmarks/`: the scripts run and report what they measured. No test depends on the measured times."""

import importlib.util
import json
import re

import pytest
from scripts import ROOT, call_example, run_example
from videos import write_video

import tpn
from tpn.video import encode, motion

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    """A script finds its neighbors."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")


def test_every_part(tmp_path):
    video = write_video(tmp_path / "v.mp4", 40)
    small = ["--model", "tpn_slowonly_tiny_motion", "--batch-size", 2, "--repeats", 1, "--device", "cpu"]
    done = run_example("benchmarks/speed", *small, "--video", video, "--output", tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["about"]["model"] == "tpn_slowonly_tiny_motion"
    titles = [title.partition(":")[0] for title in content["results"]]
    assert titles == ["inference", "latency", "views", "training step", "memory of a training step", "reading", "end to end"]
    for title, rows in content["results"].items():
        assert title.partition(":")[0] in done.stdout
        assert rows[0]["ratio"] == 1
        assert all(row["ms"] > 0 and row["what"] for row in rows)
    inference = next(iter(content["results"].values()))
    assert all(0 < row["percent_of_floor"] < 110 for row in inference)
    assert all(row["clips_per_s"] * row["ms"] == pytest.approx(2e3) for row in inference)


def test_openvino(tmp_path):
    pytest.importorskip("nncf")
    video = write_video(tmp_path / "v.mp4", 40)
    options = ["--model", "tpn_slowonly_tiny_motion", "--repeats", 1, "--device", "cpu", "--threads", 1, "--against", "openvino"]
    parts = ["--only", "latency", "loading", "end-to-end", "--video", video]
    run_example("benchmarks/speed", *options, *parts, "--output", tmp_path / "results.json")
    latency, loading, end = json.loads((tmp_path / "results.json").read_text())["results"].values()
    files = ["OpenVINO float32", "OpenVINO bfloat16", "OpenVINO int8"]
    assert [row["what"] for row in latency][-3:] == files
    assert all(row["percent_of_floor"] > 0 for row in latency)
    assert [row["what"].partition(":")[0] for row in loading] == ["tpn float32", *files]
    assert loading[3]["file_mb"] < 0.5 * loading[1]["file_mb"]
    assert all(row["memory_gib"] > 0 for row in loading)
    assert [row["what"].removeprefix("predict_each, ") for row in end][-3:] == files
    done = call_example("benchmarks/speed", "--only", "loading")
    assert (done.returncode, "got loading" in done.stderr) == (2, True)


def test_loader(tmp_path):
    video = write_video(tmp_path / "v.mp4", 40)
    (tmp_path / "list.txt").write_text(f"{video} 0\n")
    options = ["--model", "tpn_slowonly_tiny_motion", "--clips", 2, "--repeats", 1]
    done = call_example("benchmarks/loader", tmp_path / "list.txt", *options)
    assert done.stdout.count(" clips/s per process") == 3
    assert done.stdout.splitlines()[1].endswith(" 1.00x")


def test_strided(tmp_path):
    video = write_video(tmp_path / "v.mp4", 40)
    options = ["--models", "tiny", "--window", 16, "--repeats", 1, "--output", tmp_path / "results.json"]
    done = call_example("benchmarks/strided", video, *options)
    ((title, rows),) = json.loads((tmp_path / "results.json").read_text())["results"].items()
    assert title == "tiny: 2 windows of 16 frames, stride 16"
    assert [row["what"] for row in rows] == ["read each clip", "decode once", "tpn"]
    assert float(re.search(r"largest difference.*: (\S+)$", done.stdout, re.MULTILINE)[1]) <= 1e-5


def test_startup(tmp_path):
    done = run_example("benchmarks/startup", "--repeats", 1, "--output", tmp_path / "results.json")
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["what"] for row in rows][0::8] == ["python -c pass", "import torch"]
    assert all(row["what"] in done.stdout and row["ms"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1


def test_results_before_an_error_are_kept(tmp_path):
    small = ["--model", "tpn_slowonly_tiny_motion", "--batch-size", 2, "--repeats", 1, "--device", "cpu"]
    parts = ["--only", "latency", "decode", "--video", tmp_path / "none.mp4"]
    done = call_example("benchmarks/speed", *small, *parts, "--output", tmp_path / "results.json")
    assert done.returncode == 1
    assert [title.partition(":")[0] for title in json.loads((tmp_path / "results.json").read_text())["results"]] == ["latency"]


def test_errors():
    done = call_example("benchmarks/speed", "--device", "warp")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match("error: .*'warp'", done.stderr)
    done = call_example("benchmarks/speed", "--against", "torchvision", "--only", "inference", "training")
    assert done.returncode == 2
    assert re.search("error: .*--against torchvision.*inference", done.stderr)
    done = call_example("benchmarks/speed", "--against", "mmaction2", "--model", "tpn_tsm_r50_sthv1")
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*tpn_slowonly_r50_k400.*got tpn_tsm_r50_sthv1\n", done.stderr)
    if importlib.util.find_spec("mmaction") is None:
        done = call_example("benchmarks/speed", "--against", "mmaction2")
        assert done.returncode == 1
        assert re.match("error: .*No module named 'mmaction'.*pip install mmaction2", done.stderr)


def test_calibration(tmp_path):
    """Every fifth label is wrong: the model is too confident."""
    lines = []
    for i in range(40):
        label = (0, 4, 12)[i % 3]
        encode.write_video(tmp_path / f"{i}.mp4", motion.render(label, tempo=3, seed=i, num_frames=32), fps=motion.FPS)
        lines.append(f"{i}.mp4 {label if i % 5 else 7}\n")
    (tmp_path / "list.txt").write_text("".join(lines))
    done = call_example("benchmarks/calibration", tmp_path / "list.txt", "--folds", 2)
    *folds, mean, _ = [line.split() for line in done.stdout.splitlines() if line.split()[0] in ("0", "1", "mean", "std")]
    assert [len(row) for row in folds] == [9, 9]
    assert float(mean[1]) > 1  # the temperature
    assert float(mean[5]) < float(mean[4])  # the loss
    assert mean[-1] == "100.00"
    assert done.stdout.endswith("40 videos\n")
    for fold in range(2):
        tpn.save_pretrained(tpn.create_model("tpn_slowonly_tiny_motion", pretrained=True), tmp_path / f"fold{fold} model")
        (tmp_path / f"fold{fold}_train.txt").touch()
        (tmp_path / f"fold{fold}_test.txt").write_text("".join(lines[20 * fold : 20 * fold + 20]))
    of_folds = call_example("benchmarks/calibration", tmp_path, "--model", tmp_path / "{fold} model")
    assert of_folds.stdout.splitlines()[-2].split()[0] == "together"
    assert of_folds.stdout.endswith("40 videos\n")
