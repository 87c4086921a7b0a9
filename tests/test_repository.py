"""The files of the repository agree with each other and with the package."""

import re
from pathlib import Path

import pytest
import yaml
from packaging.version import Version
from scripts import ROOT
from test_docs import load

import tpn

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
GITHUB = ROOT / ".github"
WORKFLOWS = {path.stem: yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader) for path in (GITHUB / "workflows").iterdir()}
FORMS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml")}
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
REPOSITORY = "https://github.com/org/tpn"


def jobs():
    return [(f"{name}: {job}", content) for name, workflow in WORKFLOWS.items() for job, content in workflow["jobs"].items()]


def test_version():
    """In the citation, and first in the changelog."""
    assert CITATION["version"] == tpn.__version__
    versions = re.findall(r"^## (\S+) - (?:Unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == tpn.__version__


def test_citation():
    paper = CITATION["preferred-citation"]
    assert CITATION["license"] == PROJECT["license"]
    assert (CITATION["repository-code"], CITATION["url"]) == (PROJECT["urls"]["Repository"], PROJECT["urls"]["Documentation"])
    assert [author["family-names"] for author in paper["authors"]] == ["Yang", "Xu", "Shi", "Dai", "Zhou"]
    assert paper["url"] == "https://arxiv.org/abs/2004.03548"


def test_workflows_run_the_oldest_and_the_newest_python():
    listed = [name.split(" :: ")[-1] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]
    oldest, newest = WORKFLOWS["tests"]["jobs"]["tests"]["strategy"]["matrix"]["include"]
    assert (oldest["python"], newest["python"]) == (min(listed, key=Version), max(listed, key=Version))
    assert PROJECT["requires-python"] == f">={oldest['python']}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == oldest["python"]
    assert oldest["resolution"] == "lowest-direct"  # the lower bounds of pyproject.toml
    assert set(oldest["extras"].split(",")) | {newest["extras"]} <= PROJECT["optional-dependencies"].keys()
    assert not any("torch" in each for extra in oldest["extras"].split(",") for each in PROJECT["optional-dependencies"][extra])


@pytest.mark.parametrize(("name", "job"), jobs(), ids=lambda value: value if isinstance(value, str) else "")
def test_workflows_have_few_permissions(name, job):
    """Only the jobs that publish may write, and only to where they publish."""
    workflow = WORKFLOWS[name.partition(":")[0]]
    assert workflow["permissions"] == {"contents": "read"}
    assert "concurrency" in workflow
    assert "timeout-minutes" in job
    expected = {"release: publish": {"id-token": "write"}, "docs: deploy": {"id-token": "write", "pages": "write"}}
    assert job.get("permissions") == expected.get(name)
    assert ("environment" in job) == ("permissions" in job)
    for step in job["steps"]:
        assert re.search(r"@(v\d+|release/v\d+)$", step.get("uses", "@v1")), step
        assert "${{ github." not in step.get("run", ""), "text of strangers must not become a command"


def test_bounds_of_pytorch_and_torchvision_fit():
    """torchvision 0.N needs exactly one PyTorch, 2.(N - 15)."""
    floors = dict(re.fullmatch(r"([\w\[\]]+)>=(.*)", each).groups() for each in PROJECT["dependencies"])
    assert Version(floors["torch"]).minor == Version(floors["torchvision"]).minor - 15


def links(text):
    """The relative links and pictures of a Markdown text, outside of code."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s]*)|(?:src|srcset|href)=\"([^\"]*)", prose)
    return [link for pair in found for link in pair if link and not re.match(r"https://|mailto:|#", link)]


@pytest.mark.parametrize("path", [*sorted(ROOT.glob("*.md")), *sorted(GITHUB.rglob("*.md"))], ids=lambda path: path.name)
def test_relative_links_lead_to_files(path):
    assert [
        link for link in links(path.read_text(encoding="utf-8")) if not (path.parent / link.partition("#")[0]).is_file()
    ] == []


@pytest.mark.parametrize(
    ("readme", "shown"),
    [
        ("![a](docs/b.svg)", "![a](https://raw.githubusercontent.com/org/tpn/main/docs/b.svg)"),
        ("[a](docs/b.md#c)", f"[a]({REPOSITORY}/blob/main/docs/b.md#c)"),
        (
            "[![a](docs/b.png)](docs/c.md)",
            f"[![a](https://raw.githubusercontent.com/org/tpn/main/docs/b.png)]({REPOSITORY}/blob/main/docs/c.md)",
        ),
        (
            '<a href="c.md"><img src="b.png"></a>',
            f'<a href="{REPOSITORY}/blob/main/c.md"><img src="https://raw.githubusercontent.com/org/tpn/main/b.png"></a>',
        ),
        *((text, text) for text in ("![a](https://b.c/d.png)", "[a](https://b.c)", "[a](#b)", '<a href="mailto:a@b.c">')),
    ],
)
def test_links_on_a_package_index(readme, shown):
    assert on_package_index(readme) == shown


def test_readme_on_a_package_index_has_no_relative_link():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert links(readme)
    assert links(on_package_index(readme)) == []


def on_package_index(text):
    """The README as the build writes it into the metadata."""
    for each in PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    return text


def test_source_distribution_has_the_files_of_the_root():
    patterns = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    left_out = {".git", ".gitignore", ".ci", "pyproject.toml"}  # the builder adds the last one by itself
    listed = {path.name for pattern in patterns for path in ROOT.glob(pattern.lstrip("/"))}
    needed = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MODEL_CARD.md", "README.md", "SECURITY.md", "tests"}
    assert needed <= listed
    assert not listed & left_out


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CONTRIBUTING.md"])
def test_pages_of_the_site_are_the_files_of_the_root(name):
    page = (ROOT / "docs" / "pages" / name.lower()).read_text(encoding="utf-8")
    text = (ROOT / name).read_text(encoding="utf-8")
    shown = load(ROOT / "docs" / "hooks.py").on_page_markdown(page)
    assert shown.strip() == text.replace("](docs/pages/", "](").strip()
    assert "](docs/pages/" in text


def test_addresses():
    """One spelling of the repository and of the site, everywhere."""
    files = [*ROOT.glob("*.md"), ROOT / "CITATION.cff", ROOT / "pyproject.toml", *(p for p in GITHUB.rglob("*") if p.is_file())]
    for path in files:
        text = path.read_text(encoding="utf-8")
        for address in re.findall(r"https://(?:github\.com/org|raw\.githubusercontent\.com/org|org\.github\.io)[\w./-]*", text):
            assert re.match(
                r"https://(github\.com/org/tpn|raw\.githubusercontent\.com/org/tpn/|org\.github\.io/tpn/)", address
            ), path
    assert {"Homepage", "Documentation", "Repository", "Issues", "Changelog"} == PROJECT["urls"].keys()


def test_issue_forms():
    config = FORMS["config"]
    assert {link["name"] for link in config["contact_links"]} >= {"Question", "Security"}
    assert FORMS.keys() == {"bug", "feature", "checkpoint", "config"}
    for form in (FORMS[name] for name in ("bug", "feature", "checkpoint")):
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids))
        assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_model_card():
    """Its numbers are those of the table of checkpoints."""
    header, text = re.fullmatch(
        r"---\n(.*?)\n---\n(.*)", (ROOT / "MODEL_CARD.md").read_text(encoding="utf-8"), re.DOTALL
    ).groups()
    card, info = yaml.safe_load(header), tpn.model_info("tpn_slowonly_tiny_motion")
    (model,) = card["model-index"]
    assert model["name"] == info.checkpoint.model
    assert [metric["value"] for metric in model["results"][0]["metrics"]] == [info.checkpoint.measured_top1]
    assert f"| top-1 | {info.checkpoint.measured_top1:.2f} |" in text
    assert f"| top-5 | {info.checkpoint.measured_top5:.2f} |" in text
    assert f"{info.params / 1e6:.2f} M parameters, {info.gmacs} GMACs" in text
    assert Path(ROOT, "tpn", "zoo", "embedded", f"{info.checkpoint.name}.safetensors").is_file()
    assert card["license"] == PROJECT["license"].lower()
