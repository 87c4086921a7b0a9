"""Exact frames from video files, with PyAV.

Frames are counted and numbered as the decoder gives them, in presentation order; the header's frame
count and frame rate are not used. Only the frames asked for are kept, and decoding stops after the last of them.
Where the picture's size changes on the way, all frames get that of the first one, as FFmpeg's own tools do it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import av.logging
import numpy as np
import torch
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from tpn.video.transforms import resize_short_side

PathLike = str | os.PathLike[str]

# PyAV's default. Older torchvisions, imported above, let FFmpeg's threads log through Python; a thread that waits for the
# interpreter while its decoder is being closed, which holds it, waits for ever.
av.logging.set_level(None)

TEXT_DEMUXERS = {"tty"}
"""FFmpeg plays text files as terminal recordings; nobody who passes one here means that."""


class VideoError(RuntimeError):
    """A file that is there but cannot be read as a video. The message starts with its path."""


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds. num_frames is counted, fps (None if unknown) is the header's average; sizes as displayed."""

    num_frames: int
    width: int
    height: int
    fps: float | None
    codec: str


def probe(path: PathLike) -> VideoInfo:
    """Count the frames of a video and read its size, without decoding more than one frame.

    Of several video streams it is the one with the largest picture, the first of equals; cover pictures do not
    count. Raises FileNotFoundError, IsADirectoryError, PermissionError, or VideoError.
    """
    with _open(path) as (container, stream):
        num_frames = _count_packets(container, stream)
    with _open(path) as (container, stream):
        first = next(_frames(path, container, stream), None)
        if first is None:
            raise VideoError(f"{path}: no frame could be decoded")
        height, width = _to_rgb(first, first.width, first.height).shape[-2:]
        rate = stream.average_rate
        return VideoInfo(num_frames, width, height, None if rate is None else float(rate), stream.codec_context.name)


def read_frames(path: PathLike, indices: Sequence[int] | NDArray[np.integer], *, short_side: int | None = None) -> Tensor:
    """Return the frames with the given indices, in the order given, repeats included.

    path: a video file.
    indices: one-dimensional, 0 = first frame in presentation order.
    short_side: resize every frame while reading, so that a long list of large frames takes little memory.

    Returns uint8 RGB (len(indices), 3, H, W), rotated as the file's metadata asks. Raises IndexError for a frame
    that the video does not have, and what `probe` raises.
    """
    wanted = np.asarray(indices, dtype=np.int64)
    if wanted.ndim != 1 or wanted.size == 0 or wanted.min() < 0:
        raise ValueError(f"indices must be a non-empty list of frame numbers >= 0, got {indices!r}")
    frames, decoded = _decode(path, wanted, short_side)
    if wanted.max() not in frames:
        raise IndexError(f"{path}: frame {wanted.max()} was asked for, the video has {decoded} frames")
    return torch.stack([frames[i] for i in wanted.tolist()])


def sample_frames(
    path: PathLike, sample: Callable[[int], NDArray[np.int64]], *, short_side: int | None = None
) -> tuple[Tensor, NDArray[np.int64]]:
    """Let `sample` choose frames by their total number and read them.

    sample: total_frames → indices of any shape, e.g. `InputSpec.indices`.
    short_side: as in `read_frames`.

    Returns the distinct frames, uint8 RGB (N, 3, H, W), and an array of the indices' shape that holds the place of
    each chosen frame among them. Raises what `probe` raises.
    """
    with _open(path) as (container, stream):
        total = _count_packets(container, stream)
    # A packet is a frame in nearly every file. Where the decoder gives fewer, it has the last word.
    for _ in range(2):
        if total == 0:
            raise VideoError(f"{path}: no frame could be decoded")
        wanted, place = np.unique(sample(total), return_inverse=True)
        frames, decoded = _decode(path, wanted, short_side)
        if len(frames) == len(wanted):
            return torch.stack([frames[i] for i in wanted.tolist()]), place.reshape(sample(total).shape)
        total = decoded
    raise VideoError(f"{path}: two passes gave different numbers of frames")


def verify(path: PathLike) -> int:
    """Decode a whole video and return the number of its frames. Raises what `probe` raises."""
    with _open(path) as (container, stream):
        total = sum(1 for _ in _frames(path, container, stream))
    if total == 0:
        raise VideoError(f"{path}: no frame could be decoded")
    return total


@contextmanager
def _open(path: PathLike) -> Iterator[tuple[InputContainer, VideoStream]]:
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise VideoError(f"{path}: not a regular file")
    with path.open("rb") as file:  # missing, forbidden, a folder: Python's own errors
        if not file.read(1):
            raise VideoError(f"{path}: the file is empty")
    try:
        # "file:" and the whitelist: a name is never taken for a URL, and a playlist opens nothing else.
        container = av.open(f"file:{path}", options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except av.FFmpegError as error:
        raise VideoError(f"{path}: not a video that FFmpeg can open ({error.strerror})") from error
    with container:
        if container.format.name in TEXT_DEMUXERS:
            raise VideoError(f"{path}: a text file, not a video")
        videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not videos:
            raise VideoError(f"{path}: the file has no video stream")
        stream = max(videos, key=lambda s: s.width * s.height)
        stream.thread_type = "AUTO"
        if get_worker_info() is not None:  # a loader's process: there is one for every core already
            stream.codec_context.thread_count = 1
        yield container, stream


def _count_packets(container: InputContainer, stream: VideoStream) -> int:
    """Count the packets that carry a frame to be shown: as many as there are frames, for a fraction of the work."""
    return sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)


def _frames(path: PathLike, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    number = 0
    try:
        for frame in container.decode(stream):
            assert isinstance(frame, VideoFrame)
            if frame.is_corrupt:
                raise VideoError(f"{path}: damaged, frame {number} cannot be decoded without errors")
            yield frame
            number += 1
    except av.FFmpegError as error:
        raise VideoError(f"{path}: damaged, decoding failed after frame {number} ({error.strerror})") from error


def _decode(path: PathLike, wanted: NDArray[np.int64], short_side: int | None) -> tuple[dict[int, Tensor], int]:
    """Return the wanted frames that exist, by index, and how many were decoded."""
    remaining = set(wanted.tolist())
    kept: dict[int, Tensor] = {}
    number = 0
    size: tuple[int, int] | None = None
    with _open(path) as (container, stream):
        for frame in _frames(path, container, stream):
            size = size or (frame.width, frame.height)
            if number in remaining:
                rgb = _to_rgb(frame, *size)
                kept[number] = rgb if short_side is None else resize_short_side(rgb, short_side)
                remaining.remove(number)
            number += 1
            if not remaining:
                break
    return kept, number


def _to_rgb(frame: VideoFrame, width: int, height: int) -> Tensor:
    """uint8 (3, H, W), upright; width, height: of the picture as it is stored."""
    turns = round(frame.rotation / 90) % 4  # counter-clockwise, like rot90
    image = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24", width=width, height=height), turns))
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()
