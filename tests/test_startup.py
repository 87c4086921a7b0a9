"""What starts at once: `import tpn`, help, completion, and `tpn list` import neither PyTorch nor what imports it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ROOT, call
from servers import run_python

import tpn
from tpn import cli
from tpn.cli.commands import app

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]
HEAVY = {"torch", "timm", "torchvision", "av", "matplotlib"}
WITHOUT_PYTORCH = f"""
import os, sys
from scripts import call
heavy = {HEAVY | {"huggingface_hub"}}
def check(what):
    assert not heavy & sys.modules.keys(), (what, heavy & sys.modules.keys())
import tpn
check("import tpn")
from tpn.cli import main
def run(*args, code=0):
    done = call(main, "tpn", *args)
    assert done.returncode == code, done
    check(args)
    return done.stdout
for args in [["--help"], ["--version"], *([name, "--help"] for name in {COMMANDS!r})]:
    run(*args)
os.environ["_TPN_COMPLETE"] = "complete_bash"
for words in (["tr"], ["train", "--la"], ["predict", "--model", "tpn_"], ["info", "tsm_r50_sthv1."]):
    os.environ |= {{"COMP_WORDS": " ".join(["tpn", *words]), "COMP_CWORD": str(len(words))}}
    assert run(), words
del os.environ["_TPN_COMPLETE"]
run("list")
run("list", "zzz*", code=1)
run("info", "tpn_slowonly_r50_k4000", code=1)
run("predict", "missing.mp4", code=1)
run("predict", sys.executable, "--precision", "int4", code=2)
run("predict", sys.executable, "--model", "nonsense", code=1)
heavy.remove("huggingface_hub")  # its settings name the folder of the cache
run("list", "--weights")
run("info", "tpn_slowonly_r50_k400")
run("predict", sys.executable, "--model", "tsm_r50_sthv1.original", code=1)  # needs a manual download
"""


def test_help_completion_and_list_do_not_import_pytorch(tmp_path):
    run_python(WITHOUT_PYTORCH, tmp_path)


WITHOUT_TIMM = """
import os, sys
from scripts import call
from tpn.cli import main
done = call(main, "tpn", "predict", os.environ["VIDEO"], "--model", "tpn_slowonly_tiny_motion")
assert done.returncode == 0, done
assert not {"timm", "torchvision", "torch._dynamo"} & sys.modules.keys()
"""


def test_prediction_does_not_import_timm(tmp_path, videos):
    """timm and torchvision also import PyTorch's compiler; together, they double the time before a prediction."""
    run_python(WITHOUT_TIMM, tmp_path, VIDEO=str(videos / "train" / "blinking" / "000000.mp4"))


def complete(monkeypatch, *words):
    """The completions of the last word after `tpn`."""
    monkeypatch.setenv("_TPN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(["tpn", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    return call(cli.main, "tpn").stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train"]),
        (["predict", "--prec"], ["--precision"]),
        (["train", "--layer"], ["--layer-decay"]),
        (["explain", "v.mp4", "--method", "grad"], ["grad-cam"]),
        (["predict", "--precision", "b"], ["bfloat16"]),
        (["timeline", "--precision", "a"], ["auto"]),
        (["export", "model", "--format", "o"], ["onnx", "openvino"]),
        (["train", "--amp", "b"], ["bfloat16"]),
        (["info", "tsm_r50_sthv1."], ["tsm_r50_sthv1.original"]),
        *(
            ([*command, "tpn_tsm_r50"], ["tpn_tsm_r50_sthv1", "tpn_tsm_r50_sthv2"])
            for command in (
                *([name, "--model"] for name in ("demo", "predict", "features", "timeline", "explain", "train", "convert")),
                *([name] for name in ("evaluate", "export", "info", "check-model")),
            )
        ),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_completion(monkeypatch, words, expected):
    assert complete(monkeypatch, *words) == expected


def test_completion_in_bash(tmp_path):
    program = tmp_path / "tpn"
    program.write_text(f"#!{sys.executable}\nfrom tpn.cli import main\nmain()\n")
    program.chmod(0o755)
    script = """
eval "$(tpn --show-completion)"
COMP_WORDS=(tpn predict --model tpn_tsm_r50_) COMP_CWORD=3
_tpn_completion tpn
echo "${COMPREPLY[@]}"
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash"], input=script, env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout == "tpn_tsm_r50_sthv1 tpn_tsm_r50_sthv2\n", done.stderr


def test_every_public_name_exists():
    """The stub has one list for imports, which the package reads, and one for type checkers."""
    (listed,) = (node for node in ast.parse(Path(tpn.__file__ + "i").read_text()).body if isinstance(node, ast.Assign))
    assert ast.literal_eval(listed.value) == tpn.__all__
    names = {}
    exec("from tpn import *", names)
    assert names.keys() - {"__builtins__"} == set(tpn.__all__)
    assert names["create_model"] is tpn.zoo.create.create_model
    assert set(tpn.__all__) < set(dir(tpn))


def test_modules_are_attributes(tmp_path):
    script = """
import tpn
assert list(tpn.video.sampling.dense_indices(8, num_frames=2, frame_interval=4)[0]) == [1, 5]
assert tpn.InputSpec(8).clip_span == 8
assert "slowonly_r50_k400" in tpn.zoo.names.list_models()
import sys
assert "torch" not in sys.modules
"""
    run_python(script, tmp_path)
    assert not any(hasattr(module, "nothing") for module in (tpn, tpn.models, tpn.video, tpn.zoo))
    assert tpn.models.neck.TemporalPyramid is tpn.TemporalPyramid


IN_ANY_ORDER = """
import os, sys
import torch, torchvision
for imports in (
    "import tpn, timm",
    "import timm, tpn",
    "import tpn; from importlib.util import find_spec; assert find_spec('timm'); from tpn.models.backbones import ResNetTSM; import timm",
):
    assert not {"tpn", "timm"} & sys.modules.keys()
    if os.fork() == 0:
        exec(imports)
        assert timm.create_model("tsm_r50_sthv1", base_channels=4).num_classes == 174
        os._exit(0)
    assert os.wait()[1] == 0, imports
"""


@pytest.mark.slow
def test_timm_knows_the_models_in_any_order(tmp_path):
    run_python(IN_ANY_ORDER, tmp_path)
