"""Read exact frames from video files with PyAV.

Frames are numbered in the order in which the decoder returns them, which is presentation order. The frame count and frame rate in
the header are not used. Decoding stops after the last requested frame and skips to a key frame where that saves time. Damage is
therefore found only in the part that is decoded; `verify` decodes the whole file. If the picture size changes within a video,
all frames are scaled to the size of the first one, as FFmpeg's own tools do.
"""

import logging
import os
import threading
from bisect import bisect_right
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import av.logging
import numpy as np
import torch
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from tpn.video.frame_index import FrameIndex, read_index
from tpn.video.sampling import FrameSampler, at_frame_rate
from tpn.video.transforms import resize_short_side

PathLike = str | os.PathLike[str]
Device = torch.device | str | None

# Restore PyAV's default. Older versions of torchvision, imported above, make FFmpeg's threads log through Python. Closing a
# decoder would then deadlock: it holds the interpreter lock while it waits for threads that need the lock to log.
av.logging.set_level(None)

MIN_SKIP = 24
"""A seek must skip more frames than this, because it takes about as long as decoding a few frames."""

MIN_GAP_FOR_INDEX = 10 * MIN_SKIP
"""`read_frames` reads all packets first if more frames than this lie before or between the requested ones."""

REFORMAT_OPTIONS: dict[str, int] = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}
"""Convert pixels in one thread, as PyAV did before version 17. Several threads would compete with the decoder's threads."""

UPLOAD_BYTES = {"cpu": 0}
"""Size of the batches in which frames are copied to a device, by device type; default: 16 MiB. 0 copies each frame separately."""

_logger = logging.getLogger(__name__)
_thread_settings = threading.local()


class VideoError(RuntimeError):
    """A file exists but cannot be read as a video. The message starts with its path."""


@dataclass(frozen=True)
class VideoInfo:
    """Counted frames, size of the displayed picture in pixels, average frames per second (None: unknown), FFmpeg's codec name."""

    num_frames: int
    width: int
    height: int
    fps: float | None
    codec: str


def probe(path: PathLike) -> VideoInfo:
    """Count the frames of a video and read its properties. Only one frame is decoded.

    Of several video streams, the one with the largest picture is used. Cover pictures are ignored.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the file cannot be opened.
        VideoError: the file is not a video or is damaged.
    """
    with _open(path) as (container, stream):
        num_frames = read_index(container, stream).num_frames
    with _open(path) as (container, stream):
        first = next(_decode_all(path, container, stream))
        height, width, _ = _to_rgb(VideoReformatter(), first, first.width, first.height).shape
        return VideoInfo(num_frames, width, height, _frame_rate(stream), stream.codec_context.name)


def header(path: PathLike) -> tuple[float | None, int | None]:
    """Return the frames per second and the number of frames according to the header, each None if unknown.

    The number may be wrong, and follows from the duration where the header states none; `probe` counts the frames. Raises the
    same errors as `probe`.
    """
    with _open(path) as (container, stream):
        fps, seconds = _frame_rate(stream), (container.duration or 0) / 1e6
        return fps, stream.frames or round(seconds * (fps or 0)) or None


def read_frames(path: PathLike, indices: Sequence[int] | NDArray[np.integer], *, short_side: int | None = None) -> Tensor:
    """Read the frames with the given indices.

    Args:
        path: video file.
        indices: frame numbers in any order, repeats allowed; 0 is the first frame.
        short_side: resize each frame while reading, as in `tpn.video.transforms.resize_short_side`. This saves memory.

    Returns:
        Frames in the order of `indices`, uint8 RGB (len(indices), 3, H, W), rotated as the file's metadata says.

    Raises:
        IndexError: the video has fewer frames.
        VideoError, OSError: as in `probe`.
    """
    requested = np.asarray(indices, dtype=np.int64)
    if requested.ndim != 1 or requested.size == 0 or requested.min() < 0:
        raise ValueError(f"indices must be a non-empty list of frame numbers >= 0, got {indices!r}")
    distinct, positions = np.unique(requested, return_inverse=True)
    index = FrameIndex(0)
    if np.diff(distinct, prepend=-1).max() > MIN_GAP_FOR_INDEX:
        with _open(path) as (container, stream):
            index = read_index(container, stream)
    frames, num_frames = _decode_selected(path, distinct, short_side, None, index)
    if len(frames) < len(distinct):
        raise IndexError(f"{path}: cannot read frame {requested.max()}, the video has {num_frames} frames")
    return frames if np.array_equal(distinct, requested) else frames[torch.from_numpy(positions)]


def sample_frames(
    path: PathLike,
    sample: FrameSampler,
    *,
    target_fps: float | None = None,
    short_side: int | None = None,
    device: Device = None,
    start: float | None = None,
    end: float | None = None,
) -> tuple[Tensor, NDArray[np.int64]]:
    """Count the frames of a video, or of a segment of it, and read those that `sample` selects.

    A frame belongs to a segment if `start <= time < end`, where `time` is its presentation time in seconds after the first frame.
    What comes before the segment is skipped, not decoded; the packets of the file are read for its first segment only.

    Args:
        path: video file.
        sample: function from the number of frames to indices of any shape, for example `InputSpec.indices`.
        target_fps: sample as if the video had this frame rate. Default: the video's own frame rate.
        short_side: resize each frame while reading, as in `read_frames`.
        device: device on which frames are resized and returned. Default: the CPU.
        start, end: segment in seconds. Default: from the first frame, to the last one.

    Returns:
        The distinct frames, uint8 RGB (N, 3, H, W), and for each selected index its position among them, with the shape of
        the indices.

    Raises:
        VideoError, OSError: as in `probe`.
    """
    if start is None and end is None:
        with _open(path) as (container, stream):
            index, fps = read_index(container, stream), _frame_rate(stream)
        first, last = 0, index.num_frames
    else:
        index, fps, first, last = _find_segment(path, start, end)
    if target_fps is not None:
        sample = at_frame_rate(sample, fps, target_fps)
    for _ in range(2):  # again if the decoder returns fewer frames than there are packets, which is rare
        if last <= first:
            raise VideoError(f"{path}: no frame could be decoded")
        distinct, positions = np.unique(first + sample(last - first), return_inverse=True)
        frames, num_frames = _decode_selected(path, distinct, short_side, device, index)
        if len(frames) == len(distinct):
            return frames, positions.reshape(sample(last - first).shape)
        last, index = min(last, num_frames), FrameIndex(num_frames)
    raise VideoError(f"{path}: decoding twice gave different numbers of frames")


def iter_frames(path: PathLike, *, short_side: int | None = None) -> Generator[Tensor]:
    """Yield every frame of a video in order, uint8 RGB (3, H, W), rotated as the file's metadata says.

    Only one frame is in memory at a time. `short_side` resizes each frame, as in `read_frames`. Raises the same errors as
    `probe`; damage raises VideoError when the iteration reaches it.
    """
    with _open(path) as (container, stream):
        reformatter = VideoReformatter()
        size: tuple[int, int] | None = None
        for frame in _decode_all(path, container, stream):
            size = size or (frame.width, frame.height)
            image = torch.from_numpy(np.ascontiguousarray(_to_rgb(reformatter, frame, *size))).permute(2, 0, 1)
            yield image if short_side is None else resize_short_side(image, short_side)


def verify(path: PathLike) -> int:
    """Decode a whole video and return the number of its frames. Raises the same errors as `probe`."""
    with _open(path) as (container, stream):
        return sum(1 for _ in _decode_all(path, container, stream))


def decode_in_one_thread() -> None:
    """Make the calling thread open each video with one decoder thread. The default is one per core.

    Call it in threads that decode several videos in parallel. DataLoader workers do not need it.
    """
    _thread_settings.decode_in_one_thread = True


@contextmanager
def _open(path: PathLike) -> Iterator[tuple[InputContainer, VideoStream]]:
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # opening a named pipe would block
        raise VideoError(f"{path}: not a regular file")
    with path.open("rb") as file:  # Python's own errors for missing files, folders and missing permissions
        if not file.read(1):
            raise VideoError(f"{path}: the file is empty")
    try:
        # "file:" keeps FFmpeg from reading a file name as a URL, the whitelist keeps playlists from opening URLs.
        container = av.open(f"file:{path}", options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except av.FFmpegError as error:
        raise VideoError(f"{path}: not a video that FFmpeg can open ({error.strerror})") from error
    with container:
        if container.format.name == "tty":  # FFmpeg opens text files as recordings of a terminal
            raise VideoError(f"{path}: a text file, not a video")
        videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not videos:
            raise VideoError(f"{path}: the file has no video stream")
        stream = max(videos, key=lambda s: s.width * s.height)
        stream.thread_type = "AUTO"
        if get_worker_info() is not None or getattr(_thread_settings, "decode_in_one_thread", False):
            stream.codec_context.thread_count = 1
        yield container, stream


def _frame_rate(stream: VideoStream) -> float | None:
    return None if stream.average_rate is None else float(stream.average_rate)


def _find_segment(path: PathLike, start: float | None, end: float | None) -> tuple[FrameIndex, float | None, int, int]:
    """Return the index of a file, its frame rate, and the numbers of the first frame of a segment and of the frame after it."""
    status = os.stat(path)
    index, times, fps = _read_times(os.fspath(path), status.st_size, status.st_mtime_ns)
    first, last = times.searchsorted([0.0 if start is None else start, np.inf if end is None else end]).tolist()
    if first >= last:
        raise VideoError(f"{path}: no frame from start={start} to end={end}, the last frame is at {times[-1]:.10g} s")
    return index, fps, first, last


@lru_cache(maxsize=128)  # an hour of video takes about 2 MB
def _read_times(path: str, size: int, mtime_ns: int) -> tuple[FrameIndex, NDArray[np.float64], float | None]:
    """Return the index of a file, the time of each frame in seconds after the first one, and the frame rate.

    `size` and `mtime_ns` identify the content. If the packets do not number the frames, all frames are decoded.
    """
    with _open(path) as (container, stream):
        index, fps, unit = read_index(container, stream), _frame_rate(stream), stream.time_base
    pts = index.pts
    if not len(pts):
        _logger.warning("%s has no reliable index, each segment is decoded from the start; H.264 in MP4 is faster", path)
        with _open(path) as (container, stream):
            pts = np.array([-1 if frame.pts is None else frame.pts for frame in _decode_all(path, container, stream)])
        index = FrameIndex(len(pts))
        if (np.diff(pts) <= 0).any():  # as in AVI files, which have no presentation times
            if not fps:
                raise VideoError(f"{path}: the frames have no times")
            return index, np.arange(len(pts)) / fps, fps
    assert unit is not None
    return index, (pts - pts[0]) * unit.numerator / unit.denominator, fps  # rounds once, as the time in a table does


def _decode_all(path: PathLike, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
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
    if number == 0:
        raise VideoError(f"{path}: no frame could be decoded")


class _FrameBuffer:
    """Collects the requested frames in a tensor on a device, uint8 (N, 3, H, W)."""

    def __init__(self, capacity: int, size: tuple[int, int], short_side: int | None, device: Device) -> None:
        """`size` is the width and height of all frames before they are rotated and resized."""
        self.capacity, self.size, self.short_side = capacity, size, short_side
        self.device = torch.device(device or "cpu")
        self.num_added = 0
        self._upload_bytes = UPLOAD_BYTES.get(self.device.type, 16 << 20)
        self._waiting: list[NDArray[np.uint8]] = []
        self._num_stored = 0
        self._reformatter = VideoReformatter()
        self._frames = torch.empty(0, 3, 1, 1, dtype=torch.uint8)

    def add(self, frame: VideoFrame) -> None:
        image = _to_rgb(self._reformatter, frame, *self.size)
        self.num_added += 1
        if self._upload_bytes == 0:
            self._store_with_numpy(image.transpose(2, 0, 1))
            return
        self._waiting.append(image)
        if (len(self._waiting) + 1) * image.nbytes > self._upload_bytes or self.num_added == self.capacity:
            self._upload()

    def _store_with_numpy(self, image: NDArray[np.uint8]) -> None:
        """Store an image (3, H, W) without torch, whose threads stay busy after each operation and slow down the decoder."""
        if self.short_side is not None and min(image.shape[1:]) != self.short_side:
            image = resize_short_side(torch.from_numpy(np.ascontiguousarray(image)), self.short_side).numpy()
        np.copyto(self._next_slots(1, image.shape)[0].numpy(), image)

    def _upload(self) -> None:
        """Copy the waiting frames to the device together, because each transfer has a fixed cost."""
        images = torch.from_numpy(np.stack(self._waiting)).to(self.device).permute(0, 3, 1, 2)
        if self.short_side is not None:
            images = resize_short_side(images, self.short_side)
        self._next_slots(len(images), images.shape[1:]).copy_(images)
        self._waiting.clear()

    def _next_slots(self, count: int, shape: tuple[int, ...]) -> Tensor:
        if not self._num_stored:
            self._frames = torch.empty((self.capacity, *shape), dtype=torch.uint8, device=self.device)
        self._num_stored += count
        return self._frames[self._num_stored - count : self._num_stored]

    def frames(self) -> Tensor:
        if self._waiting:
            self._upload()
        return self._frames[: self._num_stored]


def _decode_selected(
    path: PathLike, wanted: NDArray[np.int64], short_side: int | None, device: Device, index: FrameIndex
) -> tuple[Tensor, int]:
    """Return the frames with the distinct, sorted numbers `wanted`, as far as they exist, and the number of frames found."""
    try:
        frames = _decode_with_seeks(path, wanted, short_side, device, index)
    except VideoError:
        frames = None  # decoding from the start gives an error with the number of the damaged frame
    if frames is not None:
        return frames, index.num_frames
    with _open(path) as (container, stream):
        for number, frame in enumerate(_decode_all(path, container, stream)):
            if number == 0:
                buffer = _FrameBuffer(len(wanted), (frame.width, frame.height), short_side, device)
            if number == wanted[buffer.num_added]:
                buffer.add(frame)
            if buffer.num_added == len(wanted):
                break
    return buffer.frames(), number + 1


def _decode_with_seeks(
    path: PathLike, wanted: NDArray[np.int64], short_side: int | None, device: Device, index: FrameIndex
) -> Tensor | None:
    """Return the frames `wanted`, skipping to key frames where that saves time.

    Return None if it saves none, or if the decoder returns other frames than the packets announce.
    """
    key_numbers = [number for number, _ in index.key_frames]
    keys = [index.key_frames[bisect_right(key_numbers, number) - 1] for number in wanted.tolist()] if key_numbers else []
    if not any(key - after > MIN_SKIP for (key, _), after in zip(keys, [0, *(wanted + 1).tolist()], strict=False)):
        return None
    with _open(path) as (container, stream):
        size = (stream.codec_context.width, stream.codec_context.height)
        buffer = _FrameBuffer(len(wanted), size, short_side, device)
        frames = _decode_all(path, container, stream)
        next_number = 0
        for number, (key, timestamp) in zip(wanted.tolist(), keys, strict=True):
            seeks = key - next_number > MIN_SKIP
            if seeks:
                try:
                    container.seek(timestamp, stream=stream)
                except av.FFmpegError:
                    return None
                frames = _decode_all(path, container, stream)
                next_number = key
            while next_number <= number:
                frame = next(frames, None)
                decoded = None if frame is None else index.number_of(frame.pts)
                if decoded is not None and decoded < next_number:
                    continue  # the seek went further back than to the key frame
                if frame is None or decoded != next_number or (frame.width, frame.height) != size:
                    return None
                if seeks and next_number == key and not frame.key_frame:
                    return None  # only the container marks it as a key frame
                if next_number == number:
                    buffer.add(frame)
                next_number += 1
    return buffer.frames()


def _to_rgb(reformatter: VideoReformatter, frame: VideoFrame, width: int, height: int) -> NDArray[np.uint8]:
    """Scale a frame to the given size, convert it to RGB and rotate it upright: (H, W, 3)."""
    quarter_turns = round(frame.rotation / 90) % 4  # counterclockwise, like rot90
    rgb = reformatter.reformat(frame, width, height, "rgb24", **REFORMAT_OPTIONS).to_ndarray()
    return np.rot90(rgb, quarter_turns)
