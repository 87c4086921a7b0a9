"""Measure how long `tpn` takes to start.

    python examples/benchmarks/startup.py
    python examples/benchmarks/startup.py --repeats 20 --output startup.json

Every command is a new process. Commands take turns; the table has medians, and ratios to `python -c pass`. CPU time tells more
than wall time on a busy machine. "import torch" is for comparison; `tpn predict` waits for "import tpn.predict". Shells run
"completion" at each press of the tab key.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tpn.cli.script import positive_int, run_cli
from tpn.files import atomic_write

TPN = ["-m", "tpn"]
COMMANDS: dict[str, list[str]] = {
    "python -c pass": ["-c", "pass"],
    "import tpn": ["-c", "import tpn"],
    "tpn --version": [*TPN, "--version"],
    "tpn --help": [*TPN, "--help"],
    "tpn train --help": [*TPN, "train", "--help"],
    "completion": TPN,
    "tpn list": [*TPN, "list"],
    "tpn info": [*TPN, "info", "tpn_slowonly_r50_k400"],
    "import torch": ["-c", "import torch"],
    "import tpn.predict": ["-c", "import tpn.predict"],
}
COMPLETION = {"_TPN_COMPLETE": "complete_bash", "COMP_WORDS": "tpn predict --model tpn_", "COMP_CWORD": "3"}


def seconds(name: str) -> tuple[float, float]:
    """Run a command once; return its wall time and its CPU time in seconds."""
    env = os.environ | (COMPLETION if name == "completion" else {})
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *COMMANDS[name]], env=env, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive_int, default=9, help="runs of each command")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()

    for name in COMMANDS:  # files get into the cache of the system, and bytecode beside them
        seconds(name)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(args.repeats):
        for name, times in runs.items():
            times.append(seconds(name))
    rows: list[dict[str, Any]] = []
    for name, times in runs.items():
        wall, cpu = (1e3 * statistics.median(kind) for kind in zip(*times, strict=True))
        rows.append({"what": name, "ms": wall, "ratio": wall / rows[0]["ms"] if rows else 1.0, "cpu_ms": cpu})
    table = Table(box=None)
    table.add_column("")
    for column in ("ms", "ratio", "CPU ms"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["what"], f"{row['ms']:.0f}", f"{row['ratio']:.1f}x", f"{row['cpu_ms']:.0f}")
    Console(width=110).print(table, highlight=False)
    if args.output is not None:
        with atomic_write(args.output) as unfinished:
            unfinished.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
