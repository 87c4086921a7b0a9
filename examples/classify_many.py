"""Classify very many videos with Ray Data, on one machine or on a cluster.

    pip install ".[ray]"
    python examples/classify_many.py videos.parquet --output results
    python examples/classify_many.py videos.parquet --output results --address auto --models 8 --workers 200

Takes a folder, a list (a path on each line) or a Parquet file with a column of paths, which all machines must see. Workers on
CPUs read the videos, processes that hold the model classify them, one per GPU; Ray lets the readers wait where the model is
behind. `results/shard-*.parquet` hold a row for every video, in the order of the list: index, path, label, probability, probs,
error. A file is there when it is complete, and never touched again: the same command continues a run that was stopped. A video
that cannot be read, or that brings down the process reading it, is a row with its reason. To have a shard done again, delete it.
"""

import argparse
import hashlib
import json
import os
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # both are read when Ray is imported

import numpy as np

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
except ImportError as error:
    sys.exit(f'error: {error.name} is missing: pip install "tpn[ray]"')
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

import tpn
from tpn.predict import VideoClassifier, parse_views
from tpn.training import command, positive_int, weights_hash, whole_file
from tpn.video import decode
from tpn.video.datasets import videos_below
from tpn.video.decode import VideoError

Row = dict[str, Any]
Columns = dict[str, Any]
NO_FRAMES, NO_CLIPS = np.zeros((1, 3, 1, 1), np.uint8), np.zeros((1, 1), np.int64)
READER_MEMORY = 512 << 20
"""Bytes that a reading process may take, as Ray plans it."""
TRIES = 2
"""So often a process may die while it reads a video."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("videos", type=Path, help="folder, list, or .parquet file")
    add("--output", required=True, type=Path, help="folder for the shards")
    add("--column", default="path", help="of the .parquet file")
    add("--root", type=Path, help="what paths are relative to; default: the folder of the list or .parquet file")
    add("--model", default="tpn_slowonly_r50_k400", help="a name from tpn list, local-dir:FOLDER or hf-hub:OWNER/NAME")
    add("--checkpoint", help="its weights, if not the published ones")
    add("--views", metavar="CLIPSxCROPS", help="such as 1x1, which takes a thirtieth of the time; default: as published")
    add("--precision", choices=["float32", "bfloat16", "float16", "auto"], default="auto", help="see tpn.optimize")
    add("--compile", action="store_true")
    add("--shard-size", type=positive_int, default=1000, help="videos of an output file")
    add("--address", help="of a running Ray cluster, or auto; default: use this machine alone")
    add("--workers", type=positive_int, default=os.cpu_count(), help="videos to read at the same time, a CPU each")
    add(
        "--models", type=positive_int, default=max(1, torch.cuda.device_count()), help="processes that hold the model, a GPU each"
    )
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu", help="of the models")
    return parser.parse_args()


def find_videos(videos: Path, root: Path | None, column: str) -> list[str]:
    """The paths of all videos, in order."""
    if videos.is_dir():
        if root is not None:
            raise ValueError(f"--root is for paths in lists; {videos} is a folder")
        paths = [os.path.abspath(path) for path in videos_below(videos)]
    else:
        if videos.suffix == ".parquet":
            table = pq.read_table(videos)
            if column not in table.column_names:
                raise ValueError(f"{videos} has no column {column!r}, but {', '.join(table.column_names)}; see --column")
            named = table[column].to_pylist()
        else:
            named = [line for line in videos.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if line.strip()]
        wrong = next((i for i, path in enumerate(named) if not isinstance(path, str) or not path), None)
        if wrong is not None:
            raise ValueError(f"{videos}: row {wrong + 1} is no path: {named[wrong]!r}")
        base = videos.parent if root is None else root
        paths = [os.path.abspath(base / path) for path in named]
    if not paths:
        raise ValueError(f"{videos}: no videos in it")
    return paths


class Shards:
    """The output: rows come in any order, and leave as files of `size` consecutive videos once these are complete."""

    def __init__(self, folder: Path, paths: Sequence[str], size: int, labels: Sequence[str], about: Row) -> None:
        self.folder, self.paths, self.size, self.labels = folder, paths, size, labels
        self.counts: Counter[str] = Counter()
        self._rows: defaultdict[int, dict[int, Row]] = defaultdict(dict)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "_about.json"  # readers of Parquet folders pass over names with _
        before = json.loads(file.read_text()) if file.exists() else about
        if other := ", ".join(name for name, value in about.items() if before.get(name) != value):
            raise ValueError(f"{folder} holds results of another run, which differs in {other}; take another --output")
        if not file.exists():
            with whole_file(file, "w") as out:
                json.dump(about, out, indent=1)

    def todo(self) -> list[int]:
        """The videos that have no row yet, by their index."""
        count = len(self.paths)
        shards = [range(first, min(first + self.size, count)) for first in range(0, count, self.size)]
        return [i for n, shard in enumerate(shards) if not self._file(n).exists() for i in shard if i not in self._rows[n]]

    def add(self, index: int, probs: np.ndarray[Any, Any] | None, error: str | None) -> None:
        shard = index // self.size
        if self._file(shard).exists():
            return  # a task that was repeated
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
        with whole_file(self._file(shard)) as file:
            pq.write_table(table, file, compression="zstd")


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Suspects:
    """Counts, for tasks that Ray repeats because their process died, how often each video was not survived."""

    def __init__(self) -> None:
        self.begun: set[int] = set()
        self.tried: Counter[int] = Counter()

    def begin(self, task: int) -> bool:
        """Say whether this task has begun before."""
        again = task in self.begun
        self.begun.add(task)
        return again

    def tries(self, index: int) -> int:
        self.tried[index] += 1
        return self.tried[index]

    def survived(self, index: int) -> None:
        del self.tried[index]


def read_block(block: pa.Table, spec: tpn.InputSpec, suspects: Any) -> Iterator[Columns]:
    """On a CPU: the frames of videos, one after the other."""
    decode.decode_in_one_thread()
    rows = block.to_pylist()
    again = ray.get(suspects.begin.remote(rows[0]["index"]))
    for row in rows:
        if again and ray.get(suspects.tries.remote(row["index"])) > TRIES:
            yield columns(row["index"], error=f"{os.fsdecode(row['path'])}: the process that read it died {TRIES} times")
            continue
        result = read(row["index"], os.fsdecode(row["path"]), spec)
        if again:
            ray.get(suspects.survived.remote(row["index"]))
        yield result


def read(index: int, path: str, spec: tpn.InputSpec) -> Columns:
    """What is wrong with a file is a value; what is wrong with us stops the run."""
    try:
        frames, clips = decode.sample_frames(path, spec.indices, short_side=spec.short_side)
    except (VideoError, OSError) as error:
        return columns(index, error=str(error) or type(error).__name__)
    except Exception:
        return columns(index, fatal=f"{path}: an error that is not the file's\n{traceback.format_exc()}")
    return columns(index, frames.numpy(), clips)


def columns(index: int, frames: Any = NO_FRAMES, clips: Any = NO_CLIPS, *, error: str = "", fatal: str = "") -> Columns:
    """A row as Ray Data takes it from a task."""
    return {"index": [index], "frames": [frames], "clips": [clips], "error": [error], "fatal": [fatal]}


class Classify:
    """Beside a GPU: holds the model, and turns frames into probabilities."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.classify = VideoClassifier(ray.get(model), **options)

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        good = [not (error or fatal) for error, fatal in zip(batch["error"], batch["fatal"], strict=True)]
        probs = np.zeros((len(good), len(self.classify.labels)), np.float32)
        fatal = batch["fatal"].copy()
        videos = zip(batch["frames"][good], batch["clips"][good], strict=True)
        try:
            results = self.classify.classify_each((torch.tensor(frames), torch.tensor(clips)) for frames, clips in videos)
            probs[good] = [result.probs.numpy() for result in results if isinstance(result, tpn.Prediction)] or 0
        except Exception:
            fatal[:] = traceback.format_exc()
        return {"index": batch["index"], "probs": probs, "error": batch["error"], "fatal": fatal}


def results(todo: list[int], paths: Sequence[str], model: tpn.TPNClassifier, args: argparse.Namespace) -> Iterator[Any]:
    """(index, probs or None, error or None) of videos, in any order."""
    spec = model.input_spec
    size = max(16, len(todo) // 10_000)  # of a task
    parts = [todo[i : i + size] for i in range(0, len(todo), size)]
    tables = [pa.table({"index": part, "path": [os.fsencode(paths[i]) for i in part]}) for part in parts]
    views = spec.num_clips * spec.num_crops * (2 if spec.flip else 1)
    frames = ray.data.from_arrow(tables).map_batches(
        read_block,
        fn_args=[spec, Suspects.remote()],
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,
        memory=READER_MEMORY,  # also keeps Ray from putting both steps into one process
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
        num_clips, num_crops = parse_views(args.views)
        model.input_spec = replace(model.input_spec, num_clips=num_clips, num_crops=num_crops, flip=False)
    about = {
        "model": args.model,
        "weights": weights_hash(model),
        "input": model.input_spec.to_dict(),
        "precision": args.precision,
    }
    listed = hashlib.sha256("\0".join(paths).encode(errors="surrogateescape")).hexdigest()
    about |= {"videos": listed, "number of videos": len(paths), "shard size": args.shard_size}
    labels = model.labels or tuple(f"class {i}" for i in range(model.num_classes))
    shards = Shards(args.output, paths, args.shard_size, labels, json.loads(json.dumps(about)))
    todo = shards.todo()
    if len(todo) < len(paths):
        print(f"{len(paths) - len(todo)} of {len(paths)} videos are done already")

    # A machine of one's own has as many "CPUs" as processes are wanted.
    here = {} if args.address else {"num_cpus": args.workers + args.models, "include_dashboard": False}
    ray.init(args.address, log_to_driver=False, logging_level="ERROR", **here)
    ray.data.DataContext.get_current().enable_progress_bars = False
    bars = ("videos", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bars, console=Console(stderr=True)) as progress:
        for index, probs, error in progress.track(results(todo, paths, model, args) if todo else (), total=len(todo)):
            shards.add(index, probs, error)
    if left := shards.todo():
        sys.exit(f"error: Ray lost {len(left)} videos; the same command does them again")
    print(f"{shards.counts['videos']} videos classified, {shards.counts['errors']} could not be read; {args.output}")


if __name__ == "__main__":
    command(main)
