"""Random networks with several paths, written as source text: a failure prints the code of a network that one can read.

A network is a few *links*, each a convolution with its norm in one of the ways that people call the two, and what is
around them: options, a mode that is switched later, helpers, other holders, hooks, additions in place. ``PATHS`` are
the ways to run one.
"""

from __future__ import annotations

import linecache
import random
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from random_texts import ACTS, ADDITIONS, AROUND, HEADER, HOOKS, LINKS
from torch import Tensor, nn

NAME = "random_paths_made"


@dataclass(frozen=True)
class Link:
    """A convolution and its norm: how they are called, in which mode differently, and what comes behind."""

    how: str
    kernel: int = 3
    bias: bool = False
    mode: int = 1
    back: int = 0
    act: str = "h = F.relu(h)"


@dataclass(frozen=True)
class Block:
    """Links, and how they end: ``addition`` joins them with where they began."""

    links: tuple[Link, ...]
    addition: str = "h = h + x"
    around: str = "plain"


@dataclass(frozen=True)
class Hook:
    """A hook on the module of some number: of all convolutions, norms and what stands around them."""

    kind: str
    where: int = 0


@dataclass(frozen=True)
class Paths:
    """A whole network."""

    blocks: tuple[Block, ...]
    hooks: tuple[Hook, ...] = ()
    seed: int = 0

    def source(self) -> str:
        """Return the text of the network's module."""
        parts, links = [HEADER], 0
        for i, block in enumerate(self.blocks):
            parts.append(_block(f"Block{i}", block))
            links += len(block.links)
        names = ", ".join(f"Block{i}()" for i in range(len(self.blocks)))
        around = [AROUND[block.around].format(i=i) for i, block in enumerate(self.blocks)]
        parts.append(
            "class Network(Moded):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            f"        self.blocks = nn.ModuleList([{names}])\n\n"
            "    def forward(self, x, norm=True, mask=None):\n"
            + textwrap.indent("\n".join(around), " " * 8)
            + "\n        return x\n\n"
            "    def features(self, x):\n"
            "        return [block.features(x) for block in self.blocks]\n"
        )
        return "\n\n".join(parts)

    def build(self) -> Any:
        """Return the network in float64, in eval mode, as if it had been trained, with its hooks."""
        made = ModuleType(NAME)
        sys.modules[NAME] = made  # where a class says that it comes from
        text, file = self.source(), f"<{NAME} {hash(self)}>"
        linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file  # as a notebook's cells are known
        exec(compile(text, file, "exec"), made.__dict__)  # noqa: S102
        torch.manual_seed(self.seed)
        model = made.Network().double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 2.0)
                nn.init.normal_(module.bias)
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 3.0)
        places = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Sequential, made.Moded))]
        for hook in self.hooks:
            HOOKS[hook.kind](places[hook.where % len(places)], made.SEEN)
        return model


def drawn(seed: int) -> Paths:
    """Return the network of a seed."""
    by = random.Random(seed)  # noqa: S311  # no secret

    def link() -> Link:
        how = "plain" if by.random() < 0.2 else by.choice(list(LINKS))
        return Link(how, by.choice((3, 1)), by.random() < 0.5, by.randint(1, 2), by.randint(0, 2), by.choice(ACTS))

    def block() -> Block:
        links = tuple(link() for _ in range(by.randint(1, 3)))
        return Block(links, by.choice(list(ADDITIONS)), "plain" if by.random() < 0.5 else by.choice(list(AROUND)))

    blocks = tuple(block() for _ in range(by.randint(1, 2)))
    hooks = range(by.choice((0, 0, 1, 2)))
    return Paths(blocks, tuple(Hook(by.choice(list(HOOKS)), by.randint(0, 15)) for _ in hooks), seed % 4)


def _block(name: str, block: Block) -> str:
    first = Link("plain")
    inits, bodies, methods, features = [""], [""], [""], [""]
    for i, link in enumerate((*block.links,) or (first,)):
        values = {"i": i, "j": link.back % (i + 1), "m": link.mode, "k": link.kernel, "p": link.kernel // 2}
        text = LINKS[link.how]
        values["conv"] = "nn.Conv2d(4, 4, {k}, padding={p}, bias={b})".format(b=link.bias, **values)
        inits.append(text.init.format(**values))
        bodies += [text.body.format(**values), link.act]
        methods.append(text.methods.format(**values))
        features.append(text.features.format(**values))
    body = textwrap.indent("\n".join(line for line in bodies if line), " " * 8)
    addition = textwrap.indent(ADDITIONS[block.addition], " " * 8)
    feature = textwrap.indent("\n".join(line for line in features if line), " " * 8)
    return (
        f"class {name}(Moded):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        + textwrap.indent("\n".join(line for line in inits if line), " " * 8)
        + "\n\n    def forward(self, x, norm=True, mask=None):\n        h = x\n"
        + f"{body}\n{addition}\n        return h\n\n"
        + f"    def features(self, x):\n        h = x\n{feature}\n        return h\n\n"
        + textwrap.indent("\n".join(line for line in methods if line), " " * 4)
    )


def _switched(model: Any, x: Tensor, **values: Any) -> Any:
    for module in model.modules():
        for name, value in values.items() if hasattr(module, "mode") else ():
            setattr(module, name, value)
    return model(x)


def _gated(model: Any, x: Tensor) -> Any:
    for module in model.modules():
        if hasattr(module, "mode"):
            module.open_gate()
    return model(x)


def _dropping(model: Any, x: Tensor) -> Any:
    for module in model.modules():
        if hasattr(module, "mode"):
            module.drop.train()
    return model(x)


def _again(model: Any, x: Tensor) -> Any:
    _switched(model, x, mode=1)
    return _switched(model, x, mode=0)


def _training(model: Any, x: Tensor) -> Any:
    """In train mode with the norms as they are in eval mode, as when fine-tuning with frozen statistics."""
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model(x)


PATHS: dict[str, Callable[[Any, Tensor], Any]] = {
    "as it is": lambda model, x: model(x),
    "mode 1": lambda model, x: _switched(model, x, mode=1),
    "mode 2": lambda model, x: _switched(model, x, mode=2),
    "a gate": _gated,
    "another layer trains": _dropping,
    "training": _training,
    "norm=False": lambda model, x: model(x, norm=False),
    "mask": lambda model, x: model(x, mask=(x[:, :1] > 0).double()),
    "features": lambda model, x: model.features(x),
    "there and back": _again,
    "one more sample": lambda model, x: model(torch.cat([x, x[:1] + 1])),
}
"""What can be done with a network."""


def seen_by(model: Any) -> list[Tensor]:
    """Return what the hooks of a network note, which its copies share."""
    found: list[Tensor] = sys.modules[type(model).__module__].SEEN
    return found
