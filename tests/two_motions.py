"""A video of two motions in turn, for tests of timelines."""

from functools import cache

import numpy as np
import torch

from tpn.video import decode, motion
from tpn.video.encode import write_video

NAME = "tpn_slowonly_tiny_motion"
FPS, SPAN, STRIDE = motion.FPS, 31, 8
BOTH = [("turning clockwise", 4.0, 56), ("blinking", 5.0, 56)]


def rendered(parts, seed):
    return motion.render_sequence([(motion.CLASSES.index(name), tempo, frames) for name, tempo, frames in parts], seed=seed)


@cache
def both():
    """Return the frames of the video, uint8 RGB (112, 112, 112, 3)."""
    return rendered(BOTH, seed=5)


def write(folder):
    """Write `both.mp4` to a folder, and its decoded frames, (T, 3, H, W), to `frames.npy`."""
    write_video(folder / "both.mp4", both(), fps=FPS)
    np.save(folder / "frames.npy", torch.stack(list(decode.iter_frames(folder / "both.mp4"))).numpy())
    return folder


def raw(frames):
    """Return frames (T, 3, H, W) as the bytes of a raw RGB pipe."""
    return np.ascontiguousarray(frames.transpose(0, 2, 3, 1)).tobytes()


def numbers(clips):
    return [(clip.first, clip.last) for clip in clips]
