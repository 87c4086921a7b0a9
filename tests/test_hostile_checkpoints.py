"""Hostile and damaged checkpoint files, read in a process that has little memory and that no file may end; see `hostile.py`.

TPN_FUZZ=10 reads ten times as many files, and TPN_FUZZ_SEED=1 others.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from hostile import entries, tensor, zip_of
from safetensors.torch import save_file
from scripts import ROOT

import tpn
from tpn.zoo.reader import read_checkpoint

FUZZ, SEED = int(os.environ.get("TPN_FUZZ", 1)), os.environ.get("TPN_FUZZ_SEED", "0")
SPEC = tpn.InputSpec(4, 1, num_clips=1, num_crops=1, short_side=32, crop_size=32)


def read_elsewhere(kind, count, folder):
    """Read files of a kind in another process; return how they ended."""
    command = [sys.executable, "-W", "ignore", Path(hostile.__file__), kind, SEED, str(count * FUZZ), folder]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture
def folder(tmp_path):
    """A saved model."""
    model = tpn.create_model("tpn_slowonly_tiny_motion", base_channels=2, num_classes=3, input_spec=SPEC)
    return tpn.save_pretrained(model, tmp_path / "model")


@pytest.mark.slow
def test_crafted_files(tmp_path):
    assert read_elsewhere("crafted", 1, tmp_path) == dict.fromkeys(hostile.CRAFTED, "refused")


@pytest.mark.slow
def test_altered_pickles(tmp_path):
    """Most programs are refused; some still describe tensors."""
    ends = read_elsewhere("pickles", 3000, tmp_path)
    assert ends["refused"] > ends["read"] > 30 * FUZZ


@pytest.mark.slow
def test_altered_files(tmp_path):
    """Checksums find what changes a tensor. The rest of the file is padding and names that nothing reads."""
    ends = read_elsewhere("files", 600, tmp_path)
    assert ends["refused"] > ends["read"] > 0


@pytest.mark.slow
def test_altered_safetensors(folder):
    ends = read_elsewhere("safetensors", 300, folder)
    assert ends["refused"] > ends["read"] > 0


@pytest.mark.slow
def test_sizes_in_both_files(folder):
    """A configuration with huge sizes, and weights that confirm it: nothing is built that is larger than the file."""
    assert read_elsewhere("sizes", 1, folder)["refused"] > 20


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_flipped_bits_of_a_tensor_are_found(zipped, tmp_path):
    """In files of PyTorch 1.6 or later. Earlier ones have no checksums."""
    path, values = tmp_path / "a.pth", torch.arange(100.0)
    data = hostile.torch_file({"w": values}, zipped)
    start, found = data.index(values.numpy().tobytes()), 0
    for bit in range(0, 3200, 53):
        altered = bytearray(data)
        altered[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        try:
            read_checkpoint(path)
        except tpn.CheckpointError:
            found += 1
    assert found == (61 if zipped else 0)


def test_files_without_checksums(tmp_path):
    """torch.save can leave them out."""
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"w": torch.arange(3.0)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "a.pth")[0]["w"].tolist() == [0, 1, 2]


def test_parts_of_a_storage(tmp_path):
    path = tmp_path / "a.pth"
    tensors = {
        "all": tensor(size=(4,)),
        "column": tensor(offset=1, size=(2,), stride=(2,)),
        "one": tensor(offset=3, size=(), stride=()),
        "none": tensor(size=(0, 5), stride=(1, 1)),
    }
    path.write_bytes(zip_of(entries(**tensors)))
    found = {name: value.tolist() for name, value in read_checkpoint(path)[0].items()}
    assert found == {"all": [0, 1, 2, 3], "column": [1, 3], "one": 3, "none": []}


def test_a_stem_of_terabytes_is_not_adapted(tmp_path):
    """All its values are one number of the file."""
    path, args = tmp_path / "a.pth", {"base_channels": 2}
    state = tpn.create_model("slowonly_r50_k400", **args).state_dict()
    state["backbone.conv1.weight"] = torch.zeros(1).expand(10**6, 3, 10**6, 7, 7)
    torch.save(state, path)
    with pytest.raises(tpn.CheckpointError, match=rf"{path}: .*backbone\.conv1\.weight \(1000000, 3, "):
        tpn.create_model("slowonly_r50_k400", in_chans=1, checkpoint_path=path, **args)


WITHOUT_VALUES = {
    "meta": lambda: torch.ones(2, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "array": lambda: np.ones(3),
}


OTHER_TENSORS = [
    *itertools.product(["zip", "legacy", "state dict"], WITHOUT_VALUES),
    ("safetensors", "float8"),
    ("safetensors", "complex"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("how", "kind"), OTHER_TENSORS)
def test_other_tensors(how, kind, tmp_path):
    """One error, which names the file and the entry."""
    path, overlay, name = tmp_path / "a.pth", None, str(tmp_path / "a.pth")
    state = tpn.create_model("tsm_r50_sthv1", base_channels=2).state_dict() | {"backbone.bn1.bias": WITHOUT_VALUES[kind]()}
    if how == "state dict":
        path, overlay, name = None, {"state_dict": state}, "the state dict"
    elif how != "safetensors":
        torch.save(state, path, _use_new_zipfile_serialization=how == "zip")
    else:
        save_file({name: value.clone() for name, value in state.items()}, path)
    with pytest.raises(tpn.CheckpointError, match=rf"^{name}: .*backbone\.bn1\.bias"):
        tpn.create_model(
            "tsm_r50_sthv1", overlay is not None, base_channels=2, checkpoint_path=path, pretrained_cfg_overlay=overlay
        )


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (torch.tensor([0, 1e39], dtype=torch.float64), "beyond.*torch.float32"),
        (torch.tensor([0, float("inf")], dtype=torch.float64), "infinite"),
        (torch.tensor([0, 1e38], dtype=torch.float64), ""),
        (torch.tensor([3e38, 3e38]), ""),  # whose sum overflows
    ],
)
def test_values_that_become_infinite(values, says, tmp_path):
    path = tmp_path / "a.pth"
    state = tpn.create_model("tsm_r50_sthv1", base_channels=2).state_dict()
    torch.save(state | {"backbone.bn1.bias": values}, path)
    if says:
        with pytest.raises(tpn.CheckpointError, match=rf"^{path}: backbone\.bn1\.bias.*{says}"):
            tpn.create_model("tsm_r50_sthv1", base_channels=2, checkpoint_path=path)
    else:
        model = tpn.create_model("tsm_r50_sthv1", base_channels=2, checkpoint_path=path)
        assert torch.equal(model.backbone.bn1.bias, values.float())
