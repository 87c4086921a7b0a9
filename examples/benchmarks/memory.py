"""Measure the peak memory of long videos and of many videos.

    python examples/benchmarks/memory.py FOLDER
    python examples/benchmarks/memory.py FOLDER --only timeline features

long: classifies 30 views of a 10-minute video of 1280x720 pixels, and times reading single frames of it.
many: classifies 500 videos, one in ten damaged.
timeline, features: run `tpn timeline` and `tpn features --stride` on 2 minutes and on 1 hour of rendered motion.

The videos are written to FOLDER and used again by the next run.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from timing import peak_memory

import tpn
from tpn.video import decode, motion
from tpn.video.encode import write_video

PARTS = ("long", "many", "timeline", "features")
MINUTES, FPS, WIDTH, HEIGHT = 10, 30, 1280, 720


def peak_mb() -> float:
    return peak_memory(torch.device("cpu")) / 2**20


def write_long_video(path: Path, frames: int) -> None:
    rng = np.random.default_rng(0)
    background = rng.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=FPS, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(frames):
            image = np.roll(background, i % WIDTH, axis=1)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))


def long_video(folder: Path, seconds: int) -> Path:
    """Return a video in the folder; write it if it is missing."""
    path = folder / f"long_{seconds}s_{WIDTH}x{HEIGHT}.mp4"
    if not path.exists():
        run_in_process(write_long_video, path, seconds * FPS)
    return path


def one_long_video(path: Path) -> None:
    classifier = tpn.VideoClassifier(tpn.create_model("tpn_slowonly_r50_k400"), device="cpu", precision="float32")
    before = peak_mb()
    start = time.perf_counter()
    prediction = classifier(path)
    seconds = time.perf_counter() - start
    info = decode.probe(path)
    print(f"{info.num_frames} frames of {info.width}x{info.height}, {len(prediction.view_logits)} views, {seconds:.0f} s")
    print(f"peak memory {peak_mb():.0f} MB, {before:.0f} MB after loading the model")

    for index in (100, 1000, 10000):
        start = time.perf_counter()
        decode.read_frames(path, [index], short_side=256)
        print(f"reading frame {index}: {time.perf_counter() - start:.2f} s")


def many_videos(path: Path, damaged: Path) -> None:
    classifier = tpn.VideoClassifier(tpn.create_model("tpn_slowonly_r50_k400"), device="cpu", precision="auto")
    damaged.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    sources = [damaged if i % 10 == 9 else path for i in range(500)]
    errors = 0
    for number, result in enumerate(classifier.predict_each(sources, num_clips=1, num_crops=1), 1):
        errors += isinstance(result, Exception)
        if number % 100 == 0 or number == 10:
            print(f"after {number} videos, {errors} of them damaged: peak memory {peak_mb():.0f} MB", flush=True)


def write_hour(part: Path, hour: Path) -> None:
    """Write two minutes of motion, and repeat its packets 30 times in another file."""
    parts = [(i % len(motion.CLASSES), 2.0 + i % 3, 5 * motion.FPS) for i in range(24)]
    write_video(part, motion.render_sequence(parts, seed=1), fps=motion.FPS)
    with av.open(str(part)) as source, av.open(str(hour), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        length = source.streams.video[0].duration
        for i in range(30):
            source.seek(0)
            for packet in source.demux(video=0):
                if packet.dts is not None:  # the last packet is empty
                    packet.stream, packet.pts, packet.dts = stream, packet.pts + i * length, packet.dts + i * length
                    out.mux(packet)


def sliding(name: str, *paths: Path) -> None:
    """Run the command timeline or features."""
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            command = [name, path, "--model", "tpn_slowonly_tiny_motion", "--device", "cpu", "--stride", 48]
            if name == "timeline":
                command += ["--json", Path(folder, "timeline.json"), "--output", Path(folder, "timeline.png")]
            else:
                command += ["--output", folder]
            start = time.perf_counter()
            process = subprocess.Popen([sys.executable, "-m", "tpn", *map(str, command)], stdout=subprocess.DEVNULL)
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
        frames = decode.probe(path).num_frames
        print(f"{name} of {frames} frames: exit code {status}, {seconds:.0f} s, peak memory {used.ru_maxrss / 1024:.0f} MB")


def run_in_process(function: Callable[..., None], *args: Any) -> None:
    """Call a function in a new process: peak memory is a property of the process and never decreases."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the videos")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    if "long" in args.only:
        run_in_process(one_long_video, long_video(args.folder, MINUTES * 60))
    if "many" in args.only:
        run_in_process(many_videos, long_video(args.folder, 10), args.folder / "damaged.mp4")
    part, hour = args.folder / "two_minutes.mp4", args.folder / "hour.mp4"
    for name in ("timeline", "features"):
        if name in args.only:
            if not hour.exists():
                run_in_process(write_hour, part, hour)
            run_in_process(sliding, name, part, hour)


if __name__ == "__main__":
    main()
