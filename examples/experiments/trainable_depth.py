"""How deep a network may be before it no longer trains: the first table of De & Smith (NeurIPS 2020), by `convert`.

Networks of 16, 100 and 1,000 layers, pre-activation (timm's blocks) and post-activation (torchvision's), on
scikit-learn's digits or on a folder of images. The learning rate of every cell is the power of two that validates best.

Run: python examples/experiments/trainable_depth.py [--workers 2] [--device cuda] [--images FOLDER --size 32]
     python examples/experiments/trainable_depth.py --render
"""

from __future__ import annotations

import math
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from drawing import line, style
from experiment import Row, Study, markdown, parser, rows, study, summary
from images import Data, digits, folder
from recipe import BN_RECIPE, RECIPE, Outcome, train
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import normfree

KINDS = ("pre-activation", "post-activation")
DEPTHS = (16, 100, 1000)
ARMS = {
    "bn": "Batch normalization",
    "rsqrt_depth": "SkipInit, alpha = 1/sqrt(d)",
    "skipinit": "SkipInit, alpha = 0",
    "deleted": "BN deleted (alpha fixed at 1)",
    "unclipped": "BN deleted, gradient not clipped",
    "sqrt2": "Blocks divided by sqrt(2)",
}
RECIPES = {name: BN_RECIPE if name in ("bn", "unclipped") else RECIPE for name in ARMS}
RATES = tuple(2.0**power for power in range(-7, 3))


def network(kind: str, depth: int, data: Data, width: int = 8) -> nn.Module:
    """Build a batch-norm network of `depth` layers: a stem, blocks of two layers in two stages, and a classifier."""
    channels = data.train.x.shape[1]
    blocks = (depth - 2) // 2
    first, second = blocks - blocks // 2, blocks // 2
    stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    if kind == "pre-activation":
        model = ResNetV2(
            [first, second],
            (width, 2 * width),
            num_classes=data.classes,
            stem_chs=width,
            basic=True,
            bottle_ratio=1.0,
            norm_layer=BatchNormAct2d,
            conv_layer=create_conv2d,
        )
        model.stem = stem  # timm's own takes a quarter of the pixels of each side away: too many of eight
        return model
    shortcut = nn.Sequential(nn.Conv2d(width, 2 * width, 1, stride=2, bias=False), nn.BatchNorm2d(2 * width))
    stages = [
        *(BasicBlock(width, width) for _ in range(first)),
        BasicBlock(width, 2 * width, 2, shortcut),
        *(BasicBlock(2 * width, 2 * width) for _ in range(second - 1)),
    ]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, data.classes))
    return nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU(), *stages, *head)


def arm(name: str, model: nn.Module) -> nn.Module:
    """Turn a batch-norm network into what a row of the table is about."""
    if name == "bn":
        return model
    if name == "skipinit":
        return normfree.convert(model, init="skipinit")
    if name == "rsqrt_depth":
        return normfree.convert(model, init="skipinit", alpha="rsqrt_depth")
    plan = normfree.plan(model, init="skipinit")
    model = normfree.convert(model, init="skipinit", alpha=1.0)
    for key, parameter in model.named_parameters():
        if key.endswith("alpha"):
            parameter.requires_grad_(False)
    if name == "sqrt2":
        for total in plan.sums:  # named block.add; a block returns its sum, or the ReLU of it, which a factor passes
            model.get_submodule(total.name.rpartition(".")[0]).register_forward_hook(divide)
    return model


def divide(_block: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """Divide what a block returns by the square root of two."""
    return output / 2**0.5


def run(kind: str, depth: int, name: str, data: Data, options: Namespace, lr: float, seed: int) -> Outcome:
    """Build one network and train it."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(seed)
    model = arm(name, network(kind, depth, data, options.width))
    settings = {"epochs": options.epochs, "batch": options.batch, "device": options.device}
    return train(model, data, RECIPES[name], lr=lr, seed=seed, **settings)


def page(table: list[Row]) -> str:
    """Write the table in the form of the paper's: test accuracy in percent, its spread, and the best learning rate."""
    parts = []
    depths = sorted({int(row["depth"]) for row in table})
    for kind in KINDS:
        body = []
        for name, title in ARMS.items():
            cells = [summary(table, {"network": kind, "depth": depth, "arm": name}) for depth in depths]
            body.append([title, *cells])
        parts.append(f"{kind}:\n\n" + markdown(["", *(f"{depth} layers" for depth in depths)], body))
    return "\n\n".join(parts) + "\n"


def plot(table: list[Row], path: Path) -> None:
    """Draw the training curve of every cell at its best learning rate, seed 0."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    depths = sorted({int(row["depth"]) for row in table})
    figure = Figure(figsize=(3.5 * len(depths), 6.5), layout="constrained")
    grid = figure.subplots(len(KINDS), len(depths), sharex="col", sharey=True, squeeze=False)
    for axes, kind in zip(grid, KINDS, strict=True):
        for ax, depth in zip(axes, depths, strict=True):
            ax.set_title(f"{kind}, {depth} layers", fontsize=9)
            ax.set_yscale("log")
            ax.set_ylim(2e-4, 10)  # what was deleted starts with losses of hundreds
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            for number, (name, title) in enumerate(ARMS.items()):
                look = style(number, len(ARMS)) | {"markersize": 0}
                best = summary(table, {"network": kind, "depth": depth, "arm": name})
                for row in table:
                    key = (row["network"], row["depth"], row["arm"], row["lr"], row["seed"])
                    if best and key == (kind, str(depth), name, str(best.lr), "0"):
                        curve = enumerate(map(float, row["curve"].split()), start=1)
                        points = {epoch: min(max(loss, 2e-4), 10) for epoch, loss in curve}
                        if row["status"] == "diverged":  # one cross for all of them, beside each other
                            points = {epoch: loss for epoch, loss in points.items() if math.isfinite(loss)}
                            ax.plot([0.9 - 0.06 * number], [0.95], "X", color=f"C{number}", transform=ax.transAxes)
                        line(ax, points, look, title, best="low")
    handles = {label: handle for ax in grid.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, fontsize=8)
    figure.supxlabel("epoch (a cross above: that arm diverges at every rate)")
    figure.supylabel("training loss")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse and go."""
    made = parser(__doc__.splitlines()[0], "trainable_depth.csv")
    made.add_argument("--images", type=Path, help="a folder with one folder a class; scikit-learn's digits without")
    made.add_argument("--size", type=int, default=16, help="pixels of a side that they are scaled to")
    made.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    made.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    made.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    made.add_argument("--rates", type=float, nargs="+", default=RATES)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--width", type=int, default=8)
    made.add_argument("--epochs", type=int, default=48)
    made.add_argument("--batch", type=int, default=64)
    options = made.parse_args()
    if options.render:
        table = rows(options.csv)
        options.csv.with_suffix(".md").write_text(page(table))
        plot(table, options.csv.with_suffix(".png"))
        return
    data = folder(options.images, options.size) if options.images else digits()
    cells = []
    for depth in options.depths:
        for kind in options.kinds:
            for name in options.arms:
                settings = {"network": kind, "depth": depth, "arm": name}
                settings |= {"epochs": options.epochs, "batch": options.batch}
                cells.append(Study(settings, partial(run, kind, depth, name, data, options)))
    study(options.csv, cells, options.rates, options.seeds, options.workers)
    print(page(rows(options.csv)))


if __name__ == "__main__":
    main()
