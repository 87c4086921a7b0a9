"""Data sets of videos for training and validation: folders, lists, extracted frames.

Every item is a clip, uint8 (T, 3, S, S), and a label. Which frames, crop and colours are drawn follows from the seed, the epoch
and the item alone, so the number of loader workers does not matter. A video that cannot be read is replaced by another draw, and
written down; see `VideoDataset.bad_files`.
"""

import json
import logging
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from tpn.video import decode, lists
from tpn.video.ahead import read_ahead
from tpn.video.decode import VideoError
from tpn.video.spec import InputSpec
from tpn.video.transforms import resize_short_side

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts", ".ogv"]
)

PathLike = str | os.PathLike[str]
Sample = Callable[[int], NDArray[np.int64]]

_logger = logging.getLogger(__name__)


LISTED = 20
"""Bad files that an error names; and that may come first of all before the run is stopped."""


class TooManyBadFilesError(RuntimeError):
    """More videos cannot be read than the data set's `max_bad` allows; the message lists them."""


@dataclass(frozen=True)
class Item:
    """One video, or one folder of frames (then with their number), and its label."""

    path: str
    label: int
    num_frames: int | None = None


class VideoDataset(Dataset[tuple[Tensor, int]], ABC):
    """What all data sets share; see `VideoFolder`, `VideoList`, `RawFrames`.

    Args:
        items: videos and labels.
        classes: names, by label.
        spec: `tpn.input_spec(model)`.
        train: random clips and `spec.train_transform`; otherwise the centre clip and one centre crop.
        target_fps: sample as if every video had this frame rate; default: frames as they are.
        max_bad: share of the videos that may be unreadable before the run stops with the list.
        seed: of all random draws.
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
            raise ValueError("the data set has no videos: the list is empty, or none of those that it names is there")
        if target_fps is not None and target_fps <= 0:
            raise ValueError(f"target_fps must be positive, got {target_fps}")
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad must be within 0..1, got {max_bad}")
        self.items, self.classes, self.spec, self.train = list(items), tuple(classes), spec, train
        self.target_fps, self.max_bad, self.seed = target_fps, max_bad, seed
        self.transform = spec.train_transform(normalize=False) if train else spec.eval_transform(normalize=False)
        self._num_files = len({item.path for item in self.items})
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # loader workers see it change
        self._any_read = torch.zeros((), dtype=torch.bool).share_memory_()
        handle, self._bad_file = tempfile.mkstemp(prefix="tpn-bad-files-", suffix=".jsonl")
        os.close(handle)
        weakref.finalize(self, _remove, self._bad_file, os.getpid())

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labels(self) -> list[int]:
        """The label of every item."""
        return [item.label for item in self.items]

    def set_epoch(self, epoch: int) -> None:
        """Draw other clips than in other epochs."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        """Return (clip uint8 (T, 3, S, S), label) of video `index`, or of another one if it cannot be read.

        A pair (index, draw) gives other clips of the same video, for samplers that take it several times in an epoch.
        """
        index, *draw = index if isinstance(index, tuple) else (index,)
        rng = np.random.default_rng([self.seed, int(self._epoch), index, *filter(None, draw)])
        while True:
            item = self.items[index]
            try:
                frames, clips = self.read(item, self._sampler(rng))
                self._any_read.fill_(True)
                break
            except (VideoError, OSError) as error:
                self._record(item, error)
                index = int(rng.integers(len(self.items)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**62)))
            clip = frames.index_select(0, clips[0])  # several times faster than frames[clips[0]]
            return self.transform(clip, item.label) if self.train else (self.transform(clip), item.label)

    def bad_files(self) -> dict[str, str]:
        """Return the videos that could not be read so far, in any worker, each with its reason."""
        lines = Path(self._bad_file).read_text(encoding="utf-8").splitlines()
        return dict(json.loads(line) for line in lines)

    def check(self, workers: int = 2) -> Iterator[tuple[Item, str | None]]:
        """Read every frame of every video, `workers` at a time; yield each with the reason why it is bad, or None."""

        def reason(item: Item) -> str | None:
            try:
                self.verify(item)
            except (VideoError, OSError) as error:
                return bad_reason(item, error)
            return None

        with closing(read_ahead(reason, self.items, workers=workers)) as reasons:
            yield from zip(self.items, reasons, strict=True)

    @abstractmethod
    def verify(self, item: Item) -> None:
        """Read every frame; raise VideoError or OSError if one cannot be read."""

    @abstractmethod
    def read(self, item: Item, sample: Sample, *, short_side: int | None = None) -> tuple[Tensor, Tensor]:
        """Read the frames that `sample` chooses, by the number of frames, as indices (clips, T); such as `spec.indices`.

        short_side: resize to it.

        Returns the distinct frames, uint8 (N, 3, H, W), and the clips as places among them, int64 (clips, T).
        """

    def _sampler(self, rng: np.random.Generator) -> Sample:
        if self.train:
            return lambda total: self.spec.random_indices(total, rng)
        return replace(self.spec, num_clips=1).indices

    def check_bad(self, bad: dict[str, str]) -> None:
        """Raise TooManyBadFilesError if these, as `bad_files` returns them, are more than `max_bad` allows."""
        if len(bad) <= self.max_bad * self._num_files and len(bad) < self._num_files:
            return
        lines = [f"\n  {path}: {reason}" for path, reason in bad.items()]
        more = f"\n  and {len(lines) - LISTED} more; `tpn check` lists all" if len(lines) > LISTED else ""
        raise TooManyBadFilesError(
            f"{len(bad)} of {self._num_files} videos cannot be read, more than max_bad={self.max_bad} allows:"
            + "".join(lines[:LISTED])
            + more
        )

    def _record(self, item: Item, error: Exception) -> None:
        known = self.bad_files()
        if item.path not in known:
            reason = bad_reason(item, error)
            _logger.warning("skipped %s: %s", item.path, reason)
            with open(self._bad_file, "a", encoding="utf-8") as file:  # one short write: whole lines also from many workers
                file.write(json.dumps([item.path, reason]) + "\n")
            known[item.path] = reason
        self.check_bad(known)
        if len(known) >= LISTED and not self._any_read:
            raise TooManyBadFilesError(
                f"the first {len(known)} videos cannot be read, not one could; is the folder right that paths are relative to?"
                + "".join(f"\n  {path}: {reason}" for path, reason in known.items())
            )


class _VideoFiles(VideoDataset):
    def verify(self, item: Item) -> None:
        decode.verify(item.path)

    def read(self, item: Item, sample: Sample, *, short_side: int | None = None) -> tuple[Tensor, Tensor]:
        chosen = sample
        if self.target_fps is not None:
            chosen = at_frame_rate(sample, decode.probe(item.path).fps, self.target_fps)
        frames, place = decode.sample_frames(item.path, chosen, short_side=short_side)
        return frames, torch.from_numpy(place)


class VideoFolder(_VideoFiles):
    """Videos in one folder per class: `root/class name/**/video.mp4`.

    Links are followed, each folder once. Files that do not end like videos are passed over.

    Args:
        root: the folder.
        spec, train, target_fps, max_bad, seed: see `VideoDataset`.
        classes: class names in the order of their labels, such as those of the training set for a validation set. Default:
            the folders' names, sorted.

    Raises FileNotFoundError, NotADirectoryError, or ValueError: no class, a class without a video, an unknown class.
    """

    def __init__(
        self, root: PathLike, spec: InputSpec, *, train: bool, classes: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        if not folders:
            raise ValueError(f"{root}: no class folders in it; expected {root}/CLASS/VIDEO.mp4")
        names = folders if classes is None else list(classes)
        unknown = sorted(set(folders) - set(names))
        if unknown:
            raise ValueError(lists.unknown_classes(root, unknown, names))
        items = []
        for name in folders:
            videos = videos_below(Path(root, name))
            if not videos:
                raise ValueError(f"{Path(root, name)}: a class without a video; add some, or remove the folder")
            items += [Item(str(path), names.index(name)) for path in videos]
        super().__init__(items, names, spec, train=train, **kwargs)


class VideoList(_VideoFiles):
    """Videos named by a text file, "path label" on each line, or by an official Kinetics CSV.

    Args:
        file: the list. Labels are numbers from 0, or class names where `classes` is given. A CSV with the columns label,
            youtube_id, time_start and time_end stands for `root/label/id_000001_000011.mp4` or `root/id_000001_000011.mp4`;
            videos that are not there are left out, with a warning that counts them.
        spec, train, target_fps, max_bad, seed: see `VideoDataset`.
        root: what paths are relative to. Default: the list's folder.
        classes: class names in the order of their labels. Default: those of the CSV, sorted; "class 0", ... for numbers.
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
            named = lists.kinetics(file, lines, folder)
        else:
            named = [(str(folder / path), label) for path, label in lists.split_lines(file, lines, 1)]
        items, names = lists.labelled(file, named, classes)
        super().__init__([Item(path, label) for path, label in items], names, spec, train=train, **kwargs)


class RawFrames(VideoDataset):
    """Videos that lie as folders of numbered images, named by a text file: "folder num_frames label" on each line.

    Args:
        file: the list.
        spec, train, max_bad, seed: see `VideoDataset`. `target_fps` does not apply: images have no frame rate.
        root: what folders are relative to. Default: the list's folder.
        template: file names, with the number of the frame.
        first: number of the first frame.
        classes: as in `VideoList`.
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
            raise ValueError("target_fps does not apply to extracted frames, which have no frame rate")
        self.template, self.first = template, first
        folder = Path(file).parent if root is None else Path(root)
        rows = lists.split_lines(file, lists.read_lines(file), 2)
        items, names = lists.labelled(file, [(path, label) for path, _, label in rows], classes)
        frames = [int(count) if count.isdecimal() and int(count) > 0 else None for _, count, _ in rows]
        if None in frames:
            raise ValueError(f"{file}: line {frames.index(None) + 1}: the number of frames must be an integer >= 1")
        located = [Item(str(folder / path), label, count) for (path, label), count in zip(items, frames, strict=True)]
        super().__init__(located, names, spec, train=train, **kwargs)

    def verify(self, item: Item) -> None:
        assert item.num_frames is not None
        for i in range(item.num_frames):
            _read_image(self._frame(item, i))

    def _frame(self, item: Item, index: int) -> Path:
        return Path(item.path, self.template.format(self.first + index))

    def read(self, item: Item, sample: Sample, *, short_side: int | None = None) -> tuple[Tensor, Tensor]:
        assert item.num_frames is not None
        indices = sample(item.num_frames)
        wanted, place = np.unique(indices, return_inverse=True)
        images = [_read_image(self._frame(item, i)) for i in wanted.tolist()]
        if short_side is not None:
            images = [resize_short_side(image, short_side) for image in images]
        if len({image.shape for image in images}) > 1:
            raise VideoError(f"{item.path}: its images are of several sizes")
        return torch.stack(images), torch.from_numpy(place).view(indices.shape)


def open_dataset(data: PathLike, spec: InputSpec, *, train: bool, template: str | None = None, **kwargs: Any) -> VideoDataset:
    """Return the data set that `data` is: a `VideoFolder`, a `VideoList`, or with a `template` of file names `RawFrames`.

    kwargs: theirs. Raises FileNotFoundError, NotADirectoryError, ValueError.
    """
    if os.path.isdir(data):
        if template is not None:
            raise ValueError(f"{data} is a folder; extracted frames are named by a list, 'folder num_frames label' on each line")
        kwargs = {name: value for name, value in kwargs.items() if name not in ("root", "first")}
        return VideoFolder(data, spec, train=train, **kwargs)
    if template is not None:
        return RawFrames(data, spec, train=train, template=template, **kwargs)
    kwargs.pop("first", None)
    return VideoList(data, spec, train=train, **kwargs)


def at_frame_rate(sample: Sample, fps: float | None, target_fps: float) -> Sample:
    """Let `sample` choose as if a video of `fps` frames a second had `target_fps`; unknown fps: as it is."""
    if not fps:
        return sample
    ratio = fps / target_fps

    def chosen(total: int) -> NDArray[np.int64]:
        indices = sample(max(round(total / ratio), 1))
        return np.minimum(np.floor(indices * ratio), total - 1).astype(np.int64)

    return chosen


def bad_reason(item: Item, error: Exception) -> str:
    """Return why a video cannot be read, without its path."""
    if isinstance(error, OSError) and error.strerror:
        other = error.filename and os.fspath(error.filename) != item.path
        return f"{error.strerror}: {error.filename}" if other else error.strerror
    return str(error).removeprefix(f"{item.path}: ")


def _read_image(path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except UnidentifiedImageError as error:
        raise VideoError(f"{path}: not an image") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # missing, forbidden: Python's own; the others are Pillow's
            raise
        raise VideoError(f"{path}: a damaged image ({error})") from error


def videos_below(folder: Path) -> list[Path]:
    """Every video file in a folder and below, sorted; links are followed, no folder is entered twice."""
    seen: set[str] = set()
    found = []
    for path, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(path, name) for name in files if Path(name).suffix.lower() in VIDEO_SUFFIXES and not name.startswith(".")]
    return sorted(found)


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a loader's worker
        Path(path).unlink(missing_ok=True)
