"""Read frames from cameras and pipes."""

import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import BinaryIO, TypeVar

import av
import numpy as np
import torch
from av.container import InputContainer
from av.format import formats_available
from torch import Tensor

from tpn.video.containers import VideoError, video_errors

T = TypeVar("T")

FORMATS = {"linux": "video4linux2,v4l2", "darwin": "avfoundation", "win32": "dshow"}
"""FFmpeg's input format for cameras on each `sys.platform`."""


class Camera:
    """An iterable over the frames of a camera, uint8 RGB (3, H, W). It ends when the camera stops and can be iterated once.

    Args:
        device: "/dev/video0" or its number (Linux), a number or a name (macOS), a name (Windows).
        size: width and height to request. Default: chosen by the camera.
        fps: frames per second to request. Default: chosen by the camera.
        format: FFmpeg's input format. Default: that for cameras on this platform.

    Attributes:
        fps: frames per second as stated by the camera, otherwise as requested.

    Raises:
        VideoError: the camera cannot be opened, or fails during the iteration.
        ValueError: the camera does not state its frame rate, and `fps` is missing.
    """

    def __init__(
        self, device: str, *, size: tuple[int, int] | None = None, fps: float | None = None, format: str | None = None
    ) -> None:
        self.device = device
        options = {} if size is None else {"video_size": "{}x{}".format(*size)}
        options |= {} if fps is None else {"framerate": f"{fps:g}"}
        self._container = _open_device(device, FORMATS.get(sys.platform) if format is None else format, options)
        rate = self._container.streams.video[0].average_rate
        if rate is None and fps is None:
            self._container.close()
            raise ValueError(f"{device}: the camera does not state its frame rate. Pass fps")
        self.fps = float(rate or fps or 0)

    def __iter__(self) -> Iterator[Tensor]:
        with self._container as container, video_errors(self.device, lambda: "the camera failed"):
            while True:
                try:
                    for frame in container.decode(video=0):
                        yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                    return
                except av.BlockingIOError:  # macOS: there is no new frame yet
                    time.sleep(0.005)


def raw_frames(file: BinaryIO, *, size: tuple[int, int]) -> Generator[Tensor]:
    """Yield the frames of raw RGB video, for example from `ffmpeg -f rawvideo -pix_fmt rgb24 -`.

    Args:
        file: binary file, buffered or not, for example `sys.stdin.buffer`.
        size: width and height of the frames.

    Yields:
        Frames, uint8 RGB (3, H, W).

    Raises:
        VideoError: the file is empty or ends within a frame.
    """
    width, height = size
    num_bytes = 3 * width * height
    name = getattr(file, "name", "the pipe")
    number = 0
    while data := _read_up_to(file, num_bytes):
        if len(data) < num_bytes:
            raise VideoError(
                f"{name}: ends within frame {number}, after {len(data)} of {num_bytes} bytes."
                f" Check that the frames are rgb24 of {width}x{height}"
            )
        yield torch.from_numpy(np.frombuffer(data, np.uint8).reshape(height, width, 3)).permute(2, 0, 1)
        number += 1
    if number == 0:
        raise VideoError(f"{name}: no frames received")


def _read_up_to(file: BinaryIO, count: int) -> bytearray:
    """Read `count` bytes, or fewer at the end of the file. One call of an unbuffered pipe's `read` may return less."""
    data = bytearray()
    while len(data) < count and (more := file.read(count - len(data))):
        data += more
    return data


def newest(items: Generator[T]) -> Generator[T]:
    """Run a generator in a thread and yield its newest item, skipping those that come while the consumer is busy.

    An exception in the generator is raised here. If the consumer closes this generator early, the other one is closed at its
    next item.
    """
    changed = threading.Condition()
    waiting: list[T] = []  # at most one item
    failures: list[Exception] = []
    ended = stopped = False

    def run() -> None:
        nonlocal ended
        try:
            with closing(items):
                for item in items:
                    with changed:
                        if stopped:
                            break
                        waiting[:] = [item]
                        changed.notify()
        except Exception as error:  # raised again in the consumer's thread
            failures.append(error)
        with changed:
            ended = True
            changed.notify()

    thread = threading.Thread(target=run, name="tpn-live", daemon=True)  # the program can exit while a camera hangs
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: waiting or ended)
                if not waiting:
                    break
                item = waiting.pop()
            yield item
        if failures:
            raise failures[0]
    finally:
        with changed:
            stopped = True
        thread.join(timeout=1)


def _open_device(device: str, format: str | None, options: dict[str, str]) -> InputContainer:
    if format is None or format not in formats_available:
        raise VideoError(f"{device}: the installed FFmpeg cannot read cameras ({format or sys.platform})")
    if format == FORMATS["linux"] and device.isdecimal():
        device = f"/dev/video{device}"
    elif format == FORMATS["win32"] and not device.startswith("video="):
        device = f"video={device}"
    with video_errors(device, lambda: "cannot open this camera"):
        container = av.open(device, format=format, options=options)
    if not container.streams.video:
        container.close()
        raise VideoError(f"{device}: the device has no video stream")
    return container
