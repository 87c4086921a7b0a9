"""Read exact frames from video files with PyAV.

Frames are numbered in the order in which the decoder returns them, which is presentation order. The frame count and frame rate in
the header are not used. In MP4 and Matroska files with H.264, HEVC, VP9, or AV1, the packets tell the number of frames; decoding
stops after the last requested frame and skips to a key frame where that saves time. In other files, and in interlaced or edited
ones, a packet may have no frame, so that `probe` and `sample_frames` decode to the end. Damage is found only in the part that is
decoded; `verify` decodes the whole file. If the picture size changes within a video, all frames are scaled to the size of the
first one, as FFmpeg's own tools do.
"""

import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import av.logging
import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor

from tpn.files import StrPath
from tpn.video.containers import VideoError, decode_all, open_video, to_rgb, video_errors
from tpn.video.frame_index import FrameIndex, read_index
from tpn.video.sampling import FrameSampler, at_frame_rate
from tpn.video.transforms import resize_short_side

# Restore PyAV's default. Older versions of torchvision, imported above, make FFmpeg's threads log through Python. Closing a
# decoder would then deadlock: it holds the interpreter lock while it waits for threads that need the lock to log.
av.logging.set_level(None)

Device = torch.device | str | None
Crop = Callable[[int, Tensor], Tensor]
"""Returns a part of the frame with a number, uint8 (3, H, W), for example `SquareCrops`."""

MIN_SKIP = 24
"""A seek must skip more frames than this, because it takes about as long as decoding a few frames."""

MIN_GAP_FOR_INDEX = 10 * MIN_SKIP
"""`read_frames` reads all packets first if more frames than this lie before or between the requested ones."""

_UNNUMBERED = FrameIndex(0, is_exact=True)
"""For reading frames by their numbers: decoding stops after the last of them, however many follow."""

UPLOAD_BYTES = {"cpu": 0}
"""Size of the batches in which frames are copied to a device, by device type; default: 16 MiB. 0 copies each frame separately."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoInfo:
    """Counted frames, size of the displayed picture in pixels, average frames per second (None: unknown), FFmpeg's codec name."""

    num_frames: int
    width: int
    height: int
    fps: float | None
    codec: str


def probe(path: StrPath) -> VideoInfo:
    """Count the frames of a video and read its properties. Only one frame is decoded if the packets tell the number of frames.

    Of several video streams, the one with the largest picture is used. Cover pictures are ignored.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the file cannot be opened.
        VideoError: the file is not a video or is damaged.
    """
    index, _, _ = _read_index(path)
    with open_video(path) as (container, stream):
        frames = decode_all(path, container, stream)
        first = next(frames)
        height, width, _ = to_rgb(path, VideoReformatter(), first, (first.width, first.height)).shape
        num_frames = index.num_frames if index.is_exact and index.agrees(0, first) else 1 + sum(1 for _ in frames)
        return VideoInfo(num_frames, width, height, _frame_rate(stream), stream.codec_context.name)


def header(path: StrPath) -> tuple[float | None, int | None]:
    """Return the frames per second and the number of frames according to the header, each None if unknown.

    The number may be wrong, and follows from the duration where the header states none; `probe` counts the frames. Raises the
    same errors as `probe`.
    """
    with open_video(path) as (container, stream):
        fps, seconds = _frame_rate(stream), (container.duration or 0) / 1e6
        return fps, stream.frames or round(seconds * (fps or 0)) or None


def read_frames(
    path: StrPath, indices: Sequence[int] | NDArray[np.integer], *, short_side: int | None = None, crop: Crop | None = None
) -> Tensor:
    """Read the frames with the given indices.

    Args:
        path: video file.
        indices: frame numbers in any order, repeats allowed; 0 is the first frame.
        short_side: resize each frame while reading, as in `tpn.video.transforms.resize_short_side`. This saves memory.
        crop: keep only a part of each frame while reading; called with the number of the frame and uint8 (3, H, W). All parts
            must have one size.

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
    index = _UNNUMBERED
    if np.diff(distinct, prepend=-1).max() > MIN_GAP_FOR_INDEX:
        index, _, _ = _read_index(path)
        index = index if index.is_exact else _UNNUMBERED
    frames, num_frames = _decode_selected(path, distinct, index, short_side=short_side, crop=crop)
    if len(frames) < len(distinct):
        raise IndexError(f"{path}: cannot read frame {requested.max()}, the video has {num_frames} frames")
    return frames if np.array_equal(distinct, requested) else frames[torch.from_numpy(positions)]


def sample_frames(
    path: StrPath,
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
    The part before the segment is skipped, not decoded. The packets of a file are read only for its first segment.

    Args:
        path: video file.
        sample: function from the number of frames to indices of any shape, for example `InputSpec.indices`.
        target_fps: sample as if the video had this frame rate. Default: the video's own frame rate.
        short_side: resize each frame while reading, as in `read_frames`.
        device: device on which frames are resized and returned. Default: the CPU.
        start: of the segment in seconds. Default: the first frame.
        end: of the segment in seconds. Default: after the last frame.

    Returns:
        The distinct frames, uint8 RGB (N, 3, H, W), and for each selected index its position among them, with the shape of
        the indices.

    Raises:
        VideoError, OSError: as in `probe`.
    """
    is_whole = start is None and end is None
    if is_whole:
        index, fps, _ = _read_index(path)
        first, last = 0, max(index.num_frames, 1)
    else:
        index, fps, first, last = find_segment(path, start, end)
    if target_fps is not None:
        sample = at_frame_rate(sample, fps, target_fps)
    for _ in range(2):  # again if the decoder returns more or fewer frames than the packets announce, which is rare
        if last <= first:
            raise VideoError(f"{path}: no frame could be decoded")
        indices = sample(last - first)
        if indices.min() < 0 or indices.max() >= last - first:
            raise ValueError(f"sample must return indices from 0 to {last - first - 1}, got {indices.min()} to {indices.max()}")
        distinct, positions = np.unique(first + indices, return_inverse=True)
        frames, num_frames = _decode_selected(path, distinct, index, short_side=short_side, device=device)
        if num_frames == index.num_frames:
            return frames, positions.reshape(indices.shape)
        if is_whole:
            last, index = num_frames, FrameIndex(num_frames, is_exact=True)
        else:
            index, _, first, last = find_segment(path, start, end, by_packets=False)
    raise VideoError(f"{path}: decoding twice gave different numbers of frames")


def iter_frames(path: StrPath, *, short_side: int | None = None, indices: Collection[int] | None = None) -> Generator[Tensor]:
    """Yield every frame of a video in order, uint8 RGB (3, H, W), rotated as the file's metadata says.

    Only one frame is in memory at a time. `short_side` resizes each frame, as in `read_frames`. With `indices`, the others are
    skipped, and decoding stops after the last of them. Raises the same errors as `probe`; damage raises VideoError when the
    iteration reaches it.
    """
    if indices is not None and len(indices) == 0:
        return
    chosen, end = (None, -1) if indices is None else (set(indices), max(indices))
    with open_video(path) as (container, stream):
        reformatter = VideoReformatter()
        size: tuple[int, int] | None = None
        for number, frame in enumerate(decode_all(path, container, stream)):
            size = size or (frame.width, frame.height)
            if chosen is not None and number not in chosen:
                continue
            image = torch.from_numpy(np.ascontiguousarray(to_rgb(path, reformatter, frame, size))).permute(2, 0, 1)
            yield image if short_side is None else resize_short_side(image, short_side)
            if number == end:
                return


def verify(path: StrPath) -> int:
    """Decode a whole video and return the number of its frames. Raises the same errors as `probe`.

    One thread decodes: the frame at which damage is reported would depend on the number of threads.
    """
    with open_video(path, one_thread=True) as (container, stream):
        return sum(1 for _ in decode_all(path, container, stream))


def _read_index(path: StrPath) -> tuple[FrameIndex, float | None, Fraction | None]:
    """Return the frames of a file according to its packets, its frame rate, and the unit of its timestamps in seconds."""
    with open_video(path) as (container, stream), video_errors(path, lambda: "damaged, the file cannot be read to its end"):
        return read_index(container, stream), _frame_rate(stream), stream.time_base


def _frame_rate(stream: VideoStream) -> float | None:
    return None if stream.average_rate is None else float(stream.average_rate)


def find_segment(
    path: StrPath, start: float | None, end: float | None, *, by_packets: bool = True
) -> tuple[FrameIndex, float | None, int, int]:
    """Return the index of a file, its frame rate, and the numbers of the first frame of a segment and of the frame after it.

    A segment is described in `sample_frames`. Raises VideoError if it has no frame.
    """
    status = os.stat(path)
    index, times, fps = _read_times(os.fspath(path), status.st_size, status.st_mtime_ns, by_packets)
    first, last = times.searchsorted([0.0 if start is None else start, np.inf if end is None else end]).tolist()
    if first >= last:
        raise VideoError(f"{path}: no frame from start={start} to end={end}, the last frame is at {times[-1]:.10g} s")
    return index, fps, first, last


@lru_cache(maxsize=128)  # an hour of video takes about 2 MB
def _read_times(path: str, size: int, mtime_ns: int, by_packets: bool) -> tuple[FrameIndex, NDArray[np.float64], float | None]:
    """Return the index of a file, the time of each frame in seconds after the first one, and the frame rate.

    `size` and `mtime_ns` identify the content. All frames are decoded if `by_packets` is False or the packets do not number them.
    """
    index, fps, unit = _read_index(path)
    pts = index.pts
    if not (by_packets and len(pts)):
        _logger.warning("%s has no reliable index, each segment is decoded from the start; H.264 in MP4 is faster", path)
        with open_video(path) as (container, stream):
            pts = np.array([-1 if frame.pts is None else frame.pts for frame in decode_all(path, container, stream)])
        index = FrameIndex(len(pts), is_exact=True)
        if (np.diff(pts) <= 0).any():  # as in AVI files, which have no presentation times
            if not fps:
                raise VideoError(f"{path}: the frames have no times")
            return index, np.arange(len(pts)) / fps, fps
    assert unit is not None
    return index, (pts - pts[0]) * unit.numerator / unit.denominator, fps  # rounds once, as the time in a table does


class _FrameBuffer:
    """Collects the requested frames in a tensor on a device, uint8 (N, 3, H, W)."""

    def __init__(
        self,
        path: StrPath,
        wanted: NDArray[np.int64],
        size: tuple[int, int],
        short_side: int | None = None,
        device: Device = None,
        crop: Crop | None = None,
    ) -> None:
        """`size` is the width and height of all frames before they are rotated and resized."""
        self.path, self.wanted, self.size, self.short_side, self.crop = path, wanted, size, short_side, crop
        self.capacity = len(wanted)
        self.device = torch.device(device or "cpu")
        self.num_added = 0
        self._upload_bytes = UPLOAD_BYTES.get(self.device.type, 16 << 20)
        self._waiting: list[NDArray[np.uint8]] = []
        self._num_stored = 0
        self._reformatter = VideoReformatter()
        self._frames = torch.empty(0, 3, 1, 1, dtype=torch.uint8)

    def add(self, frame: VideoFrame) -> None:
        image = to_rgb(self.path, self._reformatter, frame, self.size)
        if self.crop is not None:
            picture = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
            image = self.crop(int(self.wanted[self.num_added]), picture).permute(1, 2, 0).numpy()
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


def _decode_selected(path: StrPath, wanted: NDArray[np.int64], index: FrameIndex, **options: Any) -> tuple[Tensor, int]:
    """Return the frames with the distinct, sorted numbers `wanted`, as far as they exist, and the number of frames in the file.

    The number is that of the index, if it is exact and all frames were found; otherwise the video was decoded to its end.
    `options` are those of `_FrameBuffer`.
    """
    try:
        frames = _decode_with_seeks(path, wanted, index, **options)
    except VideoError:
        frames = None  # decoding from the start gives an error with the number of the damaged frame
    if frames is not None:
        return frames, index.num_frames
    number, is_exact = 0, index.is_exact
    with open_video(path) as (container, stream):
        for frame in decode_all(path, container, stream):
            is_exact = is_exact and (not len(index.pts) or index.agrees(number, frame))
            if number == 0:
                buffer = _FrameBuffer(path, wanted, (frame.width, frame.height), **options)
            if buffer.num_added < len(wanted) and number == wanted[buffer.num_added]:
                buffer.add(frame)
            number += 1
            # Damage to the last frame may be known only at the end.
            if is_exact and buffer.num_added == len(wanted) and number != index.num_frames:
                return buffer.frames(), index.num_frames
    return buffer.frames(), number


def _decode_with_seeks(path: StrPath, wanted: NDArray[np.int64], index: FrameIndex, **options: Any) -> Tensor | None:
    """Return the frames `wanted`, skipping to key frames where that saves time.

    Return None if it saves none, or if the decoder returns other frames than the packets announce.
    """
    key_frames = index.key_frames
    keys = [key_frames[bisect_right(key_frames, number) - 1] for number in wanted.tolist()] if key_frames else []
    if not any(key - after > MIN_SKIP for key, after in zip(keys, [0, *(wanted + 1).tolist()], strict=False)):
        return None
    with open_video(path) as (container, stream):
        size = (stream.codec_context.width, stream.codec_context.height)
        buffer = _FrameBuffer(path, wanted, size, **options)
        frames = decode_all(path, container, stream)
        next_number = 0
        for number, key in zip(wanted.tolist(), keys, strict=True):
            seeks = key - next_number > MIN_SKIP
            if seeks:
                with video_errors(path, lambda: "damaged, seeking failed"):
                    container.seek(int(index.pts[key]), stream=stream)
                frames = decode_all(path, container, stream)
                next_number = key
            while next_number <= number:
                frame = next(frames, None)
                decoded = None if frame is None else index.number_of(frame.pts)
                if decoded is not None and decoded < next_number:
                    continue  # the seek went further back than to the key frame
                if frame is None or decoded != next_number or (frame.width, frame.height) != size:
                    return None
                if frame.interlaced_frame or (seeks and next_number == key and not frame.key_frame):
                    return None  # two packets may be one frame; only the container marks it as a key frame
                if next_number == number:
                    buffer.add(frame)
                next_number += 1
        if next_number == index.num_frames and next(frames, None) is not None:  # as above, or more frames than packets
            return None
    return buffer.frames()
