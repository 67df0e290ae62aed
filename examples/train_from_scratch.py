"""Networks people use, from scratch on real photographs: with batch norm, with group norm, and converted.

The photographs are solar cells, sound or defective (`pip install "normfree[examples]"` brings them). Every arm has the
same epochs and chooses its learning rate from the same grid. `--networks` takes any name that `normfree convert` takes.

Run: python examples/train_from_scratch.py [--shard 0/2] [--networks NAME ...]
     python examples/train_from_scratch.py --device cuda --size 128 --networks resnet18 resnet50 mobilenet_v2 \
         efficientnet_b0 densenet121 vgg16_bn timm:resnetv2_50
     python examples/train_from_scratch.py --render
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial

import torch
from experiment import Data, Row, markdown, parser, rows, shard, solar_cells, study, summary
from recipe import BN_RECIPE, RECIPE, Outcome, train
from torch import nn

import normfree
from normfree import zoo
from normfree.bench.arms import Subject, build_arms

NETWORKS = ("torchvision:resnet18", "torchvision:mobilenet_v2", "torchvision:vgg11_bn")
ARMS = {"bn": "BatchNorm", "groupnorm": "GroupNorm", "normfree": "normfree"}
RATES = tuple(2.0**power for power in range(-9, 1, 2))


def network(source: zoo.Source, arm: str, data: Data) -> nn.Module:
    """Build a network and put what the arm has in the place of its norms."""
    model = zoo.build(source, num_classes=data.classes)
    if arm == "normfree":
        # Where a skip path protects the signal this changes little; elsewhere nothing else sets its scale.
        return normfree.calibrate(normfree.convert(model, init="skipinit"), data.train.x[:64])
    return build_arms(Subject(str(source), model, "skipinit"), (arm,))[arm].model


def run(source: zoo.Source, arm: str, data: Data, options: Namespace, lr: float, seed: int) -> Outcome:
    """Build one network and train it; group norm is as safe from the batch as none, and gets what batch norm gets."""
    torch.manual_seed(seed)
    model = network(source, arm, data)
    recipe = RECIPE if arm == "normfree" else BN_RECIPE
    return train(
        model, data, recipe, lr=lr, epochs=options.epochs, batch=options.batch, seed=seed, device=options.device
    )


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
    options = made.parse_args()
    if options.render:
        options.csv.with_suffix(".md").write_text(page(rows(options.csv)))
        return
    torch.set_num_threads(options.threads)
    data = solar_cells(options.size)
    sources = [zoo.find(name) for name in options.networks]
    for source, arm in shard([(source, arm) for source in sources for arm in options.arms], options.shard):
        settings = {"network": str(source), "arm": arm, "size": options.size, "epochs": options.epochs}
        settings["batch"] = options.batch
        study(options.csv, settings, options.rates, options.seeds, partial(run, source, arm, data, options))


if __name__ == "__main__":
    main()
