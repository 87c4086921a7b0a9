"""Everything the README shows runs, in one process as one reader would type it, without the internet."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from recipe import sketch_state_dict
from scripts import example
from servers import run_python

import tpn
from tpn.video import motion
from tpn.zoo import saved, sources
from tpn.zoo.weights import WEIGHTS, get_weights

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


WEIGHTS_PAGE = ROOT / "docs" / "weights.md"


def snippets(language, page=README):
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A folder with a video and a checkpoint, and the environment of a machine whose cache holds the weights."""
    from videos import write_video  # the decoder is only needed here

    root = tmp_path_factory.mktemp("machine")
    weights = get_weights("tpn_slowonly_r50_k400")
    tpn.save_pretrained(tpn.create_model(weights.name), sources.cache_folder(weights, root / "cache"))
    (root / "work").mkdir()
    write_video(root / "work" / "video.mp4", num_frames=20)
    for part in ("train", "val"):
        for name in ("running", "sitting down"):
            folder = root / "work" / "videos" / part / name
            folder.mkdir(parents=True)
            write_video(folder / "1.mp4", num_frames=20)
    os.link(root / "cache" / weights.name / saved.WEIGHTS_FILE, root / "work" / "mine.pth")
    repo = root / "torch" / "hub" / "org_tpn_main"
    repo.mkdir(parents=True)
    shutil.copy(ROOT / "hubconf.py", repo)
    shutil.copytree(ROOT / "tpn", repo / "tpn", ignore=shutil.ignore_patterns("__pycache__"))
    env = {
        "TPN_CACHE": str(root / "cache"),
        "TORCH_HOME": str(root / "torch"),
        "HF_HOME": str(root / "hf"),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    yield root / "work", env
    shutil.rmtree(root)


@pytest.mark.slow
def test_python_snippets(machine, hub):
    folder, env = machine
    script = "\n".join(snippets("python")) + "\nprint('end', features.shape, model.num_classes, model.labels[11])\n"
    said, _ = run_python(script, folder, **env, HF_TOKEN=hub.token)
    assert said.splitlines()[-1] == "end torch.Size([2, 2048, 1, 7, 7]) 12 my class 11"
    assert re.match(r"\d+\.\d%  \w", said)
    assert sorted(hub.repos["me/my-tpn"][-1]) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.slow
def test_weights_page(machine, hub):
    folder, env = machine
    page = WEIGHTS_PAGE.read_text(encoding="utf-8")
    with torch.device("meta"):
        shapes = timm.create_model("resnet50").state_dict()
    hub.add(
        "timm/resnet50.tv_in1k",
        weights=safetensors.torch.save({k: torch.ones(v.shape, dtype=v.dtype) for k, v in shapes.items()}),
    )
    tpn.save_pretrained(tpn.create_model("tsm_r50_sthv2", base_channels=4), folder / "my-tpn")
    said, _ = run_python("\n".join(snippets("python", page)) + "\nprint(train, test)", folder, **env, HF_TOKEN=hub.token)
    assert "TrainTransform" in said
    assert list(hub.repos) == ["timm/resnet50.tv_in1k", "me/my-tpn"]

    torch.save(sketch_state_dict("original_tpn_slowonly_r101_32x2"), folder / "FILE")
    convert, publish = (block.split()[1:] for block in snippets("bash", page))
    for arguments in (convert, publish):
        said, _ = run_python(f"import sys; sys.argv = {['tpn', *arguments]}; from tpn.cli import main; main()", folder, **env)
    assert re.search(r"^to publish +tpn-zoo/tpn_slowonly_r101_32x2_k400.original  \w{64}$", said, re.MULTILINE)


def test_table_of_the_weights_page(tmp_path):
    copy = shutil.copy(WEIGHTS_PAGE, tmp_path)
    subprocess.run(
        [sys.executable, ROOT / "docs" / "weights_table.py", copy], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )
    assert Path(copy).read_text(encoding="utf-8") == WEIGHTS_PAGE.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in Path(copy).read_text(encoding="utf-8") for name in WEIGHTS)


@pytest.mark.slow
def test_shell_snippets(machine):
    folder, env = machine
    lines = [line.partition("#")[0].strip() for block in snippets("bash") for line in block.splitlines()]
    commands = [re.sub("^pip install .* && ", "", line) for line in lines]
    commands = [line for line in commands if line and not line.startswith("pytest")]
    assert len(commands) == 9
    shutil.copytree(ROOT / "examples", folder / "examples")
    for command in commands:
        command = re.sub(r"^tpn ", f"{sys.executable} -m tpn ", re.sub(r"^python ", f"{sys.executable} ", command))
        if "predict video.mp4" in command:
            command += " --views 1x1"
        if "train.py" in command:  # what the options say, in less time
            command += " --epochs 1 --batch-size 2 --crop-size 64 --short-side 64 --workers 1"
        done = subprocess.run(command, shell=True, cwd=folder, env=os.environ | env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout or "wrote my-tpn" in done.stderr


@pytest.mark.slow
def test_training_page(machine, tmp_path):
    """Every command of the page, on fewer videos and for fewer epochs."""
    _, env = machine
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    motion.write_dataset(tmp_path / "videos" / "train", 1, seed=1, num_frames=34)
    shutil.copytree(tmp_path / "videos" / "train", tmp_path / "videos" / "val")
    shutil.copy(next((tmp_path / "videos").rglob("*.mp4")), tmp_path / "new.mp4")
    first, last = snippets("bash", page)
    shorter = (
        ("tpn_slowonly_r50_k400 --pretrained --epochs 20", "tpn_slowonly_tiny_motion --pretrained --epochs 1 --workers 1"),
        ("motion/train', 300", "motion/train', 3"),
        ("motion/val', 30", "motion/val', 1"),
        ("motion/test', 100", "motion/test', 1"),
        ("--recipe motion", "--recipe motion --epochs 2"),
    )
    commands = first + last
    for long, short in shorter:
        assert commands.count(long) == 1, long
        commands = commands.replace(long, short)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    commands = commands.replace("python ", f"{sys.executable} ").replace("tpn predict", f"{sys.executable} -m tpn predict")
    commands = commands.replace("tpn check", f"{sys.executable} -m tpn check")
    done = subprocess.run(
        ["bash", "-euc", commands],
        cwd=tmp_path,
        env=os.environ | env | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "14 videos in 14 classes, 0 of them cannot be read" in done.stdout
    assert tpn.create_model(f"local-dir:{tmp_path / 'tiny'}").labels == motion.CLASSES
    assert (tmp_path / "tiny" / "model.safetensors").stat().st_size < 4e6


PERFORMANCE_PAGE = ROOT / "docs" / "performance.md"


@pytest.mark.slow
def test_performance_page(machine, hub):
    folder, env = machine
    first, _ = snippets("python", PERFORMANCE_PAGE.read_text(encoding="utf-8"))
    said, _ = run_python(first, folder, **env)
    report, good, bad = said.splitlines()
    assert "folded_norms=62" in report
    assert re.match(r"\[\('.+', 0\.\d+\)\]", good)
    assert "missing.mp4" in bad


@pytest.mark.slow
def test_a_million_videos_of_the_performance_page(machine):
    """Two of them."""
    pytest.importorskip("ray", reason='pip install ".[ray]"')
    pq = pytest.importorskip("pyarrow.parquet", reason='pip install ".[ray]"')
    import pyarrow

    folder, env = machine
    page = PERFORMANCE_PAGE.read_text(encoding="utf-8")
    pq.write_table(pyarrow.table({"path": ["video.mp4", "missing.mp4"]}), folder / "videos.parquet")
    (command,) = (line for block in snippets("bash", page) for line in block.splitlines() if "classify_many" in line)
    shutil.copytree(ROOT / "examples", folder / "examples", dirs_exist_ok=True)
    command = command.replace("python ", f"{sys.executable} ")
    done = subprocess.run(command, shell=True, cwd=folder, env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1 videos classified, 1 could not be read; results" in done.stdout
    _, last = snippets("python", page)
    said, _ = run_python(last, folder, **env)
    assert "[2 rows x 4 columns]" in said


def test_recipes_of_the_training_page():
    rows = re.findall(
        r"^\| `([\w-]+)` \| `(\w+)` \| (\w+) \| (\S+) \| (\d+) \|$", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE
    )
    recipes = example("train").RECIPES
    assert {name for name, *_ in rows} == recipes.keys() - {"motion"}
    for name, model, start, decay, norm in rows:
        recipe = recipes[name]
        assert (model, float(decay), float(norm)) == (recipe["model"], recipe["weight_decay"], recipe["clip_grad"])
        assert recipe.get("imagenet", False) == (start == "ImageNet")


def test_table_agrees_with_the_weights():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(rows) == 4
    for model, frames, data, top1 in rows:
        weights = get_weights(model)
        spec = weights.input
        wanted = f"{spec.num_frames} x {spec.frame_interval}" if spec.sampling == "dense" else f"{spec.num_frames} segments"
        assert (frames, data, float(top1)) == (wanted, weights.dataset.title, weights.reported_top1)


def test_picture_is_what_its_script_draws(tmp_path):
    script = ROOT / "docs" / "figures" / "pyramid.py"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script, tmp_path / "pyramid.svg"], env=env, check=True)
    assert (tmp_path / "pyramid.svg").read_bytes() == script.with_suffix(".svg").read_bytes()
