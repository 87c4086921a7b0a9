"""Tracks of people and objects: reading them, their square crops, and what becomes of each in one decoding."""

import csv
import json
import re
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from runs import fit
from test_cli import run

import tpn
from tpn import tempo, tracks
from tpn.cli.tracks import _caption
from tpn.predict import Prediction
from tpn.training.config import TrainConfig
from tpn.training.data import facts_of, open_data
from tpn.video import annotate, decode, encode, motion
from tpn.video.annotate import Caption, color_of, draw_labels
from tpn.video.crops import crop_frame, square_boxes
from tpn.video.datasets import RawFrames, VideoList
from tpn.video.decode import VideoError
from tpn.video.sampling import at_frame_rate
from tpn.video.tracks import MAX_GAP, Track, read_tracks
from tpn.video.transforms import resize_short_side

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("moving right", "turning clockwise")
FRAMES, SIZE = 64, 112
LEFT, RIGHT = (11.0, 11.0, 101.0, 101.0), (123.0, 11.0, 213.0, 101.0)
OF_TINY = ("--model", "tpn_slowonly_tiny_motion", "--device", "cpu")


def steady(box, frames=range(FRAMES), id=1):
    return Track(id, np.array(frames), np.tile(box, (len(frames), 1)))


def mot(*found):
    """The lines of tracks as MOT text."""
    rows = [
        (frame + 1, track.id, x1, y1, x2 - x1, y2 - y1, 1, -1, -1, -1)
        for track in found
        for frame, (x1, y1, x2, y2) in zip(track.frames.tolist(), track.boxes.tolist(), strict=True)
    ]
    return "".join(",".join(map(str, row)) + "\n" for row in sorted(rows))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with a video of two motions side by side, `pair.mp4`, and a track for each in `pair.txt`, 1 and 2."""
    folder = tmp_path_factory.mktemp("pair")
    shown = [motion.render(motion.CLASSES.index(name), tempo=3, seed=i, num_frames=FRAMES) for i, name in enumerate(NAMES, 1)]
    encode.write_video(folder / "pair.mp4", np.concatenate(shown, axis=2), fps=motion.FPS)
    (folder / "pair.txt").write_text(mot(steady(LEFT), steady(RIGHT, id=2)))
    return folder


@pytest.fixture(scope="module")
def small():
    """A classifier with a very small network and random weights."""
    torch.manual_seed(0)
    model = tpn.create_model("tpn_slowonly_tiny_motion", base_channels=4)
    model.input_spec = replace(model.input_spec, num_clips=1, short_side=36, crop_size=32, three_crop_size=36)
    return tpn.VideoClassifier(model)


@pytest.fixture
def decoded(monkeypatch):
    """The numbers of frames that the decoder returned, a list for each time that a video was decoded."""
    runs = []
    original = decode.decode_all

    def counted(*args):
        runs.append(0)
        for frame in original(*args):
            runs[-1] += 1
            yield frame

    monkeypatch.setattr(decode, "decode_all", counted)
    return runs


def by_hand(video, track, size):
    """The crops of a track, (T, 3, size, size): what a user writes from the public functions."""
    frames, boxes = square_boxes(track)
    images = decode.read_frames(video, frames)
    return torch.stack([resize_short_side(crop_frame(image, box), size) for image, box in zip(images, boxes, strict=True)])


# Reading


def test_forms_of_tracks(tmp_path):
    boxes = {3: ([1, 2, 4], [[0, 0, 2, 4], [1, 1, 3, 5], [-2.5, 0, 4, 4]]), 1: ([0], [[5, 5, 9, 8]])}
    (tmp_path / "mot.txt").write_text("2,3,0,0,2,4,0.9,-1,-1,-1\n1,1,5,5,4,3,1\n5,3,-2.5,0,6.5,4\n\n3, 3, 1, 1, 2, 4\n")
    header, corners = "frame,id,x,y,w,h", "Class,X2,y2,id,frame,x1,y1"
    (tmp_path / "a.csv").write_text(f"{header},class\n1,3,0,0,2,4,person\n0,1,5,5,4,3,dog\n2,3,1,1,2,4,\n4,3,-2.5,0,6.5,4\n")
    (tmp_path / "b.csv").write_text(
        f"{corners}\r\np,2,4,3,1,0,0\r\np,9,8,1,0,5,5\r\np,3,5,3,2,1,1\r\np,4,4,3,4,-2.5,0\r\n", "utf-8-sig"
    )
    (tmp_path / "c.csv").write_text(f",{header}\n0,1,3,0,0,2,4\n1,0,1,5,5,4,3\n2,2,3,1,1,2,4\n3,4,3,-2.5,0,6.5,4\n")  # pandas
    rows = np.array([[1, 3, 0, 0, 2, 4, 9], [0, 1, 5, 5, 4, 3, 9], [2, 3, 1, 1, 2, 4, 9], [4, 3, -2.5, 0, 6.5, 4, 9]])
    for source in (
        tmp_path / "mot.txt",
        str(tmp_path / "a.csv"),
        tmp_path / "b.csv",
        tmp_path / "c.csv",
        rows,
        dict(sorted(boxes.items())),
    ):
        found = read_tracks(source)
        assert [track.id for track in found] == [1, 3]
        for track in found:
            assert track.frames.dtype == np.int64
            assert track.frames.tolist() == boxes[track.id][0]
            assert track.boxes.tolist() == boxes[track.id][1]
        assert (found[1].first, found[1].last, len(found[1])) == (1, 4, 4)
        assert read_tracks(found) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "t.txt: the file is empty"),
        ("1,1,0,0,2,2\n1,2,0,0,2\n", "line 2: expected numbers .*'1,2,0,0,2'"),
        ("1,1,0.1,0.2,0.3,0.8\n2,1,0.5,0.2,0.3,0.8\n", "must be pixels"),
        ("1 1 0 0 2 2\n", "line 1: .*commas, got '1 1 0"),
        ("1,1,0,0,2,2\n1,2,0,0,two,2\n", "line 2: .*two"),
        ("1,1,0,0,2,2\n0,1,0,0,2,2\n", "line 2: .*in MOT text at 1"),
        ("1,1,0,0,2,2\n2,1,0,0,0,2\n", "line 2: .*positive width"),
        ("1,1,0,0,nan,2\n", "line 1: .*finite"),
        ("1,1,inf,0,2,2\n", "line 1: .*finite"),
        ("1,1,1e308,0,1e308,2\n", "line 1: .*finite"),
        ("1,1,0,0,1e9,2\n", "line 1: .*1,000,000"),
        ("1,-1,0,0,2,2\n", "line 1: .*tracker"),
        ("1.5,1,0,0,2,2\n", "line 1: .*whole"),
        ("99999999,1,0,0,2,2\n", "line 1: .*10,000,000"),
        ("1,1,0,0,2,2\n2,1,0,0,2,2\n1,1,3,3,2,2\n", "line 3: another box of id 1 .* index 0"),
        ("frame,id,x,y,w,h\n0,1,0,0,2,2\n0,1,0,0,2,-2\n", "line 3: .*positive"),
        ("frame,id,x1,y1,x2,y2\n0,1,4,4,2,9\n", "line 2: .*positive"),
        ("frame,track,x,y,w,h\n0,1,0,0,2,2\n", "expected the columns frame, id, .*got 'frame, track"),
        ('1,1,0,0,"2,2\n', "not valid CSV"),
        (b"\xff\xfe1,1", "UTF-8"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_files_that_are_refused(tmp_path, content, message):
    (tmp_path / "t.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_tracks(tmp_path / "t.txt")
    assert str(caught.value).startswith(str(tmp_path / "t.txt"))


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("tpn.video.tracks.MAX_BYTES", 5)
    (tmp_path / "t.txt").write_text("1,1,0,0,2,2\n")
    with pytest.raises(ValueError, match="limit is 5"):
        read_tracks(tmp_path / "t.txt")


def test_other_sources_are_refused():
    for source, error in (
        (5, TypeError),
        ([1, 2], TypeError),
        (np.zeros((3, 5)), ValueError),
        (np.zeros((3, 6), bool), ValueError),
    ):
        with pytest.raises(error, match="tracks must be"):
            read_tracks(source)
    for frames, boxes in (
        ([0, 0], [[0, 0, 1, 1]] * 2),
        ([], []),
        ([0], [[0, 0, 1]]),
        ([0, 1, 2], [[0, 0, 1, 1]] * 2),
        ([0], [[0, 0, 0, 1]]),
        ([-1], [[0, 0, 1, 1]]),
    ):
        with pytest.raises(ValueError, match="track 7"):
            read_tracks({7: (frames, boxes)})
    for arrays in (np.zeros((5, 4)), 5):
        with pytest.raises(ValueError, match="track 7: expected a pair"):
            read_tracks({7: arrays})
    with pytest.raises(TypeError, match="id must be an integer, got 'x'"):
        read_tracks({"x": ([0], [[0, 0, 1, 1]])})
    assert read_tracks({}) == read_tracks(np.zeros((0, 6))) == []


def test_an_id_that_comes_back_is_another_track():
    frames = [0, 1, MAX_GAP + 2, 2 * MAX_GAP + 4]  # missing: MAX_GAP, then one more
    found = read_tracks({1: (frames, np.tile(LEFT, (4, 1)))})
    assert [(track.id, track.frames.tolist()) for track in found] == [(1, frames[:3]), (1, frames[3:])]
    assert len(read_tracks({1: (frames, np.tile(LEFT, (4, 1)))}, max_gap=0)) == 3


def test_a_part_of_a_track_has_a_box_for_each_frame():
    """Also between two that the tracker gave."""
    track = Track(1, np.array([0, 20, 40]), np.array([(0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)]))
    part = track.between(5, 15)
    assert part.frames.tolist() == list(range(5, 16))
    assert np.array_equal(part.boxes, track.filled()[5:16])
    assert track.between(-5, 0).frames.tolist() == [0]
    assert track.between(41, 50) is None


# Squares and crops


def test_squares_are_those_of_a_simple_loop():
    rng = np.random.default_rng(0)
    frames = np.array([5, 6, 9, 10, 11, 12, 20])
    corners = rng.uniform(-20, 100, (7, 2))
    track = Track(1, frames, np.hstack([corners, corners + rng.uniform(5, 60, (7, 2))]))
    every = np.arange(5, 21)
    filled = np.stack([np.interp(every, frames, track.boxes[:, i]) for i in range(4)], axis=1)
    for margin, smoothing in ((0.25, 5), (0, 1), (1, 31)):
        wanted = []
        for i in range(len(every)):
            reach = min(smoothing // 2, i, len(every) - 1 - i)
            window = filled[i - reach : i + reach + 1]
            side = round(np.mean([(1 + margin) * max(x2 - x1, y2 - y1) for x1, y1, x2, y2 in window]))
            x, y = (round(np.mean([(box[k] + box[k + 2]) / 2 for box in window]) - side / 2) for k in (0, 1))
            wanted.append([x, y, x + side, y + side])
        found, boxes = square_boxes(track, margin=margin, smoothing=smoothing)
        assert found.tolist() == every.tolist()
        assert boxes.tolist() == wanted


def test_the_square_of_a_box_that_rests_does_not_move():
    boxes = np.tile([100.3, 100.3, 142.3, 142.3], (20_000, 1))
    _, squares = square_boxes(Track(1, np.arange(len(boxes)), boxes))
    assert len(np.unique(squares, axis=0)) == 1


@pytest.mark.parametrize(
    ("options", "error"), [({"margin": -0.1}, ValueError), ({"margin": "x"}, TypeError), ({"smoothing": 4}, ValueError)]
)
def test_options_of_squares_are_checked(options, error):
    with pytest.raises(error, match=next(iter(options))):
        square_boxes(steady(LEFT), **options)


def test_crops_repeat_the_edge_of_the_picture():
    image = torch.randint(256, (3, 20, 30), dtype=torch.uint8)
    padded = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (50, 50), (50, 50)), "edge"))
    for left, top, right, bottom in ((3, 4, 9, 8), (-5, -6, 12, 14), (25, 15, 45, 35), (-40, -30, 70, 60), (35, -20, 40, -10)):
        wanted = padded[:, 50 + top : 50 + bottom, 50 + left : 50 + right]
        assert torch.equal(crop_frame(image, (left, top, right, bottom)), wanted)


# Classifying


def test_each_track_gets_its_own_label_as_crops_on_the_disk_do(classifier, pair, tmp_path):
    moving = Track(1, np.array([0, 20, 21, 63]), np.array([LEFT, (-30, 8, 90, 101), (-28, 8, 90, 101), LEFT]))
    found = [moving, steady(RIGHT, id=2)]
    results = classifier.tracks(pair / "pair.mp4", found)
    for track, result, name in zip(found, results, NAMES, strict=True):
        for i, image in enumerate(by_hand(pair / "pair.mp4", track, classifier.spec.short_side)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i:03d}.png", compress_level=0)
        pictures = [Image.open(path) for path in sorted(tmp_path.glob("*.png"))]
        torch.testing.assert_close(result.probs, classifier(pictures).probs, rtol=0, atol=1e-6)
        assert result.source == str(pair / "pair.mp4")
        assert track is moving or result.top(1)[0][0] == name
    assert classifier.tracks(pair / "pair.mp4", [steady(LEFT)])[0].top(1)[0][0] == NAMES[0]


@pytest.mark.parametrize("views", [(2, 1), (1, 3)])
def test_views_of_a_track_are_those_of_a_video(small, pair, views):
    """Three crops of a square are the same, and larger than one."""
    num_clips, num_crops = views
    options = {"num_clips": num_clips, "num_crops": num_crops}
    (result,) = small.tracks(pair / "pair.mp4", [steady(LEFT)], **options)
    images = by_hand(pair / "pair.mp4", steady(LEFT), small.spec.short_side)
    torch.testing.assert_close(result.probs, small(images, **options).probs, rtol=0, atol=1e-6)
    assert len(result.view_logits) == num_clips
    other = small.tracks(pair / "pair.mp4", [steady(LEFT)], num_clips=num_clips, num_crops=4 - num_crops)[0]
    assert not torch.allclose(other.probs, result.probs, atol=1e-6)


def test_frames_in_memory_and_a_file_are_the_same(small, pair):
    frames = torch.stack(list(decode.iter_frames(pair / "pair.mp4")))
    from_file = small.tracks(pair / "pair.mp4", pair / "pair.txt")
    for source in (frames, frames.permute(0, 2, 3, 1).numpy()):
        results = small.tracks(source, pair / "pair.txt")
        assert all(torch.equal(a.probs, b.probs) for a, b in zip(results, from_file, strict=True))
        assert results[0].source is None
    with pytest.raises(TypeError, match="got list"):
        small.tracks([frames], pair / "pair.txt")


def test_target_fps_is_that_of_the_file(small, pair):
    classifier = tpn.VideoClassifier(small.model)
    classifier.spec = spec = replace(small.spec, target_fps=motion.FPS / 3)
    (result,) = classifier.tracks(pair / "pair.mp4", [steady(LEFT, range(10, 60))])
    images = by_hand(pair / "pair.mp4", steady(LEFT, range(10, 60)), spec.short_side)
    indices = at_frame_rate(spec.indices, motion.FPS, motion.FPS / 3)(50)
    assert indices[0, 1] - indices[0, 0] == 3 * spec.frame_interval
    (wanted,) = classifier.classify_each([(images, torch.from_numpy(indices))])
    assert torch.equal(result.probs, wanted.probs)


def test_odd_tracks_do_not_stop_the_others(small, pair):
    found = {
        9: steady(LEFT),
        1: steady(LEFT, [7]),  # one frame
        2: steady(LEFT, [0, 3, 20]),  # missing frames
        3: steady((-500, 0, -400, 90)),  # outside the picture
        4: steady((-20, -20, 40, 300)),  # partly outside
        5: steady(LEFT, range(30, 70)),  # longer than the video
        6: steady((0, 0, 5000, 5000)),  # of another video
        7: Track(7, np.arange(2), np.array([LEFT, (9000, 0, 9100, 90)])),  # leaves the picture
    }
    tracks = [replace(track, id=id) for id, track in found.items()]
    results = dict(zip(found, small.tracks(pair / "pair.mp4", tracks), strict=True))
    failed = {id: str(result) for id, result in results.items() if isinstance(result, VideoError)}
    assert failed.keys() == {3, 5, 6}
    assert "track 3: all of its boxes are outside the picture of 224x112" in failed[3]
    assert "track 5: the video ends before its frame" in failed[5]
    assert "track 6: a box of 6250 pixels" in failed[6]
    for id in results.keys() - failed.keys():
        images = by_hand(pair / "pair.mp4", found[id], small.spec.short_side)
        torch.testing.assert_close(results[id].probs, small(images).probs, rtol=0, atol=1e-6)


def test_fifty_tracks_in_one_decoding(small, pair, decoded):
    rng = np.random.default_rng(1)
    found = []
    for id in range(50):
        start, corner = int(rng.integers(0, 40)), rng.uniform(0, 60, 2)
        found.append(steady((*corner, *(corner + 40)), range(start, start + 10), id))
    done = []
    results = small.tracks(pair / "pair.mp4", found, progress=lambda *counts: done.append(counts))
    assert all(isinstance(result, Prediction) for result in results)
    assert len(decoded) == 1
    assert decoded[0] <= max(track.last for track in found) + 1
    assert done == [(i, 50) for i in range(1, 51)]
    images = by_hand(pair / "pair.mp4", found[17], small.spec.short_side)
    torch.testing.assert_close(results[17].probs, small(images).probs, rtol=0, atol=1e-6)


def test_only_crops_of_unfinished_clips_are_kept(small, pair, monkeypatch):
    kept = []
    add = tracks._OpenTrack.add

    def counted(self, *args):
        yield from add(self, *args)
        kept.append(len(self.kept))

    monkeypatch.setattr(tracks._OpenTrack, "add", counted)
    list(tracks.slide(small, pair / "pair.mp4", pair / "pair.txt", stride=8, frame_interval=1))
    assert max(kept) <= small.spec.num_frames
    assert kept[-2:] == [0, 0]


def test_no_tracks_and_files_that_cannot_be_read(small, pair, tmp_path):
    assert small.tracks(pair / "pair.mp4", {}) == []
    with pytest.raises(FileNotFoundError):
        small.tracks(tmp_path / "none.mp4", pair / "pair.txt")
    with pytest.raises(VideoError, match="not a video"):
        small.tracks(pair / "pair.txt", pair / "pair.txt")


def test_damage_before_the_first_track_is_an_error_of_each(small, pair, tmp_path):
    data = bytearray((pair / "pair.mp4").read_bytes())
    start = data.index(b"mdat")
    data[start + 3000 : start + 6000] = bytes(3000)
    (tmp_path / "damaged.mp4").write_bytes(data)
    results = small.tracks(tmp_path / "damaged.mp4", [steady(LEFT, range(40, 60)), steady(RIGHT, range(50, 60), 2)])
    assert [type(result) for result in results] == [VideoError, VideoError]


def test_tracks_before_the_damage_are_classified(small, pair, monkeypatch):
    original = decode.decode_all

    def damaged(*args):
        for number, frame in enumerate(original(*args)):
            if number == 30:
                raise VideoError("pair.mp4: damaged")
            yield frame

    monkeypatch.setattr(decode, "decode_all", damaged)
    results = small.tracks(pair / "pair.mp4", [steady(LEFT), steady(LEFT, range(20))])
    assert [str(results[0]), type(results[1])] == ["pair.mp4: damaged", Prediction]


# Timelines


def test_clips_of_a_track_are_those_of_its_crops(classifier, pair, decoded):
    found = [steady(LEFT, range(5, 64)), steady(RIGHT, range(40, 50), 2), steady((900, 0, 950, 9), id=3)]
    results = {track.id: (clips, error) for track, clips, error in tracks.slide(classifier, pair / "pair.mp4", found, stride=10)}
    assert len(decoded) == 1
    assert results.keys() == {1, 2, 3}
    for track in found[:2]:
        clips, error = results[track.id]
        assert error is None
        wanted = list(tempo.slide(classifier, by_hand(pair / "pair.mp4", track, classifier.spec.short_side), stride=10))
        assert [(c.first, c.last) for c in clips] == [(track.first + c.first, track.first + c.last) for c in wanted]
        for clip, other in zip(clips, wanted, strict=True):
            torch.testing.assert_close(clip.probs, other.probs, rtol=0, atol=1e-6)
    assert results[3][0] == []
    assert "outside" in str(results[3][1])
    (segment,) = tracks.segments(found[0], results[1][0], fps=24)
    assert (segment.start, motion.CLASSES[segment.label]) == (5 / 24, NAMES[0])
    assert segment.end == (results[1][0][-1].last + 1) / 24


def test_sliding_options_are_checked(small, pair):
    for options, message in (({"stride": 0}, "stride"), ({"frame_interval": 0}, "frame_interval")):
        with pytest.raises(ValueError, match=message):
            tracks.slide(small, pair / "pair.mp4", pair / "pair.txt", **options)


# Shell


def test_predict_prints_each_track(pair, tmp_path):
    (tmp_path / "t.txt").write_text(mot(steady(LEFT), steady(RIGHT, range(10, 40), 2), steady(LEFT, [70], 8)))
    done = run("predict", pair / "pair.mp4", "--tracks", "t.txt", "--top", 1, "--views", "1x1", *OF_TINY, cwd=tmp_path)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == f"{pair / 'pair.mp4'}  track 1, frames 0–63, 0.0 s – 2.7 s  (1 view)"
    assert lines[1].endswith(f"%  {NAMES[0]}")
    assert lines[2].endswith("track 2, frames 10–39, 0.4 s – 1.7 s  (1 view)")
    assert len(lines) == 4
    assert done.stderr == f"error: {pair / 'pair.mp4'}: track 8: the video ends before its frame 70\n"
    done = run("predict", pair / "pair.mp4", "--tracks", "t.txt", "--json", "--views", "1x1", *OF_TINY, cwd=tmp_path)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["track"], row["first"], row["last"]) for row in rows] == [(1, 0, 63), (2, 10, 39), (8, 70, 70)]
    assert rows[0]["top"][0]["label"] == NAMES[0]
    assert (rows[1]["start"], rows[1]["end"], rows[1]["views"]) == (pytest.approx(10 / 24), pytest.approx(40 / 24), 1)
    assert rows[2]["error"] == f"{pair / 'pair.mp4'}: track 8: the video ends before its frame 70"


def test_timeline_of_tracks(pair, tmp_path):
    options = ("--json", "a.json", "--output", "a.png", "--annotate", "a.mp4", "--stride", 16)
    done = run("timeline", pair / "pair.mp4", "--tracks", pair / "pair.txt", *options, *OF_TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.rsplit("  ", 1)[0] for line in done.stdout.splitlines()] == [
        f"track {id}  0.0 s – 2.6 s  {name}" for id, name in enumerate(NAMES, 1)
    ]
    document = json.loads((tmp_path / "a.json").read_text())
    assert (document["fps"], document["stride"]) == (24, 16)
    assert [(t["track"], len(t["clips"]), t["segments"][0]["label"], t["error"]) for t in document["tracks"]] == [
        (1, 3, NAMES[0], None),
        (2, 3, NAMES[1], None),
    ]
    assert document["tracks"][0]["clips"][1].keys() == {"first", "last", "time", "probs"}
    assert decode.probe(tmp_path / "a.mp4").num_frames == FRAMES
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 400


def test_captions_cover_the_clips_of_a_track(pair):
    """Each frame has one caption, also where segments meet in the middle of a frame."""
    track, probs = steady(LEFT, range(7, 60)), torch.eye(3)[[0, 0, 1, 2]] * torch.tensor([0.9, 0.9, 0.9, 0.4])[:, None]
    clips = [tempo.Clip(first, first + 8, each) for first, each in zip((7, 14, 21, 28), probs, strict=True)]
    found = tracks.segments(track, clips, fps=29.97)
    captions = [_caption(each, None if each.label is None else "ab"[each.label], 29.97) for each in found]
    assert [each.text for each in captions] == ["a 90%", "b 90%", "-"]
    assert [frame for each in captions for frame in range(each.first, each.last + 1)] == list(range(7, 37))


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["predict", "pair.mp4", "pair.mp4", "--tracks", "pair.txt"], 2, "valid for one video"),
        (["predict", "pair.mp4", "--annotate", "a.mp4"], 2, "needs --tracks"),
        (["predict", "pair.mp4", "--tracks", "none.txt"], 1, "none.txt: No such file"),
        (["predict", "pair.mp4", "--tracks", "pair.txt", "--annotate", "a.gif"], 1, ".mp4, .mkv, .mov, got 'a.gif'"),
        (["predict", "pair.mp4", "--tracks", "pair.txt", "--annotate", "pair.mp4"], 1, "would replace"),
        (["predict", "pair.mp4", "--tracks", "pair.txt", "--annotate", "none/a.mp4"], 1, "none: no such folder"),
        (["predict", "pair.mp4", "--tracks", "pair.mp4"], 1, "UTF-8"),
        (["timeline", "none.mp4", "--tracks", "pair.txt"], 1, "none.mp4: No such file"),
        (["timeline", "--camera", "0", "--tracks", "pair.txt"], 2, "valid for one video"),
    ],
)
def test_wrong_options_are_found_before_the_model_is_loaded(pair, args, code, message):
    done = run(*args, "--model", "nonsense", cwd=pair)
    assert done.returncode == code
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "nonsense" not in done.stderr


# Annotated videos


def near(pixels, color):
    return np.abs(pixels.mean(axis=(0, 1)) - color).max() < 50  # H.264 halves the resolution of colors


def test_annotated_video(pair, tmp_path):
    captions = [
        (steady((20, 40, 90, 100)), [Caption(0, 30, "a b"), Caption(31, 63, "c")]),
        (steady((124, 11, 212, 101), range(10), 2), []),
    ]
    annotate.annotate(pair / "pair.mp4", tmp_path / "a.mp4", captions, fps=motion.FPS)
    info = decode.probe(tmp_path / "a.mp4")
    assert (info.num_frames, info.width, info.height, info.fps, info.codec) == (FRAMES, 224, 112, 24, "h264")
    images = decode.read_frames(tmp_path / "a.mp4", [5, 40]).permute(0, 2, 3, 1).numpy()
    for image in images:
        assert near(image[42:98, 20:22], color_of(1))
        assert near(image[98:100, 22:88], color_of(1))
        assert near(image[30:38, 20:22], color_of(1))  # beside the text
        assert not near(image[42:96, 24:26], color_of(1))
    assert near(images[0, 30:98, 210:212], color_of(2))
    assert not near(images[1, 30:98, 210:212], color_of(2))
    text, other = images[:, 28:40, 20:60]
    assert np.abs(text.astype(int) - other).max() > 100


def test_labels_stay_in_the_picture():
    image = np.full((60, 80, 3), 127, np.uint8)
    for box in ((70, 2, 90, 50), (-40, 30, 20, 90), (-1e6, -1e6, 1e6, 1e6)):
        drawn = draw_labels(image, [(1, box, "1  a name that is much too long")])
        assert (drawn == color_of(1)).all(axis=2).sum() > 200
    assert (draw_labels(image, [(1, (-40, 0, -20, 20), "1"), (2, (0, 90, 10, 95), "2")]) == image).all()
    assert not (image != 127).any()
    assert len({color_of(id) for id in range(20)}) == 20


def test_labels_of_small_boxes_are_small(tmp_path):
    """A third of the median side, 20 pixels, but never more than a thirtieth of the picture, 30 pixels."""
    video = tmp_path / "v.mp4"
    encode.write_video(video, np.full((2, 900, 1200, 3), 127, np.uint8), fps=5)
    heights = []
    for side in (60, 600):
        track = steady((200, 200, 200 + side, 200 + side), range(2))
        annotate.annotate(video, tmp_path / "a.mp4", [(track, [Caption(0, 1, "a")])], fps=5)
        above = decode.read_frames(tmp_path / "a.mp4", [0])[0].permute(1, 2, 0).numpy()[:200, 204]
        heights.append((np.abs(above.astype(int) - 127).max(axis=-1) > 50).sum())
    assert heights[0] < 35 < heights[1]


@pytest.mark.parametrize("codec", ["h264", "mpeg4"])
def test_odd_sizes_and_frame_rates(tmp_path, monkeypatch, codec):
    if codec == "mpeg4":
        monkeypatch.setattr(encode.av, "codecs_available", {"mpeg4"})
    frames = [np.full((33, 45, 3), 10 * i, np.uint8) for i in range(5)]
    encode.write_video(tmp_path / "a.mp4", iter(frames), fps=29.97002997, deterministic=False)
    info = decode.probe(tmp_path / "a.mp4")
    assert (info.num_frames, info.width, info.height, info.codec) == (5, 46, 34, codec)
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert file.streams.video[0].average_rate == Fraction(30000, 1001)
    assert (decode.read_frames(tmp_path / "a.mp4", [4]).float() - 40).abs().max() < 8


def test_a_video_that_ends_in_damage_leaves_no_file(pair, tmp_path, monkeypatch):
    def damaged(path):
        yield torch.zeros(3, 32, 32, dtype=torch.uint8)
        raise VideoError("damaged")

    monkeypatch.setattr(decode, "iter_frames", damaged)
    with pytest.raises(VideoError):
        annotate.annotate(pair / "pair.mp4", tmp_path / "a.mp4", [], fps=24)
    assert not list(tmp_path.iterdir())


# Training


def table(path, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "label", "tracks", "track", "start", "end"], *rows])
    return path


def test_rows_of_a_table_are_tracks(pair, small, tmp_path, decoded):
    spec = replace(small.spec, short_side=36, crop_size=32)
    data = VideoList(
        table(tmp_path / "t.csv", ["pair.mp4", "a", "pair.txt", 1], ["pair.mp4", "b", "pair.txt", 2, 0.5, 2]),
        spec,
        train=False,
        root=pair,
    )
    assert [(item.tracks, item.track) for item in data.items] == [(str(pair / "pair.txt"), 1), (str(pair / "pair.txt"), 2)]
    assert data.items[1].name == f"{pair}/pair.mp4 (0.5 s to 2 s, track 2 of {pair}/pair.txt)"
    for item, track in zip(data.items, (steady(LEFT), steady(RIGHT, range(12, 48))), strict=True):
        decoded.clear()
        frames, clips = data.read(item, spec.indices)
        wanted = by_hand(pair / "pair.mp4", track, 36)
        assert torch.equal(frames[clips], wanted[torch.from_numpy(spec.indices(len(track)))])
    clip, label = data[1]
    assert (clip.shape, label) == ((spec.num_frames, 3, 32, 32), 1)


def test_frames_of_a_late_track_are_found_by_seeking(tmp_path, small, decoded):
    from videos import write_video

    path = write_video(tmp_path / "long.mp4", 290, codec="libx264", g=25, sc_threshold=0)
    (tmp_path / "t.csv").write_text("frame,id,x,y,w,h\n" + "".join(f"{i},1,10,10,20,20\n" for i in range(260, 290)))
    data = VideoList(table(tmp_path / "a.csv", [path, "a", "t.csv", 1]), small.spec, train=False)
    data.read(data.items[0], lambda total: np.arange(0, total, 10)[None])
    assert sum(decoded) < 80


def test_bad_rows_are_reported(pair, tmp_path):
    (tmp_path / "gap.txt").write_text(mot(steady(LEFT, [0, 50])))
    (tmp_path / "bad.txt").write_text("1,1\n")
    (tmp_path / "far.txt").write_text(mot(steady((900, 0, 999, 90))))
    (tmp_path / "late.txt").write_text(mot(steady(LEFT, [80])))
    rows = [("pair.txt", 1), ("none.txt", 1), ("pair.txt", 7), ("gap.txt", 1), ("bad.txt", 1), ("far.txt", 1), ("late.txt", 1)]
    places = [pair / name if name == "pair.txt" else tmp_path / name for name, _ in rows]
    file = table(
        tmp_path / "t.csv",
        *([pair / "pair.mp4", "a", place, id] for place, (_, id) in zip(places, rows, strict=True)),
        [pair / "pair.mp4", "a", tmp_path / "gap.txt", 1, 1, ""],
    )
    data = VideoList(file, tpn.InputSpec(1), train=False)
    reasons = [reason for _, reason in data.check()]
    wanted = [None, "No such file.*none.txt", "row 4: .*no track 7", "absent for more than 30 frames after frame 0", "line 1"]
    wanted += ["outside the picture", "frame 80, the video has 64 frames", None]
    for reason, pattern in zip(reasons, wanted, strict=True):
        assert (reason is None) == (pattern is None), reason
        assert pattern is None or re.search(pattern, reason)


@pytest.mark.parametrize("cells", [["pair.txt", ""], ["", 1], ["pair.txt", "x"], ["pair.txt", -1]])
def test_cells_that_are_refused(tmp_path, cells):
    with pytest.raises(ValueError, match="row 2: tracks must be a file and track an id"):
        VideoList(table(tmp_path / "t.csv", ["a.mp4", "a", *cells]), tpn.InputSpec(1), train=False)


def test_extracted_frames_have_no_tracks(tmp_path):
    (tmp_path / "t.csv").write_text("path,label,num_frames,tracks,track\na,x,5,t.txt,1\n")
    with pytest.raises(ValueError, match="no start, end, or track"):
        RawFrames(tmp_path / "t.csv", tpn.InputSpec(1), train=False)


def test_tracks_of_one_video_stay_on_one_side(pair, tmp_path):
    rows = [[f"{video}.mp4", NAMES[id - 1], pair / "pair.txt", id] for video in range(10) for id in (1, 2)]
    config = TrainConfig(val_fraction=0.3)
    data = open_data(str(table(tmp_path / "t.csv", *rows)), config, tpn.create_model("tpn_slowonly_tiny_motion", num_classes=2))
    sides = [{item.path for item in part.items} for part in (data.train, data.val)]
    assert len(sides[1]) == 3
    assert not sides[0] & sides[1]
    data.write(tmp_path / "split.csv")
    again = VideoList(tmp_path / "split.csv", data.train.spec, train=True)
    assert {(item.tracks, item.track) for item in again.items} == {(str(pair / "pair.txt"), 1), (str(pair / "pair.txt"), 2)}


def test_facts_of_tracks(pair, tmp_path):
    """The length of a clip follows from that of the tracks."""
    (tmp_path / "t.txt").write_text(mot(steady(LEFT, range(10, 50)), steady(RIGHT, range(30), 2)))
    rows = [["pair.mp4", "a", tmp_path / "t.txt", 1], ["pair.mp4", "b", tmp_path / "t.txt", 2, 1, ""]]
    data = VideoList(table(tmp_path / "t.csv", *rows, ["pair.mp4", "a", "t.txt", 3]), tpn.InputSpec(1), train=True, root=pair)
    assert facts_of(data).frames == (40 + 6) / 2


def test_train_and_evaluate_on_tracks(pair, tmp_path):
    rows = [[pair / "pair.mp4", NAMES[id - 1], pair / "pair.txt", id, start, ""] for id in (1, 2) for start in ("", 0.5)]
    file = table(tmp_path / "t.csv", *rows)
    fit(str(file), str(tmp_path / "run"), val=str(file), steps=2, batch_size=2)
    assert tpn.create_model(f"local-dir:{tmp_path}/run").labels == tuple(sorted(NAMES))
    assert ", track " in (tmp_path / "run" / "report.html").read_text()  # of a mistake
    done = run("evaluate", tmp_path / "run", file, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
