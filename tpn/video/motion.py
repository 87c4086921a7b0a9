"""Render a dataset of motions: classes that differ only over time, at tempos over an eightfold range.

A textured background shows one shape. Its position, size, angle and color have the same distribution in a single frame of every
class; the class says which of them changes, and how. The picture wraps around: a shape that leaves on one side returns on the
other. One cycle of a motion (once across the picture, one turn, one swing, ...) takes `SLOWEST_CYCLE / tempo` frames, with tempos
from 1 to 8.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tpn.files import StrPath

CLASSES = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "turning clockwise",
    "turning counter-clockwise",
    "growing",
    "shrinking",
    "circling clockwise",
    "circling counter-clockwise",
    "swinging sideways",
    "swinging up and down",
    "blinking",
    "jumping",
)
MIRRORED = (
    ("moving left", "moving right"),
    ("turning clockwise", "turning counter-clockwise"),
    ("circling clockwise", "circling counter-clockwise"),
)
"""Pairs of classes that a horizontal flip exchanges."""

Order = Literal["as rendered", "shuffled", "one frame"]

SLOWEST_CYCLE = 64
"""Frames per cycle at tempo 1."""
WIDTH, HEIGHT, FPS = 112, 112, 24

_SHAPES = (  # corners relative to the size; without rotational symmetry, so that every angle looks different
    ((-1.0, -0.35), (0.1, -0.35), (0.1, -0.8), (1.0, 0.0), (0.1, 0.8), (0.1, 0.35), (-1.0, 0.35)),
    ((-0.7, -1.0), (0.0, -1.0), (0.0, 0.4), (0.9, 0.4), (0.9, 1.0), (-0.7, 1.0)),
    ((-0.9, -0.7), (1.0, 0.0), (-0.9, 0.7)),
    ((-0.6, -1.0), (0.8, -0.8), (0.8, 0.0), (0.0, 0.1), (0.0, 1.0), (-0.6, 1.0)),
)
_LOG_SIZES = np.log((9.0, 22.0))  # smallest and largest
_OVERSAMPLING = 3


@dataclass(frozen=True)
class State:
    """The shape in one frame: center (pixels), log of the size (pixels), angle (radians, clockwise), hue (0..1)."""

    x: float
    y: float
    log_size: float
    angle: float
    hue: float


def render(label: int, *, tempo: float, seed: int | Sequence[int], num_frames: int = 64) -> NDArray[np.uint8]:
    """Render a clip of a motion. The same arguments always give the same clip.

    Args:
        label: index of the motion in `CLASSES`.
        tempo: speed of the motion, usually 1 to 8: a cycle takes `SLOWEST_CYCLE / tempo` frames.
        seed: seed of all other properties, such as background, shape, position and phase.
        num_frames: number of frames, T.

    Returns:
        uint8 RGB (T, HEIGHT, WIDTH, 3).
    """
    background, shape, states = _scene(label, tempo, seed, num_frames)
    return np.stack([_draw(background, shape, state) for state in states])


def masks(label: int, *, tempo: float, seed: int | Sequence[int], num_frames: int = 64) -> NDArray[np.bool_]:
    """Return the pixels that the shape covers in the clip that `render` returns for the same arguments.

    Returns:
        bool (num_frames, HEIGHT, WIDTH), True where at least half of a pixel is covered.
    """
    _, shape, states = _scene(label, tempo, seed, num_frames)
    return np.stack([np.asarray(_mask(shape, state)) >= 128 for state in states])


def render_sequence(parts: Sequence[tuple[int, float, int]], *, seed: int) -> NDArray[np.uint8]:
    """Render one shape that performs several motions in turn.

    Args:
        parts: (label, tempo, number of frames) of each motion; see `render`.
        seed: seed of all other properties.

    Returns:
        uint8 RGB (T, HEIGHT, WIDTH, 3), where T is the total number of frames.
    """
    rng = np.random.default_rng(seed)
    background, shape, state = _background(rng), _SHAPES[rng.integers(len(_SHAPES))], _random_state(rng)
    frames = []
    for label, tempo, num_frames in parts:
        state_at = _trajectory(label, state, rng)
        states = [state_at(i * tempo / SLOWEST_CYCLE) for i in range(num_frames)]
        frames += [_draw(background, shape, state) for state in states]
        state = states[-1]
    return np.stack(frames)


def write_dataset(
    root: StrPath,
    clips_per_class: int,
    *,
    seed: int,
    tempos: tuple[float, float] = (1.0, 8.0),
    num_frames: int = 64,
    order: Order = "as rendered",
) -> None:
    """Write clips of every class to `root/CLASS/000123.mp4`, which `VideoFolder` can read. Existing files are kept.

    Args:
        root: folder of the dataset.
        clips_per_class: number of clips of each class.
        seed: use different seeds for different splits.
        tempos: lowest and highest tempo. Tempos are drawn uniformly on a logarithmic scale.
        num_frames: number of frames per clip.
        order: "as rendered"; or, for controls without motion, "shuffled" (frames in random order) or "one frame" (the first frame
            repeated).
    """
    from tpn.video.encode import write_video  # only writing needs PyAV

    if order not in get_args(Order):
        raise ValueError(f"order must be one of {', '.join(map(repr, get_args(Order)))}, got {order!r}")
    low, high = np.log(tempos)
    for label, name in enumerate(CLASSES):
        for i in range(clips_per_class):
            path = Path(root, name, f"{i:06d}.mp4")
            if not path.exists():
                rng = np.random.default_rng([seed, label, i])
                tempo = float(np.exp(rng.uniform(low, high)))
                frames = render(label, tempo=tempo, seed=(seed, i), num_frames=num_frames)
                if order != "as rendered":
                    frames = frames[rng.permutation(num_frames) if order == "shuffled" else np.zeros(num_frames, int)]
                write_video(path, frames, fps=FPS)


def _scene(
    label: int, tempo: float, seed: int | Sequence[int], num_frames: int
) -> tuple[Image.Image, Sequence[tuple[float, float]], list[State]]:
    """Return the background of a clip, the corners of its shape, and the state of the shape in each frame."""
    if label not in range(len(CLASSES)):
        raise ValueError(f"label must be in 0..{len(CLASSES) - 1}, got {label!r}")
    if tempo <= 0 or num_frames < 1:
        raise ValueError(f"tempo and num_frames must be positive, got {tempo} and {num_frames}")
    rng = np.random.default_rng([label, *np.atleast_1d(seed)])
    background, shape = _background(rng), _SHAPES[rng.integers(len(_SHAPES))]
    state_at = _trajectory(label, _random_state(rng), rng)
    phase = rng.uniform()
    return background, shape, [state_at(phase + i * tempo / SLOWEST_CYCLE) for i in range(num_frames)]


def _random_state(rng: np.random.Generator) -> State:
    x, y = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT)
    return State(x, y, rng.uniform(*_LOG_SIZES), rng.uniform(0, 2 * np.pi), rng.uniform())


def _trajectory(label: int, start: State, rng: np.random.Generator) -> Callable[[float], State]:
    """Return a function from time in cycles to the state of the shape."""
    turn = 2 * np.pi
    radius = rng.uniform(0.15, 0.25) * HEIGHT
    others = [_random_state(rng) for _ in range(64)]

    def slide(x: float, y: float) -> Callable[[float], State]:
        return lambda t: replace(start, x=start.x + x * t * WIDTH, y=start.y + y * t * HEIGHT)

    def spin(direction: int) -> Callable[[float], State]:
        return lambda t: replace(start, angle=start.angle + direction * turn * t)

    def scale(direction: int) -> Callable[[float], State]:
        return lambda t: replace(start, log_size=_LOG_SIZES[0] + (direction * t % 1) * (_LOG_SIZES[1] - _LOG_SIZES[0]))

    def circle(direction: int) -> Callable[[float], State]:
        return lambda t: replace(start, x=start.x + radius * np.cos(turn * t), y=start.y + direction * radius * np.sin(turn * t))

    def swing(x: float, y: float) -> Callable[[float], State]:
        return lambda t: replace(start, x=start.x + x * np.sin(turn * t), y=start.y + y * np.sin(turn * t))

    def blink(t: float) -> State:
        return replace(start, hue=start.hue if t % 1 < 0.5 else others[0].hue)

    def jump(t: float) -> State:
        target = others[int(2 * t) % len(others)]
        return replace(start, x=target.x, y=target.y)

    return (
        slide(-1, 0),
        slide(1, 0),
        slide(0, -1),
        slide(0, 1),
        spin(1),
        spin(-1),
        scale(1),
        scale(-1),
        circle(1),
        circle(-1),
        swing(1.5 * radius, 0),
        swing(0, 1.5 * radius),
        blink,
        jump,
    )[label]


def _background(rng: np.random.Generator) -> Image.Image:
    """Return a texture of blotches of several sizes, with little color."""
    image = np.zeros((HEIGHT, WIDTH, 3))
    for cells, strength in ((3, 30), (8, 20), (24, 14)):
        noise = rng.uniform(-1, 1, (cells, cells, 3)) * 0.4 + rng.uniform(-1, 1, (cells, cells, 1)) * 0.6
        for c in range(3):
            layer = Image.fromarray(noise[:, :, c].astype(np.float32)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            image[:, :, c] += strength * np.asarray(layer)
    return Image.fromarray((image + rng.uniform(70, 170)).clip(0, 255).astype(np.uint8))


def _draw(background: Image.Image, shape: Sequence[tuple[float, float]], state: State) -> NDArray[np.uint8]:
    color = Image.new("HSV", (1, 1), (int(state.hue * 255), 230, 235)).convert("RGB").resize((WIDTH, HEIGHT))
    return np.asarray(Image.composite(color, background, _mask(shape, state)))


def _mask(shape: Sequence[tuple[float, float]], state: State) -> Image.Image:
    """Return the coverage of each pixel by the shape, 0..255. Parts beyond an edge appear on the opposite side."""
    k = _OVERSAMPLING
    mask = Image.new("L", (WIDTH * k, HEIGHT * k))
    pen = ImageDraw.Draw(mask)
    size, cos, sin = np.exp(state.log_size), np.cos(state.angle), np.sin(state.angle)
    corners = [(size * (cos * x - sin * y), size * (sin * x + cos * y)) for x, y in shape]
    for dx in (-WIDTH, 0, WIDTH):
        for dy in (-HEIGHT, 0, HEIGHT):
            x, y = state.x % WIDTH + dx, state.y % HEIGHT + dy
            pen.polygon([(k * (x + a), k * (y + b)) for a, b in corners], fill=255)
    return mask.resize((WIDTH, HEIGHT), Image.Resampling.BOX)
