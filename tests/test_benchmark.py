"""The benchmark runs, and says what it measured; nothing here depends on how long it took."""

import importlib.util
import json

import pytest
from scripts import run_example
from videos import write_video

pytestmark = pytest.mark.slow


def test_every_part(tmp_path):
    video = write_video(tmp_path / "v.mp4", 40)
    small = ["--model", "tpn_slowonly_tiny_motion", "--batch-size", 2, "--repeats", 1, "--device", "cpu"]
    done = run_example("benchmark", *small, "--video", video, "--output", tmp_path / "results.json")
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


def test_a_part_that_fails_loses_no_other(tmp_path):
    small = ["--model", "tpn_slowonly_tiny_motion", "--batch-size", 2, "--repeats", 1, "--device", "cpu"]
    parts = ["--only", "latency", "decode", "--video", tmp_path / "none.mp4"]
    done = run_example("benchmark", *small, *parts, "--output", tmp_path / "results.json", check=False)
    assert done.returncode == 1
    assert [title.partition(":")[0] for title in json.loads((tmp_path / "results.json").read_text())["results"]] == ["latency"]


def test_errors():
    done = run_example("benchmark", "--device", "warp", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: cannot use device 'warp': ")
    done = run_example("benchmark", "--against", "torchvision", "--only", "inference", "training", check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("error: --against torchvision compares inference alone\n")
    done = run_example("benchmark", "--against", "mmaction2", "--model", "tpn_tsm_r50_sthv1", check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "error: the reference is built for tpn_slowonly_r50_k400 only, got tpn_tsm_r50_sthv1\n",
    )
    if importlib.util.find_spec("mmaction") is None:
        done = run_example("benchmark", "--against", "mmaction2", check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("error: the reference cannot be imported (No module named 'mmaction'")
        assert 'pip install mmaction2 "mmcv-lite<2.2"' in done.stderr
