"""What the forwards of random networks write inline: activations, dropouts, additions, each way people write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "leaky": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "leaky": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "prelu": nn.PReLU,
}
IN_PLACE = frozenset({"relu", "silu", "hardswish", "leaky", "elu"})
METHODS = frozenset({"relu", "tanh", "sigmoid"})


def _augmented(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


ADDITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plus": lambda x, y: x + y,
    "swapped": lambda x, y: y + x,
    "torch.add": lambda x, y: torch.add(x, y),
    "torch.add_scaled": lambda x, y: torch.add(x, y, alpha=0.5),
    "method": lambda x, y: x.add(y),
    "add_": lambda x, y: y.add_(x),
    "add_to_skip": lambda x, y: x.add_(y),
    "iadd": lambda x, y: _augmented(y, x),
    "iadd_to_skip": _augmented,
    "sum": lambda x, y: cast(Tensor, sum([x, y])),
    "scaled": lambda x, y: x + 0.5 * y,
    "divided": lambda x, y: y / 2 + x,
    "minus": lambda x, y: x - y,
}
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **ADDITIONS,
    "times": lambda x, y: x * y,
    "cat": lambda x, y: torch.cat([x, y], 1),
}


@dataclass(frozen=True)
class Call:
    """A functional operation, inline in somebody's forward; ``p`` is its number, if it takes one."""

    what: str
    how: str = "function"
    p: float = 0.0

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        if self.what == "dropout":
            return F.dropout(x, self.p, training)
        if self.what == "dropout_in_place":
            return F.dropout(x, self.p, training=training, inplace=True)
        if self.what == "depth":
            return cast(Tensor, stochastic_depth(x, self.p, "row", training))
        if self.what == "drop_path":  # as many repositories write it
            if not training:
                return x
            dims = x.dim() if self.how == "any" else int(self.how)  # the former cannot be traced
            mask = x.new_empty((x.shape[0], *(1,) * (dims - 1))).bernoulli_(1 - self.p)
            return x.div(1 - self.p) * mask
        if self.what == "mean":
            return x.flatten(2).mean(2)
        if self.what == "flatten":
            return torch.flatten(x, 1)
        if self.what == "view":
            return x.view(x.size(0), -1)
        if self.what == "pad":
            return F.pad(x, (0, 0) * (x.dim() - 2) + (0, int(self.p)))
        if self.how == "in_place":
            return FUNCTIONS[self.what](x, inplace=True)
        if self.how == "method":
            return cast(Tensor, getattr(x, f"{self.what}_")())
        return FUNCTIONS[self.what](x)
