"""The scripts that compare settings: they resume, and print a table."""

import json
import re

import pytest
from scripts import fork_example

import tpn
from tpn.video import motion

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes of three videos, and one fold."""
    root, every = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("every")
    motion.write_dataset(every, 3, seed=0, num_frames=20)
    lines = []
    for name in ("blinking", "growing"):
        (every / name).rename(root / name)
        lines += [f"{path.relative_to(root)} {name}" for path in sorted((root / name).iterdir())]
    (root / "fold0_train.txt").write_text("\n".join(lines[1:5]))
    (root / "fold0_test.txt").write_text("\n".join(lines[:1] + lines[5:]))
    return root


SETTINGS = """
tiny = {"model": "tpn_slowonly_tiny_motion", "model_args": {"base_channels": 4}, "weights": "random", "batch_size": 2, "steps": 1}
example.SETTINGS = {"plan": tiny, "no-jitter": tiny | {"color_jitter": False}}
"""
FROZEN = """
original = example.create
example.create = lambda backbone, backbone_pretrained=False, **kwargs: original(backbone, **kwargs)
example.STEPS, example.DRAWS = 2, 1
"""


def without_minutes(text):
    """The text of a table without its last column."""
    return re.sub(r" [\d.]+ \|$", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "before", "options"),
    [
        ("settings", SETTINGS, ["--settings", "plan,no-jitter"]),
        ("frozen_backbone", FROZEN, ["--backbone", "timm/test_resnet"]),
    ],
)
def test_a_study_resumes(data, tmp_path, name, before, options):
    command = [f"benchmarks/{name}", data, "--output", tmp_path, "--seeds", 2, *options]
    done = fork_example(*command, before=before)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    settings = list(dict.fromkeys(row["settings"] for row in rows))
    assert len(rows) == 2 * len(settings) >= 4
    assert all(0 <= row["top1"] <= 100 for row in rows)
    table = done.stdout[done.stdout.index("| ") :]
    assert all(f"| {name} |" in table for name in settings)
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    assert without_minutes(fork_example(*command, before=before).stdout).endswith(without_minutes(table))
    assert [json.loads(line)["top1"] for line in (tmp_path / "results.jsonl").read_text().splitlines()] == [
        r["top1"] for r in rows
    ]


def test_tempo(tmp_path):
    before = """
example.NUM_FRAMES, example.TESTED, example.WITHOUT_TIME = 16, (1.0,), ("one frame",)
example.VARIANTS = {name: example.VARIANTS[name] for name in ("no pyramid", "cascade")}
"""
    command = ["tempo", "--output", tmp_path, "--seeds", 1, "--clips", 3, "--test-clips", 1, "--epochs", 1, "--workers", 0]
    printed = fork_example(*command, before=before).stdout
    tables = (tmp_path / "tempo.md").read_text(encoding="utf-8")
    assert printed.strip().endswith(tables.strip())
    assert re.findall(r"^\| (.+?) \|", tables, re.MULTILINE) == [
        "variant",
        "no pyramid",
        "cascade",
        "clips",
        "one frame",
        "one frame",
    ]
    models = [tpn.create_model(f"local-dir:{tmp_path / name}") for name in ("no pyramid 0", "cascade 0")]
    assert models[0].neck is None
    assert models[1].config.neck.args["flow_order"] == "cascade"
    assert (tmp_path / "tempo.png").exists()
