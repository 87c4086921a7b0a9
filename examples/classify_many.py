"""Classify a large number of videos with Ray Data, on one machine or on a cluster.

    pip install ".[ray]"
    python examples/classify_many.py videos.parquet --output results
    python examples/classify_many.py videos.parquet --output results --address auto --models 8 --workers 200

The input is a folder, a list (one path per line) or a Parquet file with a column of paths, on storage that all machines share.
Tasks on CPUs read the videos, and one process per GPU classifies them; Ray pauses the readers when the models fall behind.

The output is `results/shard-*.parquet`, with one row per video in input order: index, path, label, probability, probs, error. A
video that is unreadable, or that crashes its reader, has a row with an error. Shards appear when they are complete and are never
changed: the same command resumes an interrupted run. To repeat a shard, delete it.
"""

import argparse
import hashlib
import json
import os
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # Ray reads both variables during the import

import numpy as np

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
except ImportError as error:
    sys.exit(f'error: {error.name} is not installed. Run pip install "tpn[ray]"')
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

import tpn
from tpn.cli.script import positive_int, run_cli
from tpn.config import parse_views
from tpn.files import atomic_write
from tpn.models.layers import weights_hash
from tpn.predict import VideoClassifier
from tpn.video import containers, decode
from tpn.video.datasets import videos_below
from tpn.video.decode import VideoError

Row = dict[str, Any]
Columns = dict[str, Any]
NO_FRAMES, NO_CLIPS = np.zeros((1, 3, 1, 1), np.uint8), np.zeros((1, 1), np.int64)
READER_MEMORY = 512 << 20
"""Bytes that Ray reserves for each reader."""
MAX_CRASHES = 2
"""Crashes of a reader after which a video counts as unreadable."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("videos", type=Path, help="folder, list of paths, or .parquet file")
    add("--output", required=True, type=Path, help="folder for the shards")
    add("--column", default="path", help="column of paths in a .parquet file")
    add("--root", type=Path, help="base folder of relative paths; default: the folder of the list or .parquet file")
    add("--model", default="tpn_slowonly_r50_k400", help="name from tpn list, local-dir:FOLDER or hf-hub:OWNER/NAME")
    add("--checkpoint", help="file with weights; default: the published weights")
    add("--views", metavar="CLIPSxCROPS", help="such as 1x1, which is the fastest; default: as published")
    add("--precision", choices=["float32", "bfloat16", "float16", "auto"], default="auto", help="see tpn.optimize")
    add("--compile", action="store_true")
    add("--shard-size", type=positive_int, default=1000, help="videos per output file")
    add("--address", help="address of a Ray cluster, or auto; default: start Ray on this machine")
    add("--workers", type=positive_int, default=os.cpu_count(), help="readers, one CPU each")
    add("--models", type=positive_int, default=max(1, torch.cuda.device_count()), help="model processes, one GPU each")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu", help="for the models")
    return parser.parse_args()


def find_videos(videos: Path, root: Path | None, column: str) -> list[str]:
    """Return the absolute paths of all videos, in input order."""
    if videos.is_dir():
        if root is not None:
            raise ValueError(f"--root is not valid for a folder, got {videos}. Pass a list or a .parquet file")
        paths = [os.path.abspath(path) for path in videos_below(videos)]
    else:
        if videos.suffix == ".parquet":
            table = pq.read_table(videos)
            if column not in table.column_names:
                raise ValueError(f"{videos} has no column {column!r}. Choose --column from {', '.join(table.column_names)}")
            listed = table[column].to_pylist()
        else:
            listed = [line for line in videos.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if line.strip()]
        for row, path in enumerate(listed, 1):
            if not isinstance(path, str) or not path:
                raise ValueError(f"{videos}: row {row} is not a path: {path!r}")
        base = videos.parent if root is None else root
        paths = [os.path.abspath(base / path) for path in listed]
    if not paths:
        raise ValueError(f"{videos} has no videos")
    return paths


class Shards:
    """The output files. Rows arrive in any order; the shard of `size` consecutive videos is written when it is complete."""

    def __init__(self, folder: Path, paths: Sequence[str], size: int, labels: Sequence[str], about: Row) -> None:
        self.folder, self.paths, self.size, self.labels = folder, paths, size, labels
        self.counts: Counter[str] = Counter()
        self._rows: defaultdict[int, dict[int, Row]] = defaultdict(dict)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "_about.json"  # readers of Parquet folders ignore names that start with _
        before = json.loads(file.read_text()) if file.exists() else about
        if changes := ", ".join(name for name, value in about.items() if before.get(name) != value):
            raise ValueError(f"{folder} has results of another run, with different {changes}. Choose another --output")
        if not file.exists():
            with atomic_write(file) as unfinished:
                unfinished.write_text(json.dumps(about, indent=1))

    def pending(self) -> list[int]:
        """Return the indices of the videos without a row."""
        count = len(self.paths)
        shards = [range(first, min(first + self.size, count)) for first in range(0, count, self.size)]
        return [i for n, shard in enumerate(shards) if not self._file(n).exists() for i in shard if i not in self._rows[n]]

    def add(self, index: int, probs: np.ndarray[Any, Any] | None, error: str | None) -> None:
        shard = index // self.size
        if self._file(shard).exists():
            return  # Ray repeated a task
        rows = self._rows[shard]
        row: Row = {"index": index, "path": self.paths[index].encode(errors="backslashreplace").decode(), "error": error}
        if probs is not None:
            best = int(probs.argmax())
            row |= {"label": self.labels[best], "probability": float(probs[best]), "probs": probs}
        rows[index] = row
        if len(rows) == min(self.size, len(self.paths) - shard * self.size):
            self._write(shard, [rows[i] for i in sorted(rows)])
            self.counts.update("errors" if row["error"] else "videos" for row in self._rows.pop(shard).values())

    def _file(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}.parquet"

    def _write(self, shard: int, rows: list[Row]) -> None:
        probs = pa.list_(pa.float32(), len(self.labels))
        text, names = pa.string(), json.dumps(self.labels)
        schema = [("index", pa.int64()), ("path", text), ("label", text), ("probability", pa.float32()), ("probs", probs)]
        table = pa.Table.from_pylist(rows, pa.schema([*schema, ("error", text)], metadata={"labels": names}))
        with atomic_write(self._file(shard)) as unfinished:
            pq.write_table(table, unfinished, compression="zstd")


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class CrashCounter:
    """Counts the crashes of readers by video, in tasks that Ray repeats because their process crashed."""

    def __init__(self) -> None:
        self.started: set[int] = set()
        self.attempts: Counter[int] = Counter()

    def start_task(self, task: int) -> bool:
        """Return whether the task was started before."""
        repeated = task in self.started
        self.started.add(task)
        return repeated

    def start_video(self, index: int) -> int:
        """Return the number of attempts so far, this one included."""
        self.attempts[index] += 1
        return self.attempts[index]

    def finish_video(self, index: int) -> None:
        del self.attempts[index]


def read_block(block: pa.Table, spec: tpn.InputSpec, crashes: Any) -> Iterator[Columns]:
    """Read the frames of several videos; a Ray task on a CPU."""
    containers.decode_in_one_thread()
    rows = block.to_pylist()
    repeated = ray.get(crashes.start_task.remote(rows[0]["index"]))
    for row in rows:
        index, path = row["index"], os.fsdecode(row["path"])
        if repeated and ray.get(crashes.start_video.remote(index)) > MAX_CRASHES:
            yield columns(index, error=f"{path}: its reader crashed {MAX_CRASHES} times")
            continue
        result = read_video(index, path, spec)
        if repeated:
            ray.get(crashes.finish_video.remote(index))
        yield result


def read_video(index: int, path: str, spec: tpn.InputSpec) -> Columns:
    """Return the frames, or the error: that of a file becomes a row of the result, any other error stops the run."""
    try:
        frames, clips = decode.sample_frames(path, spec.indices, target_fps=spec.target_fps, short_side=spec.short_side)
    except (VideoError, OSError) as error:
        return columns(index, error=str(error) or type(error).__name__)
    except Exception as error:
        return columns(index, fatal=f"{path}: {error!r}\n{traceback.format_exc()}")
    return columns(index, frames.numpy(), clips)


def columns(index: int, frames: Any = NO_FRAMES, clips: Any = NO_CLIPS, *, error: str = "", fatal: str = "") -> Columns:
    """Return a batch of one row in the format of Ray Data."""
    return {"index": [index], "frames": [frames], "clips": [clips], "error": [error], "fatal": [fatal]}


class Classify:
    """Compute probabilities from frames; a Ray actor that holds the model on a GPU."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.classify = VideoClassifier(ray.get(model), **options)

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        readable = [not (error or fatal) for error, fatal in zip(batch["error"], batch["fatal"], strict=True)]
        probs = np.zeros((len(readable), len(self.classify.labels)), np.float32)
        fatal = batch["fatal"].copy()
        videos = zip(batch["frames"][readable], batch["clips"][readable], strict=True)
        try:
            results = self.classify.classify_each((torch.tensor(frames), torch.tensor(clips)) for frames, clips in videos)
            probs[readable] = [result.probs.numpy() for result in results if isinstance(result, tpn.Prediction)] or 0
        except Exception as error:
            fatal[:] = f"{error!r}\n{traceback.format_exc()}"
        return {"index": batch["index"], "probs": probs, "error": batch["error"], "fatal": fatal}


def classify_all(pending: list[int], paths: Sequence[str], model: tpn.TPNClassifier, args: argparse.Namespace) -> Iterator[Any]:
    """Yield (index, probs or None, error or None) of the pending videos, in any order."""
    spec = model.input_spec
    size = max(16, len(pending) // 10_000)  # videos per task
    parts = [pending[i : i + size] for i in range(0, len(pending), size)]
    tables = [pa.table({"index": part, "path": [os.fsencode(paths[i]) for i in part]}) for part in parts]
    views = spec.num_clips * spec.num_crops * (2 if spec.flip else 1)
    frames = ray.data.from_arrow(tables).map_batches(
        read_block,
        fn_args=[spec, CrashCounter.remote()],
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,
        memory=READER_MEMORY,  # also prevents Ray from fusing both steps into one process
        compute=ray.data.TaskPoolStrategy(size=args.workers),
    )
    classified = frames.map_batches(
        Classify,
        fn_constructor_args=[ray.put(model)],
        fn_constructor_kwargs={"device": args.device, "precision": args.precision, "compile": args.compile},
        batch_size=max(1, 30 // views),
        num_cpus=1,
        num_gpus=1 if args.device == "cuda" else 0,
        compute=ray.data.ActorPoolStrategy(size=args.models),
    )
    for batch in classified.iter_batches(batch_size=None, prefetch_batches=0):
        for index, probs, error, fatal in zip(*(batch[name] for name in ("index", "probs", "error", "fatal")), strict=True):
            if fatal:
                raise RuntimeError(fatal)
            yield int(index), None if error else probs, error or None


def main() -> None:
    args = parse_args()
    paths = find_videos(args.videos, args.root, args.column)
    model = tpn.create_model(args.model, args.checkpoint is None, checkpoint_path=args.checkpoint).eval()
    if args.views:
        model.input_spec = model.input_spec.with_views(*parse_views(args.views))
    about = {
        "model": args.model,
        "weights": weights_hash(model),
        "input": model.input_spec.to_dict(),
        "precision": args.precision,
    }
    paths_hash = hashlib.sha256("\0".join(paths).encode(errors="surrogateescape")).hexdigest()
    about |= {"videos": paths_hash, "number of videos": len(paths), "shard size": args.shard_size}
    labels = model.labels or tuple(f"class {i}" for i in range(model.num_classes))
    shards = Shards(args.output, paths, args.shard_size, labels, json.loads(json.dumps(about)))
    pending = shards.pending()
    if len(pending) < len(paths):
        print(f"resuming: {len(paths) - len(pending)} of {len(paths)} videos are finished")

    # Without a cluster, Ray is told a number of CPUs that fits all processes.
    local = {} if args.address else {"num_cpus": args.workers + args.models, "include_dashboard": False}
    ray.init(args.address, log_to_driver=False, logging_level="ERROR", **local)
    ray.data.DataContext.get_current().enable_progress_bars = False
    bars = ("videos", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bars, console=Console(stderr=True)) as progress:
        results = classify_all(pending, paths, model, args) if pending else ()
        for index, probs, error in progress.track(results, total=len(pending)):
            shards.add(index, probs, error)
    if missing := shards.pending():
        sys.exit(f"error: Ray lost {len(missing)} videos. Run the same command again to classify them")
    print(f"{shards.counts['videos']} videos classified, {shards.counts['errors']} unreadable; results in {args.output}")


if __name__ == "__main__":
    run_cli(main)
