"""Square crops along a track: what a model sees of one person or object, in prediction and in training."""

import os
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpn.validation import check_int, check_number
from tpn.video import decode
from tpn.video.decode import VideoError
from tpn.video.items import Item
from tpn.video.sampling import FrameSampler, at_frame_rate
from tpn.video.tracks import MAX_FRAME, MAX_GAP, Track, read_tracks
from tpn.video.transforms import resize_short_side

MARGIN, SMOOTHING = 0.25, 5
"""Defaults of `square_boxes`, which models are trained and used with."""

MAX_ENLARGEMENT = 4
"""Side of a square in units of the longer side of the picture. A larger box belongs to another video."""


def square_boxes(
    track: Track, *, margin: float = MARGIN, smoothing: int = SMOOTHING
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the squares that a model sees of a track, one for each frame from its first to its last.

    The side is the longer side of the box, enlarged by `margin`. Center and side are averaged over the `smoothing` frames around
    each frame, at the ends of the track over fewer, and rounded to pixels. Boxes of missing frames are interpolated first.

    Args:
        track: the boxes.
        margin: how much larger than the box the square is, 0..2.
        smoothing: odd number of frames to average; 1 turns it off.

    Returns:
        frames: (F,) int64, consecutive.
        boxes: (F, 4) int64, left, top, right, bottom; right and bottom are exclusive. They may reach beyond the picture.

    Example:
        >>> frames, boxes = square_boxes(track)
        >>> crops = [crop_frame(image, box) for image, box in zip(read_frames("video.mp4", frames), boxes)]
    """
    check_number("margin", margin, minimum=0, maximum=2)
    check_int("smoothing", smoothing, minimum=1)
    if smoothing % 2 == 0:
        raise ValueError(f"smoothing must be odd, got {smoothing}; use {smoothing + 1}")
    corners = track.filled()
    centers, sides = (corners[:, :2] + corners[:, 2:]) / 2, (corners[:, 2:] - corners[:, :2]).max(axis=1, keepdims=True)
    values = np.hstack([centers, sides * (1 + margin)])
    place = np.arange(len(values))
    radius = np.minimum(np.minimum(place, place[::-1]), smoothing // 2)
    sums = np.vstack([np.zeros(3), values.cumsum(axis=0)])
    values = (sums[place + radius + 1] - sums[place - radius]) / (2 * radius + 1)[:, None]
    values = values.round(6)  # the last digits of the sums must not decide how a half is rounded
    sides = np.maximum(np.round(values[:, 2:]), 1)
    corners = np.round(values[:, :2] - sides / 2)
    return track.first + place, np.hstack([corners, corners + sides]).astype(np.int64)


def crop_frame(frame: Tensor, box: Sequence[int] | NDArray[np.int64]) -> Tensor:
    """Cut a box out of a frame. Beyond the picture, its outermost pixels repeat.

    Args:
        frame: uint8 (3, H, W).
        box: left, top, right, bottom in pixels; right and bottom are exclusive.

    Returns:
        uint8 (3, bottom - top, right - left).
    """
    left, top, right, bottom = (int(value) for value in box)
    height, width = frame.shape[-2:]
    rows, columns = torch.arange(top, bottom).clamp_(0, height - 1), torch.arange(left, right).clamp_(0, width - 1)
    return frame[:, rows.to(frame.device)][:, :, columns.to(frame.device)]


class SquareCrops:
    """The square crops of one track, resized. Call it with the number of a frame and the frame, uint8 (3, H, W).

    Args:
        track: the boxes.
        size: side of the resized crops in pixels.

    Attributes:
        first: number of the first frame of the track.
    """

    def __init__(self, track: Track, size: int) -> None:
        self.track, self.first, self.size = track, track.first, size
        _, self.boxes = square_boxes(track)
        self._picture: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.boxes)

    def __call__(self, number: int, frame: Tensor) -> Tensor:
        """Return the crop, uint8 (3, size, size). Raises VideoError if the track cannot be one of this video."""
        if frame.shape != self._picture:
            self._check_picture(*frame.shape[-2:])
            self._picture = frame.shape
        return resize_short_side(crop_frame(frame, self.boxes[number - self.first]), self.size)

    def _check_picture(self, height: int, width: int) -> None:
        left, top, right, bottom = self.boxes.T
        if not ((left < width) & (top < height) & (right > 0) & (bottom > 0)).any():
            raise VideoError(f"track {self.track.id}: all of its boxes are outside the picture of {width}x{height} pixels")
        if (largest := int((right - left).max())) > MAX_ENLARGEMENT * max(height, width):
            raise VideoError(f"track {self.track.id}: a box of {largest} pixels is too large for a picture of {width}x{height}")


def read_track(
    item: Item, sample: FrameSampler, size: int, *, target_fps: float | None = None
) -> tuple[Tensor, NDArray[np.int64]]:
    """Read the square crops of an item of a dataset that `sample` selects from the frames of its track.

    Args:
        item: with a track, and possibly a segment.
        sample: function from the number of frames to indices of any shape.
        size: side of the resized crops in pixels.
        target_fps: as in `decode.sample_frames`.

    Returns:
        The distinct crops, uint8 (N, 3, size, size), and for each selected index its position among them.

    Raises:
        VideoError, OSError: the video or the file of tracks cannot be read, or there is no such track.
    """
    crops = SquareCrops(track_of(item), size)
    if target_fps is not None:
        sample = at_frame_rate(sample, decode.header(item.path)[0], target_fps)
    indices = sample(len(crops))
    distinct, positions = np.unique(indices, return_inverse=True)
    try:
        frames = decode.read_frames(item.path, crops.first + distinct, crop=crops)
    except IndexError as error:
        raise VideoError(str(error)) from error
    return frames, positions.reshape(indices.shape)


def track_of(item: Item) -> Track:
    """Return the track of an item of a dataset, in its segment. Raises as `read_track` does."""
    first, last, where = 0, MAX_FRAME, ""
    if item.is_segment:
        _, _, first, end = decode.find_segment(item.path, item.start, item.end)
        last = end - 1
        where = f" in frames {first} to {last}"
    status = os.stat(item.tracks)
    try:
        tracks = _read_cached(item.tracks, status.st_size, status.st_mtime_ns)
    except ValueError as error:
        raise VideoError(str(error)) from error
    parts = [part for track in tracks if track.id == item.track and (part := track.between(first, last))]
    if not parts:
        raise VideoError(f"{item.tracks}: no track {item.track}{where}")
    if len(parts) > 1:
        raise VideoError(
            f"{item.tracks}: track {item.track} is absent for more than {MAX_GAP} frames after frame {parts[0].last}; "
            "choose a part by the columns start and end"
        )
    return parts[0]


@lru_cache(maxsize=64)
def _read_cached(path: str, size: int, mtime_ns: int) -> list[Track]:
    """Return the tracks of a file, of which a dataset has many rows. `size` and `mtime_ns` identify the content."""
    return read_tracks(path)
