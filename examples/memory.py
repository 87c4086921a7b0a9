"""How much memory a long video takes, where decoding stops, and whether memory grows from video to video.

Writes a 10-minute 1280x720 H.264 video (once, in the given folder), predicts it with 10 clips x 3 crops, and prints the
peak memory above that of the process with the model loaded. Then classifies 500 times a part of it, with damaged files in
between, and prints the peak after every hundredth.

    python examples/memory.py /tmp
"""

import multiprocessing
import resource
import sys
import time
from pathlib import Path

import av
import numpy as np

import tpn
from tpn.video import decode

MINUTES, RATE, WIDTH, HEIGHT = 10, 30, 1280, 720


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_long_video(path: Path, frames: int) -> None:
    rng = np.random.default_rng(0)
    background = rng.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(frames):
            image = np.roll(background, i % WIDTH, axis=1)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))


def written(folder: Path, seconds: int) -> Path:
    path = folder / f"long_{seconds}s_{WIDTH}x{HEIGHT}.mp4"
    if not path.exists():
        writer = multiprocessing.get_context("spawn").Process(target=write_long_video, args=(path, seconds * RATE))
        writer.start()  # its memory is not ours
        writer.join()
    return path


def one_long_video(path: Path) -> None:
    classifier = tpn.VideoClassifier("tpn_slowonly_r50_k400", device="cpu")
    bare = peak_mb()
    start = time.perf_counter()
    prediction = classifier(path)
    seconds = time.perf_counter() - start
    info = decode.probe(path)
    print(f"{info.num_frames} frames of {info.width}x{info.height}, {len(prediction.view_logits)} views, {seconds:.0f} s")
    print(f"peak memory {peak_mb():.0f} MB, {peak_mb() - bare:.0f} MB above the loaded model ({bare:.0f} MB)")

    for wanted in (100, 1000, 10000):
        start = time.perf_counter()
        decode.read_frames(path, [wanted], short_side=256)
        print(f"reading frame {wanted}: {time.perf_counter() - start:.2f} s")


def many_videos(path: Path, damaged: Path) -> None:
    classifier = tpn.VideoClassifier("tpn_slowonly_r50_k400", device="cpu", precision="auto")
    damaged.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    sources = [damaged if i % 10 == 9 else path for i in range(500)]
    errors = 0
    for number, result in enumerate(classifier.predict_each(sources, num_clips=1, num_crops=1), 1):
        errors += isinstance(result, Exception)
        if number % 100 == 0 or number == 10:
            print(f"after {number} videos, {errors} of them damaged: peak memory {peak_mb():.0f} MB", flush=True)


def main() -> None:
    folder = Path(sys.argv[1])
    long, short = written(folder, MINUTES * 60), written(folder, 10)
    for measure, *paths in ((one_long_video, long), (many_videos, short, folder / "damaged.mp4")):
        process = multiprocessing.get_context("spawn").Process(target=measure, args=paths)
        process.start()  # each from a fresh start
        process.join()


if __name__ == "__main__":
    main()
