"""`examples/classify_many.py`, while processes of its Ray instance are killed. Requires `pip install ".[ray]"`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from scripts import ROOT, call_example, example, run_example

import tpn
from tpn.video.decode import VideoError
from tpn.video.motion import write_dataset

pytest.importorskip("ray", reason='pip install ".[ray]"')
pq = pytest.importorskip("pyarrow.parquet", reason='pip install ".[ray]"')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc to find processes"),
]

SCRIPT = ROOT / "examples" / "classify_many.py"
OPTIONS = ["--model", "tpn_slowonly_tiny_motion", "--device", "cpu", "--precision", "float32", "--workers", "2", "--models", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with 60 videos, three unreadable ones, and a list of all of them in reversed order."""
    folder = tmp_path_factory.mktemp("many")
    write_dataset(folder / "videos", 5, seed=3)
    paths = sorted(folder.rglob("*.mp4"))[:60]
    (folder / "videos" / "empty.mp4").touch()
    (folder / "videos" / "text.mp4").write_text("no video\n" * 50)
    paths[30:30] = [folder / "videos" / name for name in ("empty.mp4", "missing.mp4", "text.mp4")]
    lines = "".join(f"{path.relative_to(folder)}\n" for path in paths[::-1])
    (folder / "list.txt").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    """Return the results of `predict_each`."""
    classify = tpn.VideoClassifier("tpn_slowonly_tiny_motion", pretrained=True)
    paths = [folder / line for line in (folder / "list.txt").read_text().splitlines()]
    return list(zip(paths, classify.predict_each(paths), strict=True))


def test_one_path_is_not_several():
    classify = tpn.VideoClassifier("tpn_slowonly_tiny_motion", pretrained=True)
    for path in ("video.mp4", Path("video.mp4")):
        with pytest.raises(TypeError, match=r"\['video.mp4'\]"):
            list(classify.predict_each(path))


class Run:
    """The script and the processes that Ray starts for it."""

    def __init__(self, *args, script=SCRIPT):
        self.mark = f"TPN_TEST_RUN={uuid.uuid4().hex}".encode()
        name, value = self.mark.decode().split("=")
        env = os.environ | {name: value, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(script), *map(str, args), *OPTIONS]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def processes(self, name=b""):
        """Return the ids of the running processes whose command line contains `name`."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdecimal() and self.mark in (folder / "environ").read_bytes().split(b"\0"):
                    line = (folder / "cmdline").read_bytes()
                    if line and name in line:
                        found.append(int(folder.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or belongs to another user
                continue
        return found

    def wait_for(self, what, seconds=120):
        end = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < end, "timeout"
            time.sleep(0.05)
        return found

    def finish(self):
        """Wait for success; return what the script printed."""
        printed, _ = self.process.communicate(timeout=240)
        assert self.process.returncode == 0, printed
        return printed


def assert_complete(output, expected, shard_size):
    shards = sorted(output.glob("shard-*.parquet"))
    assert len(shards) == -(-len(expected) // shard_size)
    labels = json.loads(pq.read_schema(shards[0]).metadata[b"labels"])
    rows = pq.read_table(output).to_pylist()
    assert [row["index"] for row in rows] == list(range(len(expected)))
    for row, (path, result) in zip(rows, expected, strict=True):
        assert row["path"] == str(path)
        if isinstance(result, Exception):
            assert row["error"] == str(result)
            assert row["label"] is row["probs"] is None
            continue
        assert row["error"] is None
        assert row["probs"] == pytest.approx(result.probs.tolist(), abs=1e-5)
        assert (row["label"], row["probability"]) == (result.top(1)[0][0], max(row["probs"]))
        assert tuple(labels) == result.labels


def test_killed_processes(folder, expected, tmp_path):
    """A killed run resumes, a killed process is replaced, and a video that kills its reader at every attempt is a bad file."""
    out, killer = tmp_path / "out", expected[50][0]
    source = SCRIPT.read_text()
    place = "    try:\n        frames, clips = decode.sample_frames"
    assert source.count(place) == 1
    script = tmp_path / "changed.py"
    script.write_text(source.replace(place, f"    if path == {str(killer)!r}:\n        os.kill(os.getpid(), 9)\n{place}"))
    options = [_parquet(tmp_path, expected), "--column", "file", "--output", out, "--shard-size", 5]
    run = Run(*options, script=script)
    run.wait_for(lambda: len(list(out.glob("shard-*"))) > 2)
    run.process.kill()
    run.process.communicate()
    run.wait_for(lambda: not run.processes(b"ray::Map"), seconds=60)  # Ray's agents take a minute to exit
    done = {path: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    assert 2 < len(done) < 13

    run = Run(*options, script=script)
    run.wait_for(lambda: len(list(out.glob("shard-*"))) > len(done))
    workers = run.processes(b"MapWorker(MapBatches(Classify")
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    printed = run.finish()
    assert f"{5 * len(done)} of 63 videos are finished" in printed
    assert re.search(r"^\d+ videos classified, [1-4] unreadable; results", printed, re.MULTILINE)
    crash = pq.read_table(out).to_pylist()[50]["error"]
    assert crash.endswith("crashed 2 times")
    assert_complete(out, [(path, VideoError(crash) if path == killer else result) for path, result in expected], 5)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    run.wait_for(lambda: not run.processes())
    assert "63 of 63 videos are finished" in Run(*options).finish()

    options[-1] = 6
    other = run_example("classify_many", *options, *OPTIONS, check=False)
    assert (other.returncode, other.stderr.count("\n")) == (1, 1)
    assert re.search("another run.*shard size.*--output", other.stderr)


def _parquet(folder, videos):
    import pyarrow as pa

    path = folder / "names.parquet"
    pq.write_table(pa.table({"number": list(range(len(videos))), "file": [str(path) for path, _ in videos]}), path)
    return path


def test_an_error_in_the_script_stops_the_run(folder, tmp_path):
    source = SCRIPT.read_text()
    place = "            results = self.classify.classify_each("
    assert source.count(place) == 1
    (tmp_path / "changed.py").write_text(source.replace(place, f"            1 / 0\n{place}"))
    run = Run(folder / "videos", "--output", tmp_path / "out", script=tmp_path / "changed.py")
    printed, _ = run.process.communicate(timeout=240)
    assert run.process.returncode == 1
    assert "ZeroDivisionError" in printed
    assert not list((tmp_path / "out").glob("shard-*"))


def test_paths_are_absolute(tmp_path, monkeypatch):
    find = example("classify_many").find_videos
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    (tmp_path / "list.txt").write_text("videos/a.mp4\n")
    monkeypatch.chdir(tmp_path)
    expected = [str(tmp_path / "videos" / "a.mp4")]
    assert find(Path("videos"), None, "path") == find(Path("list.txt"), None, "path") == expected
    assert find(Path("list.txt"), Path("..", tmp_path.name), "path") == expected
    with pytest.raises(ValueError, match="--root.*folder.*videos"):
        find(Path("videos"), tmp_path, "path")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", [], r"list\.txt.*no videos"),
        (None, [], r"list\.txt: No such file or directory"),
        ("v.mp4\n", ["--views", "3"], "views.*CLIPSxCROPS"),
        ("v.mp4\n", ["--model", "tpn_slow"], "'tpn_slow'"),
        ({"file": ["v.mp4"]}, [], "'path'.*--column.*file"),
        ({"path": ["v.mp4", None]}, [], "row 2.*None"),
    ],
)
def test_errors_before_ray_starts(tmp_path, content, options, message):
    import pyarrow as pa

    videos = tmp_path / ("list.parquet" if isinstance(content, dict) else "list.txt")
    if isinstance(content, dict):
        pq.write_table(pa.table(content), videos)
    elif content is not None:
        videos.write_text(content)
    done = call_example("classify_many", videos, "--output", tmp_path / "out", *OPTIONS, *options)
    assert done.returncode == 1
    assert re.fullmatch(rf"error: .*{message}.*\n", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()
