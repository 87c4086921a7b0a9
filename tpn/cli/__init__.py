"""The command line, `tpn COMMAND`, also as `python -m tpn`.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 something failed (one line says
what), 2 wrong usage.
"""

from tpn.cli import videos, features, timeline, explain, models, export  # isort: skip  # the order in which `tpn --help` lists the commands
from tpn.cli.app import app, main

__all__ = ["app", "explain", "export", "features", "main", "models", "timeline", "videos"]
