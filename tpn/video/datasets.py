"""Datasets of videos for training and validation: class folders, lists of videos, extracted frames.

Each item is a clip, uint8 (T, 3, S, S), and its label. The random choice of frames, crop and colors depends only on the seed, the
epoch and the index, not on the number of loader workers. A video that cannot be read is logged and replaced by another one; see
`VideoDataset.bad_files`.
"""

import json
import logging
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from tpn.config import InputSpec
from tpn.video import decode, lists
from tpn.video.ahead import read_ahead
from tpn.video.decode import VideoError
from tpn.video.sampling import FrameSampler
from tpn.video.transforms import resize_short_side

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts", ".ogv"]
)

MAX_LISTED = 20
"""Number of bad files that an error lists. Training also stops if this many videos fail before one can be read."""

PathLike = str | os.PathLike[str]

_logger = logging.getLogger(__name__)


class TooManyBadFilesError(RuntimeError):
    """More videos cannot be read than `max_bad` of the dataset allows. The message lists them."""


@dataclass(frozen=True)
class Item:
    """A video and its label.

    Attributes:
        path: video file, or folder of extracted frames.
        label: class index.
        num_frames: number of extracted frames; None for a video file.
    """

    path: str
    label: int
    num_frames: int | None = None


class _SharedState:
    """State that a dataset shares with its copies in loader workers. A deep copy of the dataset gets a copy of the state."""

    def __init__(self, epoch: int = 0, any_read: bool = False, log: bytes = b"") -> None:
        self.epoch = torch.tensor(epoch).share_memory_()
        self.any_read = torch.tensor(any_read).share_memory_()
        handle, self.log = tempfile.mkstemp(prefix="tpn-bad-files-", suffix=".jsonl")
        with os.fdopen(handle, "wb") as file:
            file.write(log)
        weakref.finalize(self, _remove_log, self.log, os.getpid())

    def __deepcopy__(self, memo: dict[int, Any]) -> "_SharedState":
        return _SharedState(int(self.epoch), bool(self.any_read), Path(self.log).read_bytes())


class VideoDataset(Dataset[tuple[Tensor, int]], ABC):
    """Base class of `VideoFolder`, `VideoList` and `RawFrames`.

    Args:
        items: videos with their labels.
        classes: class names in the order of the labels.
        spec: input specification of the model, `tpn.input_spec(model)`.
        train: True returns random clips with `spec.train_transform`, False the center clip with one center crop.
        target_fps: sample each video as if it had this frame rate. Default: the video's own frame rate.
        max_bad: largest fraction of videos, 0..1, that may be unreadable. If there are more, TooManyBadFilesError is raised.
        seed: seed of all random choices.
    """

    def __init__(
        self,
        items: Sequence[Item],
        classes: Sequence[str],
        spec: InputSpec,
        *,
        train: bool,
        target_fps: float | None = None,
        max_bad: float = 0.05,
        seed: int = 0,
    ) -> None:
        if not items:
            raise ValueError("the dataset has no videos: the list is empty, or all videos in it are missing")
        if target_fps is not None and target_fps <= 0:
            raise ValueError(f"target_fps must be positive, got {target_fps}")
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad must be between 0 and 1, got {max_bad}")
        self.items, self.classes, self.spec, self.train = list(items), tuple(classes), spec, train
        self.target_fps, self.max_bad, self.seed = target_fps, max_bad, seed
        self.transform = spec.train_transform(normalize=False) if train else spec.eval_transform(normalize=False)
        self._num_videos = len({item.path for item in self.items})
        self._shared = _SharedState()

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labels(self) -> list[int]:
        """The label of each item."""
        return [item.label for item in self.items]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which the random choices depend. Loader workers that are already running use it too."""
        self._shared.epoch.fill_(epoch)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
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
            return self.transform(clip, item.label) if self.train else (self.transform(clip), item.label)

    def bad_files(self) -> dict[str, str]:
        """Return the path of each video that could not be read so far, in any loader worker, with the reason."""
        lines = Path(self._shared.log).read_text(encoding="utf-8").splitlines()
        return dict(json.loads(line) for line in lines)

    def check(self, workers: int = 2) -> Iterator[tuple[Item, str | None]]:
        """Read every frame of every video in `workers` threads. Yield each item with the reason why it is bad, or None."""

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
            raise TooManyBadFilesError(problem + _format_bad_files(bad))

    def _log_bad_file(self, item: Item, error: Exception) -> None:
        bad = self.bad_files()
        if item.path not in bad:
            reason = bad_reason(item, error)
            _logger.warning("skipped %s: %s", item.path, reason)
            with open(self._shared.log, "a", encoding="utf-8") as file:  # in one short write, because workers append concurrently
                file.write(json.dumps([item.path, reason]) + "\n")
            bad[item.path] = reason
        self.check_bad(bad)
        if len(bad) >= MAX_LISTED and not self._shared.any_read:
            problem = f"none of the first {len(bad)} videos can be read. Check the folder that paths are relative to:"
            raise TooManyBadFilesError(problem + _format_bad_files(bad))


class _VideoFiles(VideoDataset):
    def verify(self, item: Item) -> None:
        decode.verify(item.path)

    def read(self, item: Item, sample: FrameSampler, *, short_side: int | None = None) -> tuple[Tensor, Tensor]:
        frames, positions = decode.sample_frames(item.path, sample, target_fps=self.target_fps, short_side=short_side)
        return frames, torch.from_numpy(positions)


class VideoFolder(_VideoFiles):
    """Videos in one folder per class: `root/CLASS/**/VIDEO.mp4`.

    Files without a video suffix and hidden files and folders are skipped. Links are followed; no folder is read twice.

    Args:
        root: folder with the class folders.
        spec, train, target_fps, max_bad, seed: see `VideoDataset`.
        classes: class names in the order of the labels, for example those of the training set. Default: the sorted folder names.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is not a folder.
        ValueError: there are no class folders, a class has no videos, or a folder is not in `classes`.
    """

    def __init__(
        self, root: PathLike, spec: InputSpec, *, train: bool, classes: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        if not folders:
            raise ValueError(f"{root}: no class folders found. Expected videos as {root}/CLASS/VIDEO.mp4")
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
    """Videos from a text file with "path label" on each line, or from an official Kinetics CSV file.

    Args:
        file: the list. Labels are numbers from 0 or class names. A CSV file has the columns label, youtube_id, time_start and
            time_end. Its videos are `root/label/id_000001_000011.mp4` or `root/id_000001_000011.mp4`; missing videos are skipped
            with a warning.
        spec, train, target_fps, max_bad, seed: see `VideoDataset`.
        root: folder to which paths are relative. Default: the folder of the list.
        classes: class names in the order of the labels. Default: "class 0", ... for numbers, otherwise the sorted labels.
    """

    def __init__(
        self,
        file: PathLike,
        spec: InputSpec,
        *,
        train: bool,
        root: PathLike | None = None,
        classes: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        folder = Path(file).parent if root is None else Path(root)
        lines = lists.read_lines(file)
        if lines and "youtube_id" in lines[0].split(","):
            videos = lists.find_kinetics_videos(file, lines, folder)
        else:
            videos = [(str(folder / path), label) for path, label in lists.split_lines(file, lines, 2)]
        labels, names = lists.encode_labels(file, [label for _, label in videos], classes)
        items = [Item(path, label) for (path, _), label in zip(videos, labels, strict=True)]
        super().__init__(items, names, spec, train=train, **kwargs)


class RawFrames(VideoDataset):
    """Videos stored as folders of numbered images, from a text file with "folder num_frames label" on each line.

    Args:
        file: the list. Labels are numbers from 0 or class names.
        spec, train, max_bad, seed: see `VideoDataset`. `target_fps` is not supported: images have no frame rate.
        root: folder to which paths are relative. Default: the folder of the list.
        template: format of the file names, with the frame number as argument.
        first: number of the first frame.
        classes: see `VideoList`.
    """

    def __init__(
        self,
        file: PathLike,
        spec: InputSpec,
        *,
        train: bool,
        root: PathLike | None = None,
        template: str = "img_{:05d}.jpg",
        first: int = 1,
        classes: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("target_fps") is not None:
            raise ValueError("target_fps is not valid for extracted frames, which have no frame rate")
        self.template, self.first = template, first
        folder = Path(file).parent if root is None else Path(root)
        rows = lists.split_lines(file, lists.read_lines(file), 3)
        labels, names = lists.encode_labels(file, [label for _, _, label in rows], classes)
        items = []
        for (path, count, _), label in zip(rows, labels, strict=True):
            if not count.isdecimal() or int(count) == 0:
                raise ValueError(f"{file}: num_frames of {path!r} must be a positive integer, got {count!r}")
            items.append(Item(str(folder / path), label, int(count)))
        super().__init__(items, names, spec, train=train, **kwargs)

    def verify(self, item: Item) -> None:
        assert item.num_frames is not None
        for i in range(item.num_frames):
            _read_image(self._frame_path(item, i))

    def read(self, item: Item, sample: FrameSampler, *, short_side: int | None = None) -> tuple[Tensor, Tensor]:
        assert item.num_frames is not None
        indices = sample(item.num_frames)
        distinct, positions = np.unique(indices, return_inverse=True)
        images = [_read_image(self._frame_path(item, i)) for i in distinct.tolist()]
        if short_side is not None:
            images = [resize_short_side(image, short_side) for image in images]
        if len({image.shape for image in images}) > 1:
            raise VideoError(f"{item.path}: the images have different sizes")
        return torch.stack(images), torch.from_numpy(positions).view(indices.shape)

    def _frame_path(self, item: Item, index: int) -> Path:
        return Path(item.path, self.template.format(self.first + index))


def open_dataset(data: PathLike, spec: InputSpec, *, train: bool, template: str | None = None, **kwargs: Any) -> VideoDataset:
    """Return a `VideoFolder` if `data` is a folder, a `RawFrames` if there is a `template`, otherwise a `VideoList`.

    `kwargs` are passed to the class; `root` and `first` are ignored where they do not apply. Raises the errors of the class.
    """
    if os.path.isdir(data):
        if template is not None:
            raise ValueError(f"template needs a list with 'folder num_frames label' on each line, got the folder {data}")
        kwargs = {name: value for name, value in kwargs.items() if name not in ("root", "first")}
        return VideoFolder(data, spec, train=train, **kwargs)
    if template is not None:
        return RawFrames(data, spec, train=train, template=template, **kwargs)
    kwargs.pop("first", None)
    return VideoList(data, spec, train=train, **kwargs)


def bad_reason(item: Item, error: Exception) -> str:
    """Return the reason why a video cannot be read, without its path."""
    if isinstance(error, OSError) and error.strerror:
        is_other_file = error.filename and os.fspath(error.filename) != item.path
        return f"{error.strerror}: {error.filename}" if is_other_file else error.strerror
    return str(error).removeprefix(f"{item.path}: ")


def _format_bad_files(bad: dict[str, str]) -> str:
    lines = [f"\n  {path}: {reason}" for path, reason in bad.items()]
    more = f"\n  and {len(lines) - MAX_LISTED} more; `tpn check` lists all" if len(lines) > MAX_LISTED else ""
    return "".join(lines[:MAX_LISTED]) + more


def videos_below(folder: Path) -> list[Path]:
    """Return the sorted video files in a folder and its subfolders, except hidden ones. No folder is read twice."""
    seen: set[str] = set()
    found = []
    for path, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(path, name) for name in files if Path(name).suffix.lower() in VIDEO_SUFFIXES and not name.startswith(".")]
    return sorted(found)


def _read_image(path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except UnidentifiedImageError as error:
        raise VideoError(f"{path}: not an image") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # from Python, such as a missing file; Pillow sets no errno
            raise
        raise VideoError(f"{path}: damaged image ({error})") from error


def _remove_log(path: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked loader worker
        Path(path).unlink(missing_ok=True)
