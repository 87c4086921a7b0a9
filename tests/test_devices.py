"""Runs of several processes."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from runs import CLASSES, KILL, LONG, SMALL, in_processes, metrics, weights, without_times
from scripts import ROOT

TWO_RANKS = """
import os
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
import tpn
from tpn.models.layers import freeze_batch_norm
from tpn.training.loss import TrainingLoss

def gradients(part, weights):
    torch.manual_seed(0)
    model = tpn.create_model("tpn_slowonly_tiny_motion", base_channels=8, drop_rate=0.0)
    loss = TrainingLoss(model, weights=weights)
    network = DistributedDataParallel(loss) if dist.is_initialized() else loss
    freeze_batch_norm(model.train())
    frames = torch.randint(256, (8, 16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    targets = torch.eye(14)[:8]
    network(frames[part], targets[part])[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])

def rank(i, path, weights):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=i, world_size=2)
    got = gradients(slice(4 * i, 4 * i + 4), weights)
    expected = torch.load(path + ".pt")
    error = (got - expected).abs().max() / expected.abs().max()
    print(f"{error:.1e}", flush=True)
    assert error < 1e-5 and expected.abs().max() > 0.01
    dist.destroy_process_group()

if __name__ == "__main__":
    for i, weights in enumerate((None, torch.linspace(0.2, 2, 14))):
        path = os.path.abspath(str(i))
        torch.save(gradients(slice(0, 8), weights), path + ".pt")
        mp.start_processes(rank, (path, weights), nprocs=2, start_method="fork")
"""


@pytest.mark.slow
def test_two_devices_give_the_gradients_of_one(tmp_path):
    """Each device has half of the batch; batch norm is frozen. With class weights, the halves have different sums of weights."""
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "two_ranks.py"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    assert len(re.findall(r"\de-\d\d", done.stdout)) == 4  # two processes, two losses


ELSEWHERE = """
import os
if os.environ["RANK"] == "1":  # as on another machine, without the checkpoint
    options["output"] += " elsewhere"
"""


@pytest.mark.slow
def test_two_devices_resume_bit_for_bit(videos, tmp_path):
    options = {**SMALL, **LONG, "accumulate": 1, "log_interval": 1, "data": str(videos)}
    in_processes({**options, "output": str(tmp_path / "whole")}, 2)
    options["output"] = str(tmp_path / "killed")
    assert in_processes(options, 2, before=KILL, check=False).returncode != 0
    assert torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["progress"]["step"] == 4
    in_processes({**options, "resume": True}, 2, before=ELSEWHERE)
    assert not (tmp_path / "killed elsewhere").exists()
    lines = [without_times(metrics(tmp_path / run)) for run in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (tmp_path / "killed" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_bad_files_of_all_devices_are_counted(videos, tmp_path):
    """Five of 25 files are bad. Neither of the two processes meets more than max_bad alone, but both together do."""
    for i in range(20):
        source = sorted((videos / "train").rglob("*.mp4"))[i % 12]
        (tmp_path / "train" / source.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / "train" / source.parent.name / f"{i}.mp4")
    for i in range(5):
        (tmp_path / "train" / CLASSES[0] / f"bad {i}.mp4").write_bytes(b"bad")
    options = {**SMALL, "data": str(tmp_path / "train"), "val_fraction": 0, "epochs": 1, "batch_size": 2, "max_bad": 0.17}
    done = in_processes({**options, "output": str(tmp_path / "run")}, 2, check=False)
    assert done.returncode != 0
    assert re.search("TooManyBadFilesError: .*5 of 25 videos", done.stderr)


FACTS_OF_RANK_0 = """
import os
if os.environ["RANK"] == "1":  # whose files may differ, and with them its plan
    loop.facts_of = None
"""


@pytest.mark.slow
def test_two_devices_train_like_one(videos, tmp_path):
    options = {**SMALL, "model_args": {"base_channels": 4, "drop_rate": 0.0}, "freeze": "bn", "data": str(videos)}
    options |= {"epochs": 2, "log_interval": 2, "optimizer": "sgd", "lr": 0.1, "class_weights": True}
    in_processes({**options, "batch_size": 3, "output": str(tmp_path / "two")}, 2, before=FACTS_OF_RANK_0)
    in_processes({**options, "batch_size": 6, "output": str(tmp_path / "one")})
    in_processes({**options, "batch_size": 2, "accumulate": 3, "output": str(tmp_path / "passes")})
    one, two, passes = (without_times(metrics(tmp_path / run)) for run in ("one", "two", "passes"))
    for other in (two, passes):
        for a, b in zip(one, other, strict=True):
            assert b == pytest.approx(a, rel=1e-4)
    start, end = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(start[name], end[name], atol=1e-5) for name in start)
