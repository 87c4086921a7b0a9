"""Write video files."""

import os
from fractions import Fraction
from typing import Any

import av
import numpy as np

from tpn.files import atomic_write


def write_video(path: str | os.PathLike[str], frames: np.ndarray[Any, np.dtype[np.uint8]], *, fps: int) -> None:
    """Encode frames as H.264 in an MP4 file. The same frames always give the same bytes.

    Args:
        path: The file to write. It appears when it is complete; an interrupted write leaves an existing file as it was.
        frames: uint8 RGB (T, H, W, 3), 0..255.
        fps: Frames per second.
    """
    # The output of x264's assembly code is not deterministic.
    options = {"crf": "20", "preset": "veryfast", "x264-params": "no-asm=1"}
    with atomic_write(path) as unfinished, av.open(str(unfinished), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
