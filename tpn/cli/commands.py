"""The application with all its commands, in the order of `tpn --help`."""

from tpn.cli import videos, train, evaluate, timeline, explain, features, export, models  # isort: skip
from tpn.cli.app import app

__all__ = ["app", "evaluate", "explain", "export", "features", "models", "timeline", "train", "videos"]
