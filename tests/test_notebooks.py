"""The notebooks of `examples/`: what is committed, and a run of their cells."""

import csv
import json
import re
import shutil

import pytest
from scripts import ROOT

import tpn
from tpn.video import motion

PATH = ROOT / "examples" / "finetune.ipynb"
INSTALL = '%pip install -q "tpn[viz]"'
NEW = {"bouncing", "figure eight", "pendulum", "spiraling", "zigzag"}


def test_committed_with_the_outputs_of_one_run():
    text = PATH.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert not re.search(r"/(tmp|root|home|work)/", text)
    assert f"https://colab.research.google.com/github/org/tpn/blob/main/examples/{PATH.name}" in text
    notebook = json.loads(text)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert "".join(cells[0]["source"]) == INSTALL
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert "error" not in {output["output_type"] for output in outputs}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs the cells, changed by a function, in an empty folder, and returns what they printed."""
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(change=lambda source: source):
        notebook = nbformat.read(PATH, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.source = "" if cell.source == INSTALL else change(cell.source)
        nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        return "".join(output.get("text", "") for output in outputs)

    return run


@pytest.mark.slow
def test_learns_new_classes(run, tmp_path):
    printed = run(lambda source: source.replace("steps=200", "steps=120, val_interval=5"))
    before, after = re.search(r"top-1 before: (\S+)%, after: (\S+)%", printed).groups()
    assert float(before) < 40
    assert float(after) > 70
    assert "validation at step 120" in printed  # as text, without the states of a progress bar
    assert "\x1b" not in printed
    model = tpn.create_model(f"local-dir:{tmp_path}/runs/balls")
    assert set(model.labels) == NEW
    prediction = tpn.VideoClassifier(model)(tmp_path / "new.mp4")
    assert prediction.top(1)[0][0] == "figure eight"
    assert (tmp_path / "runs/balls/report.html").exists()


@pytest.mark.slow
def test_with_videos_of_ones_own(run, tmp_path, videos):
    shutil.copytree(videos / "train", tmp_path / "mine")

    def change(source):
        if "def draw_video" in source:
            return ""
        if "draw_video(new_video" in source:
            source = re.sub("^draw_video.*$", "", source, flags=re.M).replace('"new.mp4"', '"mine/blinking/000000.mp4"')
        return source.replace('Path("videos")', 'Path("mine")').replace("steps=200", "steps=2")

    run(change)
    with open(tmp_path / "runs/balls/split.csv", newline="") as file:
        assert (
            {row["label"] for row in csv.DictReader(file)}
            == {"moving left", "turning clockwise", "blinking"}
            < set(motion.CLASSES)
        )
