"""The scripts of the page on ablations: they resume, print what they measured, and the page has their tables."""

import json
import shutil

import pytest
import torch
from filelock import FileLock
from pages import PAGES_FOLDER, ROOT
from scripts import call_example, example, fork_example

from tpn.video import motion

SHORT = ["--clips", 1, "--test-clips", 1, "--steps", 2, "--seeds", 1]


@pytest.fixture
def study(monkeypatch):
    script = example("ablations")
    names = ("no pyramid", "pyramid")
    monkeypatch.setattr(script, "VARIANTS", {name: script.VARIANTS[name] for name in names})
    return script


def read(folder, name="ablations"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def row(name, seed, top1):
    intervals = dict.fromkeys("1234", top1)
    return {"variant": name, "seed": seed, "top1": top1, "intervals": intervals, "parameters": 1000, "mmacs": 2, "minutes": 0.5}


@pytest.mark.parametrize("name", ["ablations", "benchmarks/tempo_gain"])
def test_tables_of_the_page_are_those_of_the_results(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")  # where a script finds its neighbors
    shutil.copy(PAGES_FOLDER / f"{name.rpartition('/')[2]}.jsonl", tmp_path)
    printed = call_example(name, "--output", tmp_path, "--table").stdout
    blocks = [block for block in printed.strip().split("\n\n") if block.startswith("|")]
    assert blocks
    page = (PAGES_FOLDER / "ablations.md").read_text(encoding="utf-8")
    assert all(f"\n\n{block}\n\n" in page for block in blocks)


def test_tables_compare_seed_by_seed(tmp_path):
    rows = [row("pyramid", 0, 50.0), row("pyramid", 1, 70.0), row("no pyramid", 0, 40.0), row("no pyramid", 1, 64.0)]
    (tmp_path / "ablations.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    lines = call_example("ablations", "--output", tmp_path, "--table").stdout.splitlines()
    assert lines[2] == "| pyramid | 60.0 ± 14.1 |  |"
    assert lines[3] == "| no pyramid | 52.0 ± 17.0 | -8.0 ± 2.0 |"
    assert "| pyramid" + " | 60.0 ± 14.1" * 4 + " |" in lines
    assert lines[-1] == "| pyramid | 1,000 | 2.0 | 2 | 0.5 |"


def test_every_variant_is_in_a_table():
    script = example("ablations")
    assert set(script.VARIANTS) == {name for names in script.TABLES.values() for name in names} >= set(script.SPEEDS)


@pytest.mark.slow
def test_every_variant_is_another_network():
    script, found = example("ablations"), set()
    for name in script.VARIANTS:
        with torch.device("meta"):
            model = script.build(name)
            frames = model.input_spec.num_frames
            assert model(torch.empty(2, script.CHANNELS, frames, 6, 6)).shape == (2, len(motion.CLASSES))
        found.add((str(model), frames))
    assert len(found) == len(script.VARIANTS)


def test_a_clip_takes_every_nth_frame_from_its_start():
    script = example("ablations")
    maps = torch.arange(32).view(-1, 1, 1, 1).expand(32, script.CHANNELS, 2, 2).numpy()
    assert script.clip(maps, 3, script.build("pyramid"), 2)[0, :, 0, 0].tolist() == list(range(3, 19, 2))


@pytest.mark.slow
def test_a_study_resumes(study, tmp_path):
    options = ["--output", tmp_path, *SHORT]
    first = call_example("ablations", *options)
    rows = read(tmp_path)
    assert [each["variant"] for each in rows] == ["no pyramid", "pyramid"]
    assert all(set(each["intervals"]) == set("1234") and len(each["per_class"]) == len(motion.CLASSES) for each in rows)
    (tmp_path / "ablations.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with FileLock(tmp_path / "pyramid 0.lock"):  # another process is at it
        call_example("ablations", *options)
        assert read(tmp_path) == rows[:1]
    again = call_example("ablations", *options)
    assert [each | {"minutes": 0} for each in read(tmp_path)] == [each | {"minutes": 0} for each in rows]
    assert first.stdout.count("| pyramid |") == again.stdout.count("| pyramid |") > 1
    refused = call_example("ablations", "--output", tmp_path, *SHORT, "--steps", 3)
    assert (refused.returncode, "'steps': 2" in refused.stderr) == (1, True)


@pytest.mark.slow
def test_tempo_gain_resumes(tmp_path):
    data = tmp_path / "data"
    motion.write_dataset(data, 3, seed=0, num_frames=40)
    lines = [f"{name}/{i:06d}.mp4 {name}" for name in ("blinking", "growing") for i in range(3)]
    (data / "fold0_train.txt").write_text("\n".join(lines[1:5]))
    (data / "fold0_test.txt").write_text("\n".join(lines))
    command = ["benchmarks/tempo_gain", data, "--output", tmp_path / "out", "--steps", 1, "--batch-size", 2]
    first = fork_example(*command).stdout.splitlines()
    (row,) = read(tmp_path / "out", "tempo_gain")
    assert (row["fold"], row["classes"], row["videos"]) == ("fold0", ["blinking", "growing"], [3, 3])
    assert all(0 <= accuracy <= 100 for name in ("without", "with") for accuracy in row[name])
    assert fork_example(*command).stdout.splitlines() == first[1:]
