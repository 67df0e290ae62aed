"""Networks people use, from scratch on real photographs: with batch norm, with group norm, and converted.

The photographs are solar cells, sound or defective (`pip install "normfree[examples]"` brings them). Every arm has the
same epochs and chooses its learning rate from the same grid. `--networks` takes any name that `normfree convert` takes.

Run: python examples/experiments/train_from_scratch.py [--workers 2] [--networks NAME ...]
     python examples/experiments/train_from_scratch.py --device cuda --bf16 --size 128 --workers 12 \
         --networks resnet18 resnet50 mobilenet_v2 efficientnet_b0 densenet121 vgg16_bn timm:resnetv2_50
     python examples/experiments/train_from_scratch.py --render
"""

from __future__ import annotations

from argparse import Namespace
from functools import cache, partial

import torch
from experiment import Row, Study, markdown, parser, rows, study, summary
from images import Data, solar_cells
from recipe import BN_RECIPE, RECIPE, Outcome, train
from torch import nn

import normfree
from normfree import zoo
from normfree.bench.arms import Subject, build_arms

NETWORKS = ("torchvision:resnet18", "torchvision:mobilenet_v2", "torchvision:vgg11_bn")
ARMS = {"bn": "BatchNorm", "groupnorm": "GroupNorm", "normfree": "normfree"}
RATES = tuple(2.0**power for power in range(-9, 1, 2))


images = cache(solar_cells)


def network(source: zoo.Source, arm: str, data: Data, device: str = "cpu") -> nn.Module:
    """Build a network and put what the arm has in the place of its norms."""
    model = zoo.build(source, num_classes=data.classes)
    if arm == "normfree":
        # Where a skip path protects the signal this changes little; elsewhere nothing else sets its scale.
        model = normfree.convert(model, init="skipinit").to(device)
        return normfree.calibrate(model, data.train.x[:64].to(device))
    return build_arms(Subject(str(source), model, "skipinit"), (arm,))[arm]


def run(source: zoo.Source, arm: str, options: Namespace, lr: float, seed: int) -> Outcome:
    """Build one network and train it; group norm is as safe from the batch as none, and gets what batch norm gets."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(seed)
    data = images(options.size)
    model = network(source, arm, data, options.device)
    recipe = RECIPE if arm == "normfree" else BN_RECIPE
    settings = {"epochs": options.epochs, "batch": options.batch, "device": options.device, "bf16": options.bf16}
    return train(model, data, recipe, lr=lr, seed=seed, **settings)


def page(table: list[Row]) -> str:
    """Write test accuracy, spread and best learning rate, a line a network."""
    body = []
    for key in sorted({(row["network"], int(row["size"]), int(row["epochs"])) for row in table}):
        settings = dict(zip(("network", "size", "epochs"), key, strict=True))
        body.append([*key, *(summary(table, {**settings, "arm": arm}) for arm in ARMS)])
    return markdown(["network", "pixels", "epochs", *ARMS.values()], body) + "\n"


def main() -> None:
    """Parse and go."""
    made = parser(__doc__.splitlines()[0], "train_from_scratch.csv")
    made.add_argument("--networks", nargs="+", default=NETWORKS)
    made.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    made.add_argument("--size", type=int, default=64, help="pixels of a side")
    made.add_argument("--rates", type=float, nargs="+", default=RATES)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--epochs", type=int, default=20)
    made.add_argument("--batch", type=int, default=32)
    made.add_argument("--bf16", action="store_true", help="autocast, and channels last: for a GPU")
    options = made.parse_args()
    if options.render:
        options.csv.with_suffix(".md").write_text(page(rows(options.csv)))
        return
    cells = []
    for source in map(zoo.find, options.networks):
        for arm in options.arms:
            settings = {"network": str(source), "arm": arm, "size": options.size, "epochs": options.epochs}
            settings |= {"batch": options.batch, "dtype": "bf16" if options.bf16 else "fp32"}
            cells.append(Study(settings, partial(run, source, arm, options)))
    study(options.csv, cells, options.rates, options.seeds, options.workers)
    print(page(rows(options.csv)))


if __name__ == "__main__":
    main()
