"""Exported models: the same logits in onnxruntime and PyTorch's exported programs for any batch size; errors."""

import importlib.util
import json
import re
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from backbones import Pyramid
from scripts import ROOT, example
from test_cli import run
from test_models import randomize_norms, relative_error
from torch import nn
from videos import write_video

import tpn
from tpn import export
from tpn.errors import CheckpointError
from tpn.video import decode, encode, motion
from tpn.zoo.names import is_exported

TINY = "tpn_slowonly_tiny_motion"
SPEC = tpn.InputSpec(4, 2, short_side=72, crop_size=64, three_crop_size=64)

MODELS = {
    "tiny": (TINY, {}),
    "levels of other lengths": (TINY, {"temporal_scales": (4, 16), "flow_order": "parallel"}),
    "isolation": (TINY, {"flow_order": "isolation", "spatial_modulation": False, "out_indices": (1, 2, 3)}),
    "one flow": (TINY, {"flow_order": "bottom_up", "num_frames": 7, "temporal_scales": (2, 4)}),
    "no temporal modulation": (TINY, {"temporal_modulation": False, "num_frames": 4}),
    "one map at two rates": (TINY, {"out_indices": (3, 3), "temporal_scales": (4, 8), "aux_head": False}),
    "SlowOnly R50": ("tpn_slowonly_r50_k400", {}),
    "TSM": ("tpn_tsm_r50_sthv1", {"shift_shortcut": True}),
    "SlowOnly without pyramid": ("slowonly_r50_k400", {"depth": 18}),
    "timm": ("tpn", {"backbone": "timm/resnet18", "flow_order": "top_down", "num_classes": 5, "input_spec": SPEC}),
    "timm, shifted": ("tpn", {"backbone": "timm/regnety_002", "temporal_shift": True, "num_classes": 5, "input_spec": SPEC}),
    "torchvision": ("tpn", {"backbone": "torchvision/r3d_18", "num_classes": 5, "input_spec": SPEC}),
}
"""Name and arguments of each model."""
QUICK = "levels of other lengths"
each_model = pytest.mark.parametrize(
    "which", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != QUICK)]
)


def build(which):
    """A narrow network with the batch norms and the logits of a trained one, in training mode."""
    torch.manual_seed(0)
    name, kwargs = MODELS[which]
    model = randomize_norms(tpn.create_model(name, **{"base_channels": 8} | kwargs if name != "tpn" else kwargs))
    nn.init.normal_(model.head.fc.weight)
    return model


def differences(model, exported, size):
    """Yield the relative errors of logits, for batch sizes that were not traced."""
    spec = model.input_spec
    model.eval()
    for batch in (1, 3):
        clips = torch.randn(batch, 3, spec.num_frames, size, size)
        with torch.inference_mode():
            got, expected = exported(clips), model(clips)
        assert (got.shape, got.dtype) == (expected.shape, torch.float32)
        yield relative_error(got, expected)


@each_model
def test_onnx(which, tmp_path, capfd):
    model = build(which)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = export.export_onnx(model, tmp_path / "new" / "model.onnx", size=64)
    assert capfd.readouterr() == ("", "")
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list((tmp_path / "new").iterdir()) == [path]
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (clips,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (clips.name, clips.type, clips.shape) == ("clips", "tensor(float)", ["batch", 3, model.input_spec.num_frames, 64, 64])
    assert (logits.name, logits.shape) == ("logits", ["batch", model.num_classes])
    assert max(differences(model, export.load(path), 64)) < 1e-4


@pytest.mark.parametrize("which", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in ("TSM", "timm, shifted"))])
def test_pt2(which, tmp_path, capfd):
    model = build(which)
    model.temperature = 2.5
    path = export.export_pt2(model, tmp_path / "model.pt2", size=64)
    assert export.load(path).temperature == 2.5
    assert max(differences(model, export.load(path), 64)) < 1e-6
    assert list(tmp_path.iterdir()) == [path]
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model that ships with tpn, exported by the command, and a video."""
    folder = tmp_path_factory.mktemp("export")
    write_video(folder / "video.mp4", num_frames=40)
    for suffix in ("onnx", "pt2"):
        done = run("export", TINY, "--output", f"tiny.{suffix}", cwd=folder)  # the format is that of the name
        assert done.returncode == 0, done.stderr
        file, size, unit, *_, difference, _, _, _, _ = done.stdout.split()
        assert (file, unit) == (f"tiny.{suffix}", "MB,")
        assert float(size) == pytest.approx((folder / file).stat().st_size / 1e6, abs=0.06)
        assert float(difference) < 1e-5
        assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["tiny.onnx", "tiny.pt2", "video.mp4"]
    return folder


@pytest.fixture(scope="module")
def model():
    return tpn.create_model(TINY, pretrained=True).eval()


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_metadata(folder, model, suffix):
    exported = export.load(folder / f"tiny.{suffix}")
    for name in ("num_classes", "num_features", "in_chans", "labels", "input_spec"):
        assert getattr(exported, name) == getattr(model, name), name
    assert exported.about["tpn_version"] == tpn.__version__
    assert tpn.ModelConfig.from_dict(exported.about["model"]) == model.config
    if suffix == "onnx":  # readable without tpn
        (entry,) = onnx.load(folder / "tiny.onnx", load_external_data=False).metadata_props
        assert (entry.key, json.loads(entry.value)) == ("tpn", json.loads(json.dumps(exported.about)))


def test_metadata_of_earlier_versions(folder, model):
    """They had indices of classes that a flip exchanges."""
    about = export.load(folder / "tiny.onnx").about
    about = about | {"input_spec": about["input_spec"] | {"flip_label_pairs": [[0, 1], [4, 5], [8, 9]]}}
    assert export.ExportedClassifier(torch.nn.Identity(), about).input_spec == model.input_spec
    nameless = export.ExportedClassifier(torch.nn.Identity(), about | {"labels": None})
    assert nameless.input_spec.flip_label_pairs == ()


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_video_classifier_runs_it(folder, model, suffix):
    exported = export.load(folder / f"tiny.{suffix}")
    expected, got = (tpn.VideoClassifier(each, batch_size=2)(folder / "video.mp4") for each in (model, exported))
    torch.testing.assert_close(got.view_logits, expected.view_logits, rtol=0, atol=1e-4)
    assert len(got.view_logits) == 3
    assert got.labels == expected.labels
    with pytest.raises(ValueError, match="precision and compile.*ExportedClassifier"):
        tpn.VideoClassifier(exported, precision="float32")
    with pytest.raises(RuntimeError, match="inference only"):
        exported.train()
    with pytest.raises(ValueError, match=r"\(B, 3, 16, 64, 64\).*torch.float32 \(1, 3, 16, 32, 32\)"):
        exported(torch.zeros(1, 3, 16, 32, 32))
    with pytest.raises(ValueError, match=r"one or more.*\(0, 3, 16, 64, 64\)"):
        exported(torch.zeros(0, 3, 16, 64, 64))


def test_predict_command(folder):
    rows = []
    for options in ([], ["-m", "tiny.onnx"], ["-m", "tiny.pt2"]):
        done = run("predict", "video.mp4", "-m", TINY, "--top", 14, "--json", *options, cwd=folder)
        assert done.returncode == 0, done.stderr
        rows.append(json.loads(done.stdout))
    for other in rows[1:]:
        assert [each["label"] for each in other["top"]] == [each["label"] for each in rows[0]["top"]]
        expected, got = ([each["probability"] for each in row["top"]] for row in (rows[0], other))
        np.testing.assert_allclose(got, expected, atol=1e-5)
    done = run("predict", "video.mp4", "--model", "tiny.onnx", "--precision", "bfloat16", cwd=folder)
    assert done.returncode == 1
    assert re.match("error: tiny.onnx computes in float32.*'bfloat16'", done.stderr)
    done = run("predict", "video.mp4", "--model", "tiny.pt2", "--checkpoint", "weights.pth", cwd=folder)
    assert done.returncode == 1
    assert re.match("error: checkpoint_path.*tiny.pt2 is an exported file", done.stderr)


def test_an_exported_file_is_a_name(folder, model, tmp_path):
    """In `evaluate` and `timeline`, too, with the numbers of the model."""
    (tmp_path / "list.txt").write_text(f"{folder / 'video.mp4'} 3\n")
    names = (model, folder / "tiny.onnx", folder / "tiny.pt2")
    for interval in (1, None):
        expected, *others = (tpn.evaluate(name, tmp_path / "list.txt", frame_interval=interval) for name in names)
        for got in others:
            np.testing.assert_allclose(got.probs, expected.probs, atol=1e-5)
            assert got.frame_interval == expected.frame_interval == (interval or 2)
    given = tpn.evaluate(export.load(folder / "tiny.onnx"), tmp_path / "list.txt", output=tmp_path / "out")
    np.testing.assert_allclose(given.probs, expected.probs, atol=1e-5)
    for name in (TINY, folder / "tiny.onnx"):
        done = run("timeline", folder / "video.mp4", "-m", name, "--json", "t.json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "t.json").read_text())["model"] == str(folder / "tiny.onnx")
    with pytest.raises(FileNotFoundError):
        tpn.VideoClassifier("none.onnx")
    auto = tpn.VideoClassifier(folder / "tiny.onnx", precision="auto")
    assert auto.model.precision == "float32"
    with pytest.raises(ValueError, match="tiny.onnx.*exported files.*made from"):
        tpn.create_model(folder / "tiny.onnx")
    with pytest.raises(tpn.UnknownModelError, match="tiny.onnx.*exported files"):
        tpn.input_spec(str(folder / "tiny.onnx"))


def test_names_of_exported_files(tmp_path):
    (tmp_path / "folder.onnx").mkdir()
    names = {"x.onnx": True, "runs/x.pt2": True, Path("x.xml"): True, tmp_path / "folder.onnx": False}
    names |= {"local-dir:runs/x.onnx": False, "hf-hub:me/x.onnx": False, TINY: False}
    assert {name: is_exported(name) for name in names} == names
    with pytest.raises(tpn.UnknownModelError, match="runs/x.pt2.*exported files"):
        tpn.model_info("runs/x.pt2")


@pytest.mark.slow
def test_a_wrong_file_is_not_left_behind(folder, model, monkeypatch, tmp_path):
    path = shutil.copy(folder / "tiny.pt2", tmp_path)
    before = (folder / "tiny.pt2").read_bytes()
    other = tpn.create_model(TINY, pretrained=True)
    assert export.max_difference(other, path) < 1e-6
    with torch.no_grad():
        other.head.fc.weight[3, 5] += 0.1
    assert export.max_difference(other, path) > 1e-4
    for difference in (2e-4, float("nan")):
        monkeypatch.setattr(export, "max_difference", lambda model, path, found=difference: found)
        done = run("export", TINY, "-f", "pt2", "--output", path, cwd=tmp_path)
        assert done.returncode == 1
        assert re.search(r"^error: .*tiny\.pt2 was not written: .* (2\.0e-04|nan)", done.stderr, re.MULTILINE)
        assert [file.name for file in tmp_path.iterdir()] == ["tiny.pt2"]
        assert (tmp_path / "tiny.pt2").read_bytes() == before


@pytest.mark.slow
def test_options_of_the_command(tmp_path):
    tpn.save_pretrained(build("one flow"), tmp_path / "mine")
    done = run("export", "local-dir:mine", "-f", "pt2", "--size", 40, "--num-classes", 3, "--views", "2x1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    exported = export.load(tmp_path / "mine.pt2")
    assert (exported.num_classes, exported.labels) == (3, None)
    assert exported(torch.zeros(2, 3, 7, 40, 40)).shape == (2, 3)
    assert (exported.input_spec.num_clips, exported.input_spec.num_crops) == (2, 1)
    done = run("export", "local-dir:mine", "-o", "c.pt2", "-f", "onnx", cwd=tmp_path)
    assert (done.returncode, (tmp_path / "c.pt2").exists()) == (2, False)
    assert "c.pt2" in done.stderr
    done = run("export", TINY, "--checkpoint", "mine/model.safetensors", "-f", "pt2", cwd=tmp_path)
    assert done.returncode == 1  # other arguments than the checkpoint's
    assert not (tmp_path / f"{TINY}.pt2").exists()


@pytest.mark.parametrize("num_crops", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_sizes(num_crops, tmp_path):
    """Default: that of the published views; with another size, a clip shows the same part of the picture."""
    spec = tpn.InputSpec(8, num_crops=num_crops, short_side=48, crop_size=40, three_crop_size=48)
    model = tpn.build(Pyramid(), num_classes=5, input_spec=spec)
    published = 48 if num_crops == 3 else 40
    spec = export.load(export.export_pt2(model, tmp_path / "a.pt2")).input_spec
    assert (spec.crop_size, spec.with_views(num_crops=3).view_size, spec.short_side) == (published, published, 48)
    spec = export.load(export.export_pt2(model, tmp_path / "b.pt2", size=2 * published)).input_spec
    assert (spec.crop_size, spec.with_views(num_crops=3).view_size, spec.short_side) == (2 * published, 2 * published, 96)
    video = torch.randint(0, 256, (9, 3, 60, 90), dtype=torch.uint8)
    assert len(tpn.VideoClassifier(export.load(tmp_path / "b.pt2"))(video).view_logits) == 10 * num_crops


@pytest.mark.parametrize("batch", [1, 2])
def test_the_comparison_sees_every_batch(model, batch, folder, monkeypatch):
    """Also one that a traced graph treats as a constant."""
    assert export.max_difference(model, folder / "tiny.onnx") < 1e-5
    exported = export.load(folder / "tiny.onnx")
    run = exported.run
    exported.run = lambda x: run(x) * (2 if len(x) == batch else 1)
    monkeypatch.setattr(export, "load", lambda path: exported)
    assert export.max_difference(model, folder / "tiny.onnx") > 0.1


def test_other_models(tmp_path):
    """Made of your own parts, in another precision, without classes."""
    backbone = tpn.ResNet3dSlowOnly(18, base_channels=4)
    model = tpn.TPNClassifier(backbone, None, tpn.ClassificationHead(backbone.out_channels[-1], 0)).bfloat16()
    with pytest.raises(ValueError, match="input_spec"):
        export.export_pt2(model, tmp_path / "a.pt2")
    model.input_spec = tpn.InputSpec(2, crop_size=32, num_crops=1)
    exported = export.load(export.export_pt2(model, tmp_path / "a.pt2"))
    assert next(model.parameters()).dtype == torch.bfloat16
    assert (exported.about["model"], exported.num_classes) == (None, 0)
    assert exported(torch.zeros(1, 3, 2, 32, 32)).shape == (1, exported.num_features)


def test_not_exported(model, tmp_path):
    with pytest.raises(ValueError, match="optimized"):
        export.export_onnx(tpn.optimize(model, torch.float32), tmp_path / "x.onnx")
    with pytest.raises(TypeError, match="TPNClassifier.*Linear"):
        export.export_pt2(nn.Linear(2, 2), tmp_path / "x.pt2")
    for size in (0, -32, 1.5, True):
        with pytest.raises((TypeError, ValueError), match=f"size.*{size}"):
            export.export_pt2(model, tmp_path / "x.pt2", size=size)
    assert not list(tmp_path.iterdir())


def foreign_onnx(path):
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "graph", ends[:1], ends[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)


def test_other_files(folder, tmp_path):
    foreign_onnx(tmp_path / "foreign.onnx")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pth")
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.onnx").write_text("no model\n" * 9)
    for suffix in ("onnx", "pt2"):
        data = bytearray((folder / f"tiny.{suffix}").read_bytes())
        (tmp_path / f"half.{suffix}").write_bytes(data[: len(data) // 2])
    data[len(data) // 2] ^= 1
    (tmp_path / "changed.pt2").write_bytes(data)
    foreign = "not a model that tpn exported"
    for name, says in {
        "foreign.onnx": foreign,
        "weights.pth": foreign,
        "empty.onnx": "damaged",
        "text.onnx": "damaged",
        "half.onnx": "damaged",
        "half.pt2": ".*damaged",
        "changed.pt2": ".*damaged.*checksum",
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}: {says}"):
            export.load(tmp_path / name)
    done = run("predict", folder / "video.mp4", "--model", "half.onnx", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    with pytest.raises(IsADirectoryError):
        export.load(tmp_path)


def test_metadata_of_another_version(folder, tmp_path):
    with zipfile.ZipFile(folder / "tiny.pt2") as old, zipfile.ZipFile(tmp_path / "new.pt2", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, b'{"tpn_version": "9", "input_spec": {}}' if name.endswith("/tpn") else data)
    with pytest.raises(CheckpointError, match="new.pt2: .*metadata.*'num_classes'"):
        export.load(tmp_path / "new.pt2")


def test_without_the_packages(folder, model, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name))
    with pytest.raises(ImportError, match=r'^onnx and onnxscript missing: pip install "tpn\[export\]"$'):
        export.export_onnx(model, tmp_path / "x.onnx")
    done = run("predict", "video.mp4", "--model", "tiny.onnx", cwd=folder)
    assert done.stderr == 'error: onnxruntime missing: pip install "tpn[export]"\n'
    assert export.load(folder / "tiny.pt2").num_classes == 14


def test_the_example_samples_as_tpn_does():
    for spec in {tpn.input_spec(name) for name in tpn.list_models()}:
        for total in (*range(1, 80), 300):
            assert np.array_equal(example("serve").clips(spec.to_dict(), total), spec.indices(total)), (spec, total)


@pytest.mark.parametrize("num_crops", [1, 3])
def test_the_example_crops_as_tpn_does(num_crops):
    """Up to one level: fixed-point and floating-point resizing differ by so much."""
    spec = tpn.InputSpec(2, num_crops=num_crops, short_side=40 if num_crops == 1 else 32, crop_size=32, three_crop_size=32)
    for height, width in ((61, 90), (90, 61), (40, 71)):
        frames = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        expected = spec.crops(torch.from_numpy(frames).permute(0, 3, 1, 2)).permute(0, 1, 3, 4, 2)
        got = np.stack(example("serve").crops(spec.to_dict(), frames))
        assert np.abs(got - expected.numpy()).max() <= 1


def turned(video, path):
    """Return a copy whose header says that players must rotate it by 90 degrees."""
    content = video.read_bytes()
    one, last = 2**16, 2**30
    upright, quarter = (struct.pack(">9i", *rows, last) for rows in ((one, 0, 0, 0, one, 0, 0, 0), (0, one, 0, -one, 0, 0, 0, 0)))
    place = content.index(upright, content.index(b"tkhd"))
    path.write_bytes(content[:place] + quarter + content[place + len(quarter) :])
    assert next(decode.iter_frames(path)).shape[1:] == next(decode.iter_frames(video)).mT.shape[1:]
    return path


def test_serving_example(folder, tmp_path, capsys):
    """Without PyTorch and tpn, the probabilities are the same, also for a rotated video of a phone."""
    moving = motion.render(0, tempo=2.0, seed=7)[:, :, :100]
    encode.write_video(tmp_path / "moving.mp4", moving, fps=25)
    for video in (folder / "video.mp4", tmp_path / "moving.mp4", turned(tmp_path / "moving.mp4", tmp_path / "turned.mp4")):
        example("serve").main(folder / "tiny.onnx", str(video))
        expected = tpn.VideoClassifier(TINY, pretrained=True)(video).top(3)
        got = [line.strip().split("%  ") for line in capsys.readouterr().out.splitlines()]
        assert [name for _, name in got] == [name for name, _ in expected]
        np.testing.assert_allclose([float(p) for p, _ in got], [100 * p for _, p in expected], atol=0.2)
    text = (ROOT / "examples" / "serve.py").read_text(encoding="utf-8")
    assert text.count("\n") < 75
    assert not re.search(r"import (torch|tpn)", text)
