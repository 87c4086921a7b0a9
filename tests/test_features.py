"""Feature maps by name, and feature files."""

import contextlib
import json
import re
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


@pytest.fixture(params=["npz", "parquet"])
def suffix(request):
    if request.param == "parquet":
        pytest.importorskip("pyarrow", reason='pip install "tpn[parquet]"')
    return request.param


def classifier(name=None):
    return tpn.VideoClassifier(FeatureModel(tpn.create_model(TINY, pretrained=True).eval(), name))


def take(classifier, videos, path, **kwargs):
    return [video for video, error in extract(classifier, videos, path, name=TINY, **kwargs) if error is None]


def test_maps_of_the_published_network():
    """The shapes in the documentation."""
    with torch.device("meta"):
        model = tpn.create_model("tpn_slowonly_r50_k400").eval()
        result, found = model.forward_intermediates(torch.empty(2, 3, 8, 224, 224))
    after = {f"{name}.{i}": (1024, 1, 7, 7) for name in ("temporal_modulation", "top_down", "bottom_up") for i in range(2)}
    fused = dict.fromkeys(("top_down_fusion", "bottom_up_fusion", "pyramid_fusion"), (2048, 1, 7, 7))
    modulated = {f"spatial_modulation.{i}": (2048, 8, 7, 7) for i in range(2)}
    backbone = {"c4": (1024, 8, 14, 14), "c5": (2048, 8, 7, 7)}
    assert {name: tuple(each.shape[1:]) for name, each in found.items()} == backbone | modulated | after | fused
    assert result is found["pyramid_fusion"]


@pytest.mark.parametrize("flow_order", ["cascade", "parallel", "top_down", "bottom_up", "isolation"])
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
    flows = {"top_down", "bottom_up"} if flow_order in ("cascade", "parallel") else {flow_order}
    if "top_down" in flows:
        levels = neck.top_down_flow(levels)
        assert all(torch.equal(found[f"top_down.{i}"], levels[i]) for i in range(2))
        assert torch.equal(found["top_down_fusion"], neck.top_down_fusion(levels))
    if "bottom_up" in flows:
        start = levels if flow_order == "cascade" else [found[f"temporal_modulation.{i}"] for i in range(2)]
        assert torch.equal(found["bottom_up_fusion"], neck.bottom_up_fusion(neck.bottom_up_flow(start)))
    assert {name.partition(".")[0] for name in found} & {"top_down", "bottom_up"} == flows - {"isolation"}
    if flow_order == "isolation":
        assert torch.equal(found["level_fusion"], neck.level_fusion(levels))
        assert FeatureModel(model, "level_fusion")(x).shape == (2, 128)
    assert list(model.forward_intermediates(x, ["pyramid_fusion", "c5"])[1]) == ["pyramid_fusion", "c5"]
    with pytest.raises(ValueError, match="no intermediate map 'c6'; there are c4, c5, spatial_modulation.0"):
        model.forward_intermediates(x, ["c4", "c6"])


def test_feature_models_share_the_weights_and_return_the_named_map():
    model = tpn.create_model(TINY, pretrained=True).eval()
    x = torch.randn(2, 3, 16, 64, 64)
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(FeatureModel(model)(x), expected)
    assert torch.equal(FeatureModel(model, "c4")(x), model.backbone(x)[0].mean((2, 3, 4)))
    assert FeatureModel(model, "c4").num_features == 64
    assert FeatureModel(model).model is model
    with pytest.raises(ValueError, match="no intermediate map 'c6'"):
        FeatureModel(model, "c6")
    with pytest.raises(ValueError, match="precision and compile.*FeatureModel"):
        tpn.VideoClassifier(FeatureModel(model), precision="float32")
    with pytest.raises(TypeError, match="only a TPNClassifier can be optimized, got FeatureModel"):
        tpn.optimize(FeatureModel(model))
    fast = tpn.optimize(model, "float32")
    assert torch.allclose(FeatureModel(fast, "c4")(x), FeatureModel(model, "c4")(x), atol=1e-4)
    model.reset_classifier(0)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("level", ["video", "clip"])
def test_file(folder, suffix, level):
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


def test_the_next_run_resumes(folder, suffix):
    out, whole = folder / f"out.{suffix}", folder / f"whole.{suffix}"
    videos = [str(folder / f"{i}.mp4") for i in range(3)]
    classify = classifier("c4")
    take(classify, videos, whole, level="clip")
    assert take(classify, videos[:1], out, level="clip") == videos[:1]
    assert take(classify, [*videos, videos[1]], out, level="clip") == videos[1:]
    assert take(classify, videos, out, level="clip") == []
    model = classify.model.model
    config = model.config.to_dict()
    parts = {"backbone": config["backbone"], "neck": config["neck"]}
    spec = replace(model.input_spec, flip_label_pairs=()).to_dict()
    about = features.About(TINY, features.weights_hash(model), "c4", "clip", parts, spec)
    a, b = FeatureFile(out, about), FeatureFile(whole, about)
    assert list(a.rows) == list(b.rows) == videos
    assert all(np.array_equal(a.rows[video]["features"], b.rows[video]["features"]) for video in videos)


def test_an_interrupted_run_keeps_its_features(folder, monkeypatch):
    videos = [str(folder / f"{i}.mp4") for i in range(3)]
    classify = classifier()
    with contextlib.closing(extract(classify, videos, folder / "a.npz", name=TINY)) as run:
        next(run)
    assert take(classify, videos, folder / "a.npz") == videos[1:]

    monkeypatch.setattr(features, "SAVE_EVERY", 0.0)
    writes = []
    monkeypatch.setattr(FeatureFile, "write", lambda self: writes.append(list(self.rows)))
    take(classify, videos, folder / "b.npz")
    assert writes == [videos[:1], videos[:2], videos]  # regularly, in case the process is killed


def test_several_runs_share_a_file(folder):
    """Each adds its rows to those of the others."""
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


def test_a_file_with_other_settings_that_appears_during_a_run_is_not_overwritten(folder, monkeypatch):
    """Not by repeated writes either: one during the run, one when the error ends it."""
    monkeypatch.setattr(features, "SAVE_EVERY", 0.0)
    out = folder / "out.npz"
    run = extract(classifier(), [folder / "0.mp4", folder / "1.mp4"], out, name=TINY)
    take(classifier(), [folder / "2.mp4"], folder / "clips.npz", level="clip")
    file = FeatureFile(out, features.About(TINY, "", None, "video", None, {}))
    (folder / "clips.npz").rename(out)
    before = out.read_bytes()
    file.add("0.mp4", {"features": np.zeros((1, 8), np.float32)})
    for _ in range(2):
        with pytest.raises(ValueError, match="out.npz has features with other settings"):
            file.write()
    with pytest.raises(ValueError, match="out.npz has features with other settings"):
        list(run)
    assert out.read_bytes() == before


@pytest.mark.parametrize("name", [None, "c4"])
def test_models_in_training_mode_are_refused(folder, name):
    """Also if only a part is in training mode."""
    classify = classifier(name)
    for part in (classify.model.model, classify.model.model.backbone.layer2):
        part.train()
        with pytest.raises(ValueError, match=r"training mode.*model\.eval"):
            classify(folder / "0.mp4", num_clips=1, num_crops=1)
        classify.model.model.eval()


def test_outputs_are_checked_before_the_first_video(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        next(extract(classifier(), [folder / "0.mp4"], folder / "nowhere" / "out.npz", name=TINY))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "tpn\[parquet\]"'):
        next(extract(classifier(), [folder / "0.mp4"], folder / "out.parquet", name=TINY))
    with pytest.raises(TypeError, match="FeatureModel, got one of OptimizedClassifier"):
        next(extract(tpn.VideoClassifier(TINY), [folder / "0.mp4"], folder / "out.npz", name=TINY))


def test_unreadable_videos_are_tried_again(folder):
    out = folder / "out.npz"
    classify = classifier()
    videos = [str(folder / "bad.mp4"), str(folder / "0.mp4")]
    errors = dict(extract(classify, videos, out, name=TINY))
    assert "not a video" in str(errors[videos[0]])
    assert errors[videos[1]] is None
    write_video(folder / "bad.mp4", num_frames=20)
    assert take(classify, videos, out) == videos[:1]


def test_features_with_other_settings_are_refused(folder):
    out = folder / "out.npz"
    take(classifier(), [folder / "0.mp4"], out)
    before = out.read_bytes()
    shorter = FeatureModel(tpn.create_model(TINY, pretrained=True, num_frames=8).eval())  # the same weights
    for classify, options, message in (
        (classifier(), {"level": "clip"}, "level='video', expected 'clip'"),
        (classifier(), {"num_clips": 2}, r"input\.num_clips=3, expected 2"),
        (classifier("c4"), {}, "feature=None, expected 'c4'"),
        (tpn.VideoClassifier(shorter), {}, r"input\.num_frames=16, expected 8"),
    ):
        with pytest.raises(ValueError, match=rf"out.npz .*\({message}\)"):
            take(classify, [folder / "1.mp4"], out, **options)
    assert out.read_bytes() == before


def test_other_files_are_refused(folder):
    (folder / "out.npz").write_text("hello")
    with pytest.raises(ValueError, match="out.npz is not a file of features"):
        take(classifier(), [folder / "0.mp4"], folder / "out.npz")
    with pytest.raises(ValueError, match=r"\.npz or \.parquet, got .*out\.csv"):
        take(classifier(), [folder / "0.mp4"], folder / "out.csv")


def test_command(folder):
    done = run("features", ".", "--output", "out.npz", "--model", TINY, "--views", "2x1", cwd=folder)
    assert done.returncode == 1
    assert done.stdout == "out.npz: 3 videos added, 0 already there, 1 unreadable\n"
    assert done.stderr.startswith("error: bad.mp4: not a video")
    (folder / "bad.mp4").unlink()
    again = run("features", "0.mp4", "1.mp4", "--output", "out.npz", "--model", TINY, "--views", "2x1", cwd=folder)
    assert (again.returncode, again.stdout) == (0, "out.npz: 0 videos added, 2 already there, 0 unreadable\n")
    unknown = run("features", "0.mp4", "--output", "o.npz", "--model", TINY, "--feature", "c9", cwd=folder)
    assert unknown.returncode == 2
    assert re.search("--feature.*'c9'; there are c4, c5,", " ".join(unknown.stderr.replace("│", "").split()))
    assert not (folder / "o.npz").exists()


def test_interrupted_command(folder, monkeypatch):
    def interrupted(*args, **kwargs):
        yield "0.mp4", None
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "extract", interrupted)
    done = run("features", "0.mp4", "1.mp4", "--output", "a.npz", "--model", TINY, cwd=folder)
    assert (done.returncode, done.stdout) == (130, "")
    assert re.fullmatch(r"interrupted; added 1 video to a\.npz.*\n", done.stderr)


def test_empty_folders_and_deleted_videos(folder):
    (folder / "nothing").mkdir()
    done = run("features", "nothing", "0.mp4", "--output", "a.npz", "--model", TINY, cwd=folder)
    assert (done.returncode, done.stderr) == (1, "error: nothing: no videos in this folder\n")
    assert done.stdout == "a.npz: 1 video added, 0 already there, 0 unreadable\n"
    (folder / "0.mp4").unlink()  # its row is in the file
    done = run("features", "0.mp4", "--output", "a.npz", "--model", TINY, cwd=folder)
    assert (done.returncode, done.stdout) == (0, "a.npz: 0 videos added, 1 already there, 0 unreadable\n")


@pytest.mark.parametrize("command", ["predict", "timeline"])
def test_models_without_classes_are_refused(folder, command):
    tpn.save_pretrained(tpn.create_model(TINY, num_classes=0), folder / "model")
    done = run(command, "0.mp4", "--model", "local-dir:model", cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: the model has no classes \(num_classes=0\).*\n", done.stderr)
