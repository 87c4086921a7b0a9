"""Checkpoint files: names, wrappings, what is refused, and what the messages say."""

import argparse
import collections
import datetime
import os
import pathlib
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from recipe import MODEL_OF, manifest_names, our_names, sketch_state_dict
from safetensors.torch import save_file

import tpn
from tpn import CheckpointError
from tpn.zoo.convert import convert_state_dict, detect_layout
from tpn.zoo.reader import read_checkpoint

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
TSM = "original_tsm_r50_sthv2"


def save(obj, path, zipped=True, **kwargs):
    torch.save(obj, path, _use_new_zipfile_serialization=zipped, **kwargs)
    return path


@pytest.fixture
def small():
    return {"backbone.conv1.weight": torch.randn(2, 3), "head.fc.bias": torch.arange(4)}


# Names


@pytest.mark.parametrize("name", manifest_names())
def test_every_tensor_is_used_once(name):
    source = sketch_state_dict(name)
    converted, layout = convert_state_dict(source)
    assert layout == name.partition("_")[0]
    assert sorted(map(id, converted.values())) == sorted(map(id, source.values()))
    with torch.device("meta"):
        model = tpn.create_model(MODEL_OF[name])
    expected = model.state_dict()
    assert converted.keys() == expected.keys()
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in expected.items()}
    again, layout = convert_state_dict(converted)
    assert layout == "tpn"
    assert all(again[k] is v for k, v in converted.items())


def test_names_of_the_flows():
    mm, original = our_names("mmaction2_tpn_slowonly_r50_8x8_k400"), our_names("original_tpn_slowonly_r50_8x8")
    assert mm["neck.level_fusion_1.fusion_conv.conv.weight"] == "neck.top_down_fusion.fuse.conv.weight"
    assert mm["neck.level_fusion_2.fusion_conv.conv.weight"] == "neck.bottom_up_fusion.fuse.conv.weight"
    assert original["necks.level_fusion_op2.fusion_conv.0.weight"] == "neck.top_down_fusion.fuse.conv.weight"
    assert original["necks.level_fusion_op.fusion_conv.0.weight"] == "neck.bottom_up_fusion.fuse.conv.weight"


def test_unknown_names():
    source = sketch_state_dict(TSM)
    with pytest.raises(CheckpointError, match=r"2 tensors.* original .*: optimizer\.x, ema"):
        convert_state_dict({**source, "optimizer.x": torch.ones(1), "ema": torch.ones(1)})
    with pytest.raises(CheckpointError, match="2 tensors.* a, b"):
        detect_layout({"a": torch.ones(1), "b": torch.ones(1)})
    mm = sketch_state_dict("mmaction2_tpn_tsm_r50_sthv1")
    twice = {**mm, "backbone.layer1.0.conv1.conv.weight": mm["backbone.layer1.0.conv1.conv.net.weight"]}
    with pytest.raises(CheckpointError, match=r"two tensors.* become backbone\.layer1\.0\.conv1\.weight"):
        convert_state_dict(twice)


# Files


@FORMATS
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "meta": {"epoch": 3, "lr": 0.1, "names": ("a", None)}},
        lambda s: {"model": s, "optimizer": {"state": {0: torch.ones(3)}}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": np.float64(3), "hist": np.ones(2)},
    ],
)
def test_wrappings(wrap, zipped, small, tmp_path):
    tensors, metadata = read_checkpoint(save(wrap(small), tmp_path / "a.pth", zipped))
    assert tensors.keys() == small.keys()
    assert all(torch.equal(tensors[k], small[k]) for k in small)
    assert metadata == {}


@FORMATS
def test_the_name_of_the_file_does_not_matter(zipped, small, tmp_path):
    save_file(small, tmp_path / "a.pth", metadata={"format": "pt", "x": "y"})
    save({**small, "module.x": small["head.fc.bias"]}, tmp_path / "a.safetensors", zipped)  # one prefix of several stays
    for name, extra, expected in (("a.pth", set(), {"format": "pt", "x": "y"}), ("a.safetensors", {"module.x"}, {})):
        tensors, metadata = read_checkpoint(str(tmp_path / name))
        assert tensors.keys() == small.keys() | extra
        assert all(torch.equal(tensors[k], small[k]) for k in small)
        assert metadata == expected


@FORMATS
def test_objects_of_absent_libraries(zipped, small, tmp_path, monkeypatch):
    module = types.ModuleType("absent_library")

    class HistoryBuffer:
        def __init__(self):
            self.values = [1, 2]
            self.parent = None

    class ConfigDict(dict):
        pass

    for cls in (HistoryBuffer, ConfigDict):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
    config = ConfigDict(a=1, b=ConfigDict(c=[2]))
    config.attribute = 3
    with monkeypatch.context() as context:
        context.setitem(sys.modules, module.__name__, module)
        meta = {"config": config, "history": [HistoryBuffer(), HistoryBuffer()]}
        path = save({"meta": meta, "state_dict": small}, tmp_path / "a.pth", zipped)
    assert "absent_library" not in sys.modules
    tensors, _ = read_checkpoint(path)
    assert tensors.keys() == small.keys()
    assert all(torch.equal(tensors[k], small[k]) for k in small)


@FORMATS
def test_what_training_scripts_save(zipped, small, tmp_path):
    """Their arguments, and tensors with attributes."""
    args = argparse.Namespace(
        lr=0.1, output=pathlib.Path("runs"), start=datetime.datetime(2020, 1, 2), phase=1j, raw=bytearray(b"x")
    )
    history = collections.defaultdict(int, {"a": 1})
    weights = {**small, "parameter": torch.nn.Parameter(torch.ones(2))}
    for value in weights.values():
        value.decay = False
    spectrum = torch.ones(2, dtype=torch.complex64)
    path = save({"args": args, "history": history, "spectrum": spectrum, "state_dict": weights}, tmp_path / "a.pth", zipped)
    tensors, _ = read_checkpoint(path)
    assert all(torch.equal(tensors[name], value) for name, value in weights.items())


@FORMATS
def test_paths_saved_by_python_3_13(zipped, small, tmp_path, monkeypatch):
    module = types.ModuleType("pathlib._local")
    kind = type("PosixPath", (), {"__module__": module.__name__, "__reduce__": lambda path: (type(path), ("runs",))})
    module.PosixPath = kind
    with monkeypatch.context() as context:
        context.setitem(sys.modules, module.__name__, module)
        path = save({"output": kind(), "state_dict": small}, tmp_path / "a.pth", zipped)
    tensors, _ = read_checkpoint(path)
    assert tensors.keys() == small.keys()


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


CALLS = {
    "os.system": lambda marker: Call(os.system, f"touch {marker}"),
    "eval": lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"),
    "pathlib.Path.touch": lambda marker: Call(pathlib.Path.touch, pathlib.Path(marker)),
    "builtins.getattr": lambda marker: Call(getattr, pathlib.Path(marker), "touch"),
}


@FORMATS
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_called(call, protocol, zipped, small, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    save({"state_dict": small, "meta": CALLS[call](marker)}, path, zipped, pickle_protocol=protocol)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ")
    if protocol == 2:
        assert "refused, it holds more than tensors" in str(error.value)
        assert "torch.save(model.state_dict(), 'weights.pth')" in str(error.value)
    with pytest.raises(CheckpointError):
        tpn.create_model("tsm_r50_sthv2", checkpoint_path=path, base_channels=8)
    assert not marker.exists()


def test_the_calls_above_do_something(tmp_path):
    pickle.loads(pickle.dumps(CALLS["pathlib.Path.touch"](tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated(keep, kind, small, tmp_path):
    path, tensors = tmp_path / "a", {**small, "more": torch.randn(1000)}
    save_file(tensors, path) if kind == "safetensors" else save(tensors, path, kind == "zip")
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(CheckpointError, match=rf"^{path}: (truncated or damaged|refused|neither|web|the file)"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html>\n<html><body>Sign in", "a web page, not a checkpoint; save the file that the page offers"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it starts with 'version https://git-lfs"),
        (b"\x00\x01\x02", "neither a safetensors nor a PyTorch file"),
        (b"PK\x03\x04 not a zip", "truncated or damaged PyTorch file"),
        (b"\x80\x02not a pickle", r"truncated or damaged PyTorch file|refused"),
        (np.ones(3), "PyTorch file, or another zip file"),
        ({}, "no tensors.* dict"),
        ([torch.ones(1)], "no tensors.* list"),
        (torch.ones(1), "no tensors.* Tensor"),
        ({"state_dict": {}}, "no tensors"),
        ({"epoch": 3, "lr": 0.1}, "2 .*not tensors.* 'epoch'"),
        ({3: torch.ones(1)}, "1 .*not tensors.* 3"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_not_a_checkpoint(content, text, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        with path.open("wb") as file:
            np.savez(file, x=content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"^{path}: .*({text})"):
        tpn.create_model("tsm_r50_sthv2", checkpoint_path=path, base_channels=8)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        tpn.create_model("tsm_r50_sthv2", checkpoint_path=tmp_path / "nowhere.pth")
    with pytest.raises(IsADirectoryError):
        tpn.create_model("tsm_r50_sthv2", checkpoint_path=tmp_path)
