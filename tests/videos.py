"""Small test videos whose frames encode their own number."""

from fractions import Fraction

import av
import numpy as np
import torch

BLOCK, BITS = 16, 8
WIDTH, HEIGHT = BLOCK * BITS, 48


def frame(number, width=WIDTH, height=HEIGHT):
    """Return an RGB image (H, W, 3) with the bits of a number as black and white columns, which survive lossy codecs."""
    bits = [(number >> i) & 1 for i in range(BITS)]
    row = np.repeat(np.array(bits, np.uint8) * 255, width // BITS)
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def number(image):
    """Return the number that a decoded frame, uint8 (3, H, W), encodes."""
    columns = image.float().mean(dim=(0, 1)).view(BITS, -1).mean(dim=1) > 127
    return int((columns.long() * 2 ** torch.arange(BITS)).sum())


def write_video(
    path, num_frames, codec="mpeg4", pix_fmt="yuv420p", size=(WIDTH, HEIGHT), pts=None, format=None, movflags="", **options
):
    """Write `num_frames` numbered frames. `pts` are their times in 1/100 s; default: 25 frames per second."""
    with av.open(str(path), "w", format=format, options={"movflags": movflags} if movflags else {}) as out:
        stream = add_stream(out, codec, pix_fmt, size, options)
        for i in range(num_frames):
            image = av.VideoFrame.from_ndarray(frame(i, *size), format="rgb24").reformat(format=pix_fmt)
            image.pts, image.time_base = (4 * i if pts is None else pts[i]), Fraction(1, 100)
            out.mux(stream.encode(image))
        out.mux(stream.encode(None))
    return path


def add_stream(out, codec, pix_fmt, size, options):
    stream = out.add_stream(codec, rate=25, options={k.replace("_", "-"): str(v) for k, v in options.items()})
    stream.width, stream.height = size
    stream.pix_fmt = pix_fmt
    stream.codec_context.time_base = Fraction(1, 100)
    return stream
