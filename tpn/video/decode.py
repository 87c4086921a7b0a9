"""Exact frames from video files, with PyAV.

Frames are counted and numbered as the decoder gives them, in presentation order; the header's frame
count and frame rate are not used. Only the frames asked for are kept, decoding stops after the last of them, and what lies
between them is passed over where a key frame allows it. So damage is found in what has to be decoded; `verify` decodes all.
Where the picture's size changes on the way, all frames get that of the first one, as FFmpeg's own tools do it.
"""

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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

from tpn.video.transforms import resize_short_side

PathLike = str | os.PathLike[str]
Device = torch.device | str | None

# PyAV's default. Older torchvisions, imported above, let FFmpeg's threads log through Python; a thread that waits for the
# interpreter while its decoder is being closed, which holds it, waits for ever.
av.logging.set_level(None)

SEEK_BY = {
    (container, codec): timestamp
    for container, timestamp in (("mov,mp4,m4a,3gp,3g2,mj2", "dts"), ("matroska,webm", "pts"))
    for codec in ("h264", "hevc", "vp9", "av1", "libdav1d")
}
"""Containers that know their key frames, codecs that start anew from one and give a frame for every packet; and the timestamps by
which FFmpeg finds them. (A packet of MPEG-4 part 2 may say "nothing new" and give none.)"""

MIN_SKIP = 24
"""Frames that a seek must spare: it costs about as much as decoding a few."""

FAR = 10 * MIN_SKIP
"""So many frames between two that are wanted are worth a look at all packets, to find out which can be passed over."""

ONE_THREAD: dict[str, int] = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}
"""For conversions, which older versions of PyAV do in one thread anyway: several have to wait for the decoder's."""

UPLOADS = {"cpu": 0}
"""Bytes of frames that go to a device at once, where it is not the default, 16 MB; 0: none, they are put into their place."""

_here = threading.local()

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
        num_frames = _index(container, stream).count
    with _open(path) as (container, stream):
        first = next(_frames(path, container, stream), None)
        if first is None:
            raise VideoError(f"{path}: no frame could be decoded")
        height, width, _ = _to_rgb(VideoReformatter(), first, first.width, first.height).shape
        rate = stream.average_rate
        return VideoInfo(num_frames, width, height, None if rate is None else float(rate), stream.codec_context.name)


def header(path: PathLike) -> tuple[float | None, int | None]:
    """Return what a file says of itself, frames a second and their number, None where it does not, without a look at its frames.

    The number may be wrong. Raises what `probe` raises.
    """
    with _open(path) as (_, stream):
        return None if stream.average_rate is None else float(stream.average_rate), stream.frames or None


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
    distinct, place = np.unique(wanted, return_inverse=True)
    index = _Index(0)
    if np.diff(distinct, prepend=-1).max() > FAR:
        with _open(path) as (container, stream):
            index = _index(container, stream)
    frames, decoded = _decode(path, distinct, short_side, None, index)
    if len(frames) < len(distinct):
        raise IndexError(f"{path}: frame {wanted.max()} was asked for, the video has {decoded} frames")
    return frames if np.array_equal(distinct, wanted) else frames[torch.from_numpy(place)]


def sample_frames(
    path: PathLike,
    sample: Callable[[int], NDArray[np.int64]],
    *,
    short_side: int | None = None,
    device: Device = None,
) -> tuple[Tensor, NDArray[np.int64]]:
    """Let `sample` choose frames by their total number and read them.

    sample: total_frames → indices of any shape, e.g. `InputSpec.indices`.
    short_side: as in `read_frames`.
    device: where each frame goes before it is resized. Default: the CPU.

    Returns the distinct frames, uint8 RGB (N, 3, H, W), and an array of the indices' shape that holds the place of
    each chosen frame among them. Raises what `probe` raises.
    """
    with _open(path) as (container, stream):
        index = _index(container, stream)
    total = index.count
    # A packet is a frame in nearly every file. Where the decoder gives fewer, it has the last word.
    for _ in range(2):
        if total == 0:
            raise VideoError(f"{path}: no frame could be decoded")
        wanted, place = np.unique(sample(total), return_inverse=True)
        frames, decoded = _decode(path, wanted, short_side, device, index)
        if len(frames) == len(wanted):
            return frames, place.reshape(sample(total).shape)
        total, index = decoded, _Index(decoded)
    raise VideoError(f"{path}: two passes gave different numbers of frames")


def iter_frames(path: PathLike, *, short_side: int | None = None) -> Generator[Tensor]:
    """Yield every frame of a video in presentation order, uint8 RGB (3, H, W), rotated as the file's metadata asks.

    One pass, in which one frame is held at a time, however long the video is. short_side: as in `read_frames`.
    Raises what `probe` raises, on the way.
    """
    with _open(path) as (container, stream):
        reformatter = VideoReformatter()
        size: tuple[int, int] | None = None
        for frame in _frames(path, container, stream):
            size = size or (frame.width, frame.height)
            image = torch.from_numpy(np.ascontiguousarray(_to_rgb(reformatter, frame, *size))).permute(2, 0, 1)
            yield image if short_side is None else resize_short_side(image, short_side)
    if size is None:
        raise VideoError(f"{path}: no frame could be decoded")


def verify(path: PathLike) -> int:
    """Decode a whole video and return the number of its frames. Raises what `probe` raises."""
    with _open(path) as (container, stream):
        total = sum(1 for _ in _frames(path, container, stream))
    if total == 0:
        raise VideoError(f"{path}: no frame could be decoded")
    return total


def decode_in_one_thread() -> None:
    """From now on, decode each video that the calling thread opens in one thread, not in as many as there are cores.

    For those that decode several videos at the same time; a DataLoader's processes do so by themselves.
    """
    _here.one_thread = True


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
        if get_worker_info() is not None or getattr(_here, "one_thread", False):
            stream.codec_context.thread_count = 1
        yield container, stream


@dataclass(frozen=True)
class _Index:
    """What the packets of a stream tell of its frames, for a fraction of the work that decoding is.

    count: packets that carry a frame to be shown: as many as there are frames.
    numbers: where frames can be found by their timestamps, the number of the frame of each; else empty.
    keys: the key frames' numbers, in order, each with the timestamp to seek to.
    """

    count: int
    numbers: dict[int, int] = field(default_factory=dict)
    keys: tuple[tuple[int, int], ...] = ()


def _index(container: InputContainer, stream: VideoStream) -> _Index:
    size = count = 0  # of all packets, of those that show a frame
    timed = []
    for packet in container.demux(stream):  # none is kept: together they are as large as the file
        if packet.size:
            size += 1
            count += not packet.is_discard
            if packet.pts is not None:
                timed.append((packet.pts, packet.dts if packet.dts is not None else packet.pts, packet.is_keyframe))
    place = {pts: i for i, pts in enumerate(sorted(pts for pts, _, _ in timed))}
    by = SEEK_BY.get((container.format.name, stream.codec_context.name))
    # Every packet must be a frame of its own, at a time of its own, and the first one a key frame with nothing before it.
    if by is None or not timed or not len(place) == len(timed) == size == count:
        return _Index(count)
    first, _, is_key = timed[0]
    if place[first] > 0 or not is_key:
        return _Index(count)
    keys = sorted((place[pts], pts if by == "pts" else dts) for pts, dts, is_key in timed if is_key)
    return _Index(count, place, tuple(keys))


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


class _Kept:
    """The frames that were asked for, as they come: uint8 (N, 3, H, W) on a device."""

    def __init__(self, count: int, size: tuple[int, int], short_side: int | None, device: Device) -> None:
        """size: width and height that all frames get, as they are stored."""
        self.count, self.size, self.short_side = count, size, short_side
        self.device = torch.device(device or "cpu")
        self.added = 0
        self._chunk = UPLOADS.get(self.device.type, 16 << 20)
        self._waiting: list[NDArray[np.uint8]] = []
        self._stored = 0
        self._reformatter = VideoReformatter()
        self._frames = torch.empty(0, 3, 1, 1, dtype=torch.uint8)

    def add(self, frame: VideoFrame) -> None:
        image = _to_rgb(self._reformatter, frame, *self.size)
        self.added += 1
        if self._chunk == 0:
            self._store_by_numpy(image.transpose(2, 0, 1))
            return
        self._waiting.append(image)
        if (len(self._waiting) + 1) * image.nbytes > self._chunk or self.added == self.count:
            self._upload()

    def _store_by_numpy(self, image: NDArray[np.uint8]) -> None:
        """(3, H, W). torch's threads, which stay busy for a while after each operation, would be in the decoder's way."""
        if self.short_side is not None and min(image.shape[1:]) != self.short_side:
            image = resize_short_side(torch.from_numpy(np.ascontiguousarray(image)), self.short_side).numpy()
        np.copyto(self._places(1, image.shape)[0].numpy(), image)

    def _upload(self) -> None:
        """Several frames at once: for each, a device takes as long to start its work."""
        images = torch.from_numpy(np.stack(self._waiting)).to(self.device).permute(0, 3, 1, 2)
        if self.short_side is not None:
            images = resize_short_side(images, self.short_side)
        self._places(len(images), images.shape[1:]).copy_(images)
        self._waiting.clear()

    def _places(self, number: int, shape: tuple[int, ...]) -> Tensor:
        """Where the next frames go."""
        if not self._stored:
            self._frames = torch.empty((self.count, *shape), dtype=torch.uint8, device=self.device)
        self._stored += number
        return self._frames[self._stored - number : self._stored]

    def frames(self) -> Tensor:
        if self._waiting:
            self._upload()
        return self._frames[: self._stored]


def _decode(
    path: PathLike, wanted: NDArray[np.int64], short_side: int | None, device: Device, index: _Index
) -> tuple[Tensor, int]:
    """Return the wanted frames that exist, distinct and in order, and how many the video has, as far as it was decoded."""
    try:
        found = _decode_from_keys(path, wanted, short_side, device, index)
    except VideoError:
        found = None  # from the start, the message says which frame is damaged
    if found is not None:
        return found, index.count
    number = 0
    with _open(path) as (container, stream):
        kept = None
        for frame in _frames(path, container, stream):
            kept = kept or _Kept(len(wanted), (frame.width, frame.height), short_side, device)
            if number == wanted[kept.added]:
                kept.add(frame)
            number += 1
            if kept.added == len(wanted):
                break
    return torch.empty(0, 3, 1, 1, dtype=torch.uint8) if kept is None else kept.frames(), number


def _decode_from_keys(
    path: PathLike, wanted: NDArray[np.int64], short_side: int | None, device: Device, index: _Index
) -> Tensor | None:
    """Return the wanted frames, passing over what lies between them where a key frame allows it.

    None: that would spare nothing; or the decoder gives other frames than the packets promise. Then all must be decoded.
    """
    starts = [number for number, _ in index.keys]
    nearest = [index.keys[bisect_right(starts, number) - 1] for number in wanted.tolist()] if starts else []
    if not any(key - before > MIN_SKIP for (key, _), before in zip(nearest, [0, *(wanted + 1).tolist()], strict=False)):
        return None
    due = 0  # the frame that comes next
    with _open(path) as (container, stream):
        size = (stream.codec_context.width, stream.codec_context.height)
        kept = _Kept(len(wanted), size, short_side, device)
        frames = _frames(path, container, stream)
        for number, (key, time) in zip(wanted.tolist(), nearest, strict=True):
            sought = key - due > MIN_SKIP
            if sought:
                try:
                    container.seek(time, stream=stream)
                except av.FFmpegError:
                    return None
                frames = _frames(path, container, stream)
                due = key
            while due <= number:
                frame = next(frames, None)
                came = None if frame is None or frame.pts is None else index.numbers.get(frame.pts)
                if came is not None and came < due:
                    continue  # from before the key frame
                if frame is None or came != due or (frame.width, frame.height) != size:
                    return None
                if sought and due == key and not frame.key_frame:
                    return None  # the container calls it one
                if due == number:
                    kept.add(frame)
                due += 1
    return kept.frames()


def _to_rgb(reformatter: VideoReformatter, frame: VideoFrame, width: int, height: int) -> NDArray[np.uint8]:
    """(H, W, 3), upright; width, height: of the picture as it is stored."""
    turns = round(frame.rotation / 90) % 4  # counter-clockwise, like rot90
    rgb = reformatter.reformat(frame, width, height, "rgb24", **ONE_THREAD).to_ndarray()
    return np.rot90(rgb, turns)
