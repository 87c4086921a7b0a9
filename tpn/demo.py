"""The video of `tpn demo`."""

from tpn.files import StrPath
from tpn.video import motion
from tpn.video.encode import write_video

SCENES = (("moving right", 2.0), ("turning clockwise", 4.0), ("swinging up and down", 3.0), ("growing", 2.5), ("blinking", 5.0))
"""Motion and tempo of each scene."""
SCENE_FRAMES = 60


def render_video(path: StrPath) -> None:
    """Write a video of one shape that moves as `SCENES` says."""
    parts = [(motion.CLASSES.index(name), tempo, SCENE_FRAMES) for name, tempo in SCENES]
    write_video(path, motion.render_sequence(parts, seed=12), fps=motion.FPS)
