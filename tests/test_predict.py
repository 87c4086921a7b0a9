import copy
import gc
import io
import logging
import os
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from servers import run_python
from videos import write_video

import tpn
from tpn import ClassificationHead, InputSpec, ResNet3dSlowOnly, TemporalPyramid, TPNClassifier, VideoClassifier, predict
from tpn.config import parse_views
from tpn.errors import UnknownModelError
from tpn.models.features import FeatureModel
from tpn.tempo import slide
from tpn.video.ahead import read_ahead
from tpn.video.decode import VideoError, read_frames
from tpn.video.sources import channels_first


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    backbone = ResNet3dSlowOnly(18, base_channels=8)
    model = TPNClassifier(backbone, TemporalPyramid(backbone.out_channels, 8), ClassificationHead(64, 5))
    torch.nn.init.normal_(model.head.fc.weight)
    model.input_spec = InputSpec(8, 2, num_clips=3, num_crops=3, short_side=40, crop_size=32, three_crop_size=40)
    return model


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("predict") / "v.mp4", 30)


def test_path_and_frames_agree_and_views_are_crop_major(model, video):
    classify = VideoClassifier(model)
    by_path = classify(video)
    frames = read_frames(video, range(30))
    for source in (frames, frames.permute(0, 2, 3, 1).numpy(), str(video), [video]):
        result = classify(source)
        result = result[0] if isinstance(source, list) else result
        torch.testing.assert_close(result.view_logits, by_path.view_logits, rtol=0, atol=1e-6)
    spec = model.input_spec
    crops = spec.crops(frames)
    model.eval()
    with torch.no_grad():
        views = [model(spec.normalize(crop[clip])[None])[0] for crop in crops for clip in spec.indices(30)]
    torch.testing.assert_close(by_path.view_logits, torch.stack(views), rtol=0, atol=1e-5)
    assert not torch.allclose(views[0], views[1], atol=1e-3)  # the order matters
    torch.testing.assert_close(by_path.probs, torch.stack(views).softmax(1).mean(0), rtol=0, atol=1e-5)
    assert by_path.source == str(video)


def test_number_of_views(model, video):
    classify = VideoClassifier(model)
    assert len(classify(video).view_logits) == 9
    assert len(classify(video, num_clips=2).view_logits) == 6
    assert len(classify(video, num_crops=1).view_logits) == 3
    flipping = VideoClassifier(model)
    flipping.spec = InputSpec.from_dict(model.input_spec.to_dict() | {"flip": True})
    assert len(flipping(video).view_logits) == 18
    assert len(flipping(video, num_clips=1, num_crops=1).view_logits) == 1


def test_progress(model, video):
    seen = []
    VideoClassifier(model, batch_size=4)(video, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 9), (8, 9), (9, 9)]


def test_evaluation_mode(model, video, caplog):
    """The classifier puts the model in evaluation mode once, and refuses one that is trained further."""
    caplog.set_level(logging.INFO, logger="tpn")
    model = copy.deepcopy(model).train()
    before = copy.deepcopy(model.state_dict())
    classify = VideoClassifier(model)
    assert "evaluation mode" in caplog.text
    assert classify.model is model
    caplog.clear()
    VideoClassifier(model.train(), precision="float32")  # runs a copy
    assert model.training
    assert caplog.text == ""
    model.eval()
    expected = classify(video).view_logits
    for part in (model, model.neck, model.head.drop):
        part.train()
        with pytest.raises(ValueError, match=r"training mode.*model\.eval"):
            classify(video)
        assert part.training
        model.eval()
    assert torch.equal(classify(video).view_logits, expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_threads_share_a_classifier(model):
    """A model that was in training mode gives every thread the results of evaluation mode; its statistics do not change."""
    sources = list(torch.randint(256, (60, 10, 3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    one_view = {"num_clips": 1, "num_crops": 1}
    expected = [VideoClassifier(copy.deepcopy(model).eval())(source, **one_view).view_logits for source in sources]
    model = copy.deepcopy(model).train()
    before = copy.deepcopy(model.state_dict())
    classify = VideoClassifier(model)
    with ThreadPoolExecutor(4) as pool:
        results = [result.view_logits for result in pool.map(lambda source: classify(source, **one_view), sources)]
    wrong = [i for i in range(60) if not torch.allclose(results[i], expected[i], rtol=0, atol=1e-5)]
    assert wrong == []
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_names_load_their_weights(model, video, tmp_path):
    name = "tpn_slowonly_tiny_motion"
    published = tpn.create_model(name, pretrained=True)
    folder = tpn.save_pretrained(published, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for classify in (
            VideoClassifier(name),
            VideoClassifier(name, checkpoint_path=folder / "model.safetensors"),
            VideoClassifier(name, pretrained=False, checkpoint_path=folder / "model.safetensors"),
            VideoClassifier(f"local-dir:{folder}"),
            VideoClassifier(f"local-dir:{folder}", pretrained=False),
            VideoClassifier(folder),
            VideoClassifier(str(folder), pretrained=False),
        ):
            assert torch.equal(classify.model.head.fc.weight, published.head.fc.weight)
    with pytest.warns(UserWarning, match=f"{name}.*pretrained=True"):
        classify = VideoClassifier(name, pretrained=False)
    assert not torch.equal(classify.model.head.fc.weight, published.head.fc.weight)


def test_folders_are_names(tmp_path, monkeypatch):
    """Paths of saved models, unless a published model has the name."""
    monkeypatch.chdir(tmp_path)
    name = "tpn_slowonly_tiny_motion"
    saved = tpn.create_model(name, num_classes=3)
    for folder in ("doors", f"runs/{name}", name):
        tpn.save_pretrained(saved, folder)
    (tmp_path / "empty").mkdir()
    paths = (
        "doors",
        "./doors",
        "doors/",
        f"runs/{name}",
        f"./{name}",
        f"local-dir:{name}",
        Path("doors"),
        Path(name),
        tmp_path / "doors",
    )
    for path in paths:
        assert torch.equal(tpn.create_model(path).head.fc.weight, saved.head.fc.weight), path
        assert tpn.input_spec(path) == saved.input_spec
    assert VideoClassifier("doors").model.num_classes == 3
    for published in (name, f"{name}.scratch"):
        assert tpn.create_model(published).num_classes == 14
    for path, error, says in (
        ("empty", UnknownModelError, r"'empty'.*config\.json"),
        ("doors/model.safetensors", UnknownModelError, r"model\.safetensors'.*file.*checkpoint"),
        ("./empty", FileNotFoundError, r"empty/config\.json"),
        (Path("empty"), FileNotFoundError, r"empty/config\.json"),
        ("./nothing", UnknownModelError, r"'\./nothing'.*no such folder"),
        (3, TypeError, "name.* 3"),
    ):
        with pytest.raises(error, match=says):
            tpn.create_model(path)


def test_logits_that_are_not_finite(model, video):
    model = copy.deepcopy(model)
    for value, dtype, says in (
        (-torch.inf, torch.float32, None),  # a class that is impossible
        (torch.inf, torch.float32, "NaN or infinite.*weights$"),
        (torch.nan, torch.bfloat16, "NaN or infinite.*precision='float32'"),
    ):
        with torch.no_grad():
            model.head.fc.bias[1] = value
        with pytest.raises(ValueError, match=says) if says else nullcontext():
            assert VideoClassifier(model.to(dtype))(video).probs[1] == 0


def test_top(model, video):
    prediction = VideoClassifier(model)(video)
    assert [name for name, _ in prediction.top(5)] == [f"class {i}" for i in prediction.probs.argsort(descending=True)]
    assert len(prediction.top(50)) == 5
    assert prediction.top(1)[0][1] == pytest.approx(prediction.probs.max().item())
    with pytest.raises(ValueError, match="k.*0"):
        prediction.top(0)


def test_predict_each_continues_after_a_bad_file(model, video):
    (video.parent / "empty.mp4").touch()
    sources = [video, video.parent / "empty.mp4", video.parent / "missing.mp4", video]
    good, empty, missing, again = VideoClassifier(model).predict_each(sources)
    assert torch.equal(good.probs, again.probs)
    assert isinstance(empty, VideoError)
    assert isinstance(missing, FileNotFoundError)
    with pytest.raises(VideoError):
        VideoClassifier(model)(sources)


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("batch_size", [2, 9, 20])
def test_pipeline_equals_a_simple_loop(model, video, tmp_path, mix, batch_size):
    """Batches hold views of several videos; results and errors come in order."""
    sources = [video, tmp_path / "missing.mp4", *(write_video(tmp_path / f"{n}.mp4", n) for n in (11, 24, 1)), video]
    simple = VideoClassifier(model)
    classify = VideoClassifier(model, batch_size=batch_size, workers=3)
    classify._mix_videos = mix
    seen = []
    results = list(classify.predict_each(sources, num_clips=2, num_crops=1, progress=lambda *done: seen.append(done)))
    assert len(results) == len(sources)
    for source, result in zip(sources, results, strict=True):
        if source.name == "missing.mp4":
            assert isinstance(result, FileNotFoundError)
            continue
        expected = simple(source, num_clips=2, num_crops=1)
        assert result.source == str(source)
        torch.testing.assert_close(result.view_logits, expected.view_logits, rtol=0, atol=1e-5)
    assert seen.count((2, 2)) == 5


def test_reading_keeps_a_bounded_distance(model, video):
    """For a list of any length, with or without bad files."""
    taken = []

    def sources():
        for i in range(200):
            taken.append(i)
            yield "missing.mp4" if i % 2 else video

    classify = VideoClassifier(model, batch_size=4, workers=2)
    classify._mix_videos = True
    for given, _ in enumerate(classify.predict_each(sources(), num_clips=1, num_crops=1), 1):
        assert len(taken) - given <= 2 + 1 + 2 * 4 + 2
        if given == 60:
            break
    assert len(taken) < 80


def test_target_fps_is_saved_and_used(video, tmp_path):
    """The video has 25 frames per second, the model half of it: every clip spans twice as many frames."""
    trained = tpn.create_model("tpn_slowonly_tiny_motion", pretrained=True)
    trained.input_spec = replace(trained.input_spec, frame_interval=1, target_fps=12.5)
    tpn.save_pretrained(trained, tmp_path / "model")
    classify = VideoClassifier(str(tmp_path / "model"))
    assert classify.spec.target_fps == 12.5
    every_second = read_frames(video, range(0, 30, 2))
    assert torch.equal(classify(video).probs, classify(every_second).probs)
    assert not torch.equal(classify(video).probs, classify(read_frames(video, range(30))).probs)
    with pytest.raises(ValueError, match=r"12\.5.*frame_interval"):
        next(slide(classify, video))


def test_arrays_are_not_kept(model):
    """Only the arrays that are read ahead are in memory."""
    alive = weakref.WeakSet()

    def sources():
        for _ in range(16):
            array = torch.randint(256, (10, 3, 48, 64), dtype=torch.uint8)
            alive.add(array)
            yield array

    classify = VideoClassifier(model, batch_size=8, workers=2)
    classify._mix_videos = True
    peak = 0
    gc.freeze()  # otherwise each collection takes a second
    for _ in classify.predict_each(sources(), num_clips=1, num_crops=1):
        gc.collect()
        peak = max(peak, len(alive))
    gc.unfreeze()
    assert 1 <= peak <= 5


def test_results_do_not_wait_behind_bad_files(model, video):
    """A batch is awaited when the next one is running, or when enough sources follow it."""
    taken = []

    def sources():
        yield video
        for i in range(100):
            taken.append(i)
            yield "missing.mp4"

    classify = VideoClassifier(model, batch_size=9, workers=2)
    classify._mix_videos = True
    first = next(classify.predict_each(sources()))
    assert first.probs.shape == (5,)
    assert len(taken) <= 9 + 2 + 2


def test_stopping_early_leaves_no_thread(model, video):
    before = threading.active_count()
    for _ in VideoClassifier(model, workers=4).predict_each([video] * 50):
        assert threading.active_count() > before
        break
    assert threading.active_count() == before
    with pytest.raises(ZeroDivisionError):
        VideoClassifier(model, workers=4)([video] * 50, progress=lambda *_: 1 / 0)
    assert threading.active_count() == before


def test_read_ahead():
    running = []

    def read(number):
        running.append(number)
        if number == 5:
            raise OSError("five")
        return number

    reads = read_ahead(read, range(100), workers=3)
    for expected in range(5):
        assert next(reads) == expected
        assert len(running) <= expected + 1 + 3
    with pytest.raises(OSError, match="five"):
        next(reads)
    assert list(reads) == []
    assert len(running) < 12


def test_frames_as_people_have_them(model, video):
    """OpenCV's reversed channels, read-only memory, images in a list, PIL images: each is one video."""
    classify = VideoClassifier(model)
    frames = read_frames(video, range(30)).permute(0, 2, 3, 1).numpy()
    expected = classify(frames)
    read_only = np.frombuffer(frames.tobytes(), np.uint8).reshape(frames.shape)
    bgr = np.ascontiguousarray(frames[..., ::-1])
    images = [Image.fromarray(frame) for frame in frames]
    sources = {
        "reversed channels": bgr[..., ::-1],
        "reversed images": [image[..., ::-1] for image in bgr],
        "reversed time": np.ascontiguousarray(frames[::-1])[::-1],
        "read-only": read_only,
        "list": list(frames),
        "tuple": tuple(frames),
        "tensors": [torch.from_numpy(frame) for frame in frames],
        "channels first": [torch.from_numpy(frame).permute(2, 0, 1) for frame in frames],
        "PIL": images,
        "mixed": [images[0], *frames[1:]],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, source in sources.items():
            result = classify(source)
            assert torch.equal(result.view_logits, expected.view_logits), name
            assert result.source is None
        for each in (bgr[..., ::-1], read_only):  # without the selection of frames that copies them
            assert torch.equal(channels_first(each), torch.from_numpy(frames).permute(0, 3, 1, 2))
    first, second = classify.predict_each([list(frames), list(frames[:4])])
    assert torch.equal(first.probs, expected.probs)
    assert not torch.equal(second.probs, expected.probs)


def test_list_of_videos(model, video):
    classify = VideoClassifier(model)
    frames = read_frames(video, range(30)).permute(0, 2, 3, 1).numpy()
    for several in ([str(video)], [frames, frames[:4]], (video, frames), [list(frames), video], [video.read_bytes()]):
        assert [result.probs.shape for result in classify(several)] == [(5,)] * len(several)
    assert classify([]) == []


def test_bytes_and_open_files(model, video, tmp_path):
    classify = VideoClassifier(model)
    expected = classify(video)
    content = video.read_bytes()
    at_end = io.BytesIO()
    at_end.write(content)
    with open(video, "rb") as file:
        for source in (content, bytearray(content), memoryview(content), file, io.BytesIO(content), at_end):
            result = classify(source)
            assert torch.equal(result.view_logits, expected.view_logits)
            assert result.source is None
    with pytest.raises(VideoError, match="^bytes: "):
        classify(b"no video")
    (tmp_path / "text.mp4").write_text("no video\n" * 50)
    with open(tmp_path / "text.mp4", "rb") as file, pytest.raises(VideoError, match=r"^\S*text\.mp4: "):
        classify(file)
    with open(tmp_path / "text.mp4") as file, pytest.raises(TypeError, match=r"text\.mp4.*binary.*'rb'"):
        classify(file)


@pytest.mark.parametrize(
    ("frames", "error", "says"),
    [
        (np.zeros((4, 48, 64, 3), np.float32), TypeError, r"uint8.*float32.*255 \* frames"),
        (torch.zeros(4, 48, 64, 3), TypeError, r"uint8.*float32.*255 \* frames"),
        ([np.zeros((48, 64, 3), np.float64)] * 4, TypeError, r"uint8.*float64.*255 \* frames"),
        (np.zeros((4, 48, 64, 3), np.uint16), TypeError, "uint8.*uint16.*convert"),
        ([np.zeros((48, 64, 3), bool)], TypeError, "uint8.*bool.*convert"),
        (np.zeros((4, 48, 64), np.uint8), ValueError, r"\(4, 48, 64\).*grayscale.*stack"),
        (np.zeros((4, 48, 64, 1), np.uint8), ValueError, r"\(4, 48, 64, 1\).*grayscale.*stack"),
        ([np.zeros((48, 64), np.uint8)] * 30, ValueError, r"48, 64\).*grayscale.*stack"),
        (np.zeros((48, 64, 3), np.uint8), ValueError, r"\(48, 64, 3\).*\[frame\]"),
        (np.zeros((4, 48, 64, 4), np.uint8), ValueError, r"\(4, 48, 64, 4\).*frames\[\.\.\., :3\]"),
        (np.zeros((4, 3, 64, 3), np.uint8), ValueError, r"\(4, 3, 64, 3\).*ambiguous"),
        (np.zeros((0, 48, 64, 3), np.uint8), ValueError, r"\(0, 48, 64, 3\)"),
        (
            [np.zeros((48, 64, 3), np.uint8)] * 9 + [np.zeros((64, 48, 3), np.uint8)] * 9,
            ValueError,
            r"one size.*\(48, 64, 3\).*\(64, 48, 3\)",
        ),
        (3, TypeError, "path, .*frames.* int"),
    ],
)
def test_bad_frames(model, frames, error, says):
    with pytest.raises(error, match=says):
        VideoClassifier(model)(frames)


def test_bad_arguments(model):
    with pytest.raises(ValueError, match="num_classes, pretrained.*name"):
        VideoClassifier(model, pretrained=True, num_classes=3)
    with pytest.raises(ValueError, match="batch_size.*0"):
        VideoClassifier(model, batch_size=0)
    bare = TPNClassifier(model.backbone, model.neck, model.head)
    with pytest.raises(ValueError, match="input_spec"):
        VideoClassifier(bare)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("workers", 0), ("precision", "half"), ("device", "warp")])
def test_bad_arguments_are_refused_before_the_model_is_fetched(monkeypatch, name, value):
    monkeypatch.setattr(predict, "open_model", None)
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        VideoClassifier("tpn_slowonly_r50_k400", **{name: value})


def test_wrapped_model(model, video):
    wrapped = torch.nn.DataParallel(copy.deepcopy(model))
    assert tpn.input_spec(wrapped) == model.input_spec
    assert torch.equal(VideoClassifier(wrapped)(video).view_logits, VideoClassifier(model)(video).view_logits)
    assert VideoClassifier(FeatureModel(wrapped))(video).view_logits.shape == (9, 64)


FORK = """
import os, signal, sys
import torch, tpn
def in_child(ok):
    child = os.fork()
    if child == 0:
        signal.alarm(100)
        os._exit(0 if ok() else 1)
    return os.waitpid(child, 0)[1]
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform cannot fork")
def test_a_classifier_works_after_a_fork(tmp_path):
    """PyTorch's OpenMP threads do not exist in a forked process."""
    write_video(tmp_path / "v.mkv", 40)
    script = f"""{FORK}
classifier = tpn.VideoClassifier("tpn_slowonly_tiny_motion")
before = classifier("v.mkv").probs
def same():
    other = tpn.VideoClassifier("tpn_slowonly_tiny_motion")
    return all(torch.allclose(each("v.mkv").probs, before, atol=1e-5) for each in (classifier, other))
print(torch.get_num_threads(), in_child(same), torch.get_num_threads())
"""
    assert run_python(script, tmp_path, OMP_NUM_THREADS="2")[0] == "2 0 2\n"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform cannot fork")
def test_a_compiled_classifier_needs_spawn(tmp_path):
    """A compiled model would wait for threads of its parent."""
    write_video(tmp_path / "v.mkv", 40)
    script = f"""{FORK}
torch.compile = lambda model, **_: model
classifier = tpn.VideoClassifier("tpn_slowonly_tiny_motion", compile=True)
def refused():
    try:
        classifier("v.mkv")
    except RuntimeError as error:
        return "spawn" in str(error)
print(in_child(refused), classifier("v.mkv").probs.sum() > 0.99)
"""
    assert run_python(script, tmp_path)[0] == "0 tensor(True)\n"


def test_parse_views():
    assert parse_views("10x3") == (10, 3)
    for bad in ("", "3", "x", "0x1", "2x2", "-1x3", "1x3x1", "axb"):
        with pytest.raises(ValueError, match=f"CLIPSxCROPS.*{bad}"):
            parse_views(bad)
