"""How the data of a run is divided into training and validation, and how the division is written down."""

import csv
import os
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from videos import write_video

import tpn
from tpn import InputSpec
from tpn.training.config import TrainConfig
from tpn.training.data import facts_of, open_data, stratified_split
from tpn.video.datasets import Item

SPEC = InputSpec(4, 2, short_side=36, crop_size=32)


def write_csv(path, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def opened(data, classes=None, **options):
    """Open data for a model, with `classes` in place of numbers."""
    model = SimpleNamespace(labels=classes and tuple(classes), input_spec=SPEC, multi_label=False)
    return open_data(str(data), TrainConfig(keep_classes=classes is not None, **options), model)


def facts(data):
    """What a division consists of, without the order of the videos."""
    assert data.val is None or data.val.classes == data.train.classes

    def found(part):
        names = part.classes
        return sorted((os.path.abspath(i.path), i.start, i.end, tuple(names[k] for k in i.labels), i.group) for i in part.items)

    return found(data.train), data.val and found(data.val)


def names(part):
    return [os.path.basename(item.path) for item in part.items]


@pytest.fixture
def folders(tmp_path):
    """Three classes of 5, 10, and 2 empty files."""
    for name, count in (("run", 5), ("fall", 10), ("Überholen, left", 2)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "data" / name / f"camera{i // 2} {i}.mp4").write_bytes(b"")
    return tmp_path / "data"


# Folders and --val


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("train", "val"), "val"),
        (("train", "val", "test"), "val"),
        (("Train", "Test"), "Test"),
        (("training", "validation", "other"), "validation"),
        (("train", "valid", ".hidden"), "valid"),
    ],
)
def test_folders_train_and_val_are_parts_not_classes(folders, tmp_path, parts, expected):
    (tmp_path / "sets").mkdir()
    folders.rename(tmp_path / "sets" / parts[0])
    for part in parts:
        (tmp_path / "sets" / part / "fall").mkdir(parents=True, exist_ok=True)
        (tmp_path / "sets" / part / "fall" / f"{part}.mp4").write_bytes(b"")
    data = opened(tmp_path / "sets")
    assert data.train.classes == ("fall", "run", "Überholen, left")
    assert (len(data.train), names(data.val)) == (18, [f"{expected}.mp4"])
    assert (data.train.train, data.val.train) == (True, False)
    assert parts[0] in data.split
    assert expected in data.split
    other = write_csv(tmp_path / "other.csv", ["path", "label"], ["x.mp4", "run"])
    data = opened(tmp_path / "sets", val=other)
    assert (len(data.train), names(data.val)) == (18, ["x.mp4"])
    assert other in data.split
    assert names(opened(tmp_path / "sets" / parts[0], val=str(tmp_path / "sets")).val) == [f"{expected}.mp4"]


def test_classes_of_validation_data_must_be_trained(folders, tmp_path):
    other = write_csv(tmp_path / "other.csv", ["path", "label"], ["x.mp4", "jump"])
    with pytest.raises(ValueError, match="unknown classes: jump"):
        opened(folders, val=other)


def test_rows_for_validation_are_not_trained_with_other_validation_data(tmp_path):
    table = write_csv(tmp_path / "t.csv", ["path", "label", "split"], ["a.mp4", "x", "train"], ["b.mp4", "x", "val"])
    other = write_csv(tmp_path / "o.csv", ["path", "label", "split"], ["c.mp4", "x", "train"], ["d.mp4", "x", "val"])
    data = opened(table, val=other)
    assert (names(data.train), names(data.val)) == (["a.mp4"], ["d.mp4"])
    other = write_csv(tmp_path / "o.csv", ["path", "label", "split"], ["c.mp4", "x", "train"])
    assert names(opened(table, val=other).val) == ["c.mp4"]


def test_multi_label_training_with_single_labels_in_validation(tmp_path):
    table = write_csv(tmp_path / "t.csv", ["path", "label"], ["a.mp4", "x|y"], ["b.mp4", "x"])
    other = write_csv(tmp_path / "o.csv", ["path", "label"], ["c.mp4", "y"])
    data = opened(table, val=other)
    assert data.val.labels == [(1,)]
    assert data.val.multi_label
    one_each = write_csv(tmp_path / "p.csv", ["path", "label"], ["c.mp4", "y"], ["d.mp4", "x"])
    with pytest.raises(ValueError, match=r"t\.csv has several labels"):
        opened(one_each, val=table)


# The column split


@pytest.mark.parametrize(
    ("splits", "val", "unused"),
    [
        (["train", "train", "val"], [2], 0),
        (["Training", "train", "validation", "valid"], [2, 3], 0),
        (["train", "train", "test"], [2], 0),
        (["train", "train", "val", "test", "test"], [2], 2),
        (["train", "train"], None, 0),
    ],
)
def test_the_column_split(tmp_path, splits, val, unused):
    rows = [[f"{i}.mp4", "xy"[i % 2], split] for i, split in enumerate(splits)]
    data = opened(write_csv(tmp_path / "t.csv", ["path", "label", "split"], *rows))
    assert names(data.train) == ["0.mp4", "1.mp4"]
    assert (data.val and names(data.val)) == (val and [f"{i}.mp4" for i in val])
    assert "split" in data.split
    assert ("2 test videos are not used" in data.split) == (unused == 2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["a", "x", "train"], ["b", "x", ""]], "row 3: .*split"),
        ([["a", "x", "val"], ["b", "x", "test"]], "no row is for training"),
        ([["a", "x", "train"], ["b", "y", "val"]], "no row for training has the class 'y'"),
    ],
)
def test_invalid_splits(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        opened(write_csv(tmp_path / "t.csv", ["path", "label", "split"], *rows))


def test_an_empty_column_split_is_none(tmp_path):
    rows = [[f"{i}.mp4", "x", ""] for i in range(10)]
    data = opened(write_csv(tmp_path / "t.csv", ["path", "label", "split"], *rows))
    assert (len(data.train), len(data.val)) == (8, 2)


# The stratified split


def test_each_class_is_divided(folders):
    data = opened(folders)
    assert data.train.class_counts == (8, 4, 2)
    assert data.val.class_counts == (2, 1, 0)
    assert "20%" in data.split
    assert facts(opened(folders)) == facts(data)
    assert facts(opened(folders, seed=1)) != facts(data)
    assert opened(folders, val_fraction=0).val is None
    assert opened(folders, val_fraction=0.01).val is None


def items_of(labels):
    return [Item(f"{i}.mp4", label) for i, label in enumerate(labels)]


def counts_of(items, chosen, side):
    return Counter(label for item, in_val in zip(items, chosen, strict=True) if in_val == side for label in item.labels or (-1,))


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_shares_are_within_half_a_video(fraction, seed):
    items = items_of(np.repeat(np.arange(8), [1, 2, 3, 5, 8, 30, 77, 200]).tolist())
    chosen = stratified_split(items, [""] * len(items), fraction, seed=seed)
    totals, taken = Counter(item.label for item in items), counts_of(items, chosen, True)
    for label, total in totals.items():
        assert abs(taken[label] - min(fraction * total, total - 1)) <= 0.5 + 1e-9
        assert taken[label] < total
    assert stratified_split(items, [""] * len(items), fraction, seed=seed) == chosen
    assert stratified_split(items, [""] * len(items), fraction, seed=seed + 1) != chosen


@pytest.mark.parametrize("seed", range(3))
def test_shares_of_several_labels(seed):
    """Each of 300 videos has 0 to 4 of 10 classes, of which the rarest has about 15 videos."""
    rng = np.random.default_rng(seed)
    labels = [tuple(np.flatnonzero(rng.random(10) < np.linspace(0.05, 0.4, 10)).tolist()) for _ in range(300)]
    items = items_of(labels)
    chosen = stratified_split(items, [""] * 300, 0.2, seed=seed)
    totals, taken = counts_of(items, chosen, True) + counts_of(items, chosen, False), counts_of(items, chosen, True)
    assert totals[-1] > 5
    assert taken[-1] > 0
    assert all(abs(taken[label] - 0.2 * total) <= 1.5 for label, total in totals.items())


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together(seed):
    """46 sources of 1 to 30 videos of two classes."""
    rng = np.random.default_rng(seed)
    groups = [f"g{g}" for g in range(46) for _ in range(rng.integers(1, 31))]
    items = items_of(rng.integers(2, size=len(groups)).tolist())
    chosen = stratified_split(items, groups, 0.2, seed=seed)
    sides = {group: {c for g, c in zip(groups, chosen, strict=True) if g == group} for group in groups}
    assert all(len(side) == 1 for side in sides.values())
    totals, taken = Counter(item.label for item in items), counts_of(items, chosen, True)
    assert all(abs(taken[label] / total - 0.2) < 0.01 for label, total in totals.items())


def test_every_class_keeps_a_training_video_even_if_a_group_has_most_classes():
    items = items_of([0, 1, 2, 0, 1, 3, 3])
    groups = ["a", "a", "a", "b", "b", "c", "c"]
    for seed in range(10):
        chosen = stratified_split(items, groups, 0.6, seed=seed)
        assert counts_of(items, chosen, False).keys() == {0, 1, 2, 3}
    assert not any(stratified_split(items, ["a"] * 7, 0.5))


def test_groups_come_from_the_column_or_the_path(folders, tmp_path):
    data = opened(folders, group=r"camera(\d+)")
    assert "whole groups" in data.split
    sides = [{item.group for item in part.items} for part in (data.train, data.val)]
    assert all(sides)
    assert not sides[0] & sides[1]
    with pytest.raises(ValueError, match="nothing"):
        opened(folders, group="nothing")
    rows = [[f"{i}.mp4", "xy"[i % 2], f"g{i // 10}"] for i in range(100)]
    data = opened(write_csv(tmp_path / "t.csv", ["path", "label", "group"], *rows))
    assert {item.group for item in data.train.items} & {item.group for item in data.val.items} == set()
    assert data.val.class_counts == (10, 10)


def test_segments_of_one_video_stay_together_if_there_are_enough_videos(tmp_path):
    header = ["path", "label", "start", "end"]
    rows = [[f"{video}.mp4", label, i, i + 1] for video in range(5) for i, label in enumerate("xyxyxy")]
    data = opened(write_csv(tmp_path / "t.csv", header, *rows))
    assert len(data.val) == 6
    assert not set(names(data.val)) & set(names(data.train))
    assert "whole videos" in data.split
    data = opened(write_csv(tmp_path / "t.csv", header, *(["a.mp4", "xy"[i % 2], i, i + 1] for i in range(200))))
    assert data.val.class_counts == (20, 20)
    assert "both sides" in data.split


# The written division


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_written_division_is_read_back(folders, tmp_path, suffix):
    pytest.importorskip("pyarrow")
    data = opened(folders, group=r"camera\d+")
    data.write(tmp_path / "run" / f"split.{suffix}")
    again = opened(tmp_path / "run" / f"split.{suffix}", seed=9, root="/elsewhere")
    assert facts(again) == facts(data)
    assert again.train.classes == data.train.classes
    assert "column split" in again.split


def test_the_columns_of_a_written_division(folders, tmp_path, monkeypatch):
    """Paths are absolute, so that the table can be read from any folder."""
    monkeypatch.chdir(tmp_path)
    opened("data").write(tmp_path / "split.csv")
    with open(tmp_path / "split.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "label", "start", "end", "split", "group"]
    assert Counter(row[4] for row in rows) == {"train": 14, "val": 3}
    assert all(os.path.isabs(row[0]) and os.path.exists(row[0]) for row in rows)


def test_segments_and_several_labels_are_written(tmp_path):
    rows = [[f"{i}.mp4", label, "", i + 1 / 3, "g"] for i, label in enumerate(["x|y", "y", "", "x"] * 5)]
    table = write_csv(tmp_path / "t.csv", ["path", "labels", "start", "end", "group"], *rows)
    data = opened(table, group=r"(\d+)\.mp4")
    assert len(data.val) > 0
    data.write(tmp_path / "split.csv")
    again = opened(tmp_path / "split.csv")
    assert facts(again) == facts(data)
    assert again.train.multi_label
    assert again.val.multi_label


def test_numbers_are_written_as_numbers(tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"{i}.mp4 {i % 12}\n" for i in range(60)))
    data = opened(tmp_path / "list.txt", classes=[f"name {i}" for i in range(12)])
    data.write(tmp_path / "split.csv")
    again = opened(tmp_path / "split.csv", classes=data.train.classes)
    assert facts(again) == facts(data)
    assert opened(tmp_path / "split.csv").train.classes == tuple(f"class {i}" for i in range(12))


def test_folders_named_by_numbers_stay_the_same_classes(tmp_path):
    for name in ("1", "2", "10"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(5):
            (tmp_path / "data" / name / f"{i}.mp4").write_bytes(b"")
    data = opened(tmp_path / "data")
    data.write(tmp_path / "split.csv")
    again = opened(tmp_path / "split.csv")
    assert again.train.classes == ("class 1", "class 10", "class 2")
    assert [item.label for item in again.train.items] == [item.label for item in data.train.items]


def test_numbers_that_are_names_are_names(tmp_path):
    """In a list for validation, too, and in the table of the division."""
    for name in ("1", "2", "10"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "a.mp4").write_bytes(b"")
    val = write_csv(tmp_path / "val.csv", ["path", "label"], ["b.mp4", "2"], ["c.mp4", "1"])
    data = opened(tmp_path / "data", val=val)
    assert [data.val.classes[item.label] for item in data.val.items] == ["2", "1"]
    with pytest.raises(ValueError, match=r"val\.csv.*label 10 is out of range.*3"):  # no class has the name 0: these are numbers
        opened(tmp_path / "data", val=write_csv(tmp_path / "val.csv", ["path", "label"], ["b.mp4", "0"], ["c.mp4", "10"]))


def test_numbers_of_named_classes_are_written_as_names(tmp_path, folders):
    val = write_csv(tmp_path / "val.csv", ["path", "label"], ["b.mp4", "1"], ["c.mp4", "0"])
    data = opened(folders, val=val)
    data.write(tmp_path / "split.csv")
    again = opened(tmp_path / "split.csv")
    assert facts(again) == facts(data)
    assert [item.label for item in again.val.items] == [1, 0]


def test_a_group_needs_data_that_is_not_divided(tmp_path, folders):
    table = write_csv(tmp_path / "t.csv", ["path", "label", "split"], ["a.mp4", "x", "train"], ["b.mp4", "y", "train"])
    with pytest.raises(ValueError, match=r"group='a'.*column split"):
        opened(table, group="a")
    with pytest.raises(ValueError, match=r"group.*finds nothing in 17 paths"):
        opened(folders, group=r"(z*)")


def test_every_class_is_trained_beside_other_validation_data(tmp_path):
    rows = [["a.mp4", "x", "train"], ["b.mp4", "y", "val"], ["c.mp4", "z", "train"]]
    table = write_csv(tmp_path / "t.csv", ["path", "label", "split"], *rows)
    other = write_csv(tmp_path / "o.csv", ["path", "label"], ["d.mp4", "x"])
    with pytest.raises(ValueError, match=r"t\.csv.*'y'"):
        opened(table, val=other)


def test_the_models_classes_stay_in_its_order(folders):
    """Whatever the order of the folders; the classes of other data replace them."""
    order = ("run", "Überholen, left", "fall")
    assert opened(folders, classes=order).train.classes == order
    assert opened(folders, classes=(*order, "walk")).train.classes == tuple(sorted(order))


def test_extracted_frames_are_divided_and_written(tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"folder{i} {i + 5} {i % 2}\n" for i in range(20)))
    data = opened(tmp_path / "list.txt", frames="{}.jpg")
    assert len(data.val) == 4
    data.write(tmp_path / "split.csv")
    again = opened(tmp_path / "split.csv", frames="{}.jpg")
    assert facts(again) == facts(data)
    assert [item.num_frames for item in again.val.items] == [item.num_frames for item in data.val.items]


def test_data_without_validation_is_written(folders, tmp_path):
    data = opened(folders, val_fraction=0)
    data.write(tmp_path / "split.csv")
    again = opened(tmp_path / "split.csv")
    assert again.val is None
    assert facts(again) == facts(data)


# Facts


def test_facts_of_segments(tmp_path):
    write_video(tmp_path / "long.mp4", 250, codec="libx264")
    rows = [["long.mp4", "x", 1, 3], ["long.mp4", "y", 3, ""], ["long.mp4", "x", 9, 99], ["long.mp4", "x", "", 2]]
    data = opened(write_csv(tmp_path / "t.csv", ["path", "label", "start", "end"], *rows), val_fraction=0).train
    found = facts_of(data)
    assert (found.videos, found.class_counts, found.fps) == (4, (3, 1), 25)
    assert found.frames == 50  # of 50, 175, 25, and 50
    assert facts_of(data.part([replace(data.items[0], start=20.0, end=30.0)], train=True)).frames is None


def test_labels_of_a_list_are_not_the_classes_of_a_model(tmp_path):
    """The model has as many classes as the list has numbers."""
    labels = tpn.create_model("tpn_slowonly_tiny_motion", base_channels=4).labels
    (tmp_path / "list.txt").write_text("".join(f"{i}.mp4 {i % len(labels)}\n" for i in range(28)))
    assert opened(tmp_path / "list.txt").train.classes == tuple(f"class {i}" for i in range(len(labels)))
    assert opened(tmp_path / "list.txt", classes=labels).train.classes == tuple(labels)
