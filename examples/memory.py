"""How much memory a long video takes, and where decoding stops.

Writes a 10-minute 1280x720 H.264 video (once, in the given folder), predicts it with 10 clips x 3 crops, and prints the
peak memory above that of the process with the model loaded.

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


def write_long_video(path: Path) -> None:
    rng = np.random.default_rng(0)
    background = rng.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(MINUTES * 60 * RATE):
            image = np.roll(background, i % WIDTH, axis=1)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))


def main() -> None:
    path = Path(sys.argv[1]) / f"long_{MINUTES}min_{WIDTH}x{HEIGHT}.mp4"
    if not path.exists():
        writer = multiprocessing.get_context("spawn").Process(target=write_long_video, args=(path,))
        writer.start()  # its memory is not ours
        writer.join()
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


if __name__ == "__main__":
    main()
