"""Features of videos: what a model makes of them before it classifies, in a file that grows with the next run."""

import json
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from huggingface_hub.utils import WeakFileLock
from numpy.typing import NDArray

from tpn.models.features import FeatureModel
from tpn.predict import Prediction, Unreadable, VideoClassifier
from tpn.training import weights_hash, whole_file

Level = Literal["video", "clip"]

SAVE_EVERY = 60.0
"""Seconds of work that a run which is killed may lose; more where writing the file takes long."""


@dataclass(frozen=True)
class About:
    """What features are of; those in one file have all of it in common.

    Attributes:
        model: its name, as it was given.
        weights: their hash, `tpn.training.weights_hash`.
        feature: the map's name; None for what the head reads.
        level: "video", the mean over all views, or "clip", the mean over the crops of each clip.
        model_args, input: how the model was built, and what its clips look like, views included, as JSON knows them.
    """

    model: str
    weights: str
    feature: str | None
    level: Level
    model_args: dict[str, Any] | None
    input: dict[str, Any]


class FeatureFile:
    """A table of features, `.npz` or `.parquet`: "path", "features" (C float32) and, at clip level, "clip" (0, 1, ... in time).

    What the features are of stands in it as JSON: under "about" in an .npz, in the metadata of a Parquet table, key "tpn".

    Args:
        path: the file. If it is there already, its rows are read, and `about` must be the same.

    Raises ValueError for another ending, for features of something else, and for a file that is none of these; ImportError
    without pyarrow for Parquet; FileNotFoundError if its folder is not there.
    """

    def __init__(self, path: str | PathLike[str], about: About) -> None:
        check_path(path)
        self.path, self.about = Path(path), about
        self.rows: dict[str, NDArray[np.float32]] = {}
        self._seen: tuple[int, int] | None = None  # the state of the file whose rows are here
        self._read()

    def __contains__(self, video: object) -> bool:
        return video in self.rows

    def add(self, video: str, features: NDArray[np.float32]) -> None:
        """features: (clips, C), one row for a whole video."""
        self.rows[video] = features

    def write(self) -> None:
        """Put all rows into the file, beside those that other processes put there; it is never there half."""
        with WeakFileLock(self.path.with_name(f".{self.path.name}.lock")):
            self._read()
            self._write()
            self._seen = self._state()

    def _write(self) -> None:
        rows = self.rows.items()
        columns: dict[str, Any] = {"path": [_text(path) for path, features in rows for _ in features]}
        if self.about.level == "clip":
            columns["clip"] = np.concatenate([np.arange(len(features)) for _, features in rows])
        columns["features"] = np.concatenate([features for _, features in rows])
        about = json.dumps(asdict(self.about))
        with whole_file(self.path) as file:
            if self.path.suffix == ".npz":
                np.savez(file, about=about, **columns)
            else:
                pa, pq = _pyarrow()
                columns["features"] = pa.FixedSizeListArray.from_arrays(columns["features"].ravel(), columns["features"].shape[1])
                pq.write_table(pa.table(columns).replace_schema_metadata({"tpn": about}), file)

    def _state(self) -> tuple[int, int] | None:
        """Inode and time of the last change of the file."""
        if not self.path.exists():
            return None
        state = self.path.stat()
        return state.st_ino, state.st_mtime_ns

    def _read(self) -> None:
        """Take over the rows of the file, if they are not known yet."""
        state = self._state()
        if state is None or state == self._seen:
            return
        try:
            about, paths, features = self._columns()
        except ImportError:
            raise
        except Exception as error:  # of whichever library
            raise ValueError(f"{self.path}: not a file of features that tpn wrote ({error}); choose another") from error
        ours = json.loads(json.dumps(asdict(self.about)))
        other = list(_differences(about, ours))
        if other:
            raise ValueError(f"{self.path} holds features of something else ({'; '.join(other)}); choose another file")
        starts = [i for i, path in enumerate(paths) if i == 0 or path != paths[i - 1]]
        for start, end in zip(starts, [*starts[1:], len(paths)], strict=True):
            self.rows.setdefault(paths[start], features[start:end])
        self._seen = state  # not of a file that was refused, which must stay as it is

    def _columns(self) -> tuple[dict[str, Any], list[str], NDArray[np.float32]]:
        if self.path.suffix == ".npz":
            with np.load(self.path) as file:
                return json.loads(str(file["about"])), file["path"].tolist(), file["features"]
        _, pq = _pyarrow()
        table = pq.read_table(self.path)
        features = np.asarray(table["features"].combine_chunks().flatten(), dtype=np.float32).reshape(len(table), -1)
        return json.loads(table.schema.metadata[b"tpn"]), table["path"].to_pylist(), features


def extract(
    classifier: VideoClassifier,
    videos: Iterable[str | PathLike[str]],
    path: str | PathLike[str],
    *,
    name: str,
    level: Level = "video",
    num_clips: int | None = None,
    num_crops: int | None = None,
) -> Generator[tuple[str, Unreadable | None]]:
    """Put the features of videos into a file, and yield each video when it is done, with the error if it cannot be read.

    Videos that the file has already are passed over. It is written every minute, at the end, and when the work is broken off;
    those that could not be read are not in it, and are tried again the next time.

    Args:
        classifier: of a `FeatureModel`.
        videos: paths, kept in the file as they are given.
        path: the `FeatureFile`.
        name: of the model, for the record.
        level, num_clips, num_crops: see `About` and `VideoClassifier`.
    """
    model = classifier.model
    if not isinstance(model, FeatureModel):
        raise TypeError(f"expected a VideoClassifier of a FeatureModel, got one with {type(model).__name__}")
    spec = classifier.spec_for(num_clips, num_crops)
    about = About(
        name, weights_hash(model.model), model.name, level, model.model.model_args, replace(spec, mirrored=()).to_dict()
    )
    file = FeatureFile(path, about)
    missing = [video for video in dict.fromkeys(map(str, videos)) if _text(video) not in file]
    results = classifier.predict_each(missing, num_clips=num_clips, num_crops=num_crops)
    written, pause = time.monotonic(), SAVE_EVERY
    unwritten = 0
    try:
        for video, result in zip(missing, results, strict=True):
            if isinstance(result, Prediction):
                views = result.view_logits.numpy()
                # The clips of each crop, one after the other.
                clips = views.reshape(-1, spec.num_clips, views.shape[1]).mean(axis=0)
                file.add(_text(video), clips if level == "clip" else clips.mean(axis=0, keepdims=True))
                unwritten += 1
                if time.monotonic() - written > pause:
                    started = time.monotonic()
                    file.write()
                    unwritten, written = 0, time.monotonic()
                    pause = max(SAVE_EVERY, 10 * (written - started))
            yield video, None if isinstance(result, Prediction) else result
    finally:
        if unwritten:
            file.write()


def check_path(path: str | PathLike[str]) -> None:
    """Raise what a `FeatureFile` there would raise, before there is work to lose."""
    path = Path(path)
    if path.suffix not in (".npz", ".parquet"):
        raise ValueError(f"{path}: the file's name must end in .npz or .parquet")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    if path.suffix == ".parquet":
        _pyarrow()


def _differences(theirs: dict[str, Any], ours: dict[str, Any], within: str = "") -> Iterator[str]:
    """Say what differs, of dictionaries in dictionaries their entries."""
    for key, value in ours.items():
        found = theirs.get(key)
        if isinstance(found, dict) and isinstance(value, dict):
            yield from _differences(found, value, f"{key}.")
        elif found != value:
            yield f"{within}{key} {found!r}, not {value!r}"


def _text(path: str) -> str:
    """A file's name as text that every format can hold."""
    return path.encode("utf-8", "backslashreplace").decode()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('Parquet files need pyarrow: pip install "tpn[parquet]"; .npz files need nothing more') from error
    return pyarrow, pyarrow.parquet
