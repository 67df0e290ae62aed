"""Which form of a converted network fine-tunes with the learning rates of its original, and what each part of it does.

A network is pretrained with batch norm, gets a fresh head, and is converted: then plain optimizers over
`model.parameters()` train it, with a warm-up and a cosine, and without any recipe of ours. Networks are ImageNet's
`tf_efficientnet_lite0`, `1` and `2`, and three of nine blocks that are pretrained here, on the digits 0 to 4, and go on
with 5 to 9; or, where they keep their head, with the negatives of 0 to 4.

Run: python examples/experiments/finetuning_forms.py --networks post-activation --optimizers sgd --rates 0.03125 0.0625
     python examples/experiments/finetuning_forms.py --render
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import statistics
import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace

import lite
import timm
import torch
from arms import arm
from experiment import Job, Row, accuracy, markdown, matching, measure, parser, power, rows, within_a_point
from images import Data, Part, digits, solar_cells, textures
from nine_blocks import BLOCKS, small
from recipe import Outcome, batches, cosine, outcome
from steps import gradients
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F

import normfree
from normfree.edits import Units
from normfree.options import Options
from normfree.planning.plan import look
from normfree.plans import Plan
from normfree.rewriting.applying import rewrite

ARMS = {
    "bn": "batch norm",
    "frozen": "batch norm, frozen",
    "folded": "normfree, fused before training",
    "normfree": "normfree",
    "calibrated": "normfree, calibrated on 256 training images",
    "units 1": "normfree, units of weight, bias and alpha 1",
    "one unit": "normfree, one unit for a whole filter",
    "not centred": "normfree, inputs not centred",
    "head plain": "normfree, head plain",
}
EPOCHS = {"post-activation": 6, "pre-activation": 6, "vgg": 6, **dict.fromkeys(lite.PACKAGES, 1)}
"""The networks, each with its epochs."""
TASKS = ("digits", "elpv", "textures")
WAYS = ("whole", "last stage", "kept head")
"""What is trained: all behind a fresh head, only the last stage behind one, or all with the head that was there."""
NEGATIVE = ", negative"
_SGD = tuple(2.0**power for power in range(-7, -1))
RATES = {"sgd": _SGD, "clipped": _SGD, "adamw": tuple(2.0**power for power in range(-12, -5))}
"""The optimizers, each with the rates that it tries; `clipped` is SGD with the norm of the gradient clipped at 1."""
CELL = ("network", "task", "size", "images", "way", "optimizer", "batch", "epochs")
LEGEND = """\
Test accuracy in percent by learning rate, mean of the seeds; [the worst], where seeds differ by more than five points;
n is how many there are, where others in the table have more. What diverged counts as zero. The rates in the last
columns are chosen on the validation images. Small networks are tested on 177 images: a difference of a point is two.
A cell without a figure was not run, so an arm with few rates has no range yet. `growth` in the CSV: how many times its
first root mean square an output behind a norm that went was at most in a hundred steps, up to 26 where a run learnt.

`one unit` is the form of the last version, run there: whole filters in units of 2, and heads as large as 8. It and
`units 1` left layers without a bias as they were, of which pre-activation networks have some.

Networks of nine blocks at a batch of two are of one or two seeds, batch norm frozen is of one, and so are rates with
another n beside others. Open: three seeds of those, and other rates of lite1 and lite2."""
OVERVIEW = """\
## At the rate that is best for batch norm

normfree / batch norm, all of the network behind a fresh head. The rate is the one that validates best with batch norm
among those that both ran at; n is how many seeds normfree has there, where that is fewer than three."""


@dataclass(frozen=True)
class Grown(Outcome):
    """What came of one run, and by how much an output had grown at most in the first hundred steps."""

    growth: float | None


@functools.cache
def images(task: str, size: int, count: int) -> Data:
    """Return the images of a task, the first `count` of those that train; 0 is all."""
    if task in ("elpv", "textures"):
        config = resolve_data_config({}, model=timm.create_model("tf_efficientnet_lite0"))
        data = (solar_cells if task == "elpv" else textures)(size, (255 * config["mean"][0], 255 * config["std"][0]))
    else:
        low, _, high = task.removeprefix("digits").removesuffix(NEGATIVE).strip().partition(" to ")
        data = some_digits(int(low or 0), int(high or 9), size, colour=not low, negative=task.endswith(NEGATIVE))
    return replace(data, train=Part(data.train.x[: count or None], data.train.y[: count or None]))


def some_digits(low: int, high: int, size: int, colour: bool, negative: bool) -> Data:
    """Return scikit-learn's digits from `low` to `high`, enlarged, from -1 to 1 as ImageNet's weights want."""
    whole = digits()
    darkest, lightest = whole.train.x.min(), whole.train.x.max()

    def part(of: Part) -> Part:
        mine = (of.y >= low) & (of.y <= high)
        x = 2 * (of.x[mine] - darkest) / (lightest - darkest) - 1
        x = -x if negative else x
        x = F.interpolate(x, size=(size, size), mode="bilinear")
        return Part(x.expand(-1, 3, -1, -1) if colour else x, of.y[mine] - low)

    parts = {name: part(getattr(whole, name)) for name in ("train", "validation", "test")}
    return Data(**parts, classes=high - low + 1, shift=0 if colour else 1)


@functools.cache
def pretrained(network: str) -> nn.Module:
    """Return a network with its weights: ImageNet's, or, of a small one, after twelve epochs on the digits 0 to 4."""
    if network in lite.PACKAGES:
        return lite.pretrained(network)
    torch.manual_seed(0)
    model = small(BLOCKS[network])
    fit(model, images("digits 0 to 4", 16, 0), "sgd", 0.1, epochs=12, batch=32, seed=0)
    return model.eval()


def fresh(network: str, classes: int, seed: int, way: str = "whole") -> nn.Module:
    """Return a pretrained network, mostly with a head that has learnt nothing, and frozen before the last stage or not.

    What is frozen is the same in every arm.
    """
    model = copy.deepcopy(pretrained(network))
    torch.manual_seed(seed)
    if way == "last stage":
        for name in first_stages(network):
            model.get_submodule(name).requires_grad_(False)
    if way == "kept head":
        return model
    if network in lite.PACKAGES:
        model.reset_classifier(classes)
    else:
        model[-1] = nn.Linear(model[-1].in_features, classes)
    return model


def first_stages(network: str) -> list[str]:
    """Return the names of what comes before the last stage of a network."""
    if network in lite.PACKAGES:
        return ["conv_stem", "bn1", *(f"blocks.{i}" for i in range(6))]
    return [str(i) for i in range(7 if network == "pre-activation" else 8)]


def parted(name: str, plan: Plan) -> Plan:
    """Return a plan with a part of it switched off."""
    if name == "units 1":
        units = Units(head=plan.units.head)
        plain = tuple(replace(layer, unit=1.0, mean_unit=1.0) for layer in plan.carried)
        return replace(plan, units=units, carried=plain)
    if name == "one unit":
        unit = plan.units.weight
        whole = (replace(it, unit=1.0 if it.head else unit, mean_unit=1.0) for it in plan.carried)
        return replace(plan, carried=tuple(whole))
    if name == "head plain":
        return replace(plan, carried=tuple(layer for layer in plan.carried if not layer.head))
    return replace(plan, carried=tuple(replace(layer, centred=False) for layer in plan.carried))


def form(name: str, model: nn.Module, x: Tensor) -> tuple[nn.Module, Iterable[nn.Module]]:
    """Give a network the form of an arm, perhaps for images `x`; return it with the norms that stay frozen."""
    if name in ("bn", "frozen"):
        return arm(name, model)
    if name == "calibrated":
        return normfree.calibrate(normfree.convert(model, init="preserve"), x.split(64)), ()
    if name in ("normfree", "folded"):
        return arm("fused" if name == "folded" else "normfree", model)
    plan, met = look(model, Options(init="preserve"))
    rewrite(model, parted(name, plan), met())
    return model, ()


def fit(
    model: nn.Module,
    data: Data,
    optimizer: str,
    lr: float,
    *,
    epochs: int,
    batch: int,
    seed: int,
    frozen: Iterable[nn.Module] = (),
) -> list[float]:
    """Train `model` in place with a plain optimizer; return each epoch's loss, ended by the first nan."""
    torch.manual_seed(seed)
    model.train()
    for module in frozen:
        module.eval()
    if optimizer == "adamw":
        stepper: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    else:
        stepper = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    each = len(data.train.y) // batch
    schedule, curve = cosine(stepper, 0.1, epochs * each), list[float]()
    for epoch in range(epochs):
        total = 0.0
        for i, (x, y) in enumerate(batches(data, batch)):
            schedule.step_update(epoch * each + i + 1)
            total += gradients(model, x, y).item()
            if not math.isfinite(total):
                return [*curve, math.nan]
            if optimizer == "clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            stepper.step()
        curve.append(total / each)
    return curve


def run(asked: dict[str, object], threads: int) -> Outcome:
    """Build one network in one form and train it."""
    torch.set_num_threads(threads)
    it = Namespace(**asked)
    data = images(it.task, it.size, it.images)
    model, frozen = form(it.arm, fresh(it.network, data.classes, it.seed, it.way), data.train.x[:256])
    if it.way == "last stage":
        frozen = [*frozen, *map(model.get_submodule, first_stages(it.network))]
    watched = None if it.arm in ("bn", "frozen", "folded") else normfree.watch(model, factor=math.inf)
    settings, start = {"epochs": it.epochs, "batch": it.batch, "seed": it.seed}, time.perf_counter()
    found = outcome(model, data, fit(model, data, it.optimizer, it.lr, frozen=frozen, **settings), start)
    return Grown(*astuple(found), None if watched is None else watched.growth)


def page(table: list[Row]) -> str:
    """Write the accuracies of every network, task, optimizer and batch, a line an arm and a column a learning rate."""
    parts = [LEGEND, OVERVIEW, overview(table), "## All rates"]
    for values in dict.fromkeys(tuple(row[key] for key in CELL) for row in table):
        named = dict(zip(CELL, values, strict=True))
        mine = list(matching(table, named))
        seeds = len({row["seed"] for row in mine})
        about = "{network}, {task}, {size} px, {optimizer}, batch {batch}; epochs: {epochs}".format(**named)
        about += f", {named['way']}" if named["way"] != WAYS[0] else ""
        about += f", training images: {named['images']}" if named["images"] != "0" else ""
        parts += [f"### {about}, seeds: {seeds}", grid(mine, seeds)]
    return "\n\n".join(parts) + "\n"


def overview(table: list[Row]) -> str:
    """Write how far both are at batch norm's best rate, a line a network, task and batch."""
    whole = list(matching(table, {"way": WAYS[0], "images": "0"}))
    lines = sorted(
        {(int(row["batch"]), row["network"] not in lite.PACKAGES, row["network"], row["task"]) for row in whole}
    )
    body = []
    for batch, _, network, task in lines:
        own = {"batch": batch, "network": network, "task": task}
        cells = (beside(list(matching(whole, own | {"optimizer": optimizer}))) for optimizer in RATES)
        body.append([batch, network, task, *cells])
    return markdown(["batch", "network", "task", *RATES], body)


def beside(mine: list[Row]) -> str | None:
    """Write both accuracies at the rate that is best for batch norm, and the rate."""
    ran = {row["lr"] for row in matching(mine, {"arm": "normfree"})}
    validated = {lr: value for lr, value in mean(mine, "bn").items() if lr in ran}
    if not validated:
        return None
    best = max(sorted(validated, key=float), key=validated.__getitem__)
    ours, theirs = (
        [accuracy(row, "test") for row in matching(mine, {"arm": name, "lr": best})] for name in ("normfree", "bn")
    )
    few = f" n={len(ours)}" if len(ours) < 3 else ""
    return f"{statistics.mean(ours):.1f} / {statistics.mean(theirs):.1f} ({power(float(best))}){few}"


def grid(mine: list[Row], seeds: int) -> str:
    """Write one table."""
    rates = sorted({row["lr"] for row in mine}, key=float)
    validated = {name: mean(mine, name) for name in ARMS if any(row["arm"] == name for row in mine)}
    best = {name: max(found, key=found.__getitem__) for name, found in validated.items()}
    body = []
    for name, found in validated.items():
        cells = {lr: cell(matching(mine, {"arm": name, "lr": lr}), seeds) for lr in rates}
        good = within_a_point({float(lr): accuracy for lr, accuracy in found.items()}, 2)
        chosen, there = f"{cells[best[name]]} ({power(float(best[name]))})", cells.get(best.get("bn", ""))
        body.append([ARMS[name], *cells.values(), chosen, there, f"{power(good[0])} .. {power(good[-1])}"])
    return markdown(["", *(power(float(lr)) for lr in rates), "best", "at batch norm's best", "within 2 points"], body)


def mean(mine: Sequence[Row], name: str) -> dict[str, float]:
    """Return the mean validation accuracy of an arm by learning rate."""
    own = list(matching(mine, {"arm": name}))
    return {
        lr: statistics.mean(accuracy(row, "validation") for row in matching(own, {"lr": lr}))
        for lr in {row["lr"]: None for row in own}
    }


def cell(found: Iterable[Row], seeds: int) -> str | None:
    """Write the test accuracy of some seeds."""
    each = [accuracy(row, "test") for row in found]
    if not each:
        return None
    worst = f" [{min(each):.1f}]" if max(each) - min(each) > 5 else ""
    return f"{statistics.mean(each):.1f}{worst}" + (f" n={len(each)}" if len(each) < seeds else "")


def jobs(options: Namespace) -> Iterable[Job]:
    """Go through the runs: of every network, batch and optimizer first the whole table of one seed."""
    for network, batch, optimizer in itertools.product(options.networks, options.batch, options.optimizers):
        own = [f"digits 0 to 4{NEGATIVE}" if options.way == "kept head" else "digits 5 to 9"]
        tasks, size = (options.tasks, options.size) if network in lite.PACKAGES else (own, 16)
        rates = options.rates or RATES[optimizer]
        for task, seed, lr, name in itertools.product(tasks, range(options.seeds), rates, options.arms):
            asked = {"network": network, "task": task, "size": size, "images": options.images, "arm": name}
            asked |= {"way": options.way, "optimizer": optimizer, "batch": batch}
            asked |= {"epochs": options.epochs or EPOCHS[network], "lr": lr, "seed": seed}
            yield Job(asked, functools.partial(run, asked, options.threads))


def main() -> None:
    """Parse and go."""
    made = parser(__doc__.splitlines()[0], "finetuning_forms.csv")
    made.add_argument("--networks", nargs="+", choices=EPOCHS, default=list(EPOCHS))
    made.add_argument("--tasks", nargs="+", choices=TASKS, default=["digits"], help="of ImageNet's networks")
    made.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    made.add_argument("--optimizers", nargs="+", choices=RATES, default=list(RATES))
    made.add_argument("--way", choices=WAYS, default=WAYS[0])
    made.add_argument("--batch", type=int, nargs="+", default=[16])
    made.add_argument("--rates", type=float, nargs="+", help="powers of two, around each optimizer's best, without")
    made.add_argument("--seeds", type=int, default=2)
    made.add_argument("--epochs", type=int, help="6 for small networks, 1 for others, without")
    made.add_argument("--size", type=int, default=64, help="pixels of a side, for ImageNet's networks")
    made.add_argument("--images", type=int, default=0, help="train with the first so many")
    options = made.parse_args()
    if options.render:
        options.csv.with_suffix(".md").write_text(page(rows(options.csv)))
        return
    measure(options.csv, jobs(options), options.workers)


if __name__ == "__main__":
    main()
