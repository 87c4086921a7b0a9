"""Write video files."""

from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

from tpn.files import StrPath, atomic_write

CODECS: dict[str, dict[str, str]] = {
    "libx264": {"crf": "20", "preset": "veryfast"},
    "mpeg4": {"flags": "+qscale", "global_quality": "354"},  # FFmpeg's -qscale 3
}
"""Encoders with their options; the first one that FFmpeg has is used."""


def write_video(path: StrPath, frames: Iterable[NDArray[np.uint8]], *, fps: float, deterministic: bool = True) -> None:
    """Encode frames as H.264, or as MPEG-4 where FFmpeg was built without x264. Frames are taken one by one.

    Args:
        path: The file to write, such as an MP4 file. It appears when it is complete; an interrupted write leaves an existing file
            as it was.
        frames: uint8 RGB (T, H, W, 3), 0..255, or frames of one size (H, W, 3). An odd width or height grows by one pixel.
        fps: Frames per second.
        deterministic: With x264, the same frames always give the same bytes; otherwise encoding is several times faster.
    """
    codec = next(name for name in CODECS if name in av.codecs_available)
    options = dict(CODECS[codec])
    if deterministic and codec == "libx264":
        options["x264-params"] = "no-asm=1"  # the output of x264's assembly code is not deterministic
    rate = max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))  # such as 30000/1001
    with atomic_write(path) as unfinished, av.open(f"file:{unfinished}", "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.pix_fmt = "yuv420p"
        if deterministic:
            stream.thread_count = 1
        for i, image in enumerate(frames):
            height, width = image.shape[:2]
            if height % 2 or width % 2:
                image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
            if i == 0:
                stream.height, stream.width = image.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
