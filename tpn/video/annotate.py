"""Draw tracks with captions into a copy of a video."""

import math
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from tpn.errors import printable
from tpn.files import StrPath
from tpn.video import decode
from tpn.video.encode import write_video
from tpn.video.tracks import Track

SUFFIXES = (".mp4", ".mkv", ".mov")
"""Suffixes of the files that `annotate` writes."""

FONTS = ("DejaVuSans.ttf", "Arial.ttf", "arial.ttf")
"""Fonts of the system, in order of preference. Without any, Pillow's own font is used, which has only ASCII."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Label = tuple[int, Sequence[float], str]
"""An id, which gives the color; a box in pixels, left, top, right, bottom; and a text."""


@dataclass(frozen=True)
class Caption:
    """The text of a track in the frames `first` to `last`, both included."""

    first: int
    last: int
    text: str


def annotate(
    video: StrPath,
    output: StrPath,
    captions: Sequence[tuple[Track, Sequence[Caption]]],
    *,
    fps: float,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a copy of a video, without sound, with the boxes of tracks, their ids, and captions.

    Frames are read, drawn, and encoded one by one. Boxes of missing frames are interpolated.

    Args:
        video: file to read.
        output: .mp4, .mkv, or .mov file to write, with H.264, or MPEG-4 where FFmpeg was built without x264.
        captions: each track with its captions in the order of their frames; in other frames only its id is drawn.
        fps: frames per second of the copy.
        progress: called with the number of frames written.

    Raises:
        VideoError, OSError: the video cannot be read, or the output cannot be written.
        ValueError: the output has another suffix, or is the video itself.
    """
    check_output(video, output)
    write_video(output, _annotated(video, captions, progress), fps=fps, deterministic=False)


def check_output(video: StrPath, output: StrPath) -> None:
    """Raise ValueError if `annotate` cannot write to `output`."""
    if Path(output).suffix.lower() not in SUFFIXES:
        raise ValueError(f"the annotated video must end in {', '.join(SUFFIXES)}, got {os.fspath(output)!r}")
    if os.path.exists(output) and os.path.samefile(video, output):
        raise ValueError(f"{video}: the annotated video would replace the video; choose another file")


def _annotated(
    video: StrPath, captions: Sequence[tuple[Track, Sequence[Caption]]], progress: Callable[[int], None] | None
) -> Generator[NDArray[np.uint8]]:
    waiting = sorted(captions, key=lambda each: each[0].first, reverse=True)
    visible: list[tuple[Track, NDArray[np.float64], Sequence[Caption]]] = []
    sides = [np.median(track.boxes[:, 2:] - track.boxes[:, :2]) for track, _ in captions]
    max_size = np.median(sides) / 3 if sides else math.inf
    for number, frame in enumerate(decode.iter_frames(video)):
        while waiting and waiting[-1][0].first <= number:
            track, texts = waiting.pop()
            visible.append((track, track.filled(), texts))
        visible = [each for each in visible if each[0].last >= number]
        labels = []
        for track, boxes, texts in visible:
            text = next((each.text for each in texts if each.first <= number <= each.last), "")
            labels.append((track.id, boxes[number - track.first].tolist(), f"{track.id}  {text}".rstrip()))
        yield draw_labels(frame.permute(1, 2, 0).numpy(), labels, max_size)
        if progress is not None:
            progress(number + 1)


def draw_labels(image: NDArray[np.uint8], labels: Sequence[Label], max_size: float = math.inf) -> NDArray[np.uint8]:
    """Return a copy of an image, uint8 (H, W, 3), with boxes and texts: above the box, or in it at the top of the picture.

    The height of the font is a thirtieth of the shorter side of the image, at most `max_size` pixels, and at least 10.
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    pen = ImageDraw.Draw(picture)
    width, height = picture.size
    size = max(10, int(min(width / 30, height / 30, max_size)))
    font = _font(size)
    line, pad = max(2, size // 8), size // 5  # H.264 halves the resolution of colors: a line of one pixel fades
    inside = [each for each in labels if each[1][0] < width and each[1][1] < height and each[1][2] > 0 and each[1][3] > 0]
    for id, box, _ in inside:
        left, top, right, bottom = (min(max(round(value), -line), max(width, height) + line) for value in box)
        pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=color_of(id), width=line)
    for id, box, text in inside:
        text = _fit(printable(text), width - 2 * pad, font)
        label_width = round(font.getlength(text)) + 2 * pad
        label_height = round(font.getbbox("Ag", anchor="la")[3]) + 2 * pad
        x, top = round(min(max(box[0], 0), width - label_width)), round(box[1])
        y = top - label_height if top >= label_height else max(top, 0)
        pen.rectangle((x, y, x + label_width - 1, y + label_height - 1), fill=color_of(id))
        red, green, blue = color_of(id)
        ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 120 else "white"
        pen.text((x + pad, y + pad), text, fill=ink, font=font, anchor="la")
    return np.asarray(picture)


def color_of(id: int) -> tuple[int, ...]:
    """Return the color of a track, RGB 0..255. Successive ids have different hues."""
    return ImageColor.getrgb(f"hsv({id * 137.508 % 360:.0f}, 85%, 95%)")


@lru_cache(maxsize=8)
def _font(size: int) -> Font:
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _fit(text: str, width: int, font: Font) -> str:
    """Shorten a text that is wider than so many pixels."""
    shortened = text
    while text and font.getlength(shortened) > width:
        text = text[:-1]
        shortened = f"{text}…"
    return shortened
