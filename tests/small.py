"""Published checkpoints of a few megabytes: entries of the table with narrow networks, served from loopback."""

import hashlib
import io
import tempfile
from dataclasses import replace
from functools import cache

import torch
from recipe import our_names
from safetensors.torch import save

import tpn
from tpn.zoo import checkpoints
from tpn.zoo.checkpoints import Link

SLOWONLY, TSM, BY_HAND = "tpn_slowonly_r50_k400.in1k", "tpn_tsm_r50_sthv1.in1k", "tsm_r50_sthv2.original"
MANIFESTS = {
    SLOWONLY: "mmaction2_tpn_slowonly_r50_8x8_k400",
    TSM: "mmaction2_tpn_tsm_r50_sthv1",
    BY_HAND: "original_tsm_r50_sthv2",
    "tpn_slowonly_r101_32x2_k400.original": "original_tpn_slowonly_r101_32x2",
}


def change_entry(_name, setattr=setattr, **changes):
    """Replace an entry of the table, or with `name` add another, for this process or this test; its network becomes narrow."""
    entry = checkpoints.CHECKPOINTS[_name]
    backbone = replace(entry.config.backbone, args={**entry.config.backbone.args, "base_channels": 4})
    entry = replace(entry, config=replace(entry.config, backbone=backbone), **changes)
    setattr(checkpoints, "CHECKPOINTS", {**checkpoints.CHECKPOINTS, entry.name: entry})
    return entry


def script_of(entry):
    """Python code that puts a changed entry in the table of another process."""
    return f"import small\nfrom tpn.zoo.checkpoints import *\nsmall.change_entry({entry.name!r}, source={entry.source!r})\n"


@cache
def upstream_file(name, seed=0, dtype=torch.float32, **kwargs):
    """(bytes, hash) of a checkpoint as its publisher would write it, for the narrow network of an entry."""
    torch.manual_seed(seed)
    state = random_model(name, **kwargs).state_dict()
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    buffer = io.BytesIO()
    torch.save({"meta": {}, "state_dict": {up: state[ours] for up, ours in our_names(MANIFESTS[name]).items()}}, buffer)
    return buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest()


def random_model(name, **kwargs):
    """The narrow network of an entry, with random values also in tensors that training starts from constants."""
    model = tpn.create_model(name, base_channels=4, **kwargs).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if tensor.ndim == 1 else tensor.normal_(0, 0.1)
    return model


def serve(server, name, setattr=setattr, **kwargs):
    """Put an entry's checkpoint on a file server, under a name with its hash; return the changed entry."""
    data, sha256 = upstream_file(name, **kwargs)
    path = f"/weights/{MANIFESTS[name]}-{sha256[:8]}.pth"
    server.files[path] = data
    return change_entry(name, setattr, source=Link(server.url + path, sha256[:8]))


def put_on_hub(hub, repo_id, seed=5):
    """Commit the weights of a narrow network; return (its state dict, the hash of the commit)."""
    torch.manual_seed(seed)
    tensors = random_model(SLOWONLY).state_dict()
    return tensors, hub.add(repo_id, weights=save(tensors))


def wanted(server):
    """The tensors of the one checkpoint on a file server, in our layout."""
    (data,) = server.files.values()
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        file.write(data)
        file.flush()
        return tpn.create_model(SLOWONLY, checkpoint_path=file.name).state_dict()


def same(model, tensors):
    state = model.state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def one_line(caplog):
    """The line that says where the weights come from."""
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("weights of")]
    return line
