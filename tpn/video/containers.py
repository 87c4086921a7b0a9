"""Open video files with PyAV and decode them. Every failure of FFmpeg and PyAV is a `VideoError` that names the file."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from tpn.errors import printable
from tpn.files import StrPath, refuse_url
from tpn.video.frame_index import FrameCounter, read_packets
from tpn.video.mp4_boxes import declared_samples

MAX_PIXELS = 2**26
"""Largest number of pixels of a picture, 8192 x 8192: twice that of 8K video. Decoders keep several pictures in memory, each with
1.5 to 8 bytes per pixel. FFmpeg may decode one larger picture, of up to 2**28 pixels, while it opens an FLV or MPEG-PS file, and
before PyAV 17.1 any file."""

FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,asf_o,flv,live_flv,kux,mpegts,mpeg,ogg,nut,rm,ivr,swf,dv,mxf,mxg,gxf,lxf,wtv,"
    "nsv,nuv,ty,pva,pmp,dhav,ifv,iv8,lmlm4,cine,r3d,viv,vivo,smk,bink,roq,flic,film_cpk,4xm,ea,avs,xmv,thp,mtv,mv,rpl,siff,yop,"
    "yuv4mpegpipe,ivf,h261,h263,h264,hevc,vvc,evc,av1,obu,m4v,mpegvideo,vc1,vc1test,cavsvideo,avs2,avs3,dirac,dnxhd,mjpeg,"
    "mjpeg_2000,smjpeg,mpjpeg,gif,apng,jpegxl_anim,"
    "bmp_pipe,j2k_pipe,jpeg_pipe,jpegxl_pipe,png_pipe,ppm_pipe,tiff_pipe,webp_pipe"
)
"""FFmpeg's names of the formats that can be opened; the suffix of the file does not matter. Formats that refer to other files or
to addresses are not among them: playlists (hls, dash, concat), sessions (sdp), numbered images (image2)."""

NOT_VIDEOS = {
    b"#EXTM3U": "an HLS playlist",
    b"ffconcat": "a concat playlist",
    b"v=0": "an SDP session",
    b"<?xml": "an XML file, such as a DASH playlist",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}
"""Leading bytes of files often mistaken for videos, for a clearer error. FORMATS refuses them, too, and all others."""

PYAV = tuple(int(part) for part in av.__version__.split(".")[:2])

OPEN_OPTIONS: dict[str, Any] = {"metadata_errors": "replace"} if PYAV < (19, 0) else {}  # PyAV 19 always replaces
REFORMAT_OPTIONS: dict[str, int] = {"threads": 1} if PYAV >= (17, 0) else {}
"""Convert pixels in one thread, as PyAV did before version 17. Several threads would compete with the decoder's threads."""

_thread_settings = threading.local()


class VideoError(RuntimeError):
    """A file exists but cannot be read as a video. The message is one line and starts with the path."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@contextmanager
def video_errors(path: StrPath, problem: Callable[[], str]) -> Iterator[None]:
    """Raise each error of FFmpeg and PyAV as a VideoError. For damaged files, PyAV raises Python's own errors as well.

    Args:
        path: the file.
        problem: returns what went wrong; it is called after an error, and its reason follows in the message.
    """
    try:
        yield
    except VideoError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__} {error}".strip()
        raise VideoError(f"{path}: {problem()} ({reason})") from error


def decode_in_one_thread() -> None:
    """Make the calling thread open each video with one decoder thread. The default is one per core.

    Call it in threads that decode several videos in parallel. DataLoader workers do not need it.
    """
    _thread_settings.decode_in_one_thread = True


@contextmanager
def open_video(path: StrPath, *, one_thread: bool = False) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video file, and its video stream with the largest picture. Cover pictures are ignored.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the file cannot be opened.
        VideoError: the file is not a video, is damaged, or is larger than a limit.
    """
    _check_file(Path(path))
    limits = {"max_pixels": str(MAX_PIXELS)}
    early_limits = limits if PYAV >= (17, 1) else {}  # earlier versions crash if they meet streams that are not in the header
    with video_errors(path, lambda: "not a video in a supported format, or damaged"):
        container = av.open(
            f"file:{path}",  # with "file:", FFmpeg does not read a file name as a URL
            options=early_limits,
            container_options={"protocol_whitelist": "file", "format_whitelist": FORMATS},  # also for what a file refers to
            **OPEN_OPTIONS,
        )
    with container:
        with video_errors(path, lambda: "the video stream cannot be opened"):
            stream = _main_stream(path, container)
            stream.codec_context.options = limits
            stream.thread_type = "AUTO"
            if one_thread or get_worker_info() is not None or getattr(_thread_settings, "decode_in_one_thread", False):
                stream.codec_context.thread_count = 1
        yield container, stream


def _check_file(path: Path) -> None:
    refuse_url(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # opening a named pipe would block
        raise VideoError(f"{path}: not a regular file")
    with path.open("rb", buffering=0) as file:  # Python's own errors for missing files, folders and missing permissions
        head = file.read(16)
        if not head:
            raise VideoError(f"{path}: the file is empty")
        for start, what in NOT_VIDEOS.items():
            if head.startswith(start):
                raise VideoError(f"{path}: {what}, not a video")
        with video_errors(path, lambda: "damaged"):
            declared, size = declared_samples(file), os.fstat(file.fileno()).st_size
    if declared > size:
        raise VideoError(f"{path}: damaged, it declares {declared} samples but has only {size} bytes")


def _main_stream(path: StrPath, container: InputContainer) -> VideoStream:
    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos:
        raise VideoError(f"{path}: the file has no video stream")
    decodable = [s for s in videos if s.codec_context is not None]
    if not decodable:
        raise VideoError(f"{path}: the installed FFmpeg has no decoder for its video stream")
    stream = max(decodable, key=lambda s: s.width * s.height)
    if stream.width * stream.height > MAX_PIXELS:
        raise VideoError(f"{path}: the picture has {stream.width}x{stream.height} pixels, more than the limit of {MAX_PIXELS}")
    return stream


def decode_all(path: StrPath, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Yield the frames from the current position in the file to its end. VideoError if there is none, or at the first damage."""
    number, is_suspect, is_interlaced = 0, False, False
    counter = FrameCounter(stream)

    def problem() -> str:
        # Some decoders report no size for a picture that they refuse.
        too_large = "" if stream.width else f", or larger than {MAX_PIXELS} pixels"
        return f"damaged{too_large}, decoding failed after frame {number}"

    with video_errors(path, problem):
        for packet in read_packets(container, stream):
            counter.add(packet)
            is_suspect |= packet.is_corrupt
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise VideoError(f"{path}: damaged, frame {number} cannot be decoded without errors")
                yield frame
                number += 1
                is_interlaced |= frame.interlaced_frame  # a packet may be half of a frame
    if (is_suspect or (number < counter.total and not is_interlaced)) and stream.codec_context.thread_count != 1:
        # FFmpeg's threads may report an error too late, or with the last frames, where PyAV drops it. One thread reports it.
        with open_video(path, one_thread=True) as (container, stream):
            for _ in decode_all(path, container, stream):
                pass
    if number == 0:
        raise VideoError(f"{path}: no frame could be decoded")


def to_rgb(path: StrPath, reformatter: VideoReformatter, frame: VideoFrame, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Scale a frame to a width and height, convert it to RGB and rotate it upright: (H, W, 3)."""
    quarter_turns = round(frame.rotation / 90) % 4  # counterclockwise, like rot90
    with video_errors(path, lambda: "the picture cannot be converted to RGB"):
        rgb = reformatter.reformat(frame, *size, "rgb24", **REFORMAT_OPTIONS).to_ndarray()
    return np.rot90(rgb, quarter_turns)
