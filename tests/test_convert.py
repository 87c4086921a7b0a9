"""Checkpoint files: names, wrappings, what is refused, and what the messages say."""

import logging
import os
import pathlib
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from recipe import MODEL_OF, manifest_names, our_names, sketch_state_dict
from safetensors.torch import save_file

import tpn
from tpn import CheckpointError
from tpn.zoo.checkpoint import read_checkpoint
from tpn.zoo.convert import convert_state_dict, detect_layout, load_strict
from tpn.zoo.load import load_checkpoint

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
TSM = "original_tsm_r50_sthv2"


def save(obj, path, zipped=True, **kwargs):
    torch.save(obj, path, _use_new_zipfile_serialization=zipped, **kwargs)
    return path


@pytest.fixture(scope="module")
def tsm():
    """A TSM baseline on no memory: for checkpoints that are refused before anything is copied."""
    with torch.device("meta"):
        return tpn.create_model("tsm_r50_sthv2")


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
    with pytest.raises(CheckpointError, match=r"2 tensors have no place in tpn's original conversion: optimiser\.x, ema"):
        convert_state_dict({**source, "optimiser.x": torch.ones(1), "ema": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"fit neither .*; 2 tensors, the first are a, b"):
        detect_layout({"a": torch.ones(1), "b": torch.ones(1)})
    mm = sketch_state_dict("mmaction2_tpn_tsm_r50_sthv1")
    twice = {**mm, "backbone.layer1.0.conv1.conv.weight": mm["backbone.layer1.0.conv1.conv.net.weight"]}
    with pytest.raises(CheckpointError, match=r"two tensors .* would both become backbone\.layer1\.0\.conv1\.weight"):
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


def test_module_prefix_of_some_names_stays(small, tmp_path):
    tensors, _ = read_checkpoint(save({**small, "module.x": torch.ones(1)}, tmp_path / "a.pth"))
    assert tensors.keys() == {*small, "module.x"}


def test_safetensors(small, tmp_path):
    save_file(small, tmp_path / "a.safetensors", metadata={"format": "pt", "x": "y"})
    tensors, metadata = read_checkpoint(str(tmp_path / "a.safetensors"))
    assert all(torch.equal(tensors[k], small[k]) for k in small)
    assert metadata == {"format": "pt", "x": "y"}


@FORMATS
def test_the_name_of_the_file_does_not_matter(zipped, small, tmp_path):
    save_file(small, tmp_path / "a.pth")
    save(small, tmp_path / "a.safetensors", zipped)
    for name in ("a.pth", "a.safetensors"):
        tensors, _ = read_checkpoint(tmp_path / name)
        assert all(torch.equal(tensors[k], small[k]) for k in small)


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


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


CALLS = {
    "os.system": lambda marker: Call(os.system, f"touch {marker}"),
    "eval": lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"),
    "exec": lambda marker: Call(exec, f"open({str(marker)!r}, 'w')"),
    "open": lambda marker: Call(open, str(marker), "w"),
    "subprocess.Popen": lambda marker: Call(subprocess.Popen, ["touch", str(marker)]),
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


@FORMATS
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_truncated(keep, zipped, small, tmp_path):
    path = save({**small, "more": torch.randn(1000)}, tmp_path / "a.pth", zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=r"truncated or damaged|refused") as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("keep", [0.01, 0.5, 0.99])
def test_truncated_safetensors(keep, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({f"x{i}": torch.randn(10) for i in range(20)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match="truncated or damaged safetensors file") as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html>\n<html><body>Sign in", "a web page, not a checkpoint; save the file that the page offers"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it starts with 'version https://git-lfs"),
        (b"\x00\x01\x02", "neither a safetensors nor a PyTorch file"),
        (b"PK\x03\x04 not a zip", "truncated or damaged PyTorch file"),
        (b"\x80\x02not a pickle", r"truncated or damaged PyTorch file|refused"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_not_a_checkpoint(content, text, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=text) as error:
        tpn.create_model("tsm_r50_sthv2", checkpoint_path=path, base_channels=8)
    assert str(error.value).startswith(f"{path}: ")


def test_another_zip_file(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    with pytest.raises(CheckpointError, match=r"a zip file, but not one that torch\.save wrote"):
        read_checkpoint(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({}, "no tensors in it, but a dict"),
        ([torch.ones(1)], "no tensors in it, but a list"),
        (torch.ones(1), "no tensors in it, but a Tensor"),
        ({"state_dict": {}}, "no tensors in it"),
        ({"epoch": 3, "lr": 0.1}, "2 of its entries are not tensors, the first is 'epoch'"),
        ({3: torch.ones(1)}, "1 of its entries are not tensors, the first is 3"),
    ],
)
def test_no_tensors(content, text, tmp_path):
    path = save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=text) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        tpn.create_model("tsm_r50_sthv2", checkpoint_path=tmp_path / "nowhere.pth")
    with pytest.raises(IsADirectoryError):
        tpn.create_model("tsm_r50_sthv2", checkpoint_path=tmp_path)


# Loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_values_arrive(dtype, tmp_path):
    source = sketch_state_dict(TSM, dtype)
    model = tpn.create_model("tsm_r50_sthv2", checkpoint_path=save(source, tmp_path / "a.pth"))
    state = model.state_dict()
    for name, ours in our_names(TSM).items():
        assert state[ours].dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
        assert torch.equal(state[ours], source[name].to(state[ours].dtype)), name


def test_other_number_of_classes(tmp_path, caplog):
    name = "mmaction2_tpn_tsm_r50_sthv1"
    source = sketch_state_dict(name)
    path = save({"state_dict": source}, tmp_path / "a.pth")
    with caplog.at_level(logging.INFO, logger="tpn"):
        model = tpn.create_model("tpn_tsm_r50_sthv1", num_classes=5, checkpoint_path=path)
    (record,) = [r for r in caplog.records if r.name.startswith("tpn")]
    assert record.levelname == "INFO"
    assert record.getMessage() == (f"{path} is for 174 classes, the model has 5: new and untrained: head.fc and aux_head.fc")
    state = model.state_dict()
    fresh = {"head.fc.weight", "head.fc.bias", "aux_head.fc.weight", "aux_head.fc.bias"}
    for upstream, ours in our_names(name).items():
        if ours in fresh:
            assert state[ours].shape[0] == 5
            assert state[ours].abs().max() < 0.1
        else:
            assert torch.equal(state[ours], source[upstream]), ours


def test_same_number_of_classes_is_silent(tmp_path, caplog):
    path = save(sketch_state_dict(TSM), tmp_path / "a.pth")
    with caplog.at_level(logging.INFO, logger="tpn"):
        tpn.create_model("tsm_r50_sthv2", num_classes=174, checkpoint_path=path)
    assert not [r for r in caplog.records if r.name.startswith("tpn")]


def test_number_of_classes_comes_from_the_checkpoint(tmp_path):
    source = sketch_state_dict(TSM)
    source["cls_head.fc_cls.weight"] = torch.ones(9, 2048)
    source["cls_head.fc_cls.bias"] = torch.ones(9)
    model = tpn.create_model("tsm_r50_sthv2", checkpoint_path=save(source, tmp_path / "a.pth"))
    assert (model.num_classes, model.labels) == (9, None)
    assert model.head.fc.bias.eq(1).all()


@pytest.mark.parametrize(
    ("name", "manifest_name", "parts"),
    [
        (
            "slowonly_r50_k400",
            "original_slowonly_r101_32x2",
            [
                "SlowOnly R101, 400 classes, does not fit",
                "306 of its tensors are not in the model",
                "backbone.layer3.10.bn1.bias",
            ],
        ),
        (
            "slowonly_r101_k400",
            "original_slowonly_r50_8x8",
            ["SlowOnly R50, 400 classes, does not fit", "306 tensors of the model are missing", "backbone.layer3.10.bn1.bias"],
        ),
        (
            "slowonly_r50_k400",
            TSM,
            [
                "TSM R50, 174 classes, does not fit",
                "have another shape",
                "backbone.conv1.weight (64, 3, 7, 7) instead of (64, 3, 1, 7, 7)",
            ],
        ),
        (
            "slowonly_r50_k400",
            "original_tpn_slowonly_r50_8x8",
            ["a TPN on SlowOnly R50", "of its tensors are not in the model (aux_head.conv.bn.bias, "],
        ),
        (
            "tpn_slowonly_r50_k400",
            "original_slowonly_r50_8x8",
            ["checkpoint, SlowOnly R50, 400 classes", "tensors of the model are missing from it (aux_head.conv.bn.bias, "],
        ),
    ],
)
def test_wrong_architecture(name, manifest_name, parts, tmp_path):
    with torch.device("meta"):
        model = tpn.create_model(name)
    path = save(sketch_state_dict(manifest_name), tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, path)
    assert str(error.value).startswith(f"{path}: ")
    for part in parts:
        assert part in str(error.value)
    with torch.device("meta"), pytest.raises(CheckpointError, match="does not fit the model"):
        tpn.create_model(name, checkpoint_path=path)


def drop(state):
    del state["backbone.layer2.0.bn1.weight"]


def drop_a_batch_counter(state):
    del state["backbone.layer2.0.bn1.num_batches_tracked"]


def add(state):
    state["backbone.layer1.7.conv1.weight"] = torch.ones(1)


def reshape(state):
    state["backbone.bn1.bias"] = torch.ones(63)


def add_nan(state):
    state["backbone.bn1.bias"] = torch.full((64,), float("nan"))


def add_infinity(state):
    state["backbone.bn1.running_var"] = torch.cat([torch.ones(63), torch.tensor([float("inf")])])


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (drop, r"does not fit the model: 1 tensors of the model are missing from it \(backbone\.layer2\.0\.bn1\.weight\)$"),
        (drop_a_batch_counter, r"1 tensors of the model are missing from it \(backbone\.layer2\.0\.bn1\.num_batches_tracked\)$"),
        (add, r"does not fit the model: 1 of its tensors are not in the model \(backbone\.layer1\.7\.conv1\.weight\)$"),
        (reshape, r"1 have another shape \(backbone\.bn1\.bias \(63,\) instead of \(64,\)\)$"),
        (add_nan, r"backbone\.bn1\.bias holds NaN or infinite values; the checkpoint is damaged"),
        (add_infinity, r"backbone\.bn1\.running_var holds NaN or infinite values"),
    ],
)
@pytest.mark.parametrize("classes", [174, 5])
def test_damaged(damage, text, classes, tmp_path):
    state = sketch_state_dict(TSM)
    damage(state)
    path = save(state, tmp_path / "a.pth")
    with torch.device("meta"):
        model = tpn.create_model("tsm_r50_sthv2", num_classes=classes)
    with pytest.raises(CheckpointError, match=text) as error:
        load_checkpoint(model, path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_refused_checkpoint_changes_nothing():
    model = tpn.create_model("tsm_r50_sthv2", base_channels=8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bad = {k: torch.full_like(v, 7) for k, v in before.items()}
    bad["head.fc.bias"][0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        load_strict(model, bad)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# The two variants of TSM, which names and shapes do not tell apart


def test_original_weights_need_shift_shortcut(tmp_path):
    path = save(sketch_state_dict("original_tpn_tsm_r50_sthv2"), tmp_path / "a.pth")
    with torch.device("meta"):
        with pytest.raises(CheckpointError, match="pass shift_shortcut=True to create_model") as error:
            tpn.create_model("tpn_tsm_r50_sthv1", checkpoint_path=path)
        assert str(error.value).startswith(f"{path}: ")
        with pytest.raises(CheckpointError, match="shift_shortcut=True"):
            tpn.create_model("tpn_tsm_r50_sthv1", checkpoint_path=path, num_classes=5)
    assert tpn.create_model("tpn_tsm_r50_sthv1", checkpoint_path=path, shift_shortcut=True).backbone.shift_shortcut


def test_mmaction2_weights_need_the_other_variant(tmp_path):
    path = save(sketch_state_dict("mmaction2_tpn_tsm_r50_sthv1"), tmp_path / "a.pth")
    for name, kwargs in (("tpn_tsm_r50_sthv1", {"shift_shortcut": True}), ("tpn_tsm_r50_sthv1.original", {})):
        with torch.device("meta"), pytest.raises(CheckpointError, match="pass shift_shortcut=False to create_model"):
            tpn.create_model(name, checkpoint_path=path, **kwargs)


@pytest.mark.parametrize("flag", [True, False])
def test_saved_weights_know_their_variant(flag, tmp_path):
    saved = tpn.create_model("tsm_r50_sthv1", shift_shortcut=flag, base_channels=8, num_classes=3)
    path = tpn.save_pretrained(saved, tmp_path) / "model.safetensors"
    with pytest.raises(CheckpointError, match=f"trained with shift_shortcut={flag}.* pass shift_shortcut={flag} to create_model"):
        tpn.create_model("tsm_r50_sthv1", checkpoint_path=path, shift_shortcut=not flag, base_channels=8)
    loaded = tpn.create_model("tsm_r50_sthv1", checkpoint_path=path, shift_shortcut=flag, base_channels=8)
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict(), rtol=0, atol=0)


def test_slowonly_has_no_variants():
    names = ("mmaction2_tpn_slowonly_r50_8x8_k400", "original_tpn_slowonly_r50_8x8")
    first, second = (set(our_names(name).values()) for name in names)
    assert first == second
