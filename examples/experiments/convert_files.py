"""Conversion from file to file beside reading and writing the same tensors with safetensors alone: time and memory.

For every model a checkpoint with random values is made in a work folder, without building the model. Every measurement
is a process of its own; time and memory are counted after the imports (memory: the largest resident size beyond what it
was then), and the time of the whole process beside it. Nothing is kept but the table.

Run: python examples/experiments/convert_files.py NAME ... [--endings .safetensors .pth] [--runs 3]
         [--csv FILE] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from normfree import zoo
from normfree.files import write_state

COLUMNS = ("model", "ending", "MiB", "runs", "convert_s", "safetensors_s", "ratio", "peak_MiB", "peak_share")
COLUMNS += ("safetensors_peak_MiB", "process_s", "safetensors_process_s", "versions")

MEASURE = """
import json, pathlib, re, sys, time
begin = time.perf_counter()
import safetensors.torch, timm, torch, torchvision
from normfree.checkpoint import convert_file
name, source, out, how = sys.argv[1:]
status = pathlib.Path("/proc/self/status")
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) / 1024
before, start = peak(), time.perf_counter()
if how == "convert":
    convert_file(name, source, out, init="preserve")
elif source.endswith(".safetensors"):
    safetensors.torch.save_file(safetensors.torch.load_file(source), out)
else:
    safetensors.torch.save_file(torch.load(source, weights_only=True), out)
end = time.perf_counter()
print(json.dumps([end - start, peak() - before, end - begin]))
"""


def values(state: Mapping[str, Tensor], names: list[str]) -> Iterator[Tensor]:
    """Something of the right size for every tensor: a variance must not be negative."""
    generator = torch.Generator().manual_seed(0)
    for name in names:
        left = state[name].numel()
        while left:
            count = min(left, 2**22)
            yield torch.rand(count, generator=generator).add(0.1).to(state[name].dtype)
            left -= count


def make(name: str, folder: Path, ending: str) -> Path:
    """Write a checkpoint of this architecture without holding it in memory."""
    model = zoo.skeleton(zoo.find(name))
    state = {key: torch.zeros((), dtype=t.dtype).expand(t.shape) for key, t in model.state_dict().items()}
    path = folder / "checkpoint.safetensors"
    write_state(path, state, {"format": "pt"}, values)
    if ending == ".safetensors":
        return path
    torch.save(load_file(path), path.with_suffix(ending))
    path.unlink()
    return path.with_suffix(ending)


def measure(name: str, checkpoint: Path, how: str) -> list[float]:
    """Seconds, MiB beyond the imports, and seconds with the imports, of one process."""
    out = checkpoint.with_name("out.safetensors")
    command = [sys.executable, "-c", MEASURE, name, str(checkpoint), str(out), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    out.unlink()
    figures: list[float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def row(name: str, ending: str, runs: int, work: Path) -> dict[str, object]:
    """Measure one checkpoint, in turn."""
    checkpoint = make(name, work, ending)
    size = checkpoint.stat().st_size / 2**20
    found: dict[str, list[list[float]]] = {"convert": [], "safetensors": []}
    for _ in range(runs):
        for how, figures in found.items():
            figures.append(measure(name, checkpoint, how))
    checkpoint.unlink()
    seconds, peak, process = (statistics.median(column) for column in zip(*found["convert"], strict=True))
    alone, alone_peak, alone_process = (statistics.median(column) for column in zip(*found["safetensors"], strict=True))
    pairs = zip(found["convert"], found["safetensors"], strict=True)
    ratio = statistics.median(ours[0] / theirs[0] for ours, theirs in pairs)
    cells = (f"{size:.1f}", runs, f"{seconds:.3f}", f"{alone:.3f}", f"{ratio:.2f}", f"{peak:.1f}", f"{peak / size:.3f}")
    versions = f"torch {torch.__version__.partition('+')[0]}"
    rest = (f"{alone_peak:.1f}", f"{process:.2f}", f"{alone_process:.2f}", versions)
    return dict(zip(COLUMNS, (name, ending, *cells, *rest), strict=True))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--endings", nargs="+", default=[".safetensors"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--work", type=Path, help="where the checkpoints lie meanwhile")
    options = parser.parse_args()
    rows = []
    for name in options.names:
        for ending in options.endings:
            with tempfile.TemporaryDirectory(dir=options.work) as folder:
                rows.append(row(name, ending, options.runs, Path(folder)))
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
