"""Features of videos: the output of a model before its classifier, in a file that later runs extend."""

import json
import os
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from huggingface_hub.utils import WeakFileLock
from numpy.typing import NDArray

from tpn.config import InputSpec
from tpn.errors import printable
from tpn.files import StrPath, atomic_write, require_writable
from tpn.models.features import FeatureModel
from tpn.models.layers import weights_hash
from tpn.predict import Prediction, Unreadable, VideoClassifier
from tpn.video.tables import import_pyarrow

Level = Literal["video", "clip"]
DType = Literal["float32", "float16"]
Columns = dict[str, NDArray[Any]]
"""Columns of a table by name, one row per video, clip, or window. "features" is (rows, C)."""

SAVE_EVERY = 60.0
"""Seconds between two writes of the file, and so the work that a killed run can lose. Longer if writing takes more than 6 s."""


@dataclass(frozen=True)
class About:
    """How features were computed. All features in one file have the same settings.

    Attributes:
        model: name of the model, as given by the caller.
        weights: SHA-256 of the weights, from `tpn.models.layers.weights_hash`.
        feature: name of the feature map; None for the input of the classifier.
        level: "video" for the mean over all views of a video, "clip" for the mean over the crops of each clip, "window" for the
            center crop of each window of `tpn.strided`.
        parts: backbone and neck of the model's config, as JSON values; None for a model without config.
        input: the `InputSpec` with the number of views, as JSON values.
    """

    model: str
    weights: str
    feature: str | None
    level: Level | Literal["window"]
    parts: dict[str, Any] | None
    input: dict[str, Any]

    def check_same(self, found: dict[str, Any], path: Path, kind: str) -> None:
        """Raise ValueError if `found`, the settings of the features in `path`, differ from these."""
        if differences := list(_differences(found, json.loads(json.dumps(asdict(self))))):
            raise ValueError(f"{path} has features with other settings ({'; '.join(differences)}); choose another {kind}")


@dataclass(frozen=True)
class WindowsAbout(About):
    """How the features of windows were computed.

    Attributes:
        stride: step from window to window, in frames.
        window: frames that a window stands for, `num_frames * frame_interval`.
        span: frames from the first to the last that the model sees of a window, `frame_interval - 1` less.
        dtype: of the features.
    """

    stride: int
    window: int
    span: int
    dtype: DType


class FeatureFile:
    """A table of features in an `.npz` or `.parquet` file.

    The columns are "path", "features" (float32, C values per row) and, at clip level, "clip" (0, 1, ... along time); at window
    level those of `tpn.strided.extract_windows`. The settings are stored as JSON, under "about" in an `.npz` file and under "tpn"
    in the metadata of a Parquet table.

    Args:
        path: the file. If it exists, its rows are read.
        about: settings of the features. They must be the same as in an existing file.

    Raises:
        ValueError: `path` has another suffix, has features with other settings, or is not a file of features.
        ImportError: `path` is a Parquet file and pyarrow is missing.
        OSError: the folder of `path` does not exist, or is read-only.
    """

    def __init__(self, path: StrPath, about: About) -> None:
        check_path(path)
        self.path, self.about = Path(path), about
        self.rows: dict[str, Columns] = {}
        self._version_read: tuple[int, int] | None = None
        self._read()

    def __contains__(self, video: object) -> bool:
        return isinstance(video, str) and utf8_name(video) in self.rows

    def add(self, video: str, columns: Columns) -> None:
        """Add the rows of a video: one at video level, otherwise one per clip or window."""
        self.rows[utf8_name(video)] = columns

    def write(self) -> None:
        """Write all rows, including those that other processes have added to the file. Readers never see a partial file."""
        with WeakFileLock(self.path.with_name(f".{self.path.name}.lock")):
            self._read()
            rows = self.rows.values()
            columns: dict[str, Any] = {"path": [path for path, each in self.rows.items() for _ in each["features"]]}
            columns |= {name: np.concatenate([each[name] for each in rows]) for name in next(iter(rows))}
            features = columns.pop("features")
            about = json.dumps(asdict(self.about))
            with atomic_write(self.path) as unfinished:
                if self.path.suffix == ".npz":
                    np.savez(unfinished, about=about, **columns, features=features)
                else:
                    pa, pq = import_pyarrow()
                    columns["features"] = pa.FixedSizeListArray.from_arrays(features.ravel(), features.shape[1])
                    pq.write_table(pa.table(columns).replace_schema_metadata({"tpn": about}), unfinished)
            self._version_read = self._version()

    def _version(self) -> tuple[int, int] | None:
        """Return inode and modification time of the file: every write changes them."""
        if not self.path.exists():
            return None
        state = self.path.stat()
        return state.st_ino, state.st_mtime_ns

    def _read(self) -> None:
        """Add the rows of the file, unless this version of it has been read or written before."""
        version = self._version()
        if version is None or version == self._version_read:
            return
        try:
            about, paths, columns = self._read_columns()
        except ImportError:
            raise
        except Exception as error:  # NumPy and pyarrow raise many types
            raise ValueError(f"{self.path} is not a file of features from tpn ({error}); choose another file") from error
        self.about.check_same(about, self.path, "file")
        starts = [i for i, path in enumerate(paths) if i == 0 or path != paths[i - 1]]
        for start, end in zip(starts, [*starts[1:], len(paths)], strict=True):
            self.rows.setdefault(paths[start], {name: column[start:end] for name, column in columns.items()})
        self._version_read = version  # only now: a later write must refuse a bad file again

    def _read_columns(self) -> tuple[dict[str, Any], list[str], Columns]:
        """Return the settings, the path of each row, and the other columns."""
        if self.path.suffix == ".npz":
            with np.load(self.path) as file:
                columns = {name: file[name] for name in file}
                return json.loads(str(columns.pop("about"))), columns.pop("path").tolist(), columns
        _, pq = import_pyarrow()
        table = pq.read_table(self.path)
        columns = {name: table[name].to_numpy() for name in table.column_names if name not in ("path", "features")}
        features = np.asarray(table["features"].combine_chunks().flatten(), dtype=np.float32).reshape(len(table), -1)
        return json.loads(table.schema.metadata[b"tpn"]), table["path"].to_pylist(), columns | {"features": features}


class FeatureFolder:
    """A folder with the features of one video in each `NAME.npy`, (windows, C), and a `NAME.json` beside it.

    The JSON has the settings, the path of the "video", its "fps" and "total_frames", and for each window its "first" and "last"
    frame and its middle "time" in seconds. It is written before the array, so that an array with its JSON is complete.

    Args:
        path: the folder. It is made with the first video.
        about: settings of the features. They must be the same as in an existing folder.

    Raises:
        ValueError: the folder has features with other settings.
        NotADirectoryError: `path` is a file.
    """

    def __init__(self, path: StrPath, about: WindowsAbout) -> None:
        check_folder(path)
        self.path, self.about = Path(path), about
        self._known: dict[str, tuple[str, int]] = {}  # path of the video and number of windows, by name
        for file in self.path.rglob("*.json"):
            if not file.parent.name.startswith(".incomplete-"):
                self._note(file)

    def _note(self, file: Path) -> None:
        """Remember what the JSON of a video says. Raises ValueError for other settings."""
        found = _read_json(file)
        if found.get("level") == "window":
            self.about.check_same(found, file, "folder")
            self._known[file.relative_to(self.path).as_posix().removesuffix(".json")] = found["video"], len(found["time"])

    def missing(self, videos: Mapping[str, str]) -> list[str]:
        """Return the videos, given with their names, that have no complete features.

        Raises ValueError: a name is that of two videos, or of files that are no features.
        """
        owners: dict[str, str] = {}
        missing = []
        for video, name in videos.items():
            array, about = self._files(name)
            path = os.path.abspath(utf8_name(video))
            if name not in self._known and about.exists():
                self._note(about)  # another process has written it since
            owner = owners.setdefault(name, self._known[name][0] if name in self._known else path)
            if owner != path:
                raise ValueError(
                    f"{array} would have the features of {owner} and of {printable(path)}; rename one of them, pass the folder "
                    "that holds both, or write to another folder"
                )
            if name not in self._known and (array.exists() or about.exists()):
                raise ValueError(f"{array if array.exists() else about} exists and is not from tpn; write to another folder")
            if name not in self._known or not _has_rows(array, self._known[name][1]):
                missing.append(video)
        return missing

    def add(self, video: str, name: str, columns: Columns, *, fps: float, total_frames: int) -> None:
        """Write the features of a video. Other processes see both files or none that counts."""
        array, about = self._files(name)
        with np.errstate(over="ignore"):
            features = columns["features"].astype(self.about.dtype)
        if not np.isfinite(features).all():
            raise ValueError(f"{printable(video)}: the features exceed {self.about.dtype}; write float32")
        windows = {key: columns[key].tolist() for key in ("first", "last", "time")}
        facts = {
            "video": os.path.abspath(utf8_name(video)),
            "fps": fps,
            "total_frames": total_frames,
            **asdict(self.about),
            **windows,
        }
        with atomic_write(array) as unfinished:
            unfinished.with_name(about.name).write_text(json.dumps(facts), encoding="utf-8")
            with unfinished.open("wb") as file:  # np.save would append .npy to other names
                np.save(file, features)

    def _files(self, name: str) -> tuple[Path, Path]:
        return self.path / f"{name}.npy", self.path / f"{name}.json"


def extract(
    classifier: VideoClassifier,
    videos: Iterable[StrPath],
    path: StrPath,
    *,
    name: str,
    level: Level = "video",
    num_clips: int | None = None,
    num_crops: int | None = None,
) -> Generator[tuple[str, Unreadable | None]]:
    """Write the features of videos to a file.

    Videos that are already in the file are skipped. The file is written every minute, at the end, and when the generator is
    closed. Unreadable videos are not recorded, so the next run tries them again.

    Args:
        classifier: a `VideoClassifier` of a `FeatureModel`.
        videos: paths, stored in the file as given.
        path: `.npz` or `.parquet` file; see `FeatureFile`.
        name: name of the model to store in the file.
        level: "video" or "clip"; see `About`.
        num_clips: clips of each video, as in `VideoClassifier`.
        num_crops: crops of each clip, as in `VideoClassifier`.

    Yields:
        Each new video when it is done, with the error if it is unreadable, otherwise None.

    Raises:
        TypeError: the classifier has no `FeatureModel`.
        ValueError, ImportError, FileNotFoundError: as in `FeatureFile`.
    """
    spec = classifier.spec.with_views(num_clips, num_crops)
    file = FeatureFile(path, About(model=name, level=level, **describe(feature_model(classifier), spec)))
    new_videos = [video for video in dict.fromkeys(map(str, videos)) if video not in file]

    def columns(result: Prediction | Unreadable) -> Columns | Unreadable:
        if not isinstance(result, Prediction):
            return result
        views = result.view_logits.numpy()  # (crops x clips, C), one crop after the other
        clips = views.reshape(-1, spec.num_clips, views.shape[1]).mean(axis=0)
        if level == "clip":
            return {"clip": np.arange(len(clips)), "features": clips}
        return {"features": clips.mean(axis=0, keepdims=True)}

    results = classifier.predict_each(new_videos, num_clips=num_clips, num_crops=num_crops)
    yield from add_results(file, zip(new_videos, map(columns, results), strict=True))


def add_results(
    file: FeatureFile, results: Iterable[tuple[str, Columns | Unreadable]]
) -> Generator[tuple[str, Unreadable | None]]:
    """Add the rows of videos to a file, which is written every minute, at the end, and when the generator is closed.

    Yields:
        Each video, with the error if it is unreadable, otherwise None.
    """
    last_write, interval = time.monotonic(), SAVE_EVERY
    unwritten = False
    try:
        for video, result in results:
            if not isinstance(result, dict):
                yield video, result
                continue
            file.add(video, result)
            unwritten = True
            if time.monotonic() - last_write > interval:
                started = time.monotonic()
                file.write()
                unwritten, last_write = False, time.monotonic()
                interval = max(SAVE_EVERY, 10 * (last_write - started))
            yield video, None
    finally:
        if unwritten:
            file.write()


def feature_model(classifier: VideoClassifier) -> FeatureModel:
    """Return the model of a classifier. Raises TypeError for one with classes."""
    if not isinstance(classifier.model, FeatureModel):
        raise TypeError(f"classifier must be a VideoClassifier of a FeatureModel, got one of {type(classifier.model).__name__}")
    return classifier.model


def describe(model: FeatureModel, spec: InputSpec) -> dict[str, Any]:
    """Return what an `About` says of a model and its clips."""
    parts = None
    with suppress(ValueError):  # models put together by hand have no config
        config = model.model.config.to_dict()
        parts = {"backbone": config["backbone"], "neck": config["neck"]}
    input_settings = replace(spec, flip_label_pairs=()).to_dict()
    return {"weights": weights_hash(model.model), "feature": model.name, "parts": parts, "input": input_settings}


def is_table(out: StrPath) -> bool:
    """Return whether features go to a `FeatureFile`, not to a `FeatureFolder`."""
    return Path(out).suffix in (".npz", ".parquet")


def check_path(path: StrPath) -> None:
    """Raise the errors that a `FeatureFile` at `path` would raise for its suffix and folder, before the work starts."""
    path = Path(path)
    if not is_table(path):
        raise ValueError(f"the name of a feature file must end in .npz or .parquet, got {str(path)!r}")
    require_writable(path)
    if path.suffix == ".parquet":
        import_pyarrow()


def check_folder(path: StrPath) -> None:
    """Raise ValueError or NotADirectoryError if a `FeatureFolder` cannot be at `path`, before the work starts."""
    if Path(path).suffix.lower() in (".npz", ".parquet", ".npy", ".csv"):
        raise ValueError(f"features of windows go to a folder, or to a file that ends in .npz or .parquet, got {str(path)!r}")
    if Path(path).exists() and not Path(path).is_dir():
        raise NotADirectoryError(f"{path} is a file; features of windows need a folder, or a name that ends in .npz or .parquet")


def _differences(found: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Describe each entry that differs, in nested dictionaries, too."""
    for key, value in expected.items():
        other = found.get(key)
        if isinstance(other, dict) and isinstance(value, dict):
            yield from _differences(other, value, f"{prefix}{key}.")
        elif other != value:
            yield f"{prefix}{key}={other!r}, expected {value!r}"


def utf8_name(path: str) -> str:
    """Replace bytes of a file name that are not UTF-8: neither format can store them."""
    return path.encode("utf-8", "backslashreplace").decode()


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _has_rows(path: Path, count: int) -> bool:
    """Return whether a file is an array of so many rows; only its size and its header are read."""
    try:
        return len(np.load(path, mmap_mode="r")) == count
    except (OSError, ValueError, EOFError):
        return False
