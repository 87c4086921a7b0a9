"""Datasets of videos for training and validation: class folders, tables, lists of videos, extracted frames.

Each item is a clip, uint8 (T, 3, S, S), and its label. The random choice of frames, crop and colors depends only on the seed, the
epoch and the index, not on the number of loader workers. A video that cannot be read is logged and replaced by another one; see
`VideoDataset.bad_files`.
"""

import copy
import json
import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tpn.config import InputSpec
from tpn.files import StrPath
from tpn.video import augment, decode, lists
from tpn.video.ahead import read_ahead
from tpn.video.bad_files import MAX_LISTED, SharedState, TooManyBadFilesError, format_bad_files
from tpn.video.crops import read_track
from tpn.video.decode import VideoError
from tpn.video.frame_folders import read_image
from tpn.video.items import Item, bad_reason, naming_row, read_items
from tpn.video.lists import videos_below
from tpn.video.sampling import FrameSampler
from tpn.video.transforms import resize_short_side

_logger = logging.getLogger(__name__)


class VideoDataset(Dataset[tuple[Tensor, Any]], ABC):
    """Base class of `VideoFolder`, `VideoList` and `RawFrames`.

    Args:
        items: videos with their labels.
        classes: class names in the order of the labels.
        spec: input specification of the model, `tpn.input_spec(model)`.
        train: True returns random clips with `spec.train_transform`, False the center clip with one center crop.
        max_bad: largest fraction of videos, 0..1, that may be unreadable. If there are more, TooManyBadFilesError is raised.
        seed: seed of all random choices.

    Attributes:
        numbered: whether the file has numbers for the classes, not names.
    """

    numbered = False

    def __init__(
        self,
        items: Sequence[Item],
        classes: Sequence[str],
        spec: InputSpec,
        *,
        train: bool,
        max_bad: float = 0.05,
        seed: int = 0,
    ) -> None:
        if not items:
            raise ValueError("the dataset has no videos: the list is empty, or all videos in it are missing")
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad must be between 0 and 1, got {max_bad}")
        self.items, self.classes, self.spec, self.train = list(items), tuple(classes), spec, train
        self.max_bad, self.seed = max_bad, seed
        self.use_spec(spec)
        self._num_videos = len({item.name for item in self.items})
        self._shared = SharedState()

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labels(self) -> list[int | tuple[int, ...]]:
        """The label of each item."""
        return [item.label for item in self.items]

    @property
    def multi_label(self) -> bool:
        """Whether a video may have several classes."""
        return any(not isinstance(item.label, int) for item in self.items)

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Number of items of each class, in the order of `classes`; an item with several classes counts for each of them."""
        counts = Counter(label for item in self.items for label in item.labels)
        return tuple(counts[label] for label in range(len(self.classes)))

    @property
    def targets(self) -> Tensor:
        """Targets (N, K), float32: 1 for the classes of each item."""
        return torch.stack([self._multi_hot(item) for item in self.items])

    def _multi_hot(self, item: Item) -> Tensor:
        return torch.zeros(len(self.classes)).index_fill_(0, torch.tensor(item.labels, dtype=torch.int64), 1)

    def part(self, items: Sequence[Item], *, train: bool) -> "VideoDataset":
        """Return a dataset of some of the items, for training or for validation."""
        part = copy.copy(self)
        part.items, part.train = list(items), train
        part._num_videos = len({item.name for item in part.items})
        part._shared = SharedState()
        part.use_spec(self.spec)
        return part

    def use_spec(self, spec: InputSpec, **transform: Any) -> None:
        """Read clips for another input spec; `transform` are arguments of `spec.train_transform`.

        A flip exchanges labels by the names in `classes`: a list with the numbers of a model's classes needs their names, such as
        `VideoList(..., classes=model.labels)`.
        """
        self.spec = spec
        self.transform: augment.TrainTransform | augment.EvalTransform = (
            spec.train_transform(classes=self.classes, normalize=False, **transform)
            if self.train
            else spec.eval_transform(normalize=False)
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which the random choices depend. Loader workers that are already running use it too."""
        self._shared.epoch.fill_(epoch)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Any]:
        """Return a clip, uint8 (T, 3, S, S), and its label.

        If the video cannot be read, another one takes its place. The index may be a pair (index, draw): each draw gives another
        random clip of the same video, for samplers that repeat videos within an epoch.
        """
        index, *draw = index if isinstance(index, tuple) else (index,)
        rng = np.random.default_rng([self.seed, int(self._shared.epoch), index, *filter(None, draw)])
        while True:
            item = self.items[index]
            try:
                frames, clips = self.read(item, self._sampler(rng))
                self._shared.any_read.fill_(True)
                break
            except (VideoError, OSError) as error:
                self._log_bad_file(item, error)
                index = int(rng.integers(len(self.items)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**62)))
            clip = frames.index_select(0, clips[0])  # several times faster than frames[clips[0]]
            label = item.label if isinstance(item.label, int) else self._multi_hot(item)
            return self.transform(clip, label) if self.train else (self.transform(clip), label)

    def bad_files(self) -> dict[str, str]:
        """Return the name of each video that could not be read so far, in any loader worker, with the reason."""
        lines = Path(self._shared.log).read_text(encoding="utf-8").splitlines()
        return dict(json.loads(line) for line in lines)

    def check(self, workers: int = 2) -> Iterator[tuple[Item, str | None]]:
        """Read every frame of each item in `workers` threads. Yield each item with the reason why it is bad, or None."""

        def find_reason(item: Item) -> str | None:
            try:
                self.verify(item)
            except (VideoError, OSError) as error:
                return bad_reason(item, error)
            return None

        with closing(read_ahead(find_reason, self.items, workers=workers)) as reasons:
            yield from zip(self.items, reasons, strict=True)

    @abstractmethod
    def verify(self, item: Item) -> None:
        """Read every frame. Raise VideoError or OSError if a frame cannot be read."""

    @abstractmethod
    def read(self, item: Item, sample: FrameSampler, *, short_side: int | None = None) -> tuple[Tensor, Tensor]:
        """Read the frames of an item that `sample` selects.

        Args:
            item: one of `items`.
            sample: function from the number of frames to indices (clips, T), for example `spec.indices`.
            short_side: resize the shorter side of the frames to this many pixels.

        Returns:
            The distinct frames, uint8 (N, 3, H, W), and the clips as positions among them, int64 (clips, T).
        """

    def _sampler(self, rng: np.random.Generator) -> FrameSampler:
        if self.train:
            return lambda total_frames: self.spec.random_indices(total_frames, rng)
        return replace(self.spec, num_clips=1).indices

    def check_bad(self, bad: dict[str, str]) -> None:
        """Raise TooManyBadFilesError if `bad`, in the form of `bad_files`, has more videos than `max_bad` allows."""
        if len(bad) > self.max_bad * self._num_videos or len(bad) == self._num_videos:
            problem = f"{len(bad)} of {self._num_videos} videos cannot be read, more than max_bad={self.max_bad} allows:"
            raise TooManyBadFilesError(problem + format_bad_files(bad))

    def _log_bad_file(self, item: Item, error: Exception) -> None:
        bad = self.bad_files()
        if item.name not in bad:
            reason = bad_reason(item, error)
            _logger.warning("skipped %s: %s", item.name, reason)
            with open(self._shared.log, "a", encoding="utf-8") as file:  # in one short write, because workers append concurrently
                file.write(json.dumps([item.name, reason]) + "\n")
            bad[item.name] = reason
        self.check_bad(bad)
        if len(bad) >= MAX_LISTED and not self._shared.any_read:
            problem = f"none of the first {len(bad)} videos can be read. Check the folder that paths are relative to:"
            raise TooManyBadFilesError(problem + format_bad_files(bad))


class _VideoFiles(VideoDataset):
    def verify(self, item: Item) -> None:
        if not item.is_part:
            decode.verify(item.path)
            return
        with naming_row(item):
            if item.track is not None:
                read_track(item, np.arange, 16)
            else:
                decode.sample_frames(item.path, np.arange, start=item.start, end=item.end, short_side=16)

    def read(self, item: Item, sample: FrameSampler, *, short_side: int | None = None) -> tuple[Tensor, Tensor]:
        fps = self.spec.target_fps
        options: dict[str, Any] = {"target_fps": fps, "short_side": short_side, "start": item.start, "end": item.end}
        with naming_row(item):
            if item.track is not None:
                frames, positions = read_track(item, sample, short_side or self.spec.short_side, target_fps=fps)
            else:
                frames, positions = decode.sample_frames(item.path, sample, **options)
        return frames, torch.from_numpy(positions)


class VideoFolder(_VideoFiles):
    """Videos in one folder per class: `root/CLASS/**/VIDEO.mp4`.

    Files without a video suffix and hidden files and folders are skipped. Links are followed; no folder is read twice.

    Args:
        root: folder with the class folders.
        spec: see `VideoDataset`.
        train: see `VideoDataset`.
        max_bad: see `VideoDataset`.
        seed: see `VideoDataset`.
        classes: class names in the order of the labels, for example those of the training set. Default: the sorted folder names.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is not a folder.
        ValueError: there are no class folders, a class has no videos, or a folder is not in `classes`.
    """

    def __init__(
        self, root: StrPath, spec: InputSpec, *, train: bool, classes: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        folders = lists.class_folders(root)
        if not folders:
            raise ValueError(f"{root}: no class folders found. Expected videos as {root}/CLASS/VIDEO.mp4")
        if parts := lists.split_folders(root):
            found = ", ".join(str(path) for path in parts.values())
            raise ValueError(f"{root} has no class folders, but the parts of a dataset. Pass one of them: {found}")
        names = folders if classes is None else list(classes)
        lists.check_classes(root, folders, names)
        items = []
        for name in folders:
            videos = videos_below(Path(root, name))
            if not videos:
                raise ValueError(f"{Path(root, name)}: no videos in this class folder. Add videos or remove the folder")
            items += [Item(str(path), names.index(name)) for path in videos]
        super().__init__(items, names, spec, train=train, **kwargs)


class VideoList(_VideoFiles):
    """Videos, or labeled segments of long videos, from a table or a list.

    A table is a CSV or Parquet file with a header: the columns path and label, and optionally start and end in seconds, split,
    and group; see `tpn.video.tables`. Several labels in one cell are separated by "|". If any cell has several, or if the column
    is named labels, the dataset is multi-label: every item's label is a tuple, empty for an empty cell of the column labels.

    A segment has the frames with `start <= time < end`, where `time` is the presentation time after the first frame. Segments are
    read by seeking. One without a frame is a bad file; one that reaches past the end of the video ends with it.

    With the columns tracks, a file that `read_tracks` reads, and track, an id in it, a row is one person or object: square crops
    of its default `square_boxes`, resized to `spec.short_side`, from the first to the last frame of the track in the segment.

    A list is a text file with "path label" on each line, or an official Kinetics CSV file with the columns label, youtube_id,
    time_start and time_end. Kinetics' videos are `root/label/id_000001_000011.mp4` or `root/id_000001_000011.mp4`; missing videos
    are skipped with a warning.

    Args:
        file: the table or list. Labels are numbers from 0 or class names.
        spec: see `VideoDataset`.
        train: see `VideoDataset`.
        max_bad: see `VideoDataset`.
        seed: see `VideoDataset`.
        root: folder to which paths are relative. Default: the folder of the file.
        classes: class names in the order of the labels. Default: "class 0", ... for numbers, otherwise the sorted labels.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the file cannot be read.
        ImportError: it is a Parquet file, and pyarrow is missing.
        ValueError: it is none of these files, or a line is not valid; the message has its number.
    """

    def __init__(
        self,
        file: StrPath,
        spec: InputSpec,
        *,
        train: bool,
        root: StrPath | None = None,
        classes: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        items, names, self.numbered = read_items(file, root, classes)
        super().__init__([replace(item, num_frames=None) for item in items], names, spec, train=train, **kwargs)


class RawFrames(VideoDataset):
    """Videos stored as folders of numbered images, from a list with "folder num_frames label" on each line, or a table.

    Args:
        file: the list, or a table with the columns path, num_frames and label, and optionally split and group; see `VideoList`.
        spec: see `VideoDataset`. `spec.target_fps` has no effect, because images have no frame rate.
        train: see `VideoDataset`.
        max_bad: see `VideoDataset`.
        seed: see `VideoDataset`.
        root: folder to which paths are relative. Default: the folder of the file.
        template: format of the file names, with the frame number as argument.
        first: number of the first frame.
        classes: see `VideoList`.
    """

    def __init__(
        self,
        file: StrPath,
        spec: InputSpec,
        *,
        train: bool,
        root: StrPath | None = None,
        template: str = "img_{:05d}.jpg",
        first: int = 1,
        classes: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        try:
            paths = {template.format(number) for number in (1, 2)}
        except (IndexError, KeyError, ValueError):
            paths = set()
        if len(paths) < 2:
            raise ValueError(
                f"template must have one place for the number of the frame, such as 'img_{{:05d}}.jpg', got {template!r}"
            )
        self.template, self.first = template, first
        items, names, self.numbered = read_items(file, root, classes, num_fields=3)
        if any(item.num_frames is None or item.is_part for item in items):
            raise ValueError(f"{file}: extracted frames need the column num_frames in each row, and no start, end, or track")
        super().__init__(items, names, spec, train=train, **kwargs)

    def verify(self, item: Item) -> None:
        assert item.num_frames is not None
        for i in range(item.num_frames):
            read_image(self._frame_path(item, i))

    def read(self, item: Item, sample: FrameSampler, *, short_side: int | None = None) -> tuple[Tensor, Tensor]:
        assert item.num_frames is not None
        indices = sample(item.num_frames)
        distinct, positions = np.unique(indices, return_inverse=True)
        images = [read_image(self._frame_path(item, i)) for i in distinct.tolist()]
        if short_side is not None:
            images = [resize_short_side(image, short_side) for image in images]
        if len({image.shape for image in images}) > 1:
            raise VideoError(f"{item.path}: the images have different sizes")
        return torch.stack(images), torch.from_numpy(positions).view(indices.shape)

    def _frame_path(self, item: Item, index: int) -> Path:
        return Path(item.path, self.template.format(self.first + index))


def open_dataset(data: StrPath, spec: InputSpec, *, train: bool, template: str | None = None, **kwargs: Any) -> VideoDataset:
    """Return a `VideoFolder` if `data` is a folder, a `RawFrames` if there is a `template`, otherwise a `VideoList`.

    `RawFrames` and `VideoList` read tables with a header (CSV, Parquet) and lists.
    `kwargs` are passed to the class; `root` and `first` are ignored where they do not apply. Raises the errors of the class.
    """
    if os.path.isdir(data):
        if template is not None:
            raise ValueError(f"template needs a list or a table of folders with images, got the folder {data}")
        kwargs = {name: value for name, value in kwargs.items() if name not in ("root", "first")}
        return VideoFolder(data, spec, train=train, **kwargs)
    if template is not None:
        return RawFrames(data, spec, train=train, template=template, **kwargs)
    kwargs.pop("first", None)
    return VideoList(data, spec, train=train, **kwargs)


def open_validation(data: StrPath, spec: InputSpec, **options: Any) -> VideoDataset:
    """Open the validation part of a dataset, or all of a dataset without parts; see `open_dataset` for the options."""
    folders = lists.split_folders(data)
    whole = open_dataset(folders.get("val") or folders["test"] if folders else data, spec, train=False, **options)
    return whole.part(validation_items(whole), train=False)


def validation_items(data: VideoDataset) -> list[Item]:
    """Return the items for validation: those whose split is val; if there are none, test; if there are none, all items."""
    for split in ("val", "test"):
        if chosen := [item for item in data.items if item.split == split]:
            return chosen
    return data.items
