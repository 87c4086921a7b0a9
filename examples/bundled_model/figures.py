"""Render a dataset of people: jointed figures that act alone or in pairs, before rooms and streets, and a camera that may move.

Clothes, proportions, backgrounds, bystanders, blur, noise, and the motion of the camera are random; the class says what the
figures do. `poses.py` has their movements.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from poses import ALONE, TOGETHER, Pose, Style, stand, walk

CLASSES = (*ALONE, *TOGETHER)
WIDTH, HEIGHT, FPS = 112, 84, 24
NUM_FRAMES = 32
TEMPOS = (0.6, 1.9)
"""Slowest and fastest tempo; tempos are drawn uniformly on a logarithmic scale."""

_OVERSAMPLING = 2
_MARGIN = 1.9  # size of the background, in pictures
Color = tuple[int, ...]


class _Body:
    """Clothes and proportions of a figure."""

    def __init__(self, rng: np.random.Generator) -> None:
        base = rng.uniform(20, 235)
        self.skin: Color = _color(np.array((200, 150, 120)) * rng.uniform(0.4, 1.2))
        self.top, self.trousers = (_color(base + rng.normal(0, 60) + rng.normal(0, 28, 3)) for _ in range(2))
        self.girth, self.leg, self.head = rng.uniform((0.7, 0.44, 0.055), (1.6, 0.53, 0.08))
        self.has_coat = rng.random() < 0.3

    def draw(self, pen: ImageDraw.ImageDraw, pose: Pose, facing: int, feet: NDArray[np.floating], size: float) -> None:
        """Draw the figure. `feet` is its place at x = y = 0 in pixels, `size` its height."""

        def along(angle: float) -> NDArray[np.floating]:
            return np.array((facing * np.sin(angle), np.cos(angle)))

        def limb(
            start: NDArray[np.floating], angles: tuple[float, float], length: float, width: float, colors: tuple[Color, Color]
        ) -> None:
            for angle, color in zip(angles, colors, strict=True):
                end = start + length / 2 * along(angle)
                _stroke(pen, start, end, width, color)
                start = end

        reach = max(np.cos(leg) + np.cos(leg - knee) for leg, knee in zip(pose.legs, pose.knees, strict=True)) / 2
        hip = feet + size * np.array((facing * pose.x, -pose.y - self.leg * reach))
        up = np.array((facing * np.sin(pose.lean), -np.cos(pose.lean)))
        shoulder = hip + (0.84 - self.leg) * size * up
        leg_width, arm_width, torso = (share * size * self.girth for share in (0.085, 0.06, 0.15))
        for near in (1, 0):
            top, trousers = (_color(0.75 * np.array(c)) if near else c for c in (self.top, self.trousers))
            if not near:
                _stroke(pen, hip, shoulder, torso, self.top)
                _disc(pen, hip, torso / 2, self.top if self.has_coat else self.trousers)
                _disc(pen, shoulder + 0.11 * size * up, self.head * size, self.skin)
            leg, arm = pose.legs[near], 0.3 * pose.lean + pose.arms[near]
            limb(hip, (leg, leg - pose.knees[near]), self.leg * size, leg_width, (trousers, trousers))
            limb(shoulder, (arm, arm + pose.elbows[near]), 0.4 * size, arm_width, (top, self.skin))


def _color(values: NDArray[np.floating]) -> Color:
    return tuple(int(value) for value in np.clip(values, 0, 255))


def _disc(pen: ImageDraw.ImageDraw, center: NDArray[np.floating], radius: float, color: Color) -> None:
    pen.ellipse((*(center - radius), *(center + radius)), fill=color)


def _stroke(pen: ImageDraw.ImageDraw, start: NDArray[np.floating], end: NDArray[np.floating], width: float, color: Color) -> None:
    pen.line((*start, *end), fill=color, width=max(1, int(width)))
    for place in (start, end):
        _disc(pen, place, width / 2, color)


@dataclass(frozen=True)
class _Actor:
    """A body with its place in the scene (pixels), its height (pixels), and its pose and direction in each frame."""

    body: _Body
    place: NDArray[np.floating]
    size: float
    poses: list[tuple[Pose, int]]


def _actors(name: str, rng: np.random.Generator, times: Sequence[float]) -> list[_Actor]:
    """Return bystanders and the figures of the class, those in front last."""
    screen, actors = np.array((WIDTH, HEIGHT)), []
    for _ in range(rng.choice((0, 0, 1, 2))):
        act = walk if rng.random() < 0.3 else stand
        style, facing, size = Style.random(rng), int(rng.choice((-1, 1))), rng.uniform(0.3, 0.6) * HEIGHT
        place = rng.uniform((-0.1, 0.6), (1.1, 0.95)) * screen
        actors.append(_Actor(_Body(rng), place, size, [(act(t, style), facing) for t in times]))
    facing, size = int(rng.choice((-1, 1))), rng.uniform(0.42, 0.85) * HEIGHT
    place = rng.uniform((0.35, 0.78), (0.65, 1.02)) * screen
    one, two = Style.random(rng), Style.random(rng)
    moments = [((ALONE[name](t, one), 1),) if name in ALONE else TOGETHER[name](t, one, two) for t in times]
    middle = float(np.mean([pose.x * way for moment in (moments[0], moments[-1]) for pose, way in moment]))
    for figure in reversed(range(len(moments[0]))):
        poses = [(replace(pose, x=pose.x - way * middle), way * facing) for pose, way in (moment[figure] for moment in moments)]
        actors.append(_Actor(_Body(rng), place, size, poses))
    return actors


def _camera(rng: np.random.Generator, num_frames: int) -> NDArray[np.floating]:
    """Return the offset of the picture in pixels and its zoom for each frame, (N, 3)."""
    kind = rng.choice(("static", "pan", "shake", "zoom"), p=(0.45, 0.25, 0.2, 0.1))
    share, path = np.linspace(-0.5, 0.5, num_frames), np.zeros((num_frames, 3))
    path[:, 2] = rng.uniform(0.9, 1.25)
    if kind == "pan":
        path[:, :2] = share[:, None] * rng.uniform((-0.35, -0.12), (0.35, 0.12)) * (WIDTH, HEIGHT)
    if kind == "zoom":
        path[:, 2] *= np.exp(share * rng.uniform(-0.35, 0.35))
    if kind in ("pan", "shake"):
        steps = rng.normal(0, rng.uniform(0.4, 2.2), (num_frames + 4, 2))
        path[:, :2] += sum(steps[i : i + num_frames] * weight for i, weight in enumerate((0.06, 0.25, 0.38, 0.25, 0.06)))
    return path


def _background(rng: np.random.Generator) -> Image.Image:
    """Return blotches, a floor, and boxes, discs, and lines in place of furniture, doors, and cars."""
    width, height = int(WIDTH * _MARGIN), int(HEIGHT * _MARGIN)
    noise = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((2, 30), (5, 22), (13, 14), (40, 8)):
        layer = 0.35 * rng.uniform(-1, 1, (cells, cells, 3)) + 0.65 * rng.uniform(-1, 1, (cells, cells, 1))
        for channel in range(3):
            small = Image.fromarray(layer[:, :, channel].astype(np.float32))
            noise[:, :, channel] += (
                strength * rng.uniform(0.3, 1.2) * np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
            )
    image = Image.fromarray((noise + rng.uniform(50, 190)).clip(0, 255).astype(np.uint8))
    pen, base = ImageDraw.Draw(image), rng.uniform(40, 210)

    def color() -> Color:
        return _color(base + rng.normal(0, 45) + rng.normal(0, 18, 3))

    if rng.random() < 0.8:
        floor = rng.uniform(0.45, 0.75) * height
        pen.rectangle((0, floor, width, height), fill=color())
        for x in rng.uniform(0, width, rng.integers(0, 6)):
            pen.line((x, floor, x + rng.normal(0, 80), height), fill=color(), width=int(rng.integers(1, 4)))
    for _ in range(rng.integers(2, 12)):
        x, y, a, b = rng.uniform((0, 0, 6, 6), (width, 0.8 * height, 0.3 * width, 0.4 * height))
        draw = pen.rectangle if rng.random() < 0.75 else pen.ellipse
        draw((x, y, x + a, y + b), fill=color())
    for _ in range(rng.integers(0, 8)):
        x, y = rng.uniform((0, 0), (width, height))
        ends = (x, 0, x, height) if rng.random() < 0.5 else (0, y, width, y)
        pen.line(ends, fill=color(), width=int(rng.integers(1, 4)))
    return image


def render(label: int, *, seed: int | Sequence[int], num_frames: int = NUM_FRAMES) -> NDArray[np.uint8]:
    """Render a clip. The same arguments always give the same clip.

    Args:
        label: index of the action in `CLASSES`.
        seed: seed of everything else, the tempo included.
        num_frames: number of frames, T, of which 24 are a second.

    Returns:
        uint8 RGB (T, HEIGHT, WIDTH, 3).
    """
    if label not in range(len(CLASSES)):
        raise ValueError(f"label must be in 0..{len(CLASSES) - 1}, got {label!r}")
    rng = np.random.default_rng([label, *np.atleast_1d(seed)])
    background, tempo = _background(rng), float(np.exp(rng.uniform(*np.log(TEMPOS))))
    times = [float(t) for t in rng.uniform(0, 0.3) + tempo * np.arange(num_frames) / FPS]
    actors, path = _actors(CLASSES[label], rng, times), _camera(rng, num_frames)
    blur, noise, is_gray = float(rng.choice((0, 0, 0.5, 0.9))), float(rng.choice((0, 2, 5))), rng.random() < 0.2
    center, k = np.array((WIDTH, HEIGHT)) / 2, _OVERSAMPLING
    frames = np.empty((num_frames, HEIGHT, WIDTH, 3), np.uint8)
    for i, (dx, dy, zoom) in enumerate(path):
        left, top = (_MARGIN * center - center / zoom) + np.array((dx, dy)) / zoom
        scale = 1 / (zoom * k)
        view = (scale, 0, left, 0, scale, top)
        image = background.transform((WIDTH * k, HEIGHT * k), Image.Transform.AFFINE, view, Image.Resampling.BILINEAR)
        pen = ImageDraw.Draw(image)
        for actor in actors:
            pose, facing = actor.poses[i]
            place = k * ((actor.place - center) * zoom + center - (dx, dy))
            actor.body.draw(pen, pose, facing, place, actor.size * zoom * k)
        picture = np.asarray(image.filter(ImageFilter.GaussianBlur(blur * k)).reduce(k), dtype=np.float64)
        picture = picture + rng.normal(0, noise, (HEIGHT, WIDTH, 1))
        frames[i] = (picture.mean(axis=-1, keepdims=True) if is_gray else picture).clip(0, 255)
    return frames


def write_dataset(root: str | os.PathLike[str], clips_per_class: int, *, seed: int) -> None:
    """Write clips of every class to `root/CLASS/000123.mp4`, which `VideoFolder` can read. Existing files are kept.

    Args:
        root: folder of the dataset.
        clips_per_class: number of clips of each class.
        seed: use different seeds for different splits.
    """
    from tpn.video.encode import write_video  # only writing needs PyAV

    for label, name in enumerate(CLASSES):
        for i in range(clips_per_class):
            path = Path(root, name, f"{i:06d}.mp4")
            if not path.exists():
                write_video(path, render(label, seed=(seed, i)), fps=FPS)
