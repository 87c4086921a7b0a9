"""The command line, `tpn COMMAND` or `python -m tpn COMMAND`.

Results go to standard output, everything else to standard error. Exit codes: 0 success, 1 error (described in one line),
2 wrong usage, 130 interrupted.
"""

from tpn.cli import videos, train, evaluate, features, timeline, explain, models, export  # isort: skip  # the order in `tpn --help`
from tpn.cli.app import app, main

__all__ = ["app", "evaluate", "explain", "export", "features", "main", "models", "timeline", "train", "videos"]
