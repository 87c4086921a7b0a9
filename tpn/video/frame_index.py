"""Number the frames of a video stream by its packets, which takes much less time than decoding."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

SEEKABLE = {
    (container, codec)
    for container in ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
    for codec in ("h264", "hevc", "vp9", "av1", "libdav1d")
}
"""Containers and codecs with marked key frames from which decoding can start and one frame in each packet. MPEG-4 part 2 is
excluded because some of its packets contain no frame."""

PICTURE = b"\0\0\1\xb6"
"""Start code of a picture in MPEG-4 part 2."""

EMPTY_PICTURE = 4
"""Largest number of bytes after the start code of a picture that is not coded. Coded ones of 20 macroblocks or more have more."""


@dataclass(frozen=True, eq=False)
class FrameIndex:
    """The frames of a stream according to its packets.

    Attributes:
        num_frames: number of frames in the packets, as far as a few of their bytes tell.
        is_exact: whether the decoder returns as many frames. Otherwise only decoding can tell.
        pts: presentation timestamp of each frame, ascending; empty if seeking is not reliable.
        key_frames: number of each key frame, ascending; empty if seeking is not reliable.
    """

    num_frames: int
    is_exact: bool = False
    pts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    key_frames: tuple[int, ...] = ()

    def agrees(self, number: int, frame: VideoFrame) -> bool:
        """Return whether a decoded frame is the one that the packets announce. A packet may be half of an interlaced one."""
        return self.number_of(frame.pts) == number and not frame.interlaced_frame

    def number_of(self, pts: int | None) -> int | None:
        """Return the number of the frame with a timestamp, None if there is no such frame."""
        if pts is None:
            return None
        number = int(self.pts.searchsorted(pts))
        return number if number < len(self.pts) and self.pts[number] == pts else None


class FrameCounter:
    """Estimates how many frames the decoder makes of packets, from a few of their bytes.

    Attributes:
        total: number of frames in the packets so far.
    """

    def __init__(self, stream: VideoStream) -> None:
        self.codec = stream.codec_context.name
        self.total = 0
        self._has_key = False
        self._first_pts: int | None = None

    def add(self, packet: "Packet[Any]") -> None:
        """Count the frames of the next packet.

        A video that was cut out of a longer one may start with pictures that cannot be decoded: those before the first key frame
        in the file, and those that are shown before it.
        """
        if packet.is_keyframe and not self._has_key:
            self._has_key, self._first_pts, self.total = True, packet.pts, 0
        if self._first_pts is None or packet.pts is None or packet.pts >= self._first_pts:
            self.total += self._count(packet)

    def _count(self, packet: "Packet[Any]") -> int:
        if not packet.size or packet.is_discard:
            return 0
        if self.codec == "vp8":
            return bytes(packet)[0] >> 4 & 1  # other pictures are not shown
        if self.codec == "mpeg4":  # in AVI files, packets with no picture, with one that is not coded, or with two
            return sum(len(picture) > EMPTY_PICTURE for picture in bytes(packet).split(PICTURE)[1:])
        return 1


def read_packets(container: InputContainer, stream: VideoStream) -> Iterator["Packet[Any]"]:
    """Yield the packets of a stream, and at the end an empty one, which makes the decoder return its last frames."""
    last = Packet()
    last.stream = stream
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except IndexError:  # PyAV raises it at the end of a file if streams appeared while it was read
        pass
    yield last


def read_index(container: InputContainer, stream: VideoStream) -> FrameIndex:
    """Read all packets of a stream, without decoding them.

    They number the frames if each of them is one frame with a unique timestamp, and the first one in the file and in time is a
    key frame.
    """
    counter = FrameCounter(stream)
    num_packets, is_suspect = 0, False
    packets: list[tuple[int, bool]] = []
    for packet in read_packets(container, stream):  # the packets are not stored, they are as large as the file
        if packet.size:
            num_packets += 1
            is_suspect |= packet.is_corrupt
            counter.add(packet)
            if packet.pts is not None:
                packets.append((packet.pts, packet.is_keyframe))
    times = np.unique(np.array([pts for pts, _ in packets], dtype=np.int64))
    is_seekable = (container.format.name, counter.codec) in SEEKABLE
    is_one_each = len(times) == len(packets) == num_packets == counter.total
    if not is_seekable or is_suspect or not is_one_each or not packets or not packets[0][1]:
        return FrameIndex(counter.total)
    keys = times.searchsorted(sorted(pts for pts, is_key in packets if is_key))
    return FrameIndex(counter.total, True, times, tuple(keys.tolist()))
