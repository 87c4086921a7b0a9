"""The documentation: everything that it shows runs, tables and figures are what the package says, and nothing is left out."""

import importlib.util
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from urllib.parse import urlparse

import pytest
import small
import torch
import warm
import yaml
from packaging.requirements import Requirement
from pages import PAGES, PAGES_FOLDER, ROOT, RUN, SHOWN, blocks
from safetensors.torch import save

import tpn
from tpn.training.config import RECIPES
from tpn.zoo import fetch
from tpn.zoo.checkpoints import CHECKPOINTS, get_checkpoint

README, TRAINING = PAGES["README.md"].read_text(encoding="utf-8"), PAGES["docs/pages/training.md"].read_text(encoding="utf-8")
BY_HAND = "tpn_slowonly_r101_32x2_k400.original"


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """What is on a reader's machine: a function that runs a page in a folder with videos, checkpoints, examples."""
    from videos import write_video  # the decoder is only needed here

    root = tmp_path_factory.mktemp("machine")
    work = root / "work"
    weights = get_checkpoint(small.SLOWONLY)
    narrow = tpn.create_model(weights.name, base_channels=4)
    tpn.save_pretrained(narrow, fetch.weights_folder(weights, root / "cache"))
    shutil.copytree(ROOT / "examples", work / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (work / "mine.pth").write_bytes(small.upstream_file(small.SLOWONLY)[0])
    (work / "FILE").write_bytes(small.upstream_file(BY_HAND)[0])
    if importlib.util.find_spec("pyarrow"):
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"path": ["video.mp4", "missing.mp4"]}), work / "videos.parquet")
    tpn.save_pretrained(narrow, work / "my-tpn")
    for name in ("video.mp4", "new.mp4"):
        write_video(work / name, num_frames=20)
    for part in ("train", "val"):
        for name in ("running", "sitting down"):
            folder = work / "videos" / part / name
            folder.mkdir(parents=True)
            write_video(folder / "1.mp4", num_frames=20)
    repo = root / "torch" / "hub" / "org_tpn_main"
    repo.mkdir(parents=True)
    shutil.copy(ROOT / "hubconf.py", repo)
    shutil.copytree(ROOT / "tpn", repo / "tpn", ignore=shutil.ignore_patterns("__pycache__"))
    env = {"TPN_CACHE": str(root / "cache"), "TORCH_HOME": str(root / "torch"), "HF_HOME": str(root / "hf")}
    process, env = warm.start(root / "warm", env | {"TORCHINDUCTOR_CACHE_DIR": str(root / "inductor")})

    def read(name, hub):
        """Run everything that a page shows; return what it printed, and the folder where it did."""
        folder = root / PAGES[name].stem
        shutil.copytree(work, folder)
        done = subprocess.run(
            ["python", ROOT / "tests" / "pages.py", PAGES[name]],
            executable=root / "warm" / "python",
            cwd=folder,
            env=env | {"HF_TOKEN": hub.token},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, folder

    yield read
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(root)


def imagenet_weights():
    """timm's ResNet-50, as narrow as the networks here."""
    state = tpn.create_model(small.SLOWONLY, base_channels=4).backbone.state_dict()
    state = {name: tensor.select(2, 0) if tensor.ndim == 5 else tensor for name, tensor in state.items()}
    state |= {"fc.weight": torch.ones(1), "fc.bias": torch.ones(1)}
    return save({name: tensor.contiguous() for name, tensor in state.items()})


def readme_says(said, folder, hub):
    assert re.search(r"^\d+\.\d%  \w", said, re.MULTILINE)
    assert "InputSpec(num_frames=8, frame_interval=8" in said
    assert sorted(hub.repos["me/my-tpn"][-1]) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads(hub.repos["me/my-tpn"][-1]["config.json"])["model"]["labels"][11] == "my class 11"
    assert tpn.create_model(f"local-dir:{folder / 'converted'}").num_classes == 400


def weights_page_says(said, folder, hub):
    assert re.search(rf"^to publish +my-namespace/{re.escape(BY_HAND)}  \w{{64}}$", said, re.MULTILINE)
    assert list(hub.repos) == ["timm/resnet50.tv_in1k", "me/my-tpn"]


def training_page_says(said, folder, hub):
    assert "2 videos in 2 classes, 0 unreadable" in said
    assert {"report.html", "model.safetensors", "split.csv"} <= {path.name for path in (folder / "runs" / "doors").iterdir()}


def performance_page_says(said, folder, hub):
    assert "folded_norms=62" in said
    assert "missing.mp4" in said
    assert re.search(r"^1 videos classified, 1 unreadable; results", said, re.MULTILINE)
    assert "[2 rows x 4 columns]" in said


SAYS = {
    "README.md": readme_says,
    "docs/pages/weights.md": weights_page_says,
    "docs/pages/training.md": training_page_says,
    "docs/pages/performance.md": performance_page_says,
}
"""What is checked beyond that a page runs."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if RUN & {block.language for block in blocks(page)}])
def test_everything_that_a_page_shows_runs(machine, hub, name):
    for extra in set(re.findall(r'^pip install (?:-e )?"(?:\.|tpn)\[(\w+)\]"', PAGES[name].read_text(), re.MULTILINE)) - {
        "test",
        "docs",
    }:
        missing = missing_requirements(extra)
        if missing:
            pytest.skip(f'pip install ".[{extra}]" brings {", ".join(missing)}')
    hub.add("timm/resnet50.tv_in1k", weights=imagenet_weights())
    SAYS.get(name, lambda *_: None)(*machine(name, hub), hub)


def missing_requirements(extra):
    """What an extra of the package needs and is not installed."""
    installed = {each.name.lower().replace("_", "-") for each in metadata.distributions()}
    needed = [Requirement(text) for text in metadata.requires("tpn")]
    return [each.name for each in needed if each.marker and each.marker.evaluate({"extra": extra}) and each.name not in installed]


@pytest.mark.parametrize("name", PAGES)
def test_every_block_is_run_or_says_that_it_cannot_be(name):
    text = PAGES[name].read_text(encoding="utf-8")
    found = blocks(PAGES[name])
    assert {block.language for block in found} <= RUN | SHOWN
    assert text.count("```") == 2 * len(found)
    assert "~~~" not in text
    for block in found:
        if block.language == "python":
            compile(block.code, name, "exec")


def test_every_page_is_in_the_navigation():
    def files(entry):
        if isinstance(entry, str):
            return [entry]
        return [file for each in (entry.values() if isinstance(entry, dict) else entry) for file in files(each)]

    listed = files(yaml.safe_load((ROOT / "docs" / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(path.relative_to(PAGES_FOLDER).as_posix() for path in PAGES_FOLDER.rglob("*.md"))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    """Anchors of the site are checked when it is built."""
    page = PAGES[name]
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]*)\)", prose):
        if link.startswith("#"):
            continue
        if ":" in link:
            url = urlparse(link)
            assert url.scheme == "https", link
            assert re.fullmatch(r"[\w.-]+\.\w+", url.netloc), link
        else:
            assert (page.parent / link.partition("#")[0]).is_file(), link


def test_readme_is_short_and_leads_to_the_pages():
    assert len(README.splitlines()) < 150
    linked = set(re.findall(r"\]\((docs/pages/[\w/-]+\.md)", README))
    assert linked >= {f"docs/pages/{page}.md" for page in ("models", "videos", "training", "mmaction2", "performance", "weights")}


def test_reference_has_every_public_name():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (PAGES_FOLDER / "api").glob("*.md"))
    documented = re.findall(r"^::: tpn\.(?:\w+\.)*(\w+)$", text, re.MULTILINE)
    documented.append("__version__")
    documented += re.findall(r"\w+", " ".join(re.findall(r"members: \[(.*)\]", text)))
    assert {name for name in tpn.__all__ if not inspect.ismodule(getattr(tpn, name))} <= set(documented)


def load(path):
    """A script as a module, which may import those beside it."""
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def test_tables_of_the_site_are_made_from_the_weights():
    page = load(ROOT / "docs" / "hooks.py").on_page_markdown(PAGES["docs/pages/models.md"].read_text(encoding="utf-8"))
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if line.startswith("|")]
    assert "<!--" not in page
    assert not any(re.search(r"[`*_]{2}", cell) for row in rows for cell in row)
    by_name = {}
    for row in rows:
        by_name.setdefault(re.sub("<[^>]+>", "", row[1]), []).append(row)
    for entry in CHECKPOINTS.values():
        model, file = by_name[entry.name]
        top1 = f"{entry.measured_top1:.2f}*" if entry.measured_top1 else f"{entry.reported_top1:.2f}"
        assert (model[2], model[4], model[7], model[9]) == (top1, f"{entry.gmacs:.1f}", entry.dataset, entry.source.access)
        assert f"({entry.source.url})" in file[3] or entry.source.url is None
        assert (len(model), len(file)) == (11, 9)  # nine and seven columns
    assert by_name["tpn_slowonly_r50_k400.in1k"][0][2:-1] == [
        "76.74",
        "92.57",
        "50.3",
        "91.5",
        "8 × 8",
        "Kinetics-400",
        "10 × 3, 256 px",
        "automatic",
    ]


def test_command_line_page_has_every_command():
    page = load(ROOT / "docs" / "hooks.py").on_page_markdown("<!-- commands -->")
    names = re.findall(r"^## tpn (\w+)$", page, re.MULTILINE)
    assert {"demo", "predict", "check", "list", "info", "convert", "publish"} <= set(names)
    assert "| `--views` | CLIPSxCROPS, such as 1x1. Default: as published. |" in page


@pytest.mark.parametrize("picture", sorted((PAGES_FOLDER / "figures").glob("*.svg")), ids=lambda path: path.stem)
def test_picture_is_what_its_script_draws(picture):
    assert load(ROOT / "docs" / "figures" / f"{picture.stem}.py").draw() == picture.read_text(encoding="utf-8")


def test_recipes_of_the_training_page():
    rows = re.findall(r"^\| `([\w-]+)` \| `(\w+)` \| (\w+) \| (\S+) \| (\d+) \|$", TRAINING, re.MULTILINE)
    assert {name for name, *_ in rows} == RECIPES.keys() - {"motion"}
    for name, model, start, decay, norm in rows:
        recipe = RECIPES[name]
        assert (model, float(decay), float(norm)) == (recipe["model"], recipe["weight_decay"], recipe["clip_grad"])
        assert recipe["weights"] == {"random": "random", "ImageNet": "backbone"}[start]


def test_table_of_the_readme_agrees_with_the_weights():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", README, re.MULTILINE)
    assert rows
    for model, cells in rows:
        entry = get_checkpoint(model)
        spec = entry.config.input_spec
        frames = f"{spec.num_frames} x {spec.frame_interval}" if spec.sampling == "dense" else f"{spec.num_frames} segments"
        top1 = f"{entry.measured_top1:.2f}*" if entry.measured_top1 else f"{entry.reported_top1:.2f}"
        assert cells.split(" | ") == [frames, entry.dataset, top1, f"{entry.gmacs:.1f}", entry.source.access]


def test_readme_counts_the_checkpoints():
    assert f"prints all {len(CHECKPOINTS)} checkpoints" in README
