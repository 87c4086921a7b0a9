"""Videos as people have them (files, bytes, arrays, lists of frames), and the clips that a model takes from them."""

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tpn.config import InputSpec
from tpn.files import StrPath
from tpn.video import decode
from tpn.video.decode import VideoError

Bytes = bytes | bytearray | memoryview
File = IO[bytes] | Bytes
Array = np.ndarray[Any, Any] | Tensor
"""Frames in memory, uint8; the layout is stated where they are taken."""
Frame = Array | Image.Image
Source = StrPath | File | Array | list[Frame] | tuple[Frame, ...]
FramesAndClips = tuple[Tensor, Tensor]
"""Distinct frames of a video, uint8 (N, 3, H, W), and its clips as indices into them, int64 (clips, T)."""


class _Streams(threading.local):
    """One CUDA stream per thread and device: freed memory stays with the stream that used it."""

    def __init__(self) -> None:
        self.of: dict[torch.device, torch.cuda.Stream] = {}


_streams = _Streams()


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, run the uploads and resizing of a reading thread beside the model's queued work."""
    if device.type != "cuda":
        yield
        return
    if device not in _streams.of:
        _streams.of[device] = torch.cuda.Stream(device)
    stream = _streams.of[device]
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def read_clips(source: Source, spec: InputSpec, device: torch.device) -> FramesAndClips:
    """Return the distinct frames that the views of a source need, and each clip as indices into them.

    Args:
        source: see `VideoClassifier`.
        spec: the clips to read.
        device: where the frames of a file are resized.

    Raises:
        VideoError, OSError: a file cannot be read.
        TypeError, ValueError: the source is of another type, or its frames are of another type or shape.
    """
    if isinstance(source, str | os.PathLike):
        with _side_stream(device):
            options: dict[str, Any] = {"target_fps": spec.target_fps, "short_side": spec.short_side, "device": device}
            frames, place = decode.sample_frames(source, spec.indices, **options)
        return frames, torch.from_numpy(place)
    if isinstance(source, Bytes) or hasattr(source, "read"):
        with _temporary_file(cast("File", source)) as path:
            return read_clips(path, spec, device)
    if is_frame_list(source):
        images = cast("Sequence[Frame]", source)
        wanted, place = np.unique(spec.indices(len(images)), return_inverse=True)
        video = channels_first(_stack([images[i] for i in wanted]))
    else:
        _check_frames(source)
        array = cast("Array", source)
        wanted, place = np.unique(spec.indices(len(array)), return_inverse=True)
        video = channels_first(array[wanted] if isinstance(array, np.ndarray) else array[torch.from_numpy(wanted)])
    return video, torch.from_numpy(place).view(spec.num_clips, spec.num_frames)


def is_frame_list(source: object) -> bool:
    """Return whether a source is a list of frames, which is one video: PIL images, or arrays of fewer than four dimensions."""
    return (
        isinstance(source, list | tuple)
        and len(source) > 0
        and all(isinstance(each, Image.Image) or (isinstance(each, np.ndarray | Tensor) and each.ndim < 4) for each in source)
    )


def channels_first(frames: Array) -> Tensor:
    """Check frames, (T, H, W, 3) or (T, 3, H, W), and return them as (T, 3, H, W). TypeError, ValueError for all others."""
    _check_frames(frames)
    if isinstance(frames, np.ndarray):
        # PyTorch takes neither negative strides, such as OpenCV's frame[..., ::-1], nor, silently, memory that is read-only.
        plain = frames.flags.writeable and min(frames.strides) >= 0
        frames = torch.from_numpy(frames if plain else frames.copy())
    return frames.permute(0, 3, 1, 2) if frames.shape[3] == 3 else frames


def _check_frames(frames: object) -> None:
    """Raise TypeError or ValueError, with the remedy, for anything but frames that `channels_first` takes."""
    if not isinstance(frames, np.ndarray | Tensor):
        raise TypeError(f"expected a path, an open file, an array of frames, or a list of frames, got {type(frames).__name__}")
    _check_dtype(frames)
    shape = tuple(frames.shape)
    if 0 in shape:
        raise ValueError(f"frames must not be empty, got {shape}")
    if len(shape) == 4 and (shape[3] == 3) != (shape[1] == 3):
        return
    remedy = "pass channels last"
    if len(shape) == 3 and 3 in (shape[0], shape[2]):
        remedy = "pass one frame as [frame]"
    elif len(shape) == 3 or (len(shape) == 4 and 1 in (shape[1], shape[3])):
        remedy = "pass grayscale frames (T, H, W) as np.stack((frames,) * 3, axis=-1)"
    elif len(shape) == 4 and shape[3] == 4:
        remedy = "pass frames[..., :3] if the fourth channel is alpha"
    what = "ambiguous" if len(shape) == 4 and shape[3] == shape[1] == 3 else "neither"
    raise ValueError(f"frames must be (T, H, W, 3) or (T, 3, H, W), got {shape}, {what}; {remedy}")


def _check_dtype(frames: Array) -> None:
    dtype = str(frames.dtype).removeprefix("torch.")
    if dtype != "uint8":
        remedy = "pass (255 * frames).round() as uint8 if they are 0..1" if "float" in dtype else "scale and convert them"
        raise TypeError(f"frames must be uint8, 0..255, got {dtype}; {remedy}")


def _stack(frames: Sequence[Frame]) -> Tensor:
    """Return frames of equal size as one tensor. PIL images are converted to RGB."""
    tensors = []
    for frame in frames:
        array = np.array(frame.convert("RGB")) if isinstance(frame, Image.Image) else frame
        _check_dtype(array)
        tensors.append(array if isinstance(array, Tensor) else torch.from_numpy(array.copy()))
    different = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(different) > 1:
        raise ValueError(f"the frames of a video must have one size, got {different[0]} and {different[1]}")
    return torch.stack(tensors)


@contextmanager
def _temporary_file(source: File) -> Iterator[str]:
    """Write bytes or an open file to a temporary file: the decoder reads a video in two passes."""
    name = getattr(source, "name", type(source).__name__)
    with tempfile.TemporaryDirectory(prefix="tpn-") as folder:
        path = os.path.join(folder, "video")
        with open(path, "wb") as file:
            if isinstance(source, Bytes):
                file.write(source)
            else:
                if source.seekable():
                    source.seek(0)
                if not isinstance(source.read(0), bytes):
                    raise TypeError(f"the file {name} must be open in binary mode, got text mode; pass open(..., 'rb')")
                shutil.copyfileobj(source, file)
        try:
            yield path
        except VideoError as error:
            raise VideoError(str(error).replace(path, str(name))) from None
