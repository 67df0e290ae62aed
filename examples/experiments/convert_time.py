"""How long `normfree.convert` takes, its copy included, beside `torch.fx.experimental.optimization.fuse`.

Both run in turn on the same model; the table shows medians and the median of the ratios. `--in-place` times
`normfree.convert_` instead, on a copy made off the clock, and says how much memory it takes beyond the model's own.

Run: python examples/experiments/convert_time.py [--in-place] [--runs N] [--csv FILE] [NAME ...]
"""

from __future__ import annotations

import argparse
import copy
import csv
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.fx.experimental.optimization import fuse

import normfree
from normfree import zoo

NAMES = ("torchvision:resnet18", "torchvision:resnet50", "torchvision:efficientnet_v2_s", "torchvision:densenet121")
NAMES += ("timm:resnetv2_50", "timm:tf_efficientnet_lite0", "timm:hrnet_w18_small", "timm:levit_128s")


def seconds(work: Callable[[nn.Module], object], model: nn.Module) -> float:
    """Time one call; what the arm before it left behind is collected first, and not on this one's clock."""
    gc.collect()
    start = time.perf_counter()
    work(model)
    return time.perf_counter() - start


def fuses(model: nn.Module) -> bool:
    """Whether torch can trace and fuse the model at all."""
    try:
        fuse(model)
    except Exception:  # whatever the model's forward raises when it is traced
        return False
    return True


def growth(work: Callable[[nn.Module], object], model: nn.Module) -> float:
    """Return the peak of the process' memory while converting, over the model's size; Linux only."""
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    work(model)
    return (size + memory("VmHWM") - before) / size


def memory(key: str) -> int:
    """Return one figure of the process' memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(name: str, runs: int, in_place: bool) -> dict[str, object]:
    """Return the medians of one model in milliseconds, and of the ratios to `fuse`."""
    model = zoo.build(zoo.find(name)).eval()
    convert: Callable[..., nn.Module] = normfree.convert_ if in_place else normfree.convert
    arms: dict[str, Callable[[nn.Module], object]] = {
        "preserve": lambda m: convert(m, init="preserve"),
        "skipinit": lambda m: convert(m, init="skipinit"),
    }
    if fuses(model):
        arms["fuse"] = fuse
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(runs + 1):
        for arm, work in arms.items():
            own = in_place and arm != "fuse"
            times[arm].append(seconds(work, copy.deepcopy(model) if own else model))
    row: dict[str, object] = {"model": name, "runs": runs}
    if in_place:
        row["memory"] = round(max(growth(arms[arm], copy.deepcopy(model)) for arm in ("preserve", "skipinit")), 3)
    for arm in ("preserve", "skipinit", "fuse"):
        counted = times.get(arm, [])[1:]  # the first is a warm-up
        row[f"{arm}_ms"] = round(statistics.median(counted) * 1e3, 1) if counted else "fails"
        if counted and arm != "fuse" and "fuse" in times:
            ratios = [a / b for a, b in zip(counted, times["fuse"][1:], strict=True)]
            row[f"{arm}_to_fuse"] = round(statistics.median(ratios), 3)
    return row


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--in-place", action="store_true")
    parser.add_argument("--csv")
    options = parser.parse_args()
    rows = [
        measure(name, options.runs, options.in_place) for name in track(options.names, console=Console(stderr=True))
    ]
    columns = ["model", "runs", "preserve_ms", "skipinit_ms", "fuse_ms", "preserve_to_fuse", "skipinit_to_fuse"]
    columns += ["memory"] if options.in_place else []
    table = Table(*columns, title=f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if options.csv:
        with Path(options.csv).open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
