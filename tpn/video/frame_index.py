"""Number the frames of a video stream by its packets, which takes much less time than decoding."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

SEEK_BY = {
    (container, codec): timestamp
    for container, timestamp in (("mov,mp4,m4a,3gp,3g2,mj2", "dts"), ("matroska,webm", "pts"))
    for codec in ("h264", "hevc", "vp9", "av1", "libdav1d")
}
"""Timestamp by which FFmpeg seeks, for each (container, codec) with marked key frames from which decoding can start and one frame
in each packet. MPEG-4 part 2 is excluded because some of its packets contain no frame."""


def _no_timestamps() -> NDArray[np.int64]:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class FrameIndex:
    """The frames of a stream according to its packets.

    Attributes:
        num_frames: number of packets with a visible frame.
        pts: presentation timestamp of each frame, ascending; empty if seeking is not reliable.
        key_frames: frame number and seek timestamp of each key frame, in order; empty if seeking is not reliable.
    """

    num_frames: int
    pts: NDArray[np.int64] = field(default_factory=_no_timestamps)
    key_frames: tuple[tuple[int, int], ...] = ()

    def number_of(self, pts: int | None) -> int | None:
        """Return the number of the frame with a timestamp, None if there is no such frame."""
        if pts is None:
            return None
        number = int(self.pts.searchsorted(pts))
        return number if number < len(self.pts) and self.pts[number] == pts else None


def read_index(container: InputContainer, stream: VideoStream) -> FrameIndex:
    """Read all packets of a stream, without decoding them."""
    num_packets = num_frames = 0
    packets: list[tuple[Any, Any, bool]] = []
    for packet in container.demux(stream):  # the packets are not stored, they are as large as the file
        if packet.size:
            num_packets += 1
            num_frames += not packet.is_discard
            if packet.pts is not None:
                packets.append((packet.pts, packet.dts if packet.dts is not None else packet.pts, packet.is_keyframe))
    times = np.unique(np.array([pts for pts, _, _ in packets], dtype=np.int64))
    seek_by = SEEK_BY.get((container.format.name, stream.codec_context.name))
    # Seeking is reliable if each packet is one frame with a unique timestamp and the first frame is a key frame.
    if seek_by is None or not packets or not len(times) == len(packets) == num_packets == num_frames:
        return FrameIndex(num_frames)
    first_pts, _, first_is_key = packets[0]
    if first_pts > times[0] or not first_is_key:
        return FrameIndex(num_frames)
    keys = sorted((pts, pts if seek_by == "pts" else dts) for pts, dts, is_key in packets if is_key)
    return FrameIndex(num_frames, times, tuple((int(times.searchsorted(pts)), time) for pts, time in keys))
