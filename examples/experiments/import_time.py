"""How long `import normfree` and `normfree --help` take, beside `import torch` alone: fresh processes, in turn.

Most of normfree is imported when it is asked for, so two figures are given: the bare import, and every public name.

Run: python examples/experiments/import_time.py [--runs 20] [--csv FILE]
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

EVERYTHING = "import torch, normfree; [getattr(normfree, name) for name in normfree.__all__]"
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import torch, normfree": ["-c", "import torch, normfree"],
    "import torch, all of normfree": ["-c", EVERYTHING],
    "normfree --help": ["-m", "normfree", "--help"],
}
COLUMNS = ("command", "runs", "wall_s", "cpu_s", "wall_more_s", "cpu_more_s", "versions")


def run(arguments: list[str]) -> tuple[float, float]:
    """Return the seconds that a fresh interpreter takes: on the clock, and of the processor."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, os.times()
    return wall, sum(after[2:4]) - sum(before[2:4])


def measure(runs: int) -> list[dict[str, object]]:
    """Run every command in turn; what one takes more than `import torch` is the median of the differences."""
    for arguments in COMMANDS.values():
        run(arguments)  # reads the files once
    rounds = [{name: run(arguments) for name, arguments in COMMANDS.items()} for _ in range(runs)]
    rows = []
    for name in COMMANDS:
        wall, cpu = (statistics.median(each[name][i] for each in rounds) for i in (0, 1))
        more = [statistics.median(each[name][i] - each["import torch"][i] for each in rounds) for i in (0, 1)]
        figures = (round(value, 3) for value in (wall, cpu, *more))
        version = f"torch {torch.__version__.partition('+')[0]}"
        rows.append(dict(zip(COLUMNS, (name, runs, *figures, version), strict=True)))
    return rows


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows = measure(options.runs)
    for file in [sys.stdout] if options.csv is None else [options.csv.open("w", newline=""), sys.stdout]:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
