"""Features of sliding windows: the same as of clips cut by hand, each frame computed once, in folders that resume."""

import json
import multiprocessing
import os
import re
import signal
import weakref
from contextlib import closing
from functools import cache

import numpy as np
import pytest
import torch
from backbones import Pyramid, small
from test_cli import run
from torch import nn
from videos import write_video

import tpn
from tpn import features, strided
from tpn.features import FeatureModel
from tpn.models.backbones import FoldedBackbone
from tpn.strided import extract_windows, window_features
from tpn.video import decode
from tpn.video.transforms import center_crop, resize_short_side

TINY = "tpn_slowonly_tiny_motion"
pytestmark = pytest.mark.usefixtures("one_thread")


class Images(nn.Module):
    """A network for images with two maps."""

    def __init__(self):
        super().__init__()
        self.stem, self.stage = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 12, 2, 2)

    def forward(self, x):
        fine = self.stem(x).relu()
        return fine, self.stage(fine).relu()


def spec(frames=4, interval=2, size=32):
    return tpn.InputSpec(frames, interval, short_side=size + 4, crop_size=size, three_crop_size=size)


def network(name, **kwargs):
    model = tpn.create_model(name, base_channels=4, num_classes=3, **kwargs)
    model.input_spec = spec(model.input_spec.num_frames)
    return model


def stages(*out_indices):
    args = {"backbone": "slowonly", "base_channels": 4, "out_indices": out_indices}
    return tpn.create_model("tpn", **args, num_classes=3, input_spec=spec())


FAMILIES = {
    "tiny": lambda: tpn.create_model(TINY, pretrained=True, num_frames=4),
    "slowonly": lambda: network("tpn_slowonly_r50_k400"),
    "baseline": lambda: network("slowonly_r50_k400"),
    "early stages": lambda: stages(0, 1),
    "all stages": lambda: stages(0, 1, 2, 3),
    "tsm": lambda: network("tpn_tsm_r50_sthv2"),
    "tsm in place": lambda: network("tpn_tsm_r50_sthv2", shift_shortcut=True),
    "timm": lambda: small("timm/resnet18", crop_size=32),
    "timm, channels last": lambda: small("timm/swin_tiny_patch4_window7_224"),
    "timm, shifted": lambda: small("timm/seresnet18", crop_size=32),
    "torchvision": lambda: small("torchvision/mc3_18", num_frames=2, crop_size=32),
    "images": lambda: tpn.build(FoldedBackbone(Images()), num_classes=3, input_spec=spec()),
    "own module": lambda: tpn.build(Pyramid(), num_classes=3, input_spec=spec(8)),
}


@cache
def model_of(family):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def classifier_of(family, name=None):
    return tpn.VideoClassifier(FeatureModel(model_of(family), name))


def noise(count, height=44, width=52, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def by_hand(classifier, frames, stride, interval):
    """First and last frames, and features of clips cut from an array."""
    spec, model = classifier.spec, classifier.model
    frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
    span = (spec.num_frames - 1) * interval + 1
    starts = range(0, len(frames) - span + 1, stride)
    frames = center_crop(resize_short_side(frames, spec.short_side), spec.crop_size)
    with torch.inference_mode():
        features = torch.cat([model(spec.normalize(frames[i : i + span : interval])[None]) for i in starts])
    return [(i, i + span - 1) for i in starts], features


def assert_close(found, expected):
    assert len(found) == len(expected)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def stacked(windows):
    windows = list(windows)
    assert not any(each.features.is_inference() for each in windows)
    return [(each.first, each.last) for each in windows], torch.stack([each.features for each in windows])


# Computation


@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_clips_cut_by_hand(family):
    classifier = classifier_of(family)
    num_frames = classifier.spec.num_frames
    for stride, interval, batch_size, count in ((1, 1, 1, 4), (3, 2, 3, 4), (5 * num_frames, 2, 1, 2)):
        span = (num_frames - 1) * interval + 1
        frames = noise(span + stride * count - 1)
        classifier.batch_size = batch_size
        places, found = stacked(window_features(classifier, frames, stride=stride, window=num_frames * interval))
        wanted, expected = by_hand(classifier, frames, stride, interval)
        assert places == wanted
        assert len(wanted) == count
        assert_close(found, expected)
        assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()  # they depend on the frames


@pytest.mark.parametrize("family", ["slowonly", "tsm", "images"])
def test_named_maps(family):
    for name in ("c4", "temporal_modulation.0", "top_down_fusion"):
        classifier, frames = classifier_of(family, name), noise(20)
        _, found = stacked(window_features(classifier, frames, stride=3, window=classifier.spec.num_frames * 2))
        assert_close(found, by_hand(classifier, frames, 3, 2)[1])


@pytest.mark.parametrize("family", ["slowonly", "tsm"])
def test_optimized_models(family):
    plain = classifier_of(family)
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.05)):
        fast = tpn.VideoClassifier(FeatureModel(tpn.optimize(plain.model.model, dtype)))
        found, expected = (stacked(window_features(each, noise(20), stride=3, window=16))[1] for each in (fast, plain))
        assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("length", [1, 3, 6])
def test_a_video_shorter_than_a_window(length):
    """Frames repeat as in `VideoClassifier`."""
    classifier, frames = classifier_of("images"), noise(length)
    (window,) = window_features(classifier, frames, stride=16)
    expected = classifier(frames, num_clips=1, num_crops=1).view_logits
    assert (window.first, window.last) == (0, length - 1)
    assert_close(window.features[None], expected)


@pytest.mark.parametrize(
    ("family", "module", "axis", "once"),
    [
        ("slowonly", "layer2.0", 2, True),
        ("slowonly", "layer3.0", 2, False),
        ("tsm", "conv1", 0, True),
        ("tsm", "layer1.0", 0, False),
        ("images", "net.stage", 0, True),
        ("timm, shifted", "net.layer1", 0, False),
        ("own module", "stages.0", 2, False),
    ],
)
def test_each_frame_is_computed_once(family, module, axis, once):
    """Before the first layer along time. `axis` is that of the frames in the input of a module."""
    classifier = classifier_of(family)
    num_frames, seen = classifier.spec.num_frames, 0

    def count(_, args):
        nonlocal seen
        seen += args[0].shape[0] * (args[0].shape[axis] if axis else 1)

    hook = classifier.model.model.backbone.get_submodule(module).register_forward_pre_hook(count)
    for stride, interval, classifier.batch_size in ((2, 2, 1), (1, 2, 3), (3, 2, 2), (20, 1, 1)):
        seen = 0
        windows = list(window_features(classifier, noise(30), stride=stride, window=num_frames * interval))
        needed = {i for each in windows for i in range(each.first, each.last + 1, interval)}
        assert seen == (len(needed) if once else len(windows) * num_frames)
    hook.remove()


@pytest.mark.parametrize("family", ["images", "own module"])
@pytest.mark.parametrize("stride", [1, 2, 3, 20])
def test_only_frames_that_are_needed_are_kept(family, stride, monkeypatch):
    """Of one window, for a batch size of 1. The frames of the first one all wait: a shorter video would need them."""
    classifier, alive, most, frame_class = classifier_of(family), [], 0, strided._Frame
    num_frames = classifier.spec.num_frames

    def watched(*args):
        alive.append(weakref.ref(frame := frame_class(*args)))
        return frame

    def frames():
        nonlocal most
        for i in range(60):
            yield np.zeros((36, 36, 3), np.uint8)
            if i >= 2 * num_frames:
                most = max(most, sum(ref() is not None for ref in alive))

    monkeypatch.setattr(strided, "_Frame", watched)
    assert list(window_features(classifier, frames(), stride=stride, window=2 * num_frames))
    assert 0 < most <= (num_frames if stride % 2 == 0 else 2 * num_frames - 1)


def test_frames_are_decoded_once(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", num_frames=30)
    frames = torch.stack(list(decode.iter_frames(path))).permute(0, 2, 3, 1).numpy()
    decoded, to_rgb = [], decode.to_rgb
    monkeypatch.setattr(decode, "to_rgb", lambda *args: (decoded.append(1), to_rgb(*args))[1])
    places, found = stacked(window_features(classifier_of("images"), path, stride=1))
    assert len(decoded) == 30
    wanted, expected = by_hand(classifier_of("images"), frames, 1, 2)
    assert places == wanted
    assert_close(found, expected)


def test_wrong_arguments():
    classifier = tpn.VideoClassifier(FeatureModel(FAMILIES["images"]()))  # it is changed
    for options, message in (
        ({"stride": 0}, "stride.*got 0"),
        ({"stride": 1, "window": 6}, "window must be a multiple.* 4 frames, got 6; try 8"),
        ({"stride": 1, "window": 0}, "window.*got 0; try 4"),
    ):
        with pytest.raises(ValueError, match=message):
            window_features(classifier, noise(9), **options)
    with pytest.raises(ValueError, match="no frames"):
        list(window_features(classifier, [], stride=1))
    with pytest.raises(TypeError, match="FeatureModel, got one of TPNClassifier"):
        window_features(tpn.VideoClassifier(classifier.model.model), noise(9), stride=1)
    classifier.spec = tpn.InputSpec(4, sampling="segments", num_clips=1)
    with pytest.raises(ValueError, match=r"window \(--window\), a multiple of 4"):
        window_features(classifier, noise(9), stride=1)
    classifier.spec = tpn.InputSpec(4, 2, target_fps=10)
    with pytest.raises(ValueError, match=r"window \(--window\), a multiple of 4"):
        window_features(classifier, noise(9), stride=1)
    classifier.model.model.neck.train()
    with pytest.raises(ValueError, match=r"training mode"):
        window_features(classifier, noise(9), stride=1, window=4)
    classifier.model.eval().model.backbone.net.stem.weight.data.fill_(np.nan)
    with pytest.raises(ValueError, match="NaN"):
        list(window_features(classifier, noise(9), stride=1, window=4))


# Files


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "videos" / "Übung").mkdir(parents=True)
    for i, name in enumerate(("a.mp4", "Übung/a.mp4", "Übung/走る.x.mp4")):
        write_video(tmp_path / "videos" / name, num_frames=20 + i)
    return tmp_path


@pytest.fixture(scope="module")
def images():
    return classifier_of("images")


def names(folder):
    paths = sorted((folder / "videos").rglob("*.mp4"))
    return {str(path): path.relative_to(folder / "videos").as_posix().removesuffix(".mp4") for path in paths}


def extract(classifier, videos, out, stride=4, **options):
    results = extract_windows(classifier, videos, out, name="images", stride=stride, **options)
    return [video for video, error in results if error is None]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_folder(folder, images, dtype):
    videos, out = names(folder), folder / "out"
    assert extract(images, videos, out, dtype=dtype) == list(videos)
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert files == sorted(f"{name}.{suffix}" for name in videos.values() for suffix in ("npy", "json"))
    for video, name in videos.items():
        array, about = np.load(out / f"{name}.npy"), json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        places, expected = stacked(window_features(images, video, stride=4))
        assert (array.dtype, array.shape) == (dtype, (4, images.model.num_features))
        assert np.allclose(array, expected.numpy(), rtol=0, atol=1e-6 if dtype == "float32" else 1e-2)
        assert list(zip(about["first"], about["last"], strict=True)) == places
        assert about["time"] == [(first + last) / 2 / 25 for first, last in places]
        assert (about["fps"], about["stride"], about["window"], about["span"]) == (25, 4, 8, 7)
        assert (about["video"], about["total_frames"]) == (video, decode.probe(video).num_frames)
        assert (about["model"], about["feature"], about["dtype"]) == ("images", None, dtype)
        assert about["weights"] == features.weights_hash(images.model.model)


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_table(folder, images, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason='pip install "tpn[parquet]"')
    videos, out = names(folder), folder / f"out.{suffix}"
    first, *rest = videos
    assert extract(images, {first: "a"}, out) == [first]
    assert extract(images, videos, out) == rest
    assert extract(images, videos, out) == []
    if suffix == "npz":
        with np.load(out) as file:
            table = {key: file[key].tolist() for key in file}
            about = json.loads(table.pop("about"))
    else:
        import pyarrow.parquet as pq

        read = pq.read_table(out)
        table, about = read.to_pydict(), json.loads(read.schema.metadata[b"tpn"])
    expected = {key: [] for key in ("path", "clip", "first", "last", "time", "features")}
    for video in videos:
        for i, each in enumerate(window_features(images, video, stride=4)):
            row = (video, i, each.first, each.last, (each.first + each.last) / 2 / 25, each.features.tolist())
            for key, value in zip(expected, row, strict=True):
                expected[key].append(value)
    assert np.allclose(table.pop("features"), expected.pop("features"), atol=1e-6)
    assert table == expected
    assert (about["level"], about["stride"], about["window"]) == ("window", 4, 8)
    with pytest.raises(ValueError, match="stride=4, expected 2"):
        extract(images, videos, out, stride=2)
    with pytest.raises(ValueError, match="float32.*got.*float16"):
        extract(images, videos, folder / f"b.{suffix}", dtype="float16")


def test_the_next_run_resumes(folder, images):
    videos, out = names(folder), folder / "out"
    first, *rest = videos
    with closing(extract_windows(images, videos, out, name="images", stride=4)) as interrupted:
        next(interrupted)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    assert extract(images, videos, out) == rest
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert extract(images, videos, out) == []
    (out / "a.npy").write_bytes((out / "a.npy").read_bytes()[:-1])  # a copy that was cut off
    assert extract(images, videos, out) == [first]
    (out / "a.npy").unlink()
    assert extract(images, videos, out) == [first]


@pytest.mark.parametrize("at", [3, 4])
def test_a_killed_run_leaves_no_half_video(folder, images, monkeypatch, at):
    """Killed before the JSON of the second video is moved to its place, and between it and the array."""
    videos, out = names(folder), folder / "out"
    calls, replace = [], os.replace

    def kill(*args):
        calls.append(args)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)

    process = multiprocessing.get_context("fork").Process(target=extract, args=(images, videos, out))
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", kill)
        process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len([path for path in out.rglob("*.npy") if ".incomplete" not in str(path)]) == 1
    assert extract(images, videos, out) == list(videos)[1:]


def test_other_settings_are_refused(folder, images):
    videos, out = names(folder), folder / "out"
    extract(images, dict(list(videos.items())[:1]), out)
    before = (out / "a.npy").read_bytes()
    for options, message in (
        ({"stride": 2}, "stride=4, expected 2"),
        ({"window": 4}, r"input\.frame_interval=2, expected 1.*window=8, expected 4"),
        ({"dtype": "float16"}, "dtype='float32', expected 'float16'"),
    ):
        with pytest.raises(ValueError, match=rf"a\.json has features with other settings \(.*{message}.*another folder"):
            extract(images, videos, out, **options)
    torch.manual_seed(1)
    other = tpn.VideoClassifier(FeatureModel(FAMILIES["images"]()))
    with pytest.raises(ValueError, match="other settings.*weights="):
        extract(other, videos, out)
    assert (out / "a.npy").read_bytes() == before


def test_other_files_are_not_overwritten(folder, images):
    videos, out = names(folder), folder / "out"
    out.mkdir()
    for name, content in (("a.json", '{"label": 1}'), ("a.json", "["), ("a.npy", "")):
        (out / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name}.*not from tpn"):
            extract(images, videos, out)
        assert (out / name).read_text() == content
        (out / name).unlink()
    (out / "timeline.json").write_text('{"stride": 2, "source": "a.mp4"}')  # of no video here
    assert extract(images, videos, out) == list(videos)
    with pytest.raises(NotADirectoryError, match=r"a\.json.*folder"):
        extract(images, videos, out / "a.json")


def test_videos_with_the_same_name(folder, images):
    out = folder / "out"
    one, two = folder / "videos" / "a.mp4", folder / "videos" / "Übung" / "a.mp4"
    with pytest.raises(ValueError, match=r"a\.npy would have the features of .*videos/a\.mp4 and of .*bung/a\.mp4"):
        extract(images, {str(one): "a", str(two): "a"}, out)
    assert not out.exists()
    extract(images, {str(one): "a"}, out)
    assert extract(images, {os.path.relpath(one): "a"}, out) == []
    with pytest.raises(ValueError, match=r"a\.npy would have the features of .*videos/a\.mp4 and of .*bung/a\.mp4"):
        extract(images, {str(two): "a"}, out)


def test_relative_paths_are_those_of_the_run_that_wrote_them(folder, images, monkeypatch):
    """Another video of the same relative path, in another folder, is another video."""
    monkeypatch.chdir(folder / "videos")
    extract(images, {"a.mp4": "a"}, folder / "out")
    monkeypatch.chdir(folder / "videos" / "Übung")
    with pytest.raises(ValueError, match=r"a\.npy would have the features of .*videos/a\.mp4 and of .*bung/a\.mp4"):
        extract(images, {"a.mp4": "a"}, folder / "out")


def test_another_process_works_on_the_same_folder(folder, images, monkeypatch):
    """It writes all videos after this one has looked into the folder."""
    videos, out = names(folder), folder / "out"

    class Late(features.FeatureFolder):
        def missing(self, videos):
            monkeypatch.undo()
            assert extract(images, videos, out) == list(videos)
            return super().missing(videos)

    monkeypatch.setattr(strided, "FeatureFolder", Late)
    assert extract(images, videos, out) == []


def test_features_beyond_float16(folder, images):
    scaled = tpn.VideoClassifier(FeatureModel(FAMILIES["images"](), "c5"))
    scaled.model.model.backbone.net.stage.weight.data *= 1e8
    with pytest.raises(ValueError, match="exceed float16"):
        extract(scaled, names(folder), folder / "out", dtype="float16")
    assert not (folder / "out").exists()


def test_damaged_videos(folder, images):
    """Damage in the middle counts: the features would end too early."""
    video = folder / "videos" / "b.mp4"
    write_video(video, num_frames=60)
    data = bytearray(video.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 2000] = bytes(2000)
    video.write_bytes(data)
    (folder / "videos" / "no.mp4").write_text("no video")
    results = dict(extract_windows(images, names(folder), folder / "out", name="images", stride=4))
    bad = [os.path.basename(path) for path, error in results.items() if error is not None]
    assert bad == ["b.mp4", "no.mp4"]
    assert not (folder / "out" / "b.npy").exists()
    assert len(list((folder / "out").rglob("*.npy"))) == 3


def test_command(folder):
    (folder / "videos" / "no.mp4").write_text("no video")
    done = run("features", "videos", "--stride", "16", "--window", "16", "--output", "out", "--model", TINY, cwd=folder)
    assert (done.returncode, done.stdout) == (1, "out: 3 videos added, 0 already there, 1 unreadable\n")
    assert done.stderr.startswith("error: videos/no.mp4: not a video")
    assert np.load(folder / "out" / "Übung" / "走る.x.npy").shape == (1, 128)
    (folder / "videos" / "no.mp4").unlink()
    again = run("features", "videos", "--stride", "16", "--window", "16", "--output", "out", "--model", TINY, cwd=folder)
    assert (again.returncode, again.stdout) == (0, "out: 0 videos added, 3 already there, 0 unreadable\n")
    both = run("features", "videos/a.mp4", "videos/Übung/a.mp4", "--stride", "16", "--output", "b", "--model", TINY, cwd=folder)
    assert both.returncode == 1
    assert both.stderr.startswith("error: b/a.npy would have the features of")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stride", "0", "--output", "d"], "--stride"),
        (["--window", "16", "--output", "a.npz"], "--window.*needs --stride"),
        (["--dtype", "float16", "--output", "a.npz"], "--dtype.*needs --stride"),
        (["--stride", "4", "--level", "clip", "--output", "d"], "--level.*not valid with --stride"),
        (["--stride", "4", "--views", "1x1", "--output", "d"], "--views.*not valid with --stride"),
        (["--output", "d"], r"\.npz or \.parquet, got 'd'"),
        (["--stride", "4", "--output", "videos/a.mp4"], "is a file"),
        (["--stride", "4", "--output", "a.NPZ"], r"\.npz or \.parquet, got 'a\.NPZ'"),
    ],
)
def test_command_with_wrong_options(folder, options, message):
    done = run("features", "videos/a.mp4", *options, "--model", TINY, cwd=folder)
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert re.search(message, " ".join(done.stderr.replace("│", "").split())), done.stderr
