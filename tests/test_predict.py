import copy
import gc
import os
import subprocess
import sys
import threading
import weakref
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from videos import write_video

import tpn
from tpn import ClassificationHead, InputSpec, ResNet3dSlowOnly, TemporalPyramid, TPNClassifier, VideoClassifier
from tpn.models.features import FeatureModel
from tpn.predict import parse_views
from tpn.video.ahead import read_ahead
from tpn.video.decode import VideoError, read_frames

ROOT = Path(__file__).parents[1]


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


def test_batch_size_does_not_change_the_result(model, video):
    results = [VideoClassifier(model, batch_size=n)(video).view_logits for n in (1, 2, 7, 100)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-5)


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


def test_model_is_left_as_it_was(model, video):
    model.train()
    model.head.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classify = VideoClassifier(model)
    classify(video)
    with pytest.raises(VideoError):
        classify(write_video(video.parent / "bad.mp4", 1).with_name("bad2.mp4").touch() or video.parent / "bad2.mp4")
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_that_gives_no_numbers(model, video):
    model = copy.deepcopy(model)
    for value, dtype, says in (
        (-torch.inf, torch.float32, None),  # a class that cannot be
        (torch.inf, torch.float32, "values that are NaN or infinite; its weights are damaged$"),
        (torch.nan, torch.bfloat16, "damaged, or it needs precision='float32'$"),
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
    with pytest.raises(ValueError, match="k must be at least 1"):
        prediction.top(0)


def test_predict_each_goes_on_after_a_bad_file(model, video):
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
def test_pipeline_gives_what_a_simple_loop_gives(model, video, tmp_path, mix, batch_size):
    """Views of several videos in a batch, errors in between, everything in order."""
    sources = [video, tmp_path / "missing.mp4", *(write_video(tmp_path / f"{n}.mp4", n) for n in (11, 24, 9)), video]
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
    """However long the list, and whatever is in it."""
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


def test_arrays_are_not_kept(model):
    """Of many large ones, those that are read ahead are there."""
    alive = weakref.WeakSet()

    def sources():
        for _ in range(16):
            array = torch.randint(256, (10, 3, 48, 64), dtype=torch.uint8)
            alive.add(array)
            yield array

    classify = VideoClassifier(model, batch_size=8, workers=2)
    classify._mix_videos = True
    peak = 0
    for _ in classify.predict_each(sources(), num_clips=1, num_crops=1):
        gc.collect()
        peak = max(peak, len(alive))
    assert 1 <= peak <= 5


def test_results_do_not_wait_behind_bad_files(model, video):
    """Of a device, a batch is waited for when the next one is under way, or when enough has come in behind it."""
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


@pytest.mark.parametrize("num_frames", [1, 7, 8, 15])
def test_short_videos(model, tmp_path, num_frames):
    path = write_video(tmp_path / "v.mp4", num_frames)
    prediction = VideoClassifier(model)(path)
    assert prediction.view_logits.shape == (9, 5)
    assert prediction.probs.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("frames", "error", "says"),
    [
        (np.zeros((4, 48, 64, 3), np.float32), TypeError, "uint8, 0..255, got torch.float32"),
        (np.zeros((4, 48, 64), np.uint8), ValueError, r"got \(4, 48, 64\): it is neither"),
        (np.zeros((4, 48, 64, 4), np.uint8), ValueError, "it is neither"),
        (np.zeros((4, 3, 64, 3), np.uint8), ValueError, "it could be both"),
        (np.zeros((0, 48, 64, 3), np.uint8), ValueError, r"got \(0, 48, 64, 3\)"),
        (3, TypeError, "expected a path or an array of frames, got int"),
    ],
)
def test_bad_frames(model, frames, error, says):
    with pytest.raises(error, match=says):
        VideoClassifier(model)(frames)


def test_bad_arguments(model):
    with pytest.raises(ValueError, match="go with a model's name"):
        VideoClassifier(model, pretrained=True)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        VideoClassifier(model, batch_size=0)
    bare = TPNClassifier(model.backbone, model.neck, model.head)
    with pytest.raises(ValueError, match="no input_spec"):
        VideoClassifier(bare)


def test_a_model_in_a_wrapper_for_training(model, video):
    wrapped = torch.nn.DataParallel(copy.deepcopy(model))
    assert tpn.input_spec(wrapped) == model.input_spec
    assert torch.equal(VideoClassifier(wrapped)(video).view_logits, VideoClassifier(model)(video).view_logits)
    assert VideoClassifier(FeatureModel(wrapped))(video).view_logits.shape == (9, 64)


def test_parse_views():
    assert parse_views("10x3") == (10, 3)
    for bad in ("", "3", "x", "0x1", "2x2", "-1x3", "1x3x1", "axb"):
        with pytest.raises(ValueError, match="CLIPSxCROPS"):
            parse_views(bad)


def run(script):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=100)


def test_import_needs_no_decoder_no_plots_no_network():
    done = run(
        "import sys, socket\n"
        "def refuse(*a, **k): raise OSError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import tpn, torch\n"
        "print(sorted({'av', 'matplotlib'} & sys.modules.keys()))\n"
        "tpn.list_models(); print(tpn.TemporalPyramid((8, 16), 4)((torch.zeros(1, 8, 4, 6, 6), torch.zeros(1, 16, 4, 3, 3))).shape)"
    )
    assert done.stdout.splitlines() == ["[]", "torch.Size([1, 16, 1, 3, 3])"], done.stderr


def test_models_run_where_no_decoder_is_installed():
    done = run(
        "import sys; sys.modules['av'] = None\n"
        "import tpn, torch\n"
        "print(tpn.create_model('tsm_r50_sthv2')(torch.zeros(1, 3, 2, 32, 32)).shape)\n"
        "try: tpn.VideoClassifier\n"
        "except ImportError as error: print(error)\n"
    )
    shape, error = done.stdout.splitlines()
    assert shape == "torch.Size([1, 174])"
    assert "av" in error
