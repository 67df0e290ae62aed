r"""What normalisation costs in a training step: `normfree bench` over several networks and both starting points.

With `--runs 0` it counts what does not depend on the clock: bytes saved for backward, and operators. A run can be
stopped and goes on where it was: what the CSV holds is not measured again.

Run: python examples/experiments/training_cost.py --runs 0 --csv examples/results/training_memory.csv
     python examples/experiments/training_cost.py --runs 7 --csv examples/results/training_cpu.csv NAME ...
     python examples/experiments/training_cost.py --device cuda --dtype bf16 --channels-last [--compile] \
         --batch 256 --csv FILE NAME
"""

from __future__ import annotations

import argparse
import csv
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from normfree import zoo
from normfree.bench import ARMS, Setting, arm_names, run
from normfree.bench.results import COLUMNS, flat

NAMES = ("resnet18", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2")
NAMES += ("mobilenet_v2", "efficientnet_b0", "regnet_y_400mf")


def known(path: Path) -> list[dict[str, str]]:
    """The rows that are measured already."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to the CSV."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[f"torchvision:{name}" for name in NAMES])
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--inits", default="skipinit,preserve")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--no-largest", action="store_true", help="do not look for the largest batch that fits")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # deprecations inside the libraries' own models
    inits: list[Any] = options.inits.split(",")
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(options.names) * len(inits))
        for name in options.names:
            for init in inits:
                setting = Setting(
                    batch=options.batch,
                    size=options.size,
                    device=options.device,
                    dtype=options.dtype,
                    compiled=options.compile,
                    channels_last=options.channels_last,
                    init=init,
                    runs=options.runs,
                    arms=arm_names(options.arms),
                    largest=not options.no_largest,
                )
                about = setting.about(name)
                clock = {"versions"} if options.runs else {"versions", "threads"}  # what is counted needs no clock
                key = {k: str(v) for k, v in about.items() if k not in clock}
                if not any(key.items() <= row.items() for row in known(options.csv)):
                    say = lambda text, name=name: progress.update(task, description=f"{name} {text}")  # noqa: E731
                    results = run(name, zoo.build(zoo.find(name)), setting, say)
                    append(options.csv, [flat(result, about) for result in results])
                progress.advance(task)


if __name__ == "__main__":
    main()
