"""Write videos."""

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def write_video(path: str | os.PathLike[str], frames: np.ndarray[Any, np.dtype[np.uint8]], *, fps: int) -> None:
    """Encode frames, uint8 RGB (T, H, W, 3), as H.264 in an mp4 file: the same frames give the same file.

    Nothing stands under its name before it is complete.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    with av.open(str(unfinished), "w") as out:
        # x264's hand-written assembly gives another file now and then.
        options = {"crf": "20", "preset": "veryfast", "x264-params": "no-asm=1"}
        stream = out.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    os.replace(unfinished, path)
