"""Published checkpoints of a few megabytes: entries of the weights table with narrow networks, served from loopback."""

import hashlib
import io
import tempfile
from dataclasses import replace

import torch
from recipe import our_names
from safetensors.torch import save

import tpn
from tpn.zoo import publish, sources, weights

SLOWONLY, TSM, BY_HAND = "tpn_slowonly_r50_k400.in1k", "tpn_tsm_r50_sthv1.in1k", "tsm_r50_sthv2.original"
MANIFESTS = {
    SLOWONLY: "mmaction2_tpn_slowonly_r50_8x8_k400",
    TSM: "mmaction2_tpn_tsm_r50_sthv1",
    BY_HAND: "original_tsm_r50_sthv2",
    "tpn_slowonly_r101_32x2_k400.original": "original_tpn_slowonly_r101_32x2",
}


def change_entry(name, setattr=setattr, **changes):
    """Replace an entry of the table, for this process or this test; its network becomes narrow."""
    entry = weights.WEIGHTS[name]
    entry = replace(entry, model_args={**entry.model_args, "base_channels": 4}, **changes)
    table = {**weights.WEIGHTS, name: entry}
    for module in (weights, publish, sources):
        setattr(module, "WEIGHTS", table)
    return entry


def upstream_file(name, seed=0, dtype=torch.float32):
    """(bytes, hash) of a checkpoint as its publisher would write it, for the narrow network of an entry."""
    torch.manual_seed(seed)
    state = random_model(name).state_dict()
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    buffer = io.BytesIO()
    torch.save({"meta": {}, "state_dict": {up: state[ours] for up, ours in our_names(MANIFESTS[name]).items()}}, buffer)
    return buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest()


def random_model(name):
    """The narrow network of an entry, with random weights, also where training starts from constants."""
    model = tpn.create_model(name, base_channels=4).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if tensor.ndim == 1 else tensor.normal_(0, 0.1)
    return model


def serve(server, name, setattr=setattr, **kwargs):
    """Put an entry's checkpoint on a file server, under a name with its hash; return the changed entry."""
    data, sha256 = upstream_file(name, **kwargs)
    path = f"/weights/{MANIFESTS[name]}-{sha256[:8]}.pth"
    server.files[path] = data
    return change_entry(name, setattr, url=server.url + path, sha256=sha256[:8])


def put_on_hub(hub, repo_id, seed=5):
    torch.manual_seed(seed)
    model = random_model(SLOWONLY)
    return model.state_dict(), hub.add(repo_id, weights=save(model.state_dict()))


def wanted(server):
    """The tensors of the one checkpoint on a file server, in our layout."""
    (data,) = server.files.values()
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        file.write(data)
        file.flush()
        return tpn.create_model(SLOWONLY, checkpoint_path=file.name).state_dict()


def same(model, tensors):
    return all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())


def one_line(caplog):
    """The line that says where the weights come from."""
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("weights of")]
    return line
