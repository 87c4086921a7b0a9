"""Features of videos: the output of a model before its classifier, in a file that later runs extend."""

import json
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from huggingface_hub.utils import WeakFileLock
from numpy.typing import NDArray

from tpn.files import atomic_write
from tpn.models.features import FeatureModel
from tpn.predict import Prediction, Unreadable, VideoClassifier
from tpn.training.state import weights_hash

Level = Literal["video", "clip"]

SAVE_EVERY = 60.0
"""Seconds between two writes of the file, and so the work that a killed run can lose. Longer if writing takes more than 6 s."""


@dataclass(frozen=True)
class About:
    """How features were computed. All features in one file have the same settings.

    Attributes:
        model: name of the model, as given by the caller.
        weights: SHA-256 of the weights, from `tpn.training.state.weights_hash`.
        feature: name of the feature map; None for the input of the classifier.
        level: "video" for the mean over all views of a video, "clip" for the mean over the crops of each clip.
        parts: backbone and neck of the model's config, as JSON values; None for a model without config.
        input: the `InputSpec` with the number of views, as JSON values.
    """

    model: str
    weights: str
    feature: str | None
    level: Level
    parts: dict[str, Any] | None
    input: dict[str, Any]


class FeatureFile:
    """A table of features in an `.npz` or `.parquet` file.

    The columns are "path", "features" (float32, C values per row) and, at clip level, "clip" (0, 1, ... along time). The settings
    are stored as JSON, under "about" in an `.npz` file and under "tpn" in the metadata of a Parquet table.

    Args:
        path: the file. If it exists, its rows are read.
        about: settings of the features. They must be the same as in an existing file.

    Raises:
        ValueError: `path` has another suffix, has features with other settings, or is not a file of features.
        ImportError: `path` is a Parquet file and pyarrow is missing.
        FileNotFoundError: the folder of `path` does not exist.
    """

    def __init__(self, path: str | PathLike[str], about: About) -> None:
        check_path(path)
        self.path, self.about = Path(path), about
        self.rows: dict[str, NDArray[np.float32]] = {}
        self._version_read: tuple[int, int] | None = None
        self._read()

    def __contains__(self, video: object) -> bool:
        return video in self.rows

    def add(self, video: str, features: NDArray[np.float32]) -> None:
        """Add the features of a video, (clips, C) at clip level or (1, C) at video level."""
        self.rows[video] = features

    def write(self) -> None:
        """Write all rows, including those that other processes have added to the file. Readers never see a partial file."""
        with WeakFileLock(self.path.with_name(f".{self.path.name}.lock")):
            self._read()
            rows = self.rows.items()
            features = np.concatenate([features for _, features in rows])
            columns: dict[str, Any] = {"path": [_utf8_name(path) for path, features in rows for _ in features]}
            if self.about.level == "clip":
                columns["clip"] = np.concatenate([np.arange(len(features)) for _, features in rows])
            about = json.dumps(asdict(self.about))
            with atomic_write(self.path) as unfinished:
                if self.path.suffix == ".npz":
                    np.savez(unfinished, about=about, **columns, features=features)
                else:
                    pa, pq = _import_pyarrow()
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
            about, paths, features = self._read_columns()
        except ImportError:
            raise
        except Exception as error:  # NumPy and pyarrow raise many types
            raise ValueError(f"{self.path} is not a file of features from tpn ({error}); choose another file") from error
        differences = list(_differences(about, json.loads(json.dumps(asdict(self.about)))))
        if differences:
            raise ValueError(f"{self.path} has features with other settings ({'; '.join(differences)}); choose another file")
        starts = [i for i, path in enumerate(paths) if i == 0 or path != paths[i - 1]]
        for start, end in zip(starts, [*starts[1:], len(paths)], strict=True):
            self.rows.setdefault(paths[start], features[start:end])
        self._version_read = version  # only now: a later write must refuse a bad file again

    def _read_columns(self) -> tuple[dict[str, Any], list[str], NDArray[np.float32]]:
        """Return the settings, the path of each row, and the features (rows, C)."""
        if self.path.suffix == ".npz":
            with np.load(self.path) as file:
                return json.loads(str(file["about"])), file["path"].tolist(), file["features"]
        _, pq = _import_pyarrow()
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
    """Write the features of videos to a file.

    Videos that are already in the file are skipped. The file is written every minute, at the end, and when the generator is
    closed. Unreadable videos are not recorded, so the next run tries them again.

    Args:
        classifier: a `VideoClassifier` of a `FeatureModel`.
        videos: paths, stored in the file as given.
        path: `.npz` or `.parquet` file; see `FeatureFile`.
        name: name of the model to store in the file.
        level: "video" or "clip"; see `About`.
        num_clips, num_crops: views of each video, as in `VideoClassifier`.

    Yields:
        Each new video when it is done, with the error if it is unreadable, otherwise None.

    Raises:
        TypeError: the classifier has no `FeatureModel`.
        ValueError, ImportError, FileNotFoundError: as in `FeatureFile`.
    """
    model = classifier.model
    if not isinstance(model, FeatureModel):
        raise TypeError(f"classifier must be a VideoClassifier of a FeatureModel, got one of {type(model).__name__}")
    spec = classifier.spec.with_views(num_clips, num_crops)
    parts = None
    with suppress(ValueError):  # models put together by hand have no config
        config = model.model.config.to_dict()
        parts = {"backbone": config["backbone"], "neck": config["neck"]}
    input_settings = replace(spec, flip_label_pairs=()).to_dict()
    file = FeatureFile(path, About(name, weights_hash(model.model), model.name, level, parts, input_settings))
    new_videos = [video for video in dict.fromkeys(map(str, videos)) if _utf8_name(video) not in file]
    results = classifier.predict_each(new_videos, num_clips=num_clips, num_crops=num_crops)
    last_write, interval = time.monotonic(), SAVE_EVERY
    unwritten = False
    try:
        for video, result in zip(new_videos, results, strict=True):
            if isinstance(result, Prediction):
                views = result.view_logits.numpy()  # (crops x clips, C), one crop after the other
                clips = views.reshape(-1, spec.num_clips, views.shape[1]).mean(axis=0)
                file.add(_utf8_name(video), clips if level == "clip" else clips.mean(axis=0, keepdims=True))
                unwritten = True
                if time.monotonic() - last_write > interval:
                    started = time.monotonic()
                    file.write()
                    unwritten, last_write = False, time.monotonic()
                    interval = max(SAVE_EVERY, 10 * (last_write - started))
            yield video, None if isinstance(result, Prediction) else result
    finally:
        if unwritten:
            file.write()


def check_path(path: str | PathLike[str]) -> None:
    """Raise the errors that a `FeatureFile` at `path` would raise for its suffix and folder, before the work starts."""
    path = Path(path)
    if path.suffix not in (".npz", ".parquet"):
        raise ValueError(f"the name of a feature file must end in .npz or .parquet, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    if path.suffix == ".parquet":
        _import_pyarrow()


def _differences(found: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Describe each entry that differs, in nested dictionaries, too."""
    for key, value in expected.items():
        other = found.get(key)
        if isinstance(other, dict) and isinstance(value, dict):
            yield from _differences(other, value, f"{prefix}{key}.")
        elif other != value:
            yield f"{prefix}{key}={other!r}, expected {value!r}"


def _utf8_name(path: str) -> str:
    """Replace bytes of a file name that are not UTF-8: neither format can store them."""
    return path.encode("utf-8", "backslashreplace").decode()


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('Parquet files need pyarrow: pip install "tpn[parquet]", or write an .npz file') from error
    return pyarrow, pyarrow.parquet
