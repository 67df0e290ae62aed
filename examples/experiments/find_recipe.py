"""What a network without normalisation needs to train as easily as one with it: the measurement behind `RECIPE`.

Pre- and post-activation networks of 18 layers on scikit-learn's digits, with batch norm and converted, at learning
rates that are powers of two, under a list of recipes. What counts is how wide the range of rates is that end within a
point of the best on the validation images, beside batch norm's, and the test accuracy at the rate that validates best.

Run: python examples/experiments/find_recipe.py [--workers 2] [--seeds 3] [NAME ...]
     python examples/experiments/find_recipe.py --render
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import torch
from experiment import Job, Row, accuracy, markdown, measure, parser, power, rows, within_a_point
from images import Data, digits
from recipe import Outcome, Recipe, train
from trainable_depth import KINDS, arm, network

DEPTH, BATCH = 18, 64
RATES = tuple(2.0**power for power in range(-6, 4))
BN = {"bn": Recipe(), "bn + warm-up": Recipe(warmup=0.1), "bn + warm-up + norm 1": Recipe(0.1, "norm:1")}
ALONE = {
    "nothing": Recipe(),
    "warm-up": Recipe(warmup=0.1),
    "norm 1": Recipe(clip="norm:1"),
    "agc 0.1": Recipe(clip="agc:0.1"),
}
CLIPS = ("norm:1", "norm:0.5", "norm:0.3", "agc:0.1", "agc:0.03", "agc:0.01")
RELATIVE = {
    f"warm-up + {clip.replace(':', ' ')} + scalars lr{name}": Recipe(0.1, clip, rate)
    for clip in CLIPS
    for name, rate in {"": 1.0, "/10": 0.1}.items()
}
FIXED = {
    f"warm-up + {clip.replace(':', ' ')} + scalars {rate}": Recipe(0.1, clip, scalar_lr=rate)
    for clip in CLIPS
    for rate in (1.0, 0.3, 0.1)
}
RECIPES = BN | ALONE | RELATIVE | FIXED


def run(kind: str, name: str, data: Data, options: Namespace, lr: float, seed: int) -> Outcome:
    """Train one network with one recipe."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(seed)
    model = arm("bn" if name in BN else "skipinit", network(kind, DEPTH, data))
    settings = {"epochs": options.epochs, "batch": BATCH, "device": options.device}
    return train(model, data, RECIPES[name], lr=lr, seed=seed, **settings)


def line(table: list[Row], kind: str, name: str) -> Iterator[object]:
    """One line of the page: a recipe on a kind of network."""
    mine = [row for row in table if (row["network"], row["recipe"]) == (kind, name)]
    by_rate = {lr: [row for row in mine if float(row["lr"]) == lr] for lr in RATES}
    mean = {lr: statistics.mean(accuracy(row, "validation") for row in at) for lr, at in by_rate.items() if at}
    good, best = within_a_point(mean), max(mean, key=mean.__getitem__)
    yield from (name, len({row["seed"] for row in mine}))
    yield from (f"{mean[lr]:.1f}" if lr in mean else None for lr in RATES)
    yield f"{power(good[0])} .. {power(good[-1])}"
    yield f"{good[-1] / good[0]:g}"
    yield f"{statistics.mean(accuracy(row, 'test') for row in by_rate[best]):.1f} ({power(best)})"


def page(table: list[Row]) -> str:
    """Write validation accuracy against learning rate, the usable range, and the test accuracy at the best rate."""
    parts = []
    for kind in KINDS:
        names = [name for name in RECIPES if any((r["network"], r["recipe"]) == (kind, name) for r in table)]
        header = ["recipe", "seeds", *map(power, RATES), "within a point", "factor", "test"]
        parts.append(f"{kind}:\n\n" + markdown(header, [list(line(table, kind, name)) for name in names]))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Parse and go."""
    made = parser(__doc__.splitlines()[0], "recipe.csv")
    made.add_argument("names", nargs="*", help=f"recipes; all without: {'; '.join(RECIPES)}")
    made.add_argument("--rates", type=float, nargs="+", default=RATES)
    made.add_argument("--seeds", type=int, default=1)
    made.add_argument("--epochs", type=int, default=48)
    options = made.parse_args()
    if options.render:
        options.csv.with_suffix(".md").write_text(page(rows(options.csv)))
        return
    data, jobs = digits(), []
    for seed in range(options.seeds):
        for kind in KINDS:
            for name in options.names or RECIPES:
                settings = {"network": kind, "depth": DEPTH, "recipe": name, "epochs": options.epochs, "batch": BATCH}
                for lr in options.rates:
                    about = {**settings, "lr": lr, "seed": seed}
                    jobs.append(Job(about, partial(run, kind, name, data, options, lr, seed)))
    measure(options.csv, jobs, options.workers)


if __name__ == "__main__":
    main()
