"""Datasets: folders, lists, extracted frames, random clips, bad files."""

import copy
import os
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from videos import number, write_video

import tpn
from tpn import InputSpec
from tpn.video import containers
from tpn.video.datasets import RawFrames, TooManyBadFilesError, VideoFolder, VideoList, open_dataset
from tpn.video.decode import read_frames

SPEC = InputSpec(4, 2, short_side=36, crop_size=32, num_clips=10)
SEGMENTS = replace(SPEC, sampling="segments", num_clips=2)
LENGTHS = {"left turn": (20, 9), "Überholen": (30, 40, 3)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two classes, one with a space and one with an umlaut in the name; a subfolder, a text file and a hidden folder."""
    root = tmp_path_factory.mktemp("videos")
    for name, lengths in LENGTHS.items():
        for i, length in enumerate(lengths):
            folder = root / name / ("more" if i == 2 else "")
            folder.mkdir(parents=True, exist_ok=True)
            write_video(folder / f"video {i}.mp4", num_frames=length)
    (root / "left turn" / "notes.txt").write_text("not a video")
    (root / ".hidden").mkdir()
    return root


def frame_numbers(dataset, index, rng):
    """Return the numbers of the frames in a clip, which the test videos encode in their pixels."""
    item = dataset.items[index]
    frames, clips = dataset.read(item, dataset._sampler(rng))
    return [number(frame) for frame in frames[clips[0]]]


def test_folder(root):
    data = VideoFolder(root, SPEC, train=False)
    assert data.classes == ("left turn", "Überholen")
    assert len(data) == 5
    assert data.labels == [0, 0, 1, 1, 1]
    clip, label = data[4]
    assert (clip.shape, clip.dtype, label) == ((4, 3, 32, 32), torch.uint8, 1)


def test_validation_uses_the_center_clip(root):
    data = VideoFolder(root, SPEC, train=False)
    assert frame_numbers(data, 0, None) == [6, 8, 10, 12]
    paths = [item.path for item in data.items]
    expected = SPEC.eval_transform(normalize=False)(read_frames(paths[0], [6, 8, 10, 12]))
    assert torch.equal(data[0][0], expected)
    assert frame_numbers(VideoFolder(root, SEGMENTS, train=False), 0, None) == [2, 7, 12, 17]


def test_short_videos_wrap_around(root):
    data = VideoFolder(root, SPEC, train=False)
    (short,) = [i for i, item in enumerate(data.items) if "more" in item.path]
    assert frame_numbers(data, short, None) == [0, 2, 1, 0]
    assert VideoFolder(root, SPEC, train=True)[short][0].shape == (4, 3, 32, 32)


@pytest.mark.parametrize("spec", [SPEC, SEGMENTS])
def test_training_clips_start_anywhere(root, spec):
    data = VideoFolder(root, spec, train=True)
    rng = np.random.default_rng(0)
    seen = [frame_numbers(data, 0, rng) for _ in range(60)]
    if spec is SPEC:
        assert {first for first, *_ in seen} == set(range(14))
        assert all(clip == list(range(clip[0], clip[0] + 8, 2)) for clip in seen)
    else:
        assert [set(column) for column in zip(*seen, strict=True)] == [set(range(i, i + 5)) for i in (0, 5, 10, 15)]


def test_clips_depend_only_on_seed_epoch_and_index(root):
    def clips(workers=0, epoch=0, seed=0, order=None):
        data = VideoFolder(root, SPEC, train=True, seed=seed)
        data.set_epoch(epoch)
        loader = DataLoader(data, batch_size=1, num_workers=workers, sampler=order)
        return [clip[0] for clip, _ in loader]

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    first = clips()
    torch.manual_seed(1)
    assert same(clips(workers=2), first)
    assert same(clips(order=[4, 3, 2, 1, 0])[::-1], first)
    assert not same(clips(epoch=1), first)
    assert not same(clips(seed=1), first)


def test_options_of_the_training_transform(root):
    data = VideoFolder(root, SPEC, train=True)
    before = data[0][0]
    for options in ({"rand_augment": 30}, {"random_erasing": 1}, {"color_jitter": False}):
        data.use_spec(SPEC, **options)
        assert not torch.equal(data[0][0], before)
    data.use_spec(SPEC, rand_augment=0, random_erasing=0.0)
    assert torch.equal(data[0][0], before)


def labels_of(data, index, epochs=12):
    """The labels that a training clip has in several epochs."""
    seen = set()
    for epoch in range(epochs):
        data.set_epoch(epoch)
        seen.add(data[index][1])
    return seen


def test_flips_exchange_labels(root):
    spec = replace(SPEC, flip_label_pairs=(("left turn", "Überholen"),))
    for classes in (None, ("Überholen", "other", "left turn")):
        data = VideoFolder(root, spec, train=True, classes=classes)
        assert labels_of(data, 0) == {data.classes.index("left turn"), data.classes.index("Überholen")}
    data.use_spec(spec, flip_prob=0)
    assert labels_of(data, 0) == {2}


def test_flips_never_change_the_labels_of_other_classes(root):
    """The model's first two classes are moving left and moving right; both folders here have other names."""
    data = VideoFolder(root, tpn.input_spec("tpn_slowonly_tiny_motion"), train=True)
    assert [labels_of(data, index, epochs=8) for index in (0, 4)] == [{0}, {1}]


def test_list(root, tmp_path):
    (tmp_path / "list.txt").write_text("left turn/video 0.mp4 2\n\nÜberholen/video 1.mp4 0\n", encoding="utf-8")
    data = VideoList(tmp_path / "list.txt", SPEC, train=False, root=root)
    assert data.labels == [2, 0]
    assert data.classes == ("class 0", "class 1", "class 2")
    assert data[0][0].shape == (4, 3, 32, 32)
    named = VideoList(tmp_path / "list.txt", SPEC, train=False, root=root, classes=["a", "b", "c"])
    assert named.classes == ("a", "b", "c")
    with pytest.raises(ValueError, match="label 2 .*2 classes"):
        VideoList(tmp_path / "list.txt", SPEC, train=False, root=root, classes=["a", "b"])


def test_kinetics_csv(root, tmp_path, caplog):
    for folder, name in (("left turn", "abc-DEF_000001_000011.mp4"), (".", "_x_000020_000030.mp4")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).symlink_to(root / "left turn" / "video 0.mp4")
    rows = [
        "label,youtube_id,time_start,time_end,split",
        "left turn,abc-DEF,1,11,train",
        '"a, b",_x,20,30,train',
        "gone,zz,0,10,train",
    ]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    data = VideoList(tmp_path / "train.csv", SPEC, train=True)
    assert data.classes == ("a, b", "left turn")
    assert data.labels == [1, 0]
    assert re.search(f"1 of the 3 .*missing.*{tmp_path}", caplog.text)
    assert data[1][0].shape == (4, 3, 32, 32)


@pytest.mark.parametrize("template", ["img_%05d.jpg", "img.jpg", "img_{}_{}.jpg", "{x}.jpg", "img_{:q}.jpg", "{"])
def test_templates_without_one_place_for_the_number(tmp_path, template):
    with pytest.raises(ValueError, match=re.escape(f"got {template!r}")):
        RawFrames(tmp_path / "list.txt", SPEC, train=False, template=template)


def test_raw_frames(root, tmp_path):
    frames = read_frames(root / "left turn" / "video 0.mp4", range(20))
    (tmp_path / "my video").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / "my video" / f"f{i:03}.jpg", quality=100)
    (tmp_path / "list.txt").write_text("my video 20 1\n")
    data = RawFrames(tmp_path / "list.txt", SPEC, train=False, template="f{:03}.jpg", first=0)
    assert frame_numbers(data, 0, None) == [6, 8, 10, 12]
    assert data[0][1] == 1
    assert list(data.check()) == [(data.items[0], None)]
    (tmp_path / "my video" / "f017.jpg").write_bytes(b"no image")
    ((_, reason),) = data.check()
    assert "f017.jpg: not an image" in reason
    (tmp_path / "list.txt").write_text("my video many 1\n")
    with pytest.raises(ValueError, match="'my video': num_frames .*'many'"):
        RawFrames(tmp_path / "list.txt", SPEC, train=False)


def test_target_fps(root):
    data = VideoFolder(root, replace(SPEC, target_fps=12.5), train=False)  # the test videos have 25 frames per second
    assert frame_numbers(data, 0, None) == [2, 6, 10, 14]


def test_target_fps_reads_a_file_no_more_often(root, monkeypatch):
    """A file is opened twice: to count its frames and to decode them."""
    opened, av_open = [], containers.av.open
    monkeypatch.setattr(containers.av, "open", lambda *args, **kwargs: opened.append(args) or av_open(*args, **kwargs))
    for target_fps in (None, 12.5):
        opened.clear()
        VideoFolder(root, replace(SPEC, target_fps=target_fps), train=True)[0]
        assert len(opened) == 2


# Bad files


@pytest.fixture
def mixed(root, tmp_path):
    """Five good videos and three bad ones."""
    for folder, _, files in os.walk(root):
        for name in files:
            target = tmp_path / os.path.relpath(folder, root)
            target.mkdir(parents=True, exist_ok=True)
            (target / name).symlink_to(os.path.join(folder, name))
    good = (root / "left turn" / "video 0.mp4").read_bytes()
    (tmp_path / "left turn" / "cut.mp4").write_bytes(good[: len(good) // 3])
    (tmp_path / "left turn" / "empty.mp4").write_bytes(b"")
    (tmp_path / "left turn" / "link.mp4").symlink_to("nowhere")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_replaced_and_logged(mixed, caplog, workers):
    data = VideoFolder(mixed, SPEC, train=True, max_bad=0.5)
    batches = list(DataLoader(data, batch_size=2, num_workers=workers))
    assert sum(len(clips) for clips, _ in batches) == len(data) == 8
    bad = data.bad_files()
    assert {os.path.basename(path) for path in bad} == {"cut.mp4", "empty.mp4", "link.mp4"}
    assert "the file is empty" in bad[str(mixed / "left turn" / "empty.mp4")]
    assert bad[str(mixed / "left turn" / "link.mp4")] == "No such file or directory"
    if workers == 0:
        assert sum("skipped" in r.getMessage() for r in caplog.records) == 3


def test_too_many_bad_files_stop_the_run(mixed):
    data = VideoFolder(mixed, SPEC, train=True)
    with pytest.raises(TooManyBadFilesError, match=r"1 of 8 videos cannot be read, more than max_bad=0.05 allows:\n  .*mp4: "):
        list(DataLoader(data))


@pytest.mark.parametrize(
    ("lines", "max_bad", "message"),
    [
        (["bad.mp4 0"], 1, "1 of 1 videos"),
        (["bad.mp4 0"] * 60, 0.05, "1 of 1 videos cannot be read"),
        ([f"{i}.mp4 {i % 2}" for i in range(1000)], 0.05, "first 20 videos"),
    ],
    ids=["only bad files", "one file many times", "a wrong root"],
)
def test_lists_of_bad_files_stop_the_run_early(tmp_path, lines, max_bad, message):
    (tmp_path / "bad.mp4").write_bytes(b"")
    (tmp_path / "list.txt").write_text("\n".join(lines))
    with pytest.raises(TooManyBadFilesError, match=message):
        VideoList(tmp_path / "list.txt", SPEC, train=True, max_bad=max_bad)[0]


def test_a_long_list_of_bad_files_is_shortened(root, tmp_path):
    lines = [f"{i}.mp4 0\n" for i in range(30)] + [f"{root / 'left turn' / 'video 0.mp4'} 0\n"]
    (tmp_path / "list.txt").write_text("".join(lines))
    data = VideoList(tmp_path / "list.txt", SPEC, train=True, max_bad=0.75)
    data[30]  # the only video that can be read
    with pytest.raises(TooManyBadFilesError, match=r"24 of 31 videos cannot be read(.|\n)*and 4 more; `tpn check` lists all"):
        [data[i] for i in range(30)]


def test_the_log_of_bad_files_is_removed_with_the_dataset(root):
    data = VideoFolder(root, SPEC, train=True)
    log = data._shared.log
    assert os.path.exists(log)
    copied = pickle.loads(pickle.dumps(data))  # as in a spawned loader worker
    del copied
    assert os.path.exists(log)
    del data
    assert not os.path.exists(log)


def test_pickled_datasets_share_the_log_of_bad_files_and_deep_copies_do_not(mixed):
    data = VideoFolder(mixed, SPEC, train=True, max_bad=0.5)
    data[[item.path for item in data.items].index(str(mixed / "left turn" / "empty.mp4"))]
    before = data.bad_files()
    copied, worker = copy.deepcopy(data), pickle.loads(pickle.dumps(data))
    assert copied.bad_files() == before
    list(DataLoader(copied, num_workers=1))
    assert len(copied.bad_files()) == 3
    assert data.bad_files() == before
    list(DataLoader(worker))
    assert len(data.bad_files()) == 3
    del data, worker
    assert len(copied.bad_files()) == 3


def test_persistent_workers_of_a_deep_copy_use_the_next_epoch(root):
    original = VideoFolder(root, SPEC, train=True)
    data = copy.deepcopy(original)
    loader = DataLoader(data, batch_size=5, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        epochs.append(next(iter(loader))[0])
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])
    data.set_epoch(1)
    assert torch.equal(original[0][0], epochs[0][0])


def test_check_reads_everything(mixed, root):
    report = {os.path.basename(item.path): reason for item, reason in VideoFolder(mixed, SPEC, train=True).check()}
    assert len(report) == 6  # two pairs of good files have the same name
    assert {name for name, reason in report.items() if reason} == {"cut.mp4", "empty.mp4", "link.mp4"}
    assert all(reason is None for _, reason in VideoFolder(root, SPEC, train=True).check(workers=1))


# Folders and lists


def test_unusual_folders(root, tmp_path):
    with pytest.raises(FileNotFoundError):
        VideoFolder(tmp_path / "nowhere", SPEC, train=True)
    with pytest.raises(ValueError, match="no class folders"):
        VideoFolder(tmp_path, SPEC, train=True)
    (tmp_path / "a class").mkdir()
    with pytest.raises(ValueError, match="a class: no videos"):
        VideoFolder(tmp_path, SPEC, train=True)
    (tmp_path / "a class" / "loop").symlink_to(tmp_path / "a class")
    (tmp_path / "a class" / "one.mp4").symlink_to(root / "left turn" / "video 0.mp4")
    assert [os.path.basename(item.path) for item in VideoFolder(tmp_path, SPEC, train=True).items] == ["one.mp4"]
    (tmp_path / "a class" / ".incomplete").symlink_to(root / "left turn")
    assert len(VideoFolder(tmp_path, SPEC, train=True)) == 1
    (tmp_path / "a class" / "more").symlink_to(root / "left turn")
    assert len(VideoFolder(tmp_path, SPEC, train=True)) == 1 + len(list((root / "left turn").rglob("*.mp4")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.mp4", b"\0\xff", r"a\.mp4: not a list"),
        ("a.txt", b"a.mp4 0\nb.mp4\n", r"a\.txt: line 2: got 'b.mp4'.*path label"),
        ("k.csv", b"youtube_id,time_start,time_end\nabc,0,10\n", r"k\.csv: .*column label"),
        ("k.csv", b"label,youtube_id,time_start,time_end\na,abc,0,\n", r"k\.csv: line 2: time_start"),
    ],
)
def test_invalid_lists(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        VideoList(tmp_path / name, SPEC, train=True)


def test_classes_of_the_training_set(root, tmp_path):
    (tmp_path / "Überholen").mkdir()
    (tmp_path / "Überholen" / "same name.mp4").symlink_to(root / "left turn" / "video 0.mp4")
    train = VideoFolder(root, SPEC, train=True)
    assert VideoFolder(tmp_path, SPEC, train=False, classes=train.classes).labels == [1]
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match="unknown classes: new"):
        VideoFolder(tmp_path, SPEC, train=False, classes=train.classes)


@pytest.mark.parametrize(("name", "value"), [("max_bad", 5)])
def test_invalid_arguments(root, name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        VideoFolder(root, SPEC, train=True, **{name: value})


def test_other_clips_of_the_same_video(root):
    data = VideoFolder(root, SPEC, train=True)
    first, second = data[2, 0][0], data[2, 1][0]
    assert torch.equal(first, data[2][0])
    assert torch.equal(second, data[2, 1][0])
    assert not torch.equal(first, second)


def test_open_dataset(root, tmp_path):
    assert isinstance(open_dataset(root, SPEC, train=True, root=None, template=None), VideoFolder)
    (tmp_path / "list.txt").write_text(f"{root}/left turn/video 0.mp4 0\n")
    assert isinstance(open_dataset(tmp_path / "list.txt", SPEC, train=True), VideoList)
    (tmp_path / "frames.txt").write_text("folder 5 0\n")
    assert isinstance(open_dataset(tmp_path / "frames.txt", SPEC, train=True, template="{}.jpg"), RawFrames)
    with pytest.raises(ValueError, match="template .*folder"):
        open_dataset(root, SPEC, train=True, template="{}.jpg")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_dataset(root / "nowhere", SPEC, train=True)
    with pytest.raises(ValueError, match="num_frames"):
        open_dataset(tmp_path / "list.txt", SPEC, train=True, template="{}.jpg", root=root)


def test_all_clips_of_a_video(root):
    """As in evaluation: the distinct frames, resized, and each clip as positions among them."""
    data = VideoFolder(root, SPEC, train=False)
    frames, clips = data.read(data.items[0], SPEC.indices, short_side=24)
    assert clips.shape == (10, 4)
    assert frames.shape[-2] == 24
    whole, positions = data.read(data.items[0], SPEC.indices)
    assert torch.equal(clips, positions)
    assert [[number(whole[i]) for i in clip] for clip in clips] == SPEC.indices(20).tolist()
