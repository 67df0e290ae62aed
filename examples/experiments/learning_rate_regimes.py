"""Which learning rate is best at which batch size, with batch norm and without, at a fixed number of epochs.

De & Smith (NeurIPS 2020) find that both want the same rate at a small batch, and batch norm a larger one only at a
large batch. Pre-activation networks of 18 layers on scikit-learn's digits show whether that is so here.

Run: python examples/experiments/learning_rate_regimes.py [--workers 2]
     python examples/experiments/learning_rate_regimes.py --render
"""

from __future__ import annotations

import math
import statistics
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from drawing import limits, line, style
from experiment import Row, Study, Summary, markdown, parser, rows, study, summary, usable
from images import Data, digits
from recipe import Outcome, train
from trainable_depth import KINDS, RECIPES, arm, network

DEPTH = 18
ARMS = {"bn": "Batch normalization", "skipinit": "SkipInit, alpha = 0"}
BATCHES = (4, 8, 16, 32, 64, 128, 256, 512)
RATES = tuple(2.0**power for power in range(-9, 2))


def run(name: str, batch: int, data: Data, options: Namespace, lr: float, seed: int) -> Outcome:
    """Build one network and train it."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(seed)
    model = arm(name, network(options.network, DEPTH, data))
    settings = {"epochs": options.epochs, "batch": batch, "device": options.device}
    return train(model, data, RECIPES[name], lr=lr, seed=seed, **settings)


def page(table: list[Row]) -> str:
    """Write test accuracy, spread, best learning rate and range of good ones of both arms at every batch size."""
    parts = []
    for kind in [kind for kind in KINDS if any(row["network"] == kind for row in table)]:
        sizes = sorted({int(row["batch"]) for row in table if row["network"] == kind})
        body: list[list[object]] = []
        for size in sizes:
            cells = [{"network": kind, "arm": name, "batch": size} for name in ARMS]
            body.append([size, *(summary(table, cell) for cell in cells), *(usable(table, cell) for cell in cells)])
        header = ["batch", *ARMS.values(), *(f"{title}: within a point of the best" for title in ARMS.values())]
        parts.append(f"{kind}:\n\n" + markdown(header, body))
    return "\n\n".join(parts) + "\n"


def plot(table: list[Row], path: Path) -> None:
    """Draw the best rate, and the accuracy it reaches, against the batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    found: dict[str, dict[float, Summary]] = {}
    for kind in KINDS:
        for name, title in ARMS.items():
            cells = {size: summary(table, {"network": kind, "arm": name, "batch": size}) for size in BATCHES}
            found[f"{title}, {kind}"] = {size: it for size, it in cells.items() if it is not None}
    found = {title: cells for title, cells in found.items() if cells}
    tests = {
        title: {size: statistics.mean(it.test) if it.test else math.nan for size, it in cells.items()}
        for title, cells in found.items()
    }
    right.set_ylim(limits([value for cells in tests.values() for value in cells.values()], 0, 100))
    for axis in (left, right):
        axis.set_xscale("log", base=2)
    left.set_yscale("log", base=2)
    for number, (title, cells) in enumerate(found.items()):
        look = style(number, len(found))
        rates = {size: it.lr for size, it in cells.items() if it.test}
        left.plot(list(rates), list(rates.values()), **look)
        line(right, tests[title], look, title, best="high")
    left.set_ylabel("best learning rate")
    right.set_ylabel("test accuracy, %")
    right.legend(fontsize=7)
    figure.supxlabel("batch size")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse and go."""
    made = parser(__doc__.splitlines()[0], "learning_rate_regimes.csv")
    made.add_argument("--network", choices=KINDS, default=KINDS[0])
    made.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    made.add_argument("--rates", type=float, nargs="+", default=RATES)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--epochs", type=int, default=64)
    options = made.parse_args()
    if options.render:
        options.csv.with_suffix(".md").write_text(page(rows(options.csv)))
        plot(rows(options.csv), options.csv.with_suffix(".png"))
        return
    data = digits()
    cells = []
    for batch in options.batches:
        for name in ARMS:
            settings = {"network": options.network, "depth": DEPTH, "arm": name}
            settings |= {"epochs": options.epochs, "batch": batch}
            cells.append(Study(settings, partial(run, name, batch, data, options)))
    study(options.csv, cells, options.rates, options.seeds, options.workers)


if __name__ == "__main__":
    main()
