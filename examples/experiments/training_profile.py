r"""Which kernels a training step spends its time in, with its norms and without: torch's profiler over arms of `bench`.

Run: python examples/experiments/training_profile.py --device cuda --dtype bf16 --channels-last --batch 256 \
         --csv FILE [NAME]
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from normfree import zoo
from normfree.bench.arms import Subject, build_arms
from normfree.bench.running import DTYPES, Step

ARMS = ("bn", "normfree", "biases", "bare")
COLUMNS = ("model", "arm", "batch", "device", "dtype", "kernel", "calls", "ms")


def spent(step: Step, x: torch.Tensor) -> dict[str, list[float]]:
    """Return calls and milliseconds of one step by kernel; on a CPU by operator, without what it calls."""
    for _ in range(3):
        step(x)
    with profile(activities=[ProfilerActivity.CUDA if x.is_cuda else ProfilerActivity.CPU], acc_events=True) as seen:
        step(x)
        if x.is_cuda:
            torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in seen.events() or ():
        if not x.is_cuda or "CUDA" in str(event.device_type):
            found[event.name][0] += 1
            found[event.name][1] += (event.device_time if x.is_cuda else event.self_cpu_time_total) / 1e3
    return found


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="torchvision:resnet50")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args()
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    shape = (options.batch, 3, options.size, options.size)
    x = torch.randn(shape).to(options.device).contiguous(memory_format=layout)
    model = zoo.build(zoo.find(options.name))
    with options.csv.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name, arm in build_arms(Subject(options.name, model, "skipinit"), ARMS).items():
            trained = arm.to(device=options.device, memory_format=layout)
            step = Step(trained, torch.optim.SGD(trained.parameters(), lr=0.0, momentum=0.9), DTYPES[options.dtype])
            found = spent(step, x)
            about = (options.name, name, options.batch, options.device, options.dtype)
            for kernel, (calls, ms) in sorted(found.items(), key=lambda item: -item[1][1]):
                writer.writerow((*about, kernel, calls, f"{ms:.3f}"))
            trained.cpu()


if __name__ == "__main__":
    main()
