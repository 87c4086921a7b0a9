"""Imports run one way: each part of the package imports parts before it, and none imports `tpn` itself."""

import ast
from pathlib import Path

import pytest
from servers import run_python

import tpn

ROOT = Path(tpn.__file__).parent
ORDER = (
    ["version", "after_timm", "devices", "errors", "files", "transfer", "validation", "video.sampling", "video.transforms"],
    ["video.augment"],
    ["config", "hub"],
    ["models"],
    ["video"],
    ["zoo"],
    ["openvino_runtime"],
    ["exported", "quantization"],
    ["optimization"],
    ["export"],
    ["predict", "tempo", "tracks"],
    ["training"],
    ["features", "strided", "explain", "demo"],
    ["cli"],
)
PLACE = {name: place for place, names in enumerate(ORDER) for name in names}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.stem not in ("__init__", "__main__") or path.parent != ROOT)


def place_of(module):
    """The place of a dotted name below tpn, None for tpn itself."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in (2, 1))
    return next((PLACE[name] for name in names if name in PLACE), None)


def imported(path):
    """The dotted names below tpn that a file imports, within functions, too; "" for tpn itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name[4:] for alias in node.names if alias.name.split(".")[0] == "tpn")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tpn":
            prefix = node.module[4:]
            yield from (f"{prefix}.{alias.name}".removeprefix(".") for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = place_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert own is not None, "the part has no place in the order"
    names = set(imported(path))
    assert "" not in names
    assert not {name for name in names if place_of(name) is None or place_of(name) > own}


def test_modules_and_public_functions_do_not_share_names():
    modules = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert not modules & {*(name for name in tpn.__all__ if callable(getattr(tpn, name))), *tpn.list_models()}


def test_models_need_no_decoder_no_plots_no_network(tmp_path):
    script = """
import sys, socket
def refuse(*a, **k): raise OSError('network')
socket.socket.connect = socket.getaddrinfo = refuse
import tpn, torch
print(*{'av', 'matplotlib', 'requests', 'onnx', 'captum'} & sys.modules.keys())
sys.modules['av'] = None
tpn.list_models()
print(tpn.create_model('tpn_tsm_r50_sthv2', base_channels=4)(torch.zeros(2, 3, 8, 32, 32)).shape)
try: tpn.VideoClassifier
except ImportError as error: print(error)
"""
    imported, shape, error = run_python(script, tmp_path)[0].splitlines()
    assert imported == ""
    assert shape == "torch.Size([2, 174])"
    assert "av" in error
