"""Sliding clips over files, arrays, and live frames; segments; tempo."""

import io
import threading
import warnings
import weakref
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
import two_motions
from two_motions import BOTH, FPS, SPAN, STRIDE, numbers, raw, rendered

import tpn
from tpn import tempo
from tpn.predict import VideoClassifier
from tpn.tempo import Clip
from tpn.video import motion
from tpn.video.datasets import RawFrames, VideoFolder, VideoList
from tpn.video.encode import write_video
from tpn.video.live import Camera, raw_frames

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def video():
    return two_motions.both()


def clips_of(labels, probability=0.9):
    """Clips of 3 frames, one frame apart, with one of 4 classes each, or all of them equally probable for None."""
    for i, label in enumerate(labels):
        probs = torch.full((4,), 0.25)
        if label is not None:
            probs = torch.full((4,), (1 - probability) / 3)
            probs[label] = probability
        yield Clip(i, i + 2, probs)


# Sliding


def test_file_array_pipe_and_camera_give_the_same(classifier, motions):
    path, frames = motions / "both.mp4", np.load(motions / "frames.npy")
    sources = {
        "file": path,
        "tensor": torch.from_numpy(frames),
        "array": frames.transpose(0, 2, 3, 1),
        "pipe": raw_frames(io.BytesIO(raw(frames)), size=(112, 112)),
        "camera": Camera(f"movie={path}", format="lavfi"),
    }
    found = {name: list(tempo.slide(classifier, source, stride=20)) for name, source in sources.items()}
    first = found["file"]
    assert numbers(first) == [(0, 30), (20, 50), (40, 70), (60, 90), (80, 110)]
    for name, clips in found.items():
        assert numbers(clips) == numbers(first), name
        assert all(torch.equal(a.probs, b.probs) for a, b in zip(clips, first, strict=True)), name


@pytest.mark.parametrize("shape", [(112, 112), (80, 112), (100, 64), (50, 70)])
def test_same_as_the_classifier(classifier, video, shape):
    """Frames of any shape are resized and center-cropped as in `VideoClassifier`, which takes the same three clips."""
    frames = video[: SPAN + 2 * STRIDE, : shape[0], : shape[1]]
    clips = list(tempo.slide(classifier, frames))
    assert numbers(clips) == [(0, 30), (8, 38), (16, 46)]
    whole = classifier(frames, num_clips=3, num_crops=1)
    assert torch.equal(torch.stack([clip.probs for clip in clips]), whole.view_logits.softmax(dim=1))


@pytest.mark.parametrize("length", [1, 2, 15, 30, 31])
def test_a_video_shorter_than_a_clip(classifier, video, length):
    (clip,) = tempo.slide(classifier, video[:length])
    assert (clip.first, clip.last) == (0, length - 1)
    assert torch.equal(clip.probs, classifier(video[:length], num_clips=1, num_crops=1).probs)


def test_other_intervals_and_strides(classifier, video):
    """Strides that are not a multiple of the interval, and a stride that is longer than a clip."""
    for stride, interval, starts in ((45, 2, [0, 45]), (33, 3, [0, 33, 66]), (5, 7, [0, 5])):
        span = 15 * interval + 1
        clips = list(tempo.slide(classifier, video, stride=stride, frame_interval=interval))
        assert numbers(clips)[: len(starts)] == [(start, start + span - 1) for start in starts]
        for clip in clips[:2]:
            chosen = torch.from_numpy(video[clip.first : clip.last + 1 : interval]).permute(0, 3, 1, 2)
            (logits,) = classifier.model.eval()(classifier.spec.normalize(classifier.spec.crops(chosen)))
            torch.testing.assert_close(clip.probs, logits.detach().softmax(dim=0), atol=1e-6, rtol=0)


def test_models_of_segments(video):
    model = tpn.create_model("tpn_tsm_r50_sthv1", base_channels=4)
    classifier = VideoClassifier(model)
    with pytest.raises(ValueError, match="segments.*frame_interval"):
        tempo.slide(classifier, video)
    clips = tempo.slide(classifier, video[:30], frame_interval=4, stride=1)
    assert numbers(clips) == [(0, 28), (1, 29)]


def test_invalid_arguments(classifier, video):
    for name in ("stride", "frame_interval"):
        with pytest.raises(ValueError, match=f"{name}.*0"):
            tempo.slide(classifier, video, **{name: 0})


def test_sources_without_frames(classifier, video, tmp_path):
    for source, error, message in (
        ([], ValueError, "no frames"),
        (["a.mp4"], TypeError, "frames.*got str"),
        (video / 255, TypeError, "uint8"),
        (tmp_path / "missing.mp4", FileNotFoundError, "missing"),
    ):
        with pytest.raises(error, match=message):
            next(tempo.slide(classifier, source))


@pytest.mark.parametrize(("stride", "at_most"), [(8, 16), (2, 16), (1, 31), (60, 16)])
def test_only_frames_that_are_needed_are_kept(classifier, stride, at_most):
    """After the first clip. Before that, all frames are kept: a video shorter than a clip needs them."""
    alive, made = [], 0

    def watched(frame):
        nonlocal made
        made += 1
        image = tempo.preprocess(frame, spec, torch.device("cpu"))
        alive.append(weakref.ref(image))
        return image

    def held():
        return sum(ref() is not None for ref in alive)

    spec = tempo.sliding_spec(classifier.spec)
    given = 0

    def frames():
        nonlocal given
        for given in range(1, 301):
            yield np.zeros((90, 120, 3), np.uint8)
            assert held() <= (SPAN if given <= SPAN else at_most + 1)

    windows = tempo.sliding_windows(frames(), spec, stride, watched)
    for start, (first, last, clip) in zip(range(0, 300, stride), windows, strict=False):
        assert (first, last, given) == (start, start + SPAN - 1, start + SPAN)  # as soon as it is complete
        assert torch.stack(clip).shape == (16, 3, 64, 64)
        clip.clear()
    assert made < (200 if stride != 1 else 301)  # frames between the clips are not even resized


def test_the_caller_may_overwrite_a_frame(classifier):
    noise = np.random.default_rng(0).integers(0, 256, (SPAN, 64, 64, 3), np.uint8)

    def reused():
        buffer = np.empty_like(noise[0])
        for image in noise:
            buffer[:] = image
            yield buffer

    (expected,), (clip,) = (tempo.slide(classifier, frames) for frames in (noise, reused()))
    assert torch.equal(clip.probs, expected.probs)


def batching(classifier, batch_size):
    """A classifier that puts clips into batches, as on a GPU."""
    gathering = VideoClassifier(classifier.model, batch_size=batch_size)
    gathering._mix_videos = True
    return gathering


def test_batches(classifier, video):
    clips = list(tempo.slide(batching(classifier, 3), video, stride=20))
    expected = list(tempo.slide(classifier, video, stride=20))
    assert numbers(clips) == numbers(expected)
    torch.testing.assert_close([clip.probs for clip in clips], [clip.probs for clip in expected], atol=1e-6, rtol=0)


def test_clips_in_an_incomplete_batch_are_yielded_before_an_error(classifier, video):
    def frames():
        yield from video[: SPAN + 20]
        raise OSError("the disk is gone")

    clips = tempo.slide(batching(classifier, 30), frames(), stride=10)
    assert [next(clips).first for _ in range(3)] == [0, 10, 20]
    with pytest.raises(OSError, match="the disk is gone"):
        next(clips)


@pytest.mark.parametrize("is_live", [True, False])
def test_a_clip_is_yielded_when_it_is_complete(classifier, video, is_live):
    """With batch size 1 or live frames, before another frame is read."""
    taken, go = [], threading.Event()

    def frames():
        for number, image in enumerate(video):
            if number == SPAN:
                assert go.wait(20) or not is_live
            taken.append(number)
            yield image

    many = batching(classifier, 30 if is_live else 1)
    with closing(tempo.slide(many, frames(), live=is_live)) as clips:
        assert numbers([next(clips)]) == [(0, 30)]
        assert len(taken) == SPAN
        go.set()


def test_live_clips_are_skipped_while_the_model_is_busy(classifier, video, monkeypatch):
    """5 clips become complete during the first one: 4 are skipped, the last one is classified next."""
    busy, go = threading.Event(), threading.Event()
    forward = classifier.model.forward

    def slow(x):
        busy.set()
        assert go.wait(20)
        return forward(x)

    def frames():
        yield from video[:SPAN]
        assert busy.wait(20)
        yield from video[SPAN : SPAN + 5 * STRIDE]
        go.set()

    monkeypatch.setattr(classifier.model, "forward", slow)
    clips = list(tempo.slide(classifier, frames(), live=True))
    assert numbers(clips) == [(0, 30), (40, 70)]
    monkeypatch.undo()
    patient = list(tempo.slide(classifier, video[: SPAN + 5 * STRIDE]))
    assert numbers(patient) == [(8 * i, 8 * i + 30) for i in range(6)]
    assert torch.equal(clips[1].probs, patient[5].probs)


# Segments


def test_segments_are_yielded_when_they_end():
    asked = []

    def clips():
        for clip in clips_of([0, 0, 1, 1, None, None, 1, 2]):
            asked.append(clip.first)
            yield clip

    ended = []
    for segment in tempo.segments(clips(), fps=1.0):
        ended.append((segment.label, segment.start, segment.end, len(asked)))
        assert segment.probability == pytest.approx(0.9 if segment.label is not None else 0.25)
    # the middles of the clips are 1, 2, 3, ...; the last column is the number of clips read so far
    assert ended == [(0, 0.0, 2.5, 3), (1, 2.5, 4.5, 5), (None, 4.5, 6.5, 7), (1, 6.5, 7.5, 8), (2, 7.5, 10.0, 8)]


def test_segments_without_a_class():
    assert [s.label for s in tempo.segments(clips_of([0, 1], 0.75), fps=1.0, min_probability=0.75)] == [0, 1]
    (none,) = tempo.segments(clips_of([0, 1], 0.75), fps=1.0, min_probability=0.76)
    assert (none.label, none.start, none.end, none.probability) == (None, 0.0, 4.0, 0.75)
    assert not list(tempo.segments([], fps=1.0))
    with pytest.raises(ValueError, match="min_probability.*got 50"):
        list(tempo.segments(clips_of([0]), fps=1.0, min_probability=50))
    for fps in (0, float("nan")):
        with pytest.raises(ValueError, match=f"fps.*got {fps}"):
            list(tempo.segments(clips_of([0]), fps=fps))
    (whole,) = tempo.segments(clips_of([3]), fps=2.0)
    assert (whole.start, whole.end) == (0.0, 1.5)


def test_segments_of_a_video(classifier, motions):
    found = list(tempo.segments(tempo.slide(classifier, motions / "both.mp4"), fps=FPS))
    assert [motion.CLASSES[s.label] for s in found] == [name for name, _, _ in BOTH]
    assert found[0].start == 0
    assert found[0].end == pytest.approx(56 / FPS, abs=0.5)
    assert found[1].start == pytest.approx(56 / FPS, abs=0.5)


def test_curves():
    times, probs = tempo.curves(clips_of([0, 1, 2]), fps=2.0)
    assert times.tolist() == [0.5, 1.0, 1.5]
    assert probs.shape == (3, 4)
    assert probs[1, 1] == pytest.approx(0.9)


# Tempo


def test_width_of_known_curves():
    t = np.arange(11)
    width = tempo.full_width_at_half_maximum
    assert width(t, 5 - np.abs(t - 5)) == 5  # a triangle
    assert width(t, 5 - np.abs(t - 4.0).clip(max=5)) == 5  # not in the middle
    fine = np.linspace(-10, 10, 4001)
    assert width(fine, 0.3 * np.exp(-(fine**2) / 2)) == pytest.approx(2 * np.sqrt(2 * np.log(2)), abs=1e-5)
    assert width([0, 1, 3, 4, 8], [0, 1, 1, 0.25, 0]) == pytest.approx(3 + 2 / 3 - 0.5)  # uneven steps


def test_width_is_cut_at_the_ends():
    width = tempo.full_width_at_half_maximum
    assert width([1, 2, 3], [1, 1, 1]) == 2
    assert width([1, 2, 3], [1, 1, 1], ends=(0, 4.5)) == 4.5
    assert width([1, 2, 3], [0, 0.6, 1], ends=(0, 4)) == pytest.approx(4 - 1 - 0.5 / 0.6)
    assert width([1, 2, 3], [1, 0, 0], ends=(0.5, 4)) == 1
    assert width([1, 2, 3], [0.5, 0.5, 1]) == 2  # exactly half is not below half
    assert width([1], [0.2], ends=(0, 2)) == 2


def test_width_of_zeros_and_of_several_maxima():
    width = tempo.full_width_at_half_maximum
    assert width([1, 2, 3], [0, 0, 0], ends=(0, 9)) == 0
    assert width(np.arange(8), [0, 1, 0, 0, 1, 1, 1, 0]) == 1  # the first of two equal maxima
    assert width(np.arange(8), [0, 1, 0.4, 0.6, 2, 0.6, 0, 0]) == pytest.approx(1 + 0.6 / 1.4)  # a lower maximum beside it


@pytest.mark.parametrize(
    ("times", "values", "ends", "message"),
    [
        ([], [], None, r"times.*got \(0,\), \(0,\)"),
        ([0, 1], [1], None, r"times.*got \(2,\), \(1,\)"),
        ([0, 0], [1, 1], None, "times"),
        ([0, 1], [1, -1], None, "values"),
        ([0, 1], [1, float("nan")], None, "values"),
        ([0, 1], [1, 1], (0.5, 2), r"ends.*0\.5\.\.2"),
    ],
)
def test_width_of_invalid_curves(times, values, ends, message):
    with pytest.raises(ValueError, match=message):
        tempo.full_width_at_half_maximum(times, values, ends=ends)


DURATIONS = (48, 96, 144)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Growing for 2, 4 and 6 seconds between other motions, one video of another class, and a broken file."""
    root = tmp_path_factory.mktemp("data")
    for name in ("growing", "moving up"):
        (root / name).mkdir()
    for frames in DURATIONS:
        parts = [("turning clockwise", 3.0, 48), ("growing", 2.5, frames), ("blinking", 5.0, 48)]
        write_video(root / "growing" / f"{frames:03d}.mp4", rendered(parts, seed=3), fps=FPS)
    write_video(root / "moving up" / "a.mp4", rendered([("moving up", 3.0, 40)], seed=4), fps=FPS)
    (root / "moving up" / "broken.mp4").write_bytes(b"broken")
    return root


def test_tempo_follows_the_duration(classifier, data):
    dataset = VideoFolder(data, classifier.spec, train=False)
    tempos = list(tempo.dataset_tempos(classifier, dataset, stride=12))
    assert [t.item for t in tempos] == dataset.items
    *growing, moving, broken = tempos
    for measured, frames in zip(growing, DURATIONS, strict=True):
        assert measured.seconds == pytest.approx(frames / FPS, abs=0.5)
    assert moving.seconds == pytest.approx(31 / FPS)  # a single clip, up to its end
    assert broken.seconds is None
    assert "not a video" in broken.reason
    variance = tempo.tempo_variance(tempos, num_classes=2)
    assert variance[0] == pytest.approx(np.var([t.seconds for t in growing], ddof=1))
    assert variance[0] == pytest.approx(4, rel=0.2)
    assert np.isnan(variance[1])


def test_datasets_that_cannot_be_measured(classifier, data, tmp_path):
    spec = classifier.spec
    (tmp_path / "list.txt").write_text("a 3 0\n")
    (tmp_path / "parts.csv").write_text("path,label,end\na.mp4,growing,2\n")
    (tmp_path / "dancing").mkdir()
    (tmp_path / "dancing" / "a.mp4").touch()
    for dataset, message in (
        (VideoFolder(data, replace(spec, target_fps=12), train=False), "target_fps"),
        (RawFrames(tmp_path / "list.txt", spec, train=False), "VideoFolder or VideoList"),
        (VideoFolder(tmp_path, spec, train=False), "'dancing'"),
        (VideoList(tmp_path / "parts.csv", spec, train=False), "whole videos"),
    ):
        with pytest.raises(ValueError, match=message):
            tempo.dataset_tempos(classifier, dataset)


def test_gain_against_variance():
    nan = float("nan")
    one, two, variance = [0.5, 0.5, 0.5, 0.5, 0.5], [0.5, 0.6, 0.75, 0.9, nan], [1, 2, 4, 30, 9]
    result = tempo.gain_against_variance(one, two, variance)
    np.testing.assert_allclose(result.gain, [0, 0.1, 0.25, 0.4, nan], atol=1e-12)
    assert result.num_classes == 4
    assert result.spearman == pytest.approx(1)
    assert result.pearson == pytest.approx(np.corrcoef([0, 0.1, 0.25, 0.4], variance[:4])[0, 1])
    tied = tempo.gain_against_variance([0] * 4, [1, 2, 2, 4], [4, 3, 2, 1])
    assert tied.spearman == pytest.approx(-0.9486833)  # from scipy.stats.spearmanr
    same = tempo.gain_against_variance([0] * 3, [1, 1, 1], [4, 3, nan])
    assert np.isnan([same.pearson, same.spearman]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = tempo.gain_against_variance([0] * 3, [1, 2, 3], [4, 4, 4])
    assert np.isnan([same.pearson, same.spearman]).all()
    with pytest.raises(ValueError, match=r"baseline.*\(2,\), \(2,\), \(1,\)"):
        tempo.gain_against_variance([0, 1], [0, 1], [1])
