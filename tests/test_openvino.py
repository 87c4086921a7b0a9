"""OpenVINO: the same logits as PyTorch, damaged files, int8 on real clips, `tpn.optimize(backend="openvino")`."""

import gc
import json
import os
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from servers import run_python
from test_cli import run
from test_export import SPEC, TINY, build, differences
from test_models import relative_error
from torch import nn
from videos import write_video

import tpn
from tpn import export, openvino_runtime, quantization
from tpn.errors import CheckpointError
from tpn.training import evaluation
from tpn.training.data import open_validation
from tpn.video import encode, motion
from tpn.video.datasets import open_dataset

sys.modules.setdefault("openvino_telemetry", None)
openvino = pytest.importorskip("openvino")

SHOWN = ("turning clockwise", "blinking", "growing")


class Own(nn.Module):
    """A backbone of one's own: two maps."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(3, 8, 3, (1, 4, 4), 1)
        self.second = nn.Conv3d(8, 16, 3, (1, 2, 2), 1)

    def forward(self, x):
        x = self.first(x).relu()
        return x, self.second(x).relu()


@pytest.fixture(scope="module")
def model():
    return tpn.create_model(TINY, pretrained=True).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The model that ships with tpn, exported, and a video."""
    folder = tmp_path_factory.mktemp("openvino")
    write_video(folder / "video.mp4", num_frames=40)
    assert export.export_openvino(model, folder / "tiny.xml") is None
    assert sorted(path.name for path in folder.iterdir()) == ["tiny.bin", "tiny.xml", "video.mp4"]
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Rendered motions in class folders."""
    folder = tmp_path_factory.mktemp("clips")
    for name in SHOWN:
        for seed in range(3):
            path = folder / name / f"{seed}.mp4"
            path.parent.mkdir(exist_ok=True)
            encode.write_video(path, motion.render(motion.CLASSES.index(name), tempo=3.0, seed=seed), fps=motion.FPS)
    return folder


@pytest.mark.parametrize(
    "which",
    [
        "tiny",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("levels of other lengths", "no temporal modulation")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("SlowOnly R50", "TSM", "timm, shifted", "torchvision")),
        "own",
    ],
)
def test_same_logits(which, tmp_path):
    torch.manual_seed(0)
    model = tpn.build(Own(), num_classes=5, input_spec=SPEC) if which == "own" else build(which)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export.export_openvino(model, tmp_path / "model.xml", size=64)
    assert export.max_difference(model, tmp_path / "model.xml") < 1e-4
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert getattr(model.backbone, "folded", True)
    assert max(differences(model, export.load(tmp_path / "model.xml"), 64)) < 1e-4
    clips = torch.randn(3, model.in_chans, model.input_spec.num_frames, 64, 64)
    network = openvino.Core().compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        assert relative_error(torch.from_numpy(network(clips.numpy())[0]), model.eval()(clips)) < 1e-4


def test_tsm_runs_unfolded(monkeypatch):
    """With 3D layers, whose shifts are convolutions."""
    traced = []

    def trace(model, *args, **kwargs):
        traced.append(model.backbone.folded)
        raise RuntimeError

    monkeypatch.setattr(torch.export, "export", trace)
    with pytest.raises(RuntimeError):
        tpn.optimize(build("TSM"), backend="openvino")
    assert traced == [False]


def test_metadata(folder, model):
    exported = export.load(folder / "tiny.xml")
    for name in ("num_classes", "num_features", "in_chans", "labels", "input_spec"):
        assert getattr(exported, name) == getattr(model, name), name
    about = json.loads(openvino.Core().read_model(folder / "tiny.xml").get_rt_info("tpn").value)  # readable without tpn
    assert about == json.loads(json.dumps(exported.about))
    read = openvino.Core().read_model(folder / "tiny.xml")
    assert [port.get_any_name() for port in (*read.inputs, *read.outputs)] == ["clips", "logits"]
    assert str(read.inputs[0].get_partial_shape()) == "[?,3,16,64,64]"


def test_the_file_is_a_name(folder, model, tmp_path):
    expected = tpn.VideoClassifier(model)(folder / "video.mp4")
    for options in ({}, {"batch_size": 2}, {"precision": "float32"}):
        got = tpn.VideoClassifier(folder / "tiny.xml", **options)(folder / "video.mp4")
        torch.testing.assert_close(got.view_logits, expected.view_logits, rtol=0, atol=1e-4)
    half = tpn.VideoClassifier(str(folder / "tiny.xml"), precision="bfloat16")(folder / "video.mp4")
    torch.testing.assert_close(half.probs, expected.probs, rtol=0, atol=0.02)
    for options in ({"precision": "float16"}, {"compile": True}, {"device": "meta"}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=rf"{name}.*'{value}'|tiny.xml .* {name} out"):
            tpn.VideoClassifier(folder / "tiny.xml", **options)
    done = run("predict", "video.mp4", "-m", "tiny.xml", "--json", cwd=folder)
    assert json.loads(done.stdout)["top"][0]["label"] == expected.top(1)[0][0]
    (tmp_path / "list.txt").write_text(f"{folder / 'video.mp4'} 3\n")
    np.testing.assert_allclose(tpn.evaluate(folder / "tiny.xml", tmp_path / "list.txt").probs[0], expected.probs, atol=1e-5)


def test_results_of_two_precisions_are_not_merged(folder, tmp_path):
    (tmp_path / "list.txt").write_text(f"{folder / 'video.mp4'} 3\n")
    data = open_validation(tmp_path / "list.txt", SPEC, classes=motion.CLASSES)
    models = [export.load(folder / "tiny.xml", precision=precision) for precision in ("float32", "bfloat16")]
    models += [export.ExportedClassifier(models[0].run, models[0].about | {"id": name}) for name in "ab"]  # as from tpn.optimize
    identities = [json.dumps(evaluation._identity(each, data)) for each in models]
    assert len(set(identities)) == 4


@pytest.mark.slow
def test_processes_are_left_as_they_were(folder):
    """No statistics are sent, and the stack of signal handlers exists after the models are gone, in any order."""
    out, _ = run_python(
        f"""
import gc, os, signal, sys
from tpn import export
models = [export.load({str(folder / "tiny.xml")!r}) for _ in range(2)]
assert sys.modules['openvino_telemetry'] is None
while models:
    del models[0]
    gc.collect()
signal.signal(signal.SIGTERM, lambda *args: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
""",
        folder,
    )
    assert out == "handled\n"


def test_several_threads_may_call_one_model(folder):
    exported = export.load(folder / "tiny.xml")
    x = torch.randn(8, 3, 16, 64, 64)
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(exported, x.split(1)))
    assert torch.equal(torch.cat(rows), exported(x))


def test_damaged_files(folder, tmp_path):
    def copy(name):
        for suffix in ("xml", "bin"):
            shutil.copy(folder / f"tiny.{suffix}", tmp_path / f"{name}.{suffix}")
        return tmp_path / f"{name}.xml"

    copy("alone").with_suffix(".bin").unlink()
    with pytest.raises(CheckpointError, match=r"alone.xml: its weights, alone.bin, are missing"):
        export.load(tmp_path / "alone.xml")
    data = bytearray(copy("changed").with_suffix(".bin").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "changed.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"changed.xml: changed.bin is damaged, or belongs to another model"):
        export.load(tmp_path / "changed.xml")
    half = copy("half").with_suffix(".bin")
    half.write_bytes(half.read_bytes()[: len(data) // 2])
    for name, content in {"cut": copy("cut").read_bytes()[:5000], "empty": b"", "text": b"no model\n" * 9, "zip": b"PK"}.items():
        copy(name).write_bytes(content)
    for name in ("half", "cut", "empty", "text", "zip"):
        with pytest.raises(CheckpointError, match=rf"{name}.xml: .*damaged[^\n]*$"):
            export.load(tmp_path / f"{name}.xml")
    foreign = openvino.Core().read_model(copy("foreign"))
    foreign.set_rt_info("{", "tpn")
    openvino.save_model(foreign, tmp_path / "broken.xml", compress_to_fp16=False)
    with pytest.raises(CheckpointError, match="broken.xml: the metadata is damaged"):
        export.load(tmp_path / "broken.xml")
    relu = openvino.opset13.relu(p := openvino.opset13.parameter([1, 3], np.float32))
    openvino.save_model(openvino.Model([relu], [p]), tmp_path / "foreign.xml")
    (tmp_path / "foreign.bin").touch()
    with pytest.raises(CheckpointError, match="foreign.xml: not a model that tpn exported"):
        export.load(tmp_path / "foreign.xml")
    done = run("predict", folder / "video.mp4", "-m", "changed.xml", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


@pytest.mark.slow
def test_nothing_is_half_written(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"\.xml, got .*model\.onnx"):
        export.export_openvino(model, tmp_path / "model.onnx")
    save = openvino_runtime.save

    def save_once(*args):
        save(*args)
        raise OSError("disk full")

    monkeypatch.setattr(openvino_runtime, "save", save_once)
    with pytest.raises(OSError, match="disk full"):
        export.export_openvino(model, tmp_path / "model.xml")
    assert not list(tmp_path.iterdir())


def test_small_convolutions_are_split():
    """The same numbers from 1x1x1 convolutions; grouped ones and those of larger maps stay."""
    torch.manual_seed(0)
    layers = [nn.Conv3d(4, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.Conv3d(8, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1))]  # to 16, to 8
    layers += [nn.Conv3d(8, 4, (3, 1, 1), (2, 1, 1), (1, 0, 0)), nn.Conv3d(4, 4, (3, 1, 1), groups=2), nn.Conv3d(4, 6, 1)]
    network = nn.Sequential(*layers)
    x = torch.randn(1, 4, 6, 32, 31)
    converted = openvino.convert_model(torch.export.export(network, (x,)))
    converted.reshape({0: list(x.shape)})
    assert [op.get_type_name() for op in converted.get_ordered_ops()].count("Convolution") == 4
    openvino_runtime.split_small_convolutions(converted)
    assert [op.get_type_name() for op in converted.get_ordered_ops()].count("Convolution") == 1 + 9 + 3 + 1
    got = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]
    assert relative_error(torch.from_numpy(got), network(x).detach()) < 1e-5


@pytest.mark.parametrize(("precision", "amx", "split"), [("bfloat16", True, 1), ("bfloat16", False, 0), ("float32", True, 0)])
def test_how_a_file_runs(folder, monkeypatch, precision, amx, split):
    splits, given = [], []
    core = openvino_runtime._core()

    def compile_model(network, device, options):
        given.append(options)
        return core.compile_model(network, device, options)

    monkeypatch.setattr(openvino_runtime, "cpu_has_amx", lambda: amx)
    monkeypatch.setattr(openvino_runtime, "split_small_convolutions", splits.append)
    monkeypatch.setattr(
        openvino_runtime, "_core", lambda: SimpleNamespace(compile_model=compile_model, read_model=core.read_model)
    )
    export.load(folder / "tiny.xml", precision=precision)
    assert len(splits) == split
    assert given[0]["INFERENCE_NUM_THREADS"] == torch.get_num_threads()
    assert given[0]["INFERENCE_PRECISION_HINT"] == openvino_runtime.PRECISIONS[precision]


@pytest.mark.slow
def test_optimize(model):
    x = torch.randn(2, 3, 16, 64, 64)
    fast = tpn.optimize(model, "float32", backend="openvino", sample=x)
    assert fast.report.max_difference < 1e-5
    assert fast.report.same_top1
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 1e-5
    half = tpn.optimize(model, "bfloat16", backend="openvino", sample=x)
    assert half.report.dtype == torch.bfloat16
    frames = torch.randint(256, (40, 3, 64, 64), dtype=torch.uint8)
    expected, got = (tpn.VideoClassifier(each)(frames).probs for each in (model, fast))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"sample.*\(1, 3, 16, 64, 32\)"):
        tpn.optimize(model, backend="openvino", sample=torch.zeros(1, 3, 16, 64, 32))
    with pytest.raises(ValueError, match="backend must be torch or openvino, got 'tensorrt'"):
        tpn.optimize(model, backend="tensorrt")
    with pytest.raises(ValueError, match="compile=True"):
        tpn.optimize(model, backend="openvino", compile=True)
    with pytest.raises(ValueError, match="dtype.*float16"):
        tpn.optimize(model, "float16", backend="openvino")


@pytest.mark.slow
def test_int8(model, clips, tmp_path, monkeypatch):
    pytest.importorskip("nncf")
    done = run("export", TINY, "-o", "tiny.xml", "--int8", "--calibrate", clips, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"tiny.xml  1.\d MB, int8, calibrated on 6 clips, same result as in float32 on 100.0% of 3 held-back clips, "
        r"0 layers left out\n",
        done.stdout,
    )
    exported = export.load(tmp_path / "tiny.xml")
    assert exported.about["precision"] == "int8"
    assert exported.about["quantization"]["agreement"] == 1
    assert exported.input_spec == model.input_spec
    x = torch.randn(3, 3, 16, 64, 64)
    with torch.no_grad():
        difference = (exported(x).softmax(1) - model(x).softmax(1)).abs().max()
    assert 1e-5 < difference < 0.2
    assert tpn.evaluate(tmp_path / "tiny.xml", write_table(clips, tmp_path / "table.csv")).metrics["top1"] > 80
    decisions = count()
    monkeypatch.setattr(quantization, "_most_probable", lambda logits: next(decisions))
    monkeypatch.setattr("nncf.quantize_with_accuracy_control", lambda model, *args, **kwargs: model)
    before = (tmp_path / "tiny.bin").read_bytes()
    done = run("export", TINY, "-o", "tiny.xml", "--int8", "--calibrate", clips, cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(r"error: int8.* 0.0% of 3 held-back clips.*2.0%", done.stderr)
    assert (tmp_path / "tiny.bin").read_bytes() == before


def write_table(clips, path):
    """Write a table with labels, in which the last video of each class is for validation."""
    rows = [(file, file.parent.name, "val" if file.stem == "2" else "train") for file in sorted(clips.rglob("*.mp4"))]
    path.write_text("path,label,split\n" + "".join(f"{','.join(map(str, row))}\n" for row in rows))
    return path


@pytest.mark.slow
def test_layers_that_cost_too_much_are_left_out(clips, tmp_path, monkeypatch):
    """Results are equal only where a logit nearly is that of float32, which int8 cannot reach: every layer is restored."""
    pytest.importorskip("nncf")
    model = tpn.build(Own(), neck=None, num_classes=3, input_spec=SPEC)
    nn.init.normal_(model.head.fc.weight)
    monkeypatch.setattr(quantization, "_most_probable", lambda logits: round(float(logits.max()), 4))
    monkeypatch.setattr(openvino_runtime, "fastest_precision", lambda: "float32")
    report = export.export_openvino(model, tmp_path / "tiny.xml", calibrate=clips)
    assert report.left_out
    assert f"{len(report.left_out)} layers left out ({report.left_out[0]}" in str(report)
    gc.collect()
    received = []
    before = signal.signal(signal.SIGUSR1, lambda *args: received.append(args[0]))
    os.kill(os.getpid(), signal.SIGUSR1)  # NNCF's Cores have left the stack of signal handlers as it was
    signal.signal(signal.SIGUSR1, before)
    assert received == [signal.SIGUSR1]


def test_the_label_is_that_of_the_video_that_was_read(clips, tmp_path):
    for name in SHOWN[:2]:
        (tmp_path / name).mkdir()
        shutil.copy(clips / name / "0.mp4", tmp_path / name)
    (tmp_path / SHOWN[0] / "0.mp4").write_bytes(b"damaged")
    data = open_dataset(tmp_path, SPEC, train=False)
    data.max_bad = 0.5
    assert [data[i][1] for i in range(2)] == [data.classes.index(SHOWN[1])] * 2


def test_decisions():
    logits = np.float32([-1, 3, 0.5])
    assert quantization._most_probable(logits) == 1
    assert quantization._classes_above_half(logits) == (False, True, True)


def test_split(model, clips, tmp_path):
    table = write_table(clips, tmp_path / "table.csv")
    calibration, held_back = quantization.divide_data(table, model.input_spec, model.labels)
    assert {item.split for item in calibration.items} == {"train"}
    assert {item.split for item in held_back.items} == {"val"}
    assert calibration.classes == held_back.classes == model.labels


def test_test_videos_do_not_choose_the_network(model, clips, tmp_path):
    table = write_table(clips, tmp_path / "table.csv")
    table.write_text(table.read_text().replace("train", "test", 1))
    calibration, held_back = quantization.divide_data(table, model.input_spec, model.labels)
    assert {item.split for item in calibration.items} == {"train"}
    assert {item.split for item in held_back.items} == {"val"}


@pytest.mark.slow
def test_accuracy_with_labels(model, clips, tmp_path):
    pytest.importorskip("nncf")
    table = write_table(clips, tmp_path / "table.csv")
    report = export.export_openvino(model, tmp_path / "tiny.xml", calibrate=table, max_drop=0.01)
    assert (report.calibration, report.held_back) == (6, 3)
    assert report.accuracy == report.accuracy_float32 == 1
    assert "accuracy 100.0%, in float32 100.0%" in str(report)


def test_options_of_int8(clips, tmp_path):
    for named, *options in (
        ("--int8", "--int8"),
        ("--calibrate", "--calibrate", clips),
        ("--int8", "--int8", "--calibrate", clips, "-f", "onnx"),
        ("--max-drop", "--max-drop", 0.1),
        ("--root", "--root", clips),
        ("--first-frame", "--first-frame", 0),
        ("--calibrate", "-f", "openvino", "--int8", "--calibrate", clips / "missing"),
    ):
        done = run("export", TINY, *options, cwd=tmp_path)
        assert done.returncode == 2, options
        assert named in done.stderr
    model = build("tiny")
    for value in (5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"max_drop={value}"):
            export.export_openvino(model, tmp_path / "x.xml", calibrate=clips, max_drop=value)
    with pytest.raises(ValueError, match="max_drop=0.1"):
        export.export_openvino(model, tmp_path / "x.xml", max_drop=0.1)
    with pytest.raises(ValueError, match=r"7 classes.* 3 classes"):
        export.export_openvino(tpn.create_model(TINY, num_classes=7), tmp_path / "x.xml", calibrate=clips, max_drop=0.1)
    with pytest.raises(ValueError, match=r"classes.*calibrate"):
        export.export_openvino(tpn.create_model(TINY, num_classes=0), tmp_path / "x.xml", calibrate=clips)
    (tmp_path / "several.csv").write_text(
        "path,label\n" + "".join(f"{file},{SHOWN[0]}|{SHOWN[1]}\n" for file in clips.rglob("*.mp4"))
    )
    with pytest.raises(ValueError, match=r"several\.csv.*several for one video"):
        export.export_openvino(model, tmp_path / "x.xml", calibrate=tmp_path / "several.csv", max_drop=0.1)
    single = tmp_path / "one" / "a"
    single.mkdir(parents=True)
    shutil.copy(next(clips.rglob("*.mp4")), single)
    with pytest.raises(ValueError, match="at least 2"):
        quantization.divide_data(tmp_path / "one", SPEC, None)
