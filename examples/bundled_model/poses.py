"""What the figures of `figures.py` do: functions from time to poses.

Lengths are in heights of a figure, times in seconds at a tempo of 1, angles in radians: limbs hang down at 0, the torso stands up
at 0, and positive angles lean or reach forward.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

_TURN = 2 * np.pi
Limbs = tuple[float, float]  # near and far


@dataclass(frozen=True)
class Pose:
    """A figure: where its feet are, how its torso leans, and the angles of its near and far limbs at the joints."""

    x: float = 0.0
    y: float = 0.0
    lean: float = 0.0
    arms: Limbs = (0.15, -0.15)
    elbows: Limbs = (0.2, 0.2)
    legs: Limbs = (0.06, -0.06)
    knees: Limbs = (0.03, 0.03)


@dataclass(frozen=True)
class Style:
    """How a figure does something: frequency, phase, amplitude, start of what happens once, and two free numbers in 0..1."""

    frequency: float
    phase: float
    amplitude: float
    start: float
    a: float
    b: float

    @classmethod
    def random(cls, rng: np.random.Generator) -> "Style":
        low, high = (0.7, 0.0, 0.8, 0.05, 0.0, 0.0), (1.4, _TURN, 1.25, 0.6, 1.0, 1.0)
        return cls(*rng.uniform(low, high))

    def wave(self, t: float, speed: float = 1.0) -> float:
        """Return a sine of time, -1..1."""
        return float(np.sin(_TURN * speed * self.frequency * t + self.phase))

    def cycle(self, t: float, speed: float) -> float:
        """Return the share of a cycle that has passed, 0..1."""
        return (speed * self.frequency * t + self.phase / _TURN) % 1

    def progress(self, t: float, seconds: float, delay: float = 0.0) -> float:
        """Return how much of a movement that happens once is done, 0..1."""
        u = np.clip((t - self.start) * self.frequency / seconds - delay / seconds, 0, 1)
        return float(u * u * (3 - 2 * u))


Action = Callable[[float, Style], Pose]
Pair = tuple[tuple[Pose, int], tuple[Pose, int]]  # poses, and the directions that they face


def stand(t: float, style: Style) -> Pose:
    sway = 0.03 * float(np.sin(_TURN * 0.3 * t + style.phase))
    arms = (0.1 + 0.6 * style.a + 0.05 * style.wave(t), -0.1 + 0.04 * style.wave(t))
    return Pose(lean=sway, arms=arms, elbows=(0.2 + 1.2 * style.b, 0.2))


def _stride(t: float, style: Style, *, speed: float, steps: float, swing: float, bend: float, lean: float, elbow: float) -> Pose:
    angle = steps * _TURN * style.frequency * t + style.phase
    s, c, swing = float(np.sin(angle)), float(np.cos(angle)), swing * style.amplitude
    return Pose(
        x=speed * style.amplitude * style.frequency * t,
        y=0.03 * abs(c),
        lean=lean,
        arms=(-1.1 * swing * s, 1.1 * swing * s),
        elbows=(elbow, elbow),
        legs=(swing * s, -swing * s),
        knees=(bend * max(0.0, c), bend * max(0.0, -c)),
    )


def walk(t: float, style: Style) -> Pose:
    return _stride(t, style, speed=0.75, steps=0.95, swing=0.45, bend=0.5, lean=0.06, elbow=0.3)


def _run(t: float, style: Style) -> Pose:
    return _stride(t, style, speed=1.9, steps=1.5, swing=0.75, bend=1.1, lean=0.25, elbow=1.5)


def _jump(t: float, style: Style) -> Pose:
    u = style.cycle(t, 0.9)
    up = float(np.sin(np.pi * np.clip((u - 0.3) / 0.5, 0, 1)))
    crouch = max(0.0, 1 - abs(u - 0.2) / 0.18) + 0.6 * max(0.0, 1 - abs(u - 0.86) / 0.1)
    arm, knee = 2.4 * up - 0.5 * crouch, 1.4 * crouch + 0.3 * up
    return Pose(
        y=0.45 * up * style.amplitude - 0.16 * crouch,
        lean=0.3 * crouch,
        arms=(arm, arm),
        legs=(0.75 * crouch, 0.65 * crouch),
        knees=(knee, knee),
    )


def _wave(t: float, style: Style) -> Pose:
    return replace(stand(t, style), arms=(2.5 + 0.15 * style.a, -0.1), elbows=(0.5 + 0.7 * style.wave(t, 1.4), 0.2))


def _punch(t: float, style: Style) -> Pose:
    s = style.wave(t, 1.3)
    a, b = max(0.0, s) ** 0.7, max(0.0, -s) ** 0.7
    return Pose(
        x=0.05 * (a + b),
        lean=0.1 + 0.15 * (a + b),
        arms=(0.55 + a, 0.55 + b),
        elbows=(2.1 * (1 - a), 2.1 * (1 - b)),
        legs=(0.35, -0.3),
        knees=(0.25, 0.25),
    )


def _kick(t: float, style: Style) -> Pose:
    u = style.cycle(t, 0.8)
    high = float(np.sin(np.pi * np.clip((u - 0.2) / 0.5, 0, 1)))
    bend = max(0.0, float(np.sin(_TURN * np.clip((u - 0.15) / 0.6, 0, 1) + 0.3)))
    return Pose(
        lean=-0.3 * high,
        arms=(0.4 - 0.6 * high, 0.3 + 0.5 * high),
        elbows=(1.2, 1.2),
        legs=(1.5 * high * style.amplitude - 0.3 * (u < 0.3), -0.1),
        knees=(1.3 * bend * (1 - high), 0.1),
    )


def _fall(t: float, style: Style) -> Pose:
    u, way = style.progress(t, 0.7), 1 if style.a > 0.5 else -1
    return Pose(
        lean=way * 1.5 * u,
        arms=(0.15 + way * 1.4 * u * (1.2 - u), -0.1 + way * u),
        legs=((1.35 * way + 0.2) * u, 1.2 * way * u),
        knees=(0.5 * float(np.sin(np.pi * u)), 0.2),
    )


def _bend(t: float, style: Style) -> Pose:
    u = 0.5 - 0.5 * float(np.cos(_TURN * 0.45 * style.frequency * t + style.phase))
    knee = 0.5 * u * style.a
    return Pose(y=-0.05 * u, lean=1.5 * u, arms=(0.3 + 1.2 * u, 0.2 + 1.1 * u), legs=(0.25 * u, 0.15 * u), knees=(knee, knee))


def _sit_down(t: float, style: Style) -> Pose:
    u = style.progress(t, 0.9)
    return Pose(
        y=-0.02 * u,
        lean=0.5 * float(np.sin(np.pi * u)),
        arms=(0.2 + 0.6 * u, 0.6 * u),
        legs=(1.4 * u, 1.3 * u),
        knees=(1.45 * u, 1.35 * u),
    )


def _throw(t: float, style: Style) -> Pose:
    u = style.cycle(t, 0.7)
    arm = 2.9 - 2.2 * float(np.clip((u - 0.5) / 0.15, 0, 1)) if u > 0.15 else 0.7 + 2.2 * u / 0.15
    return Pose(
        lean=0.25 * float(np.sin(_TURN * (u - 0.45))), arms=(arm, 0.5), elbows=(1.2 if u < 0.5 else 0.2, 0.6), legs=(0.35, -0.35)
    )


def _jumping_jack(t: float, style: Style) -> Pose:
    u = 0.5 - 0.5 * float(np.cos(_TURN * style.frequency * t + style.phase))
    arm, leg = 0.1 + 2.7 * u, 0.05 + 0.45 * u
    return Pose(y=0.1 * float(np.sin(np.pi * u)), arms=(arm, -arm), elbows=(0.05, 0.05), legs=(leg, -leg))


def _blend(p: Pose, q: Pose, share: float) -> Pose:
    """Return a pose between two, all of `q` at 1."""
    pairs = ((getattr(p, name), getattr(q, name)) for name in Pose.__dataclass_fields__)
    mixed: list[Any] = [
        tuple((1 - share) * a + share * b for a, b in zip(u, v, strict=True))
        if isinstance(u, tuple)
        else (1 - share) * u + share * v
        for u, v in pairs
    ]
    return Pose(*mixed)


def _hug(t: float, one: Style, two: Style) -> Pair:
    done, until = one.progress(t, 0.7), min(t, one.start + 0.7 / one.frequency)
    held = replace(stand(t, one), arms=(1.3, 1.1), elbows=(0.7, 0.7))
    place = -0.14 - (1 - done) * (0.8 + 0.5 * one.a)
    a, b = (replace(_blend(walk(until, style), held, done), x=place) for style in (one, two))
    return (a, 1), (b, -1)


def _push(t: float, one: Style, two: Style) -> Pair:
    reach, back = one.progress(t, 0.25), one.progress(t, 0.7, delay=0.2)
    ahead = replace(stand(t, one), lean=0.35, arms=(1.5, 1.4), elbows=(0.05, 0.05), legs=(0.4, -0.4))
    a = _blend(stand(t, one), ahead, reach * (1 - 0.6 * back))
    hit = replace(two, start=one.start + 0.3 / one.frequency, a=0.0)
    falls = two.a > 0.6
    b = _blend(stand(t, two), _fall(t, hit) if falls else walk(1.5 * t, two), 1.0 if falls else float(np.sin(np.pi * back)))
    b = replace(b, x=-0.36 - 0.7 * back * (0.5 + two.b), lean=b.lean - 0.35 * float(np.sin(np.pi * back)))
    return (replace(a, x=-0.36 + 0.1 * reach), 1), (b, -1)


def _fight(t: float, one: Style, two: Style) -> Pair:
    blows = (_punch, _kick, _punch)
    drift = 0.15 * float(np.sin(_TURN * 0.45 * t + one.phase)) + 0.3 * float(np.sin(_TURN * 0.2 * t + two.phase))
    gap = 0.27 + 0.14 * float(np.sin(_TURN * 0.6 * one.frequency * t + two.phase))
    poses = []
    for turn, (style, side) in enumerate(((one, 1), (two, -1))):
        pose = blows[(int(0.7 * style.frequency * t + style.phase) + turn) % 3](t, style)
        lean = pose.lean + 0.15 * float(np.sin(_TURN * (0.8 - 0.1 * turn) * t + turn))
        poses.append((replace(pose, x=pose.x + side * drift - gap, lean=lean), side))
    return poses[0], poses[1]


def _wrestle(t: float, one: Style, two: Style) -> Pair:
    drift, tilt = 0.25 * one.wave(t, 0.35), 0.35 * two.wave(t, 0.6)
    down = one.progress(t, 0.9, delay=0.3) if one.b > 0.5 else 0.0
    lean, legs = 0.55 + 0.2 * one.wave(t, 0.9), (0.4 + 0.9 * down, -0.5 - 0.8 * down)
    hold = Pose(lean=lean, arms=(1.25, 1.0), elbows=(0.6, 0.5), legs=legs, knees=(0.5, 0.3))
    a = replace(hold, x=drift - 0.24, lean=hold.lean + tilt + 0.8 * down)
    b = replace(hold, x=-drift - 0.24, lean=hold.lean - tilt - 1.6 * down)
    return (a, 1), (b, -1)


def _kick_someone(t: float, one: Style, two: Style) -> Pair:
    u, back = one.cycle(t, 0.8), max(0.0, one.wave(t - 0.12, 0.8))
    hurt = replace(stand(t, two), lean=0.5 * back, arms=(0.9 * back, 0.7 * back), elbows=(1.0, 1.0))
    return (replace(_kick(t, one), x=-0.42 + 0.05 * u), 1), (replace(hurt, x=-0.42 - 0.15 * back), -1)


def _shake_hands(t: float, one: Style, two: Style) -> Pair:
    done, shake = one.progress(t, 0.7), 0.12 * float(np.sin(_TURN * 1.6 * one.frequency * t))
    arms, elbows = (0.1 + (0.9 + shake) * done, -0.1), (0.2 + 0.35 * done, 0.2)
    place = -0.3 - 0.6 * (1 - done) * (0.8 + 0.5 * one.a)
    a, b = (replace(stand(t, style), x=place, arms=arms, elbows=elbows) for style in (one, two))
    return (a, 1), (b, -1)


def _talk(t: float, one: Style, two: Style) -> Pair:
    poses = []
    for style in (one, two):
        arm = 0.5 + 0.35 * style.wave(t, 0.9) * style.b
        poses.append(
            replace(stand(t, style), x=-0.35 - 0.2 * one.a, arms=(arm, 0.1), elbows=(1.2 + 0.4 * style.wave(t, 1.1), 0.4))
        )
    return (poses[0], 1), (poses[1], -1)


def _pass(t: float, one: Style, two: Style) -> Pair:
    start = 0.6 * (1.6 + one.a)
    a, b = walk(t, one), walk(t, two)
    return (replace(a, x=a.x - start), 1), (replace(b, x=b.x - start), -1)


def _side_by_side(action: Action, gap: float) -> Callable[[float, Style, Style], Pair]:
    def act(t: float, one: Style, two: Style) -> Pair:
        a, b = action(t, one), action(t, two)
        place = a.x - 0.6 * one.amplitude
        return (replace(a, x=place), 1), (replace(b, x=place + gap + 0.2 * one.a), 1)

    return act


ALONE: Mapping[str, Action] = {
    "standing": stand,
    "walking": walk,
    "running": _run,
    "leaping": _jump,
    "waving": _wave,
    "punching": _punch,
    "kicking": _kick,
    "falling": _fall,
    "bending": _bend,
    "sitting down": _sit_down,
    "throwing": _throw,
    "jumping jacks": _jumping_jack,
}
TOGETHER: Mapping[str, Callable[[float, Style, Style], Pair]] = {
    "hugging": _hug,
    "pushing": _push,
    "fighting": _fight,
    "wrestling": _wrestle,
    "kicking someone": _kick_someone,
    "shaking hands": _shake_hands,
    "talking": _talk,
    "passing": _pass,
    "walking together": _side_by_side(walk, 0.45),
    "chasing": _side_by_side(_run, 0.9),
}
