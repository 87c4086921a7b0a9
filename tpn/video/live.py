"""Frames as they come: from a camera, or raw from a pipe."""

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

from tpn.video.decode import VideoError

T = TypeVar("T")

FORMATS = {"linux": "video4linux2,v4l2", "darwin": "avfoundation", "win32": "dshow"}
"""FFmpeg's input for cameras, by `sys.platform`."""


class Camera:
    """The frames of a camera, uint8 RGB (3, H, W), until the device is gone; they can be iterated over once.

    Args:
        device: "/dev/video0", or its number (Linux); a number or a name (macOS); a name (Windows).
        size, fps: width and height, and frames a second, to ask the device for. Default: its own.
        format: FFmpeg's name for the kind of device. Default: the platform's cameras.

    Attributes:
        fps: frames a second, as the device states them.

    Raises VideoError: the device cannot be opened, or fails later; ValueError: it does not state its frame rate.
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
            raise ValueError(f"{device}: the camera does not state its frame rate; pass fps")
        self.fps = float(rate or fps or 0)

    def __iter__(self) -> Iterator[Tensor]:
        with self._container as container:
            while True:
                try:
                    for frame in container.decode(video=0):
                        yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                    return
                except av.BlockingIOError:  # macOS: there is no new frame yet
                    time.sleep(0.005)
                except av.FFmpegError as error:
                    raise VideoError(f"{self.device}: the camera failed ({error.strerror})") from error


def raw_frames(file: BinaryIO, *, size: tuple[int, int]) -> Generator[Tensor]:
    """Yield the frames that are written to a pipe as raw rgb24, such as by `ffmpeg -f rawvideo -pix_fmt rgb24 -`.

    file: `sys.stdin.buffer`, or any binary file, buffered or not. size: width and height. Returns uint8 (3, H, W) each.
    Raises VideoError: there is nothing to read, or it ends within a frame.
    """
    width, height = size
    number = 0
    while data := _read(file, 3 * width * height):
        if len(data) < 3 * width * height:
            raise VideoError(
                f"{_name(file)}: ends within frame {number}, {len(data)} bytes of {3 * width * height};"
                f" are the frames rgb24 of {width}x{height}?"
            )
        yield torch.from_numpy(np.frombuffer(data, np.uint8).reshape(height, width, 3)).permute(2, 0, 1)
        number += 1
    if number == 0:
        raise VideoError(f"{_name(file)}: no frame came")


def _read(file: BinaryIO, count: int) -> bytearray:
    """Return so many bytes, fewer at the end; a pipe without a buffer gives what there is."""
    data = bytearray()
    while len(data) < count and (more := file.read(count - len(data))):
        data += more
    return data


def newest(items: Generator[T]) -> Generator[T]:
    """Yield what a generator yields; of what comes while the consumer is busy, only the last.

    The generator runs in a thread, at its own pace. What it raises is raised here. Whoever stops early ends it at its next item.
    """
    changed = threading.Condition()
    waiting: list[T] = []  # one at most
    failures: list[Exception] = []
    ended = stopped = False

    def read() -> None:
        nonlocal ended
        try:
            with closing(items):
                for item in items:
                    with changed:
                        if stopped:
                            break
                        waiting[:] = [item]
                        changed.notify()
        except Exception as error:  # for the consumer
            failures.append(error)
        with changed:
            ended = True
            changed.notify()

    thread = threading.Thread(target=read, name="tpn-live", daemon=True)  # a device that hangs does not keep the program
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
    try:
        container = av.open(device, format=format, options=options)
    except av.FFmpegError as error:
        raise VideoError(f"{device}: not a camera that can be opened ({error.strerror})") from error
    if not container.streams.video:
        container.close()
        raise VideoError(f"{device}: gives no video")
    return container


def _name(file: BinaryIO) -> str:
    return str(getattr(file, "name", "the pipe"))
