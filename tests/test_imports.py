"""Imports run one way: each part of the package knows those before it, and none after it."""

import ast
from pathlib import Path

import pytest

import tpn

ROOT = Path(tpn.__file__).parent
ORDER = (
    ["models"],
    ["video"],
    ["zoo"],
    ["optimize", "export"],
    ["training", "predict"],
    ["features", "tempo", "explain", "demo"],
    ["cli"],
)
PLACE = {name: place for place, names in enumerate(ORDER) for name in names}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem in PLACE)


def imported(path):
    """The parts of tpn that a file imports, within functions, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("tpn."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tpn":
            parts = node.module.split(".")[1:]
            yield from parts[:1] or (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    later = {name for name in imported(path) if name != own and PLACE.get(name, -1) > PLACE[own]}
    assert not later, f"{own} comes before {', '.join(later)}"
    if own == "models":
        assert not {name for name in imported(path) if name != "models"}


def test_every_part_has_its_place():
    parts = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert parts == {*PLACE, "__init__", "__main__"}
