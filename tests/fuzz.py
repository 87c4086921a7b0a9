"""Read randomly altered files, and report every crash, hang, bloat, and undocumented error, by seed.

    python tests/fuzz.py --seed 0 --seconds 60
    python tests/fuzz.py --kinds videos --only 1234

Files are read in other processes, with limits on their memory and on the time for each file. A finding names the kind of the file
and its seed; `--only` reads this file in a process without limits, and shows the traceback. The exit code is 1 after a finding.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet
import torch
from safetensors.torch import save
from videos import write_video

import tpn
from tpn.training.config import TrainConfig
from tpn.training.data import open_data
from tpn.video import decode
from tpn.zoo.reader import read_checkpoint

BATCH, SECONDS, MEMORY = 100, 20, 1 << 30
"""Files that a process reads, seconds of computing for each, and bytes of memory besides what the imports take."""
EXPECTED = (ValueError, TypeError, OSError, decode.VideoError)
"""Documented errors, of whose classes the others are."""

SPEC = tpn.InputSpec(num_frames=4, frame_interval=1, short_side=36, crop_size=32)
CODECS = {"mp4": "mpeg4", "avi": "mpeg4", "mkv": "libx264", "ts": "mpeg2video", "webm": "libvpx", "mov": "mjpeg"}
WORD = re.compile(r'"[^"]*"|[^\s,:|\[\]{}"]+|[\s,:|\[\]{}"]')
LONG = ["9" * 5000, "9" * 11, "a" * 70_000, "../" * 2000, '"' + "a" * 70_000 + '"', "[" * 20_000]
WORDS = ["", "0", "-1", "2", "1e999", "NaN", "null", "true", '"x"', '""', "[]", "{}", "[[1]]", '{"a": 1}', "9223372036854775808", *LONG,
         "²", "٣", "é", "\0", "\r", "\n", '"', "|", ",", ";", "\ud800", "path,label", "label", "youtube_id,", "test", "x.mp4,1"]  # fmt: skip
TABLES = [
    "a.mp4 0\nb c.mp4 1\n\nd.mp4 0\n",
    "a.mp4 5 walking\nb.mp4 7 standing\n",
    "path,label,start,end,split,group,num_frames\na.mp4,x,0,1.5,train,g,\nb.mp4,y,,,val,h,7\nc.mp4,y,,,train,h,\n",
    'path,labels\n"a,1.mp4",x|y\nb.mp4,\nc.mp4,y\n',
    "label,youtube_id,time_start,time_end,split\nx,abc,1,11,train\ny,def,2,12,val\n",
]


def good_files(folder):
    """Write a saved model to a folder, and return the content of good files by kind and suffix."""
    tensors = {f"layer{i}.weight": torch.full((3, i + 1), 0.5) for i in range(4)} | {"n": torch.tensor(7)}
    checkpoints = [io.BytesIO(), io.BytesIO()]
    for zipped, file in enumerate(checkpoints):
        torch.save({"state_dict": tensors, "meta": {"epoch": 3}}, file, _use_new_zipfile_serialization=bool(zipped))
    tpn.save_pretrained(tpn.create_model("tpn_slowonly_tiny_motion", base_channels=4), folder / "saved")
    rows = {"path": ["a.mp4", "b.mp4"], "label": ["x", "y"], "start": [0.0, None], "end": [1, None], "num_frames": [3, 4]}
    pa.parquet.write_table(pa.table(rows), folder / "good.parquet")
    videos = []
    for suffix, codec in CODECS.items():
        path = write_video(folder / f"good.{suffix}", 12, codec, "yuvj420p" if codec == "mjpeg" else "yuv420p")
        videos.append((suffix, path.read_bytes()))
    return {
        "safetensors": [("safetensors", save(tensors, metadata={"format": "pt"}))],
        "checkpoints": [("pth", file.getvalue()) for file in checkpoints],
        "configs": [("json", (folder / "saved" / "config.json").read_bytes())],
        "tables": [("csv", text.encode()) for text in TABLES],
        "parquet": [("parquet", (folder / "good.parquet").read_bytes())],
        "videos": videos,
    }


def altered_bytes(data, rng):
    """Some bytes replaced, removed, or inserted, also by parts of the file, and by numbers that may be lengths."""
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at, start = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
        number = rng.choice([0, 1, 2**31 - 1, 2**32 - 1, rng.randrange(2**32)])
        new = [
            rng.randbytes(1),
            struct.pack(">I", number),
            struct.pack("<I", number),
            b"",
            data[start : start + rng.choice([4, 400])],
        ]
        chosen = rng.choice(new)
        data = data[:at] + chosen + data[at + rng.choice([0, 1, len(chosen), len(chosen), 100]) :]
    return data


def altered_words(data, rng):
    """Some words or separators of a text removed, repeated, exchanged, or replaced."""
    words = WORD.findall(data.decode())
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(words))
        words[at] = rng.choice(
            [rng.choice(WORDS), rng.choice(WORDS), rng.choice(words), words[at] * 3, words[at] + rng.choice(WORDS)]
        )
    return "".join(words).encode("utf-8", "surrogatepass")


def altered(kind, data, rng):
    if kind in ("configs", "tables") and rng.random() < 0.9:
        return altered_words(data, rng)
    if kind == "safetensors" and rng.random() < 0.5:
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header = altered_words(data[8:end], rng)
        return struct.pack("<Q", len(header)) + header + data[end:]
    if kind == "checkpoints" and data.startswith(b"PK") and rng.random() < 0.7:  # an altered pickle in a whole zip file
        changed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(changed, "w") as new:
            for name in old.namelist():
                new.writestr(name, altered_bytes(old.read(name), rng) if name.endswith(".pkl") else old.read(name))
        return changed.getvalue()
    return altered_bytes(data, rng)


def read(kind, path):
    if kind == "videos":
        num_frames = decode.verify(path)
        frames, clips = decode.sample_frames(path, SPEC.indices, short_side=36, start=0.1)
        assert 0 < len(frames) <= num_frames
        assert clips.max() < len(frames)
        decode.probe(path)
        decode.read_frames(path, [0, num_frames - 1])
    elif kind == "configs":
        tpn.create_model(path.parent)
    elif kind in ("tables", "parquet"):
        frames = "img_{:05d}.jpg" if path.stat().st_size % 3 == 0 else None
        open_data(str(path), TrainConfig(frames=frames), SimpleNamespace(labels=None, multi_label=False, input_spec=SPEC))
    else:
        read_checkpoint(path)


def read_altered(good, folder, kind, seed):
    """Read the file of a seed. Errors that are documented and short, and name the file, are not raised."""
    rng = random.Random(f"{kind} {seed}")
    suffix, data = rng.choice(good[kind])
    path = folder / "saved" / "config.json" if kind == "configs" else folder / f"altered.{suffix}"
    path.write_bytes(altered(kind, data, rng))
    try:
        read(kind, path)
    except EXPECTED as error:
        name, message = "saved" if kind == "configs" else path.name, str(error)
        if name not in message or len(message) > 2000 or message.count("\n") > 4:
            raise AssertionError(f"no file name, or too long: {type(error).__name__}: {message}") from error


def read_batch(good, folder, kind, seeds):
    """Read files in another process until one of them ends it; return their number, and the findings by seed."""
    sys.stdout.flush()
    reader, writer = os.pipe()
    if not (child := os.fork()):
        size = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (int(size.split()[1]) * 1024 + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for seed in seeds:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(6 * SECONDS)
            finding = None
            try:
                read_altered(good, folder, kind, seed)
            except BaseException as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                finding = f"{type(error).__name__}: {str(error)[:300]!r} ({Path(place.filename).name}:{place.lineno})"
            os.write(writer, json.dumps(finding).encode() + b"\n")
        os._exit(0)
    os.close(writer)
    with open(reader) as lines:
        ends = [json.loads(line) for line in lines]
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        ends.append(f"the process ended with {code}" + " (time limit)" * (code in (-signal.SIGPROF, -signal.SIGALRM)))
    return len(ends), {seed: finding for seed, finding in zip(seeds, ends, strict=False) if finding}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first file of each kind")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--kinds", nargs="+")
    parser.add_argument("--only", type=int, help="read the file of this seed, of each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = 0
    with tempfile.TemporaryDirectory(prefix="tpn-fuzz-") as name:
        folder = Path(name)
        with multiprocessing.get_context("fork").Pool(1) as pool:  # this process starts no threads, which forks would lack
            good = pool.apply(good_files, (folder,))
        kinds = args.kinds or list(good)
        for kind in kinds:
            if args.only is not None:
                read_altered(good, folder, kind, args.only)
                continue
            seed, end = args.seed, time.monotonic() + args.seconds / len(kinds)
            while time.monotonic() < end:
                count, findings = read_batch(good, folder, kind, range(seed, seed + BATCH))
                seed, found = seed + count, found + len(findings)
                for at, finding in findings.items():
                    print(f"--kinds {kind} --only {at}: {finding}", flush=True)
            print(f"{kind}: {seed - args.seed} files, seeds {args.seed} to {seed - 1}", flush=True)
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
