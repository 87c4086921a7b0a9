"""Tables of labeled videos: columns, several labels, segments, and what is refused."""

import csv
import logging
import sys
from itertools import pairwise

import av
import numpy as np
import pytest
import torch
import typer
from torch.utils.data import DataLoader
from videos import HEIGHT, WIDTH, frame, number, write_video

from tpn import InputSpec
from tpn.cli.videos import check
from tpn.video import decode, tables
from tpn.video.datasets import RawFrames, TooManyBadFilesError, VideoFolder, VideoList, open_dataset
from tpn.video.decode import VideoError, read_frames, sample_frames
from tpn.video.tables import Row, read_table, write_table

SPEC = InputSpec(4, 2, short_side=36, crop_size=32)
EVERY = np.arange


def write_csv(path, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def write_parquet(path, header, *rows):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({name: list(column) for name, column in zip(header, zip(*rows, strict=True), strict=True)}), path)
    return path


def open_table(path, **kwargs):
    return open_dataset(path, SPEC, train=False, **kwargs)


def numbers(path, **segment):
    frames, positions = sample_frames(path, EVERY, **segment)
    return [number(frames[i]) for i in positions]


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A video of 240 frames at 25 frames per second, with a key frame in every second."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    return write_video(path, 240, codec="libx264", g=25, sc_threshold=0, bf=2)


# Columns and labels


def test_a_misspelled_column(tmp_path, caplog):
    """A missing start would pass for a whole video. Columns of other names are the user's own."""
    file = write_csv(tmp_path / "a.csv", ["path", "label", "strat", "end", "camera"], ["a.mp4", "x", "1", "2", "north"])
    ((row,), _) = read_table(file)
    assert (row.start, row.end) == (None, 2)
    assert [(record.levelname, record.args[1:]) for record in caplog.records] == [("WARNING", ("strat", "start"))]


@pytest.mark.parametrize("write", [write_csv, write_parquet])
def test_columns(tmp_path, write):
    suffix = "csv" if write is write_csv else "parquet"
    header = ["note", "split", "path", "Start", "end", "label", "group"]
    rows = [["x", "train", "a, b.mp4", "0.5", "2", 'left "turn"', "g1"], ["y", "Validation", "/c.mp4", "", "", "Überholen", ""]]
    data = open_table(write(tmp_path / f"t.{suffix}", header, *rows))
    assert isinstance(data, VideoList)
    assert data.classes == ('left "turn"', "Überholen")
    assert [(i.path, i.label, i.start, i.end, i.split, i.group) for i in data.items] == [
        (str(tmp_path / "a, b.mp4"), 0, 0.5, 2.0, "train", "g1"),
        ("/c.mp4", 1, None, None, "val", ""),
    ]
    assert not data.multi_label
    assert not data.numbered


def test_paths_are_relative_to_root(tmp_path):
    table = write_csv(tmp_path / "t.csv", ["path", "label"], ["a.mp4", "x"])
    assert open_table(table, root="/videos").items[0].path == "/videos/a.mp4"


def test_parquet_has_numbers_and_missing_values(tmp_path):
    table = write_parquet(
        tmp_path / "t.pq", ["path", "label", "start", "end"], ["a.mp4", 2, None, 1.5], ["a.mp4", 0, 1.5, float("nan")]
    )
    data = open_table(table)
    assert data.classes == ("class 0", "class 1", "class 2")
    assert [(i.label, i.start, i.end) for i in data.items] == [(2, None, 1.5), (0, 1.5, None)]


def test_spreadsheets_write_a_byte_order_mark_and_blank_lines(tmp_path):
    (tmp_path / "t.csv").write_text('"path","label"\r\n\r\na.mp4,x\r\n', encoding="utf-8-sig", newline="")
    assert [(item.row, item.label) for item in open_table(tmp_path / "t.csv").items] == [(3, 0)]


@pytest.mark.parametrize("name", ["label", "labels"])
def test_several_labels_in_a_cell(tmp_path, name):
    table = write_csv(tmp_path / "t.csv", ["path", name], ["a.mp4", "run|fall"], ["b.mp4", "fall"], ["c.mp4", "jump | run"])
    data = open_table(table)
    assert data.classes == ("fall", "jump", "run")
    assert data.labels == [(0, 2), (0,), (1, 2)]
    assert data.multi_label
    assert data.class_counts == (2, 1, 2)
    assert data.targets.tolist() == [[1, 0, 1], [1, 0, 0], [0, 1, 1]]


def test_a_column_labels_is_multi_label_and_may_have_empty_cells(tmp_path):
    data = open_table(write_csv(tmp_path / "t.csv", ["path", "labels"], ["a.mp4", "1"], ["b.mp4", ""], ["c.mp4"]))
    assert data.labels == [(1,), (), ()]
    assert data.multi_label
    assert data.numbered
    assert data.class_counts == (0, 1)


def test_targets_of_clips_with_several_labels(tmp_path, long):
    table = write_csv(tmp_path / "t.csv", ["path", "labels", "end"], [long, "x|z", 2], [long, "y", 1], [long, "", ""])
    data = open_table(table)
    batch = next(iter(DataLoader(data, batch_size=3)))
    assert batch[0].shape == (3, 4, 3, 32, 32)
    assert batch[1].tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_numbers_take_the_names_that_are_passed_and_no_others(tmp_path):
    """As many numbers as a model has classes are not its classes."""
    table = write_csv(tmp_path / "t.csv", ["path", "label"], *([f"{i}.mp4", i] for i in range(3)))
    assert open_table(table).classes == ("class 0", "class 1", "class 2")
    assert open_table(table, classes=["c", "a", "b"]).classes == ("c", "a", "b")
    assert open_table(table, classes=["c", "a", "b"]).labels == [0, 1, 2]


HEADER = "path,label,start,end,split"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"t\.csv.*no videos"),
        ("path,start\na.mp4,1\n", "column label .*got 'path, start'"),
        ("path,label,Label\na.mp4,x,y\n", "one column label"),
        ("path,label,labels\na.mp4,x,y\n", "one column label"),
        ("path,label\na.mp4,x,y\n", "row 2: 3 cells for 2 columns"),
        ("path,label\n,x\n", "row 2: path is empty"),
        ("path,label\na.mp4,x\nb.mp4,\n", "row 3: label is empty.*labels"),
        ("path,label\na.mp4,x||y\n", r"row 2: .*'\|', got 'x\|\|y'"),
        ("path,label\na.mp4,x|x\n", r"row 2: .*got 'x\|x'"),
        ("path,labels\na.mp4,\n", "no row has a label"),
        ("path,label\n\"a.mp4,x\nb.mp4,y\n", "row 3: not valid CSV"),
        ("path;label\na.mp4;x\n", "separated by commas, got .*path;label"),
        ("path\tlabel\na.mp4\tx\n", "separated by commas"),
        (f"{HEADER}\na.mp4,x,5,5,\n", "row 2: .*start=5 and end=5"),
        (f"{HEADER}\na.mp4,x,,0,\n", "row 2: .*end=0"),
        (f"{HEADER}\na.mp4,x,ten,20,\n", "row 2: start .*'ten'"),
        (f"{HEADER}\na.mp4,x,-1,20,\n", "row 2: start .*'-1'"),
        (f"{HEADER}\na.mp4,x,1,nan,\n", "row 2: end .*'nan'"),
        (f"{HEADER}\na.mp4,x,1,2,\nb.mp4,x,1,2,holdout\n", "row 3: split .*train.*val.*'holdout'"),
        ("path,label\na.mp4,x\nb.mp4,y\nc.mp4,\"x,y\"\n", r"'x,y' looks like several labels.*'\|'"),
        ("path,label\na.mp4,0;1\n", r"'0;1' looks like several labels"),
        ("path,label\na.mp4,0\nb.mp4,100000\n", "label '100000' .*below 100000"),
        (f"path,label\na.mp4,{'9' * 5000}\n", r"label '9+\.\.\.9+' .*below 100000"),
        ("path,label,num_frames\na.mp4,x,1234567890\n", "row 2: num_frames .*9 digits, got '1234567890'"),
        (f"path,label,split\na.mp4,x,{'a' * 9999}\n", r"row 2: split .*'a+\.\.\.a+'"),
    ],
)  # fmt: skip
def test_invalid_tables(tmp_path, content, message):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_table(tmp_path / "t.csv")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_labels_that_contain_commas(tmp_path):
    table = write_csv(tmp_path / "t.csv", ["path", "label"], ["a.mp4", "shake, rattle"], ["b.mp4", "roll"])
    assert open_table(table).classes == ("roll", "shake, rattle")
    table = write_csv(tmp_path / "t.csv", ["path", "label"], ["a.mp4", "x"], ["b.mp4", "y"], ["c.mp4", "x,y"])
    assert open_table(table, classes=["x", "y", "x,y"]).labels == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a.mp4 10 60 jump\n", "line 1: got 'a.mp4 10 60 jump'"),
        ("my video 10.5 60 jump\n", "line 1: got"),
        ("a.mp4 x\nfolder 300 1\n", "line 2: got 'folder 300 1'.*num_frames label"),
        ("a.mp4,jump\n", "line 1: got 'a.mp4,jump'"),
        ("my video.MP4,left turn\n", "line 1: got"),
        ('"a.mp4", jump\n', "line 1: got"),
        ("a.mp4 x y\nb.mp4 0\nvideo.mp4;jump it\n", "line 3: got"),
        ("a.mp4 0,1\nb.mp4 2\n", "label '0,1' looks like several"),
        ("a.mp4 0|1\nb.mp4 2\n", "label '0.1' looks like several"),
        (f"a 0{'/a' * 9999} 7 x\n", "line 1: got"),
    ],
)
def test_lists_that_are_read_wrongly_are_refused(tmp_path, content, line):
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(ValueError, match=line) as caught:
        open_table(tmp_path / "list.txt")
    assert "header" in str(caught.value)


def test_a_path_may_end_in_a_number(tmp_path):
    (tmp_path / "clip 7").write_bytes(b"")
    (tmp_path / "list.txt").write_text("clip 7 jump\n")
    assert open_table(tmp_path / "list.txt").items[0].path == str(tmp_path / "clip 7")


def test_parquet_that_cannot_be_read(tmp_path, monkeypatch):
    table = write_parquet(tmp_path / "t.parquet", ["path", "label"], ["a.mp4", ["x", "y"]])
    with pytest.raises(ValueError, match=r"row 1: label .*\['x', 'y'\]"):
        open_table(table)
    table.write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"t\.parquet: not a Parquet file"):
        open_table(table)
    for place in (-5, -60):  # of the metadata
        content = bytearray(write_parquet(table, ["path", "label"], ["a.mp4", "x"]).read_bytes())
        content[place] ^= 0xFF
        table.write_bytes(content)
        with pytest.raises(ValueError, match=r"t\.parquet: not a Parquet file, or damaged"):
            open_table(table)
    with pytest.raises(FileNotFoundError):
        open_table(tmp_path / "none.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"tpn\[parquet\]"):
        open_table(table)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_written_table_is_read_back(tmp_path, suffix):
    pytest.importorskip("pyarrow")
    rows = [
        Row(None, '/a "b",\nc.mp4', ("x", "y z"), start=0.1, end=1 / 3, split="train", group="g"),
        Row(None, "/d.mp4", (), split="val", num_frames=7),
    ]
    write_table(tmp_path / f"t.{suffix}", rows, multi_label=True)
    read, multi_label = read_table(tmp_path / f"t.{suffix}")
    assert multi_label
    assert [tables.Row(None, *list(vars(row).values())[1:]) for row in read] == rows
    with pytest.raises(ValueError, match=r"'\|'.*x\|y"):
        write_table(tmp_path / "t.csv", [Row(None, "a.mp4", ("x|y",))])


def test_extracted_frames(tmp_path):
    table = write_csv(tmp_path / "t.csv", ["path", "num_frames", "label", "split"], ["a", 20, "x", "train"], ["b", 9, "y", "val"])
    data = open_table(table, template="{}.jpg")
    assert isinstance(data, RawFrames)
    assert [(item.num_frames, item.label, item.split) for item in data.items] == [(20, 0, "train"), (9, 1, "val")]
    assert open_table(table).items[0].num_frames is None
    table = write_csv(tmp_path / "t.csv", ["path", "label"], ["a", "x"])
    with pytest.raises(ValueError, match="num_frames"):
        open_table(table, template="{}.jpg")


def test_class_counts(tmp_path):
    (tmp_path / "list.txt").write_text("a.mp4 2\nb.mp4 0\nc.mp4 2\n")
    assert open_table(tmp_path / "list.txt").class_counts == (1, 0, 2)


# Segments


def test_a_frame_belongs_to_a_segment_if_its_time_does(long):
    assert numbers(long, start=1.0, end=1.2) == [25, 26, 27, 28, 29]
    assert numbers(long, start=0.1, end=0.2) == [3, 4]  # 0.12 and 0.16 s
    assert numbers(long, end=0.08) == [0, 1]
    assert numbers(long, start=9.5) == [238, 239]
    assert numbers(long, start=9.5, end=99) == [238, 239]


def test_adjacent_segments_have_each_frame_once(long):
    limits = [i / 10 for i in range(97)]
    frames = [n for start, end in pairwise(limits) for n in numbers(long, start=start, end=end)]
    assert frames == list(range(240))


@pytest.mark.parametrize("name", ["v.mkv", "v.mp4"])
@pytest.mark.parametrize("offset", [0, 500])
def test_segments_of_a_video_with_a_variable_frame_rate(tmp_path, name, offset):
    """Times count from the first frame, whatever its timestamp is."""
    times = np.cumsum([0, *np.random.default_rng(0).integers(2, 60, 199)])  # in 1/100 s
    path = write_video(tmp_path / name, 200, codec="libx264", g=20, bf=2, pts=(times + offset).tolist())
    for start, end in [(0, 3), (7.5, 9.25), (20, 30), (times[50] / 100, times[60] / 100), (times[150] / 100, 1e6)]:
        expected = [n for n, time in enumerate(times / 100) if start <= time < end]
        assert numbers(path, start=start, end=end) == expected


@pytest.mark.parametrize(("name", "codec"), [("v.avi", "mpeg4"), ("v.avi", "libx264"), ("v.mpg", "mpeg2video"), ("v.ts", "libx264"), ("v.mp4", "mpeg4")])  # fmt: skip
def test_files_that_cannot_be_seeked_are_decoded_from_the_start(tmp_path, caplog, name, codec):
    path = tmp_path / name
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, width=WIDTH, height=HEIGHT, pix_fmt="yuv420p", options={"bf": "2"})
        for i in range(100):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame(i), format="rgb24")))
        out.mux(stream.encode(None))
    with caplog.at_level(logging.WARNING):
        assert numbers(path, start=2, end=2.12) == [50, 51, 52]
        assert numbers(path, start=3.8) == [95, 96, 97, 98, 99]
    assert caplog.text.count("decoded from the start") == 1


def test_target_fps_in_a_segment(long):
    spec = InputSpec(4, 2, short_side=36, crop_size=32, num_clips=1)
    frames, positions = sample_frames(long, spec.indices, target_fps=12.5, start=2, end=3)  # frames 50 to 74, as if 12
    assert [number(frames[i]) for i in positions[0]] == [54, 58, 62, 66]


def test_segments_without_a_frame_are_bad_files(tmp_path, long, caplog):
    rows = [["a.mp4", "x", 0, 2], ["a.mp4", "x", 100, 110.5], ["a.mp4", "y", 1.001, 1.002]]
    (tmp_path / "a.mp4").symlink_to(long)
    table = write_csv(tmp_path / "t.csv", ["path", "label", "start", "end"], *rows)
    data = open_table(table, max_bad=0.7)
    for index, values in [(1, "row 3: .*start=100.0 .*end=110.5.* 9.56 s"), (2, "row 4: .*start=1.001 .*end=1.002")]:
        with pytest.raises(VideoError, match=rf"a\.mp4: {values}"):
            data.read(data.items[index], EVERY)
    [data[i] for i in (1, 2, 1, 2)]
    assert caplog.text.count("skipped") == 2
    path = str(tmp_path / "a.mp4")
    assert data.bad_files().keys() == {f"{path} (100 s to 110.5 s)", f"{path} (1.001 s to 1.002 s)"}
    assert [reason is None for _, reason in data.check()] == [True, False, False]
    with pytest.raises(TooManyBadFilesError, match="1 of 3 videos"):
        open_table(table)[1]


def test_checking_a_segment_decodes_only_the_segment(long, monkeypatch):
    decoded = count_decoded(monkeypatch)
    data = open_dataset(write_csv(long.parent / "t.csv", ["path", "label", "start", "end"], [long, 0, 5, 6]), SPEC, train=False)
    assert [reason for _, reason in data.check(1)] == [None]
    assert 25 <= len(decoded) <= 60


def count_decoded(monkeypatch):
    decoded, decode_all = [], decode.decode_all
    monkeypatch.setattr(decode, "decode_all", lambda *args: (decoded.append(each.pts) or each for each in decode_all(*args)))
    return decoded


@pytest.mark.slow
def test_100_segments_of_a_long_video_are_read_by_seeking(tmp_path, monkeypatch):
    """The packets are read once, and only frames near the clips are decoded: up to 24 + 25 frames before the end of a clip, whose key frames are 24 apart."""
    total = 2_500
    write_video(tmp_path / "long.mp4", total, codec="libx264", size=(64, 48), g=24, sc_threshold=0, preset="ultrafast")
    rows = [["long.mp4", i % 2, i, i + 1] for i in range(100)]
    data = open_dataset(write_csv(tmp_path / "t.csv", ["path", "label", "start", "end"], *rows), SPEC, train=True)
    indexed, read_index = [], decode.read_index
    monkeypatch.setattr(decode, "read_index", lambda *args: indexed.append(args) or read_index(*args))
    decoded = count_decoded(monkeypatch)
    batches = list(DataLoader(data, batch_size=20))
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1] * 50
    assert not data.bad_files()
    assert len(indexed) == 1
    assert len(decoded) < 100 * (24 + 7 + 25)  # decoding the video up to each segment takes 125,000 frames
    for index in (0, 77, 99):
        frames, clips = data.read(data.items[index], lambda count: np.array([[0, count - 1]]))
        assert [number(frames[i]) for i in clips[0]] == [25 * index % 256, (25 * index + 24) % 256]


def test_the_index_follows_changes_of_the_file(tmp_path):
    path = write_video(tmp_path / "v.mp4", 50, codec="libx264")
    assert len(numbers(path, start=0)) == 50
    write_video(path, 60, codec="libx264")
    assert len(numbers(path, start=0)) == 60


def test_segments_give_the_frames_of_the_whole_video(long):
    every = read_frames(long, range(240))
    frames, positions = sample_frames(long, lambda total: np.array([0, total - 1]), start=4.5, end=8, short_side=None)
    assert torch.equal(frames[torch.from_numpy(positions)], every[[113, 199]])


# Folders


def test_a_folder_of_train_and_val_has_no_class_folders(tmp_path, capsys):
    for part in ("Train", "validation", "test"):
        (tmp_path / part / "a class").mkdir(parents=True)
        (tmp_path / part / "a class" / "v.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"Train.*validation.*test"):
        VideoFolder(tmp_path, SPEC, train=True)
    assert VideoFolder(tmp_path / "Train", SPEC, train=True).classes == ("a class",)
    with pytest.raises(typer.Exit):
        check(tmp_path, None, None, 1, 2, tmp_path / "bad.txt")
    assert "3 videos in 1 class, 3 unreadable" in capsys.readouterr().out
    assert len((tmp_path / "bad.txt").read_text().splitlines()) == 3
