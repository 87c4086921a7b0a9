"""Intermediate maps by name, and files of features that grow."""

import contextlib
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_cli import run
from videos import write_video

import tpn
from tpn import features
from tpn.features import FeatureFile, FeatureModel, extract

TINY = "tpn_slowonly_tiny_motion"


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        write_video(tmp_path / f"{i}.mp4", num_frames=20 + i)
    (tmp_path / "bad.mp4").write_text("no video")
    return tmp_path


def classifier(name=None):
    return tpn.VideoClassifier(FeatureModel(tpn.create_model(TINY, pretrained=True).eval(), name))


def take(classifier, videos, path, **kwargs):
    return [video for video, error in extract(classifier, videos, path, name=TINY, **kwargs) if error is None]


def test_maps_of_the_published_network():
    """The shapes that the documentation names."""
    with torch.device("meta"):
        model = tpn.create_model("tpn_slowonly_r50_k400").eval()
        result, found = model.forward_intermediates(torch.empty(2, 3, 8, 224, 224))
    after = {f"{name}.{i}": (1024, 1, 7, 7) for name in ("temporal_modulation", "top_down", "bottom_up") for i in range(2)}
    fused = dict.fromkeys(("top_down_fusion", "bottom_up_fusion", "pyramid_fusion"), (2048, 1, 7, 7))
    modulated = {f"spatial_modulation.{i}": (2048, 8, 7, 7) for i in range(2)}
    backbone = {"c4": (1024, 8, 14, 14), "c5": (2048, 8, 7, 7)}
    assert {name: tuple(each.shape[1:]) for name, each in found.items()} == backbone | modulated | after | fused
    assert result is found["pyramid_fusion"]


@pytest.mark.parametrize("flow_order", ["cascade", "parallel", "top_down", "bottom_up"])
def test_maps_are_those_of_forward(flow_order):
    torch.manual_seed(0)
    model = tpn.create_model("tpn_slowonly_r101_k400", base_channels=4, flow_order=flow_order).eval()
    x = torch.randn(2, 3, 8, 48, 64)
    features, found = model.forward_intermediates(x)
    assert torch.equal(features, model.forward_features(x))
    neck, maps = model.neck, model.backbone(x)
    assert all(torch.equal(found[f"c{4 + i}"], maps[i]) for i in range(2))
    levels = [found[f"temporal_modulation.{i}"] for i in range(2)]
    for i in range(2):
        assert torch.equal(levels[i], neck.temporal_modulation[i](neck.spatial_modulation[i](maps[i])))
    if flow_order != "bottom_up":
        levels = neck.top_down_flow(levels)
        assert all(torch.equal(found[f"top_down.{i}"], levels[i]) for i in range(2))
        assert torch.equal(found["top_down_fusion"], neck.top_down_fusion(levels))
    if flow_order != "top_down":
        start = levels if flow_order == "cascade" else [found[f"temporal_modulation.{i}"] for i in range(2)]
        assert torch.equal(found["bottom_up_fusion"], neck.bottom_up_fusion(neck.bottom_up_flow(start)))
    assert ("top_down.0" in found, "bottom_up.0" in found) == (flow_order != "bottom_up", flow_order != "top_down")
    assert list(model.forward_intermediates(x, ["pyramid_fusion", "c5"])[1]) == ["pyramid_fusion", "c5"]
    with pytest.raises(ValueError, match="no intermediate is called 'c6'; there are c4, c5, spatial_modulation.0"):
        model.forward_intermediates(x, ["c4", "c6"])


def test_feature_models_share_the_weights_and_give_what_they_say():
    model = tpn.create_model(TINY, pretrained=True).eval()
    x = torch.randn(2, 3, 16, 64, 64)
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(FeatureModel(model)(x), expected)
    assert torch.equal(FeatureModel(model, "c4")(x), model.backbone(x)[0].mean((2, 3, 4)))
    assert FeatureModel(model, "c4").num_features == 64
    assert FeatureModel(model).model is model
    with pytest.raises(ValueError, match="no intermediate is called 'c6'"):
        FeatureModel(model, "c6")
    with pytest.raises(ValueError, match="precision and compile are for a TPNClassifier; a FeatureModel runs as it is"):
        tpn.VideoClassifier(FeatureModel(model), precision="float32")
    with pytest.raises(TypeError, match="only a TPNClassifier can be optimized, got FeatureModel"):
        tpn.optimize(FeatureModel(model))
    fast = tpn.optimize(model, "float32")
    assert torch.allclose(FeatureModel(fast, "c4")(x), FeatureModel(model, "c4")(x), atol=1e-4)
    model.reset_classifier(0)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
@pytest.mark.parametrize("level", ["video", "clip"])
def test_file(folder, suffix, level):
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason='pip install "tpn[parquet]"')
    videos = [folder / f"{i}.mp4" for i in range(3)]
    out = folder / f"out.{suffix}"
    classify = classifier()
    assert take(classify, videos, out, level=level, num_clips=4, num_crops=3) == list(map(str, videos))

    expected = []
    for prediction in classify.predict_each(videos, num_clips=4, num_crops=3):
        clips = prediction.view_logits.view(3, 4, -1).mean(0)
        expected.append(clips if level == "clip" else clips.mean(0, keepdim=True))
    if suffix == "npz":
        with np.load(out) as file:
            table, about = {key: file[key].tolist() for key in file if key != "about"}, json.loads(str(file["about"]))
    else:
        import pyarrow.parquet as pq

        read = pq.read_table(out)
        table, about = read.to_pydict(), json.loads(read.schema.metadata[b"tpn"])
    assert np.allclose(table["features"], torch.cat(expected).numpy(), atol=1e-6)
    assert table["path"] == [str(video) for video in videos for _ in range(4 if level == "clip" else 1)]
    assert table.get("clip") == (list(range(4)) * 3 if level == "clip" else None)
    views = about["input"]
    assert (about["level"], views["num_clips"], views["num_crops"], views["flip"]) == (level, 4, 3, False)


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_the_next_run_goes_on(folder, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason='pip install "tpn[parquet]"')
    out, whole = folder / f"out.{suffix}", folder / f"whole.{suffix}"
    videos = [str(folder / f"{i}.mp4") for i in range(3)]
    classify = classifier("c4")
    take(classify, videos, whole, level="clip")
    assert take(classify, videos[:1], out, level="clip") == videos[:1]
    assert take(classify, [*videos, videos[1]], out, level="clip") == videos[1:]
    assert take(classify, videos, out, level="clip") == []
    model = classify.model.model
    about = features.About(
        TINY, features.weights_hash(model), "c4", "clip", model.model_args, replace(model.input_spec, mirrored=()).to_dict()
    )
    a, b = FeatureFile(out, about), FeatureFile(whole, about)
    assert list(a.rows) == list(b.rows) == videos
    assert all(np.array_equal(a.rows[video], b.rows[video]) for video in videos)


def test_a_run_that_is_broken_off_keeps_what_it_has(folder, monkeypatch):
    videos = [str(folder / f"{i}.mp4") for i in range(3)]
    classify = classifier()
    with contextlib.closing(extract(classify, videos, folder / "a.npz", name=TINY)) as run:
        next(run)
    assert take(classify, videos, folder / "a.npz") == videos[1:]

    monkeypatch.setattr(features, "SAVE_EVERY", 0.0)
    writes = []
    monkeypatch.setattr(FeatureFile, "write", lambda self: writes.append(list(self.rows)))
    take(classify, videos, folder / "b.npz")
    assert writes == [videos[:1], videos[:2], videos]  # as it goes on: a process may be killed


def test_several_at_one_file(folder):
    """Each adds to what the others have written meanwhile."""
    out = folder / "out.npz"
    first, second = (
        extract(classifier(), [folder / name for name in names], out, name=TINY) for names in (["0.mp4"], ["1.mp4", "2.mp4"])
    )
    next(second)
    list(first)
    list(second)
    with np.load(out) as file:
        assert file["path"].tolist() == [str(folder / f"{i}.mp4") for i in (1, 2, 0)]
        assert len(file["features"]) == 3


def test_another_kind_of_file_that_appears_meanwhile_stays(folder, monkeypatch):
    """However often it is tried to write: while the videos come, and when the work is broken off by that."""
    monkeypatch.setattr(features, "SAVE_EVERY", 0.0)
    out = folder / "out.npz"
    run = extract(classifier(), [folder / "0.mp4", folder / "1.mp4"], out, name=TINY)
    take(classifier(), [folder / "2.mp4"], folder / "clips.npz", level="clip")
    file = FeatureFile(out, features.About(TINY, "", None, "video", None, {}))
    (folder / "clips.npz").rename(out)
    before = out.read_bytes()
    file.add("0.mp4", np.zeros((1, 8), np.float32))
    for _ in range(2):
        with pytest.raises(ValueError, match="holds features of something else"):
            file.write()
    with pytest.raises(ValueError, match="holds features of something else"):
        list(run)
    assert out.read_bytes() == before


@pytest.mark.parametrize("probe", [FeatureModel, lambda model: FeatureModel(model, "c4"), lambda model: model])
def test_a_probe_of_a_model_that_trains_on(folder, probe):
    """It is evaluated in evaluation mode, whatever was switched to training mode after the probe was made, and left as it is."""
    model = tpn.create_model(TINY, pretrained=True).eval()
    classify, video = tpn.VideoClassifier(probe(model)), folder / "0.mp4"
    expected = classify(video, num_clips=1, num_crops=1).view_logits
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for part in (model, model.backbone.layer2):
        model.eval()
        part.train()
        modes = [module.training for module in model.modules()]
        assert torch.equal(classify(video, num_clips=1, num_crops=1).view_logits, expected)
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_frozen_part_stays_frozen():
    model = tpn.create_model(TINY, pretrained=True)
    model.backbone.eval()
    FeatureModel(model, "c4")
    assert (model.training, model.neck.training, model.backbone.training) == (True, True, False)
    tpn.VideoClassifier(model)(torch.zeros(4, 64, 64, 3, dtype=torch.uint8), num_clips=1, num_crops=1)
    assert (model.training, model.neck.training, model.backbone.training) == (True, True, False)


def test_what_cannot_be_written_is_said_before_the_work(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        next(extract(classifier(), [folder / "0.mp4"], folder / "nowhere" / "out.npz", name=TINY))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "tpn\[parquet\]"'):
        next(extract(classifier(), [folder / "0.mp4"], folder / "out.parquet", name=TINY))
    with pytest.raises(TypeError, match="expected a VideoClassifier of a FeatureModel, got one with OptimizedClassifier"):
        next(extract(tpn.VideoClassifier(TINY), [folder / "0.mp4"], folder / "out.npz", name=TINY))


def test_bad_videos_are_tried_again(folder):
    out = folder / "out.npz"
    classify = classifier()
    videos = [str(folder / "bad.mp4"), str(folder / "0.mp4")]
    errors = dict(extract(classify, videos, out, name=TINY))
    assert "not a video" in str(errors[videos[0]])
    assert errors[videos[1]] is None
    write_video(folder / "bad.mp4", num_frames=20)
    assert take(classify, videos, out) == videos[:1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"level": "clip"}, "level 'video', not 'clip'"),
        ({"num_clips": 2}, r"input\.num_clips 3, not 2"),
    ],
)
def test_other_features_are_not_mixed_in(folder, change, says):
    out = folder / "out.npz"
    take(classifier(), [folder / "0.mp4"], out)
    before = out.read_bytes()
    with pytest.raises(ValueError, match=f"out.npz holds features of something else \\({says}\\); choose another file"):
        take(classifier(), [folder / "1.mp4"], out, **change)
    with pytest.raises(ValueError, match="feature None, not 'c4'"):
        take(classifier("c4"), [folder / "1.mp4"], out)
    other = FeatureModel(tpn.create_model(TINY, pretrained=True, num_frames=8).eval())  # the same weights
    with pytest.raises(ValueError, match=r"\(model_args\.num_frames 16, not 8; input\.num_frames 16, not 8\)"):
        take(tpn.VideoClassifier(other), [folder / "1.mp4"], out)
    assert out.read_bytes() == before


def test_what_is_no_file_of_features(folder):
    (folder / "out.npz").write_text("hello")
    with pytest.raises(ValueError, match="not a file of features that tpn wrote"):
        take(classifier(), [folder / "0.mp4"], folder / "out.npz")
    with pytest.raises(ValueError, match=r"must end in .npz or .parquet"):
        take(classifier(), [folder / "0.mp4"], folder / "out.csv")


def test_command(folder):
    done = run("features", ".", "--out", "out.npz", "--model", TINY, "--views", "2x1", cwd=folder)
    assert done.returncode == 1
    assert done.stdout == "out.npz: 3 videos added, 0 were there already, 1 cannot be read\n"
    assert done.stderr.startswith("error: bad.mp4: not a video")
    (folder / "bad.mp4").unlink()
    again = run("features", "0.mp4", "1.mp4", "--out", "out.npz", "--model", TINY, "--views", "2x1", cwd=folder)
    assert (again.returncode, again.stdout) == (0, "out.npz: 0 videos added, 2 were there already, 0 cannot be read\n")
    other = run("features", "0.mp4", "--out", "out.npz", "--model", TINY, "--feature", "c4", "--views", "2x1", cwd=folder)
    assert (other.returncode, other.stdout) == (1, "")
    assert other.stderr == "error: out.npz holds features of something else (feature None, not 'c4'); choose another file\n"
    unknown = run("features", "0.mp4", "--out", "o.npz", "--model", TINY, "--feature", "c9", cwd=folder)
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("error: no intermediate is called 'c9'; there are c4, c5,")
    assert not (folder / "o.npz").exists()


def test_interrupted_command(folder, monkeypatch):
    def interrupted(*args, **kwargs):
        yield "0.mp4", None
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "extract", interrupted)
    done = run("features", "0.mp4", "1.mp4", "--out", "a.npz", "--model", TINY, cwd=folder)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted; 1 videos were added to a.npz, and the same command goes on from there\n"


def test_folders_without_videos_and_videos_that_are_gone(folder):
    (folder / "nothing").mkdir()
    done = run("features", "nothing", "--out", "a.npz", "--model", TINY, cwd=folder)
    assert (done.returncode, done.stderr) == (1, "error: nothing: no videos in it\n")
    done = run("features", "nothing", "0.mp4", "--out", "a.npz", "--model", TINY, cwd=folder)
    assert (done.returncode, done.stderr) == (1, "error: nothing: no videos in it\n")
    assert done.stdout == "a.npz: 1 videos added, 0 were there already, 0 cannot be read\n"
    (folder / "0.mp4").unlink()  # its row is there
    done = run("features", "0.mp4", "--out", "a.npz", "--model", TINY, cwd=folder)
    assert (done.returncode, done.stdout) == (0, "a.npz: 0 videos added, 1 were there already, 0 cannot be read\n")


@pytest.mark.parametrize("command", ["predict", "timeline"])
def test_a_model_without_classes_has_no_answer(folder, command):
    tpn.save_pretrained(tpn.create_model(TINY, num_classes=0), folder / "model")
    done = run(command, "0.mp4", "--model", "local-dir:model", cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: the model has no classes, num_classes is 0; tpn features writes what it gives\n"
