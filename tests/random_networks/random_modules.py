"""The modules that random networks are built of: what people write in their forwards, each way once.

Everything here is ordinary model code and knows nothing of normfree. A block holds *steps*: names of its children, or
functional operations that its own forward calls inline, because a call inside a module is traced differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from random_functions import ADDITIONS, JOINS, Call
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Gating:
    """Squeeze-excite written inline: the children's names."""

    dims: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Gate:
    """The same before a block has taken its children."""

    dims: int
    children: tuple[nn.Module, ...]


Step = str | Call | Gating
Piece = nn.Module | Call | Gate


class Steps(nn.Module):
    """A module whose forward runs steps."""

    def hold(self, name: str, pieces: Sequence[Piece]) -> tuple[Step, ...]:
        """Register what is a module under ``name`` and a number; return the steps."""
        return tuple(self._hold(f"{name}{i}", piece) for i, piece in enumerate(pieces))

    def _hold(self, name: str, piece: Piece) -> Step:
        if isinstance(piece, Gate):
            names = (str(self._hold(f"{name}_{i}", child)) for i, child in enumerate(piece.children))
            return Gating(piece.dims, tuple(names))
        if isinstance(piece, nn.Module):
            self.add_module(name, piece)
            return name
        return piece

    def run(self, steps: tuple[Step, ...], x: Tensor) -> Tensor:
        """Apply the steps in order."""
        for step in steps:
            if isinstance(step, Call):
                x = step(x, self.training)
            elif isinstance(step, Gating):
                x = x * torch.sigmoid(gate(x, step.dims, [getattr(self, name) for name in step.names]))
            else:
                x = getattr(self, step)(x)
        return x


def gate(x: Tensor, dims: int, children: Sequence[nn.Module]) -> Tensor:
    """Return the logits of a squeeze-excite gate; ``dims`` is what ``x.dim()`` would not tell a trace."""
    y = x.flatten(2).mean(2)
    for _ in range(dims - 2):
        y = y.unsqueeze(2)
    for child in children:
        y = child(y)
    return y


class SqueezeExcite(nn.Module):
    """The same gate as a module."""

    def __init__(self, dims: int, children: Sequence[nn.Module]) -> None:
        super().__init__()
        self.dims, self.layers = dims, nn.ModuleList(children)

    def forward(self, x: Tensor) -> Tensor:
        return gate(x, self.dims, list(self.layers)).sigmoid() * x


class Chain(Steps):
    """Steps one after the other."""

    def __init__(self, pieces: Sequence[Piece], untold: bool) -> None:
        """``untold``: call the layers from a plain list, which torch knows nothing of, beside their registration."""
        super().__init__()
        self.steps = self.hold("layer", pieces)
        self.plain = [getattr(self, s) if isinstance(s, str) else s for s in self.steps] if untold else None

    def forward(self, x: Tensor) -> Tensor:
        if self.plain is None:
            return self.run(self.steps, x)
        for step in self.plain:
            x = step(x) if isinstance(step, nn.Module) else self.run((step,), x)
        return x


class Residual(Steps):
    """``post(skip(x) + branch(first(x)))``."""

    def __init__(self, parts: Mapping[str, Sequence[Piece]], how: str, skip_first: bool, preactivated: bool) -> None:
        super().__init__()
        self.parts = {name: self.hold(name, pieces) for name, pieces in parts.items()}
        self.how, self.skip_first, self.preactivated = how, skip_first, preactivated

    def forward(self, x: Tensor) -> Tensor:
        y = self.run(self.parts["first"], x)
        source = y if self.preactivated else x
        skip = self.run(self.parts["skip"], source) if self.skip_first else source
        branch = self.run(self.parts["branch"], y)
        if not self.skip_first:
            skip = self.run(self.parts["skip"], source)
        return self.run(self.parts["post"], ADDITIONS[self.how](skip, branch))


class Wired(Steps):
    """Any acyclic graph: each step takes an earlier value, and may be joined with another one."""

    def __init__(self, wires: Sequence[tuple[Sequence[Piece], int, str | None, int]]) -> None:
        super().__init__()
        self.wires = [(self.hold(f"wire{i}_", p), source, join, b) for i, (p, source, join, b) in enumerate(wires)]

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for steps, source, join, other in self.wires:
            y = self.run(steps, values[source])
            values.append(y if join is None else JOINS[join](values[other], y))
        return values[-1]


class Split(Steps):
    """Channels go different ways: ``how`` is a method of splitting, or the slice that ReXNet and DPN add to."""

    def __init__(self, pieces: Sequence[Piece], how: str, at: int, joined: bool) -> None:
        super().__init__()
        self.steps, self.how, self.at, self.joined = self.hold("layer", pieces), how, at, joined

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "add_slice":
            y = self.run(self.steps, x)
            return torch.cat([y[:, : self.at] + x, y[:, self.at :]], 1)
        if self.how == "iadd_slice":
            y = self.run(self.steps, x)
            head, rest = y[:, : self.at], y[:, self.at :]
            head += x
            return torch.cat([head, rest], 1)
        parts = {"split": torch.split, "chunk": torch.chunk}[self.how](x, 2 if self.how == "chunk" else self.at, 1)
        y = self.run(self.steps, parts[0])
        return torch.cat([y, parts[1]], 1) if self.joined else y


class Untraceable(nn.Module):
    """What torch.fx cannot follow."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "shape":
            return self.inner(x) if x.shape[0] > 0 else x
        if self.how == "data":
            return x if x.mean() > 1e6 else self.inner(x)
        return torch.cat([self.inner(row[None]) for row in x])


class Checkpointed(nn.Module):
    """Gradient checkpointing in training."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, checkpoint(self.inner, x, use_reentrant=False) if self.training else self.inner(x))


class FunctionalNorm(nn.Module):
    """A batch norm that no module tree shows, under names that no buffer gives away."""

    centre: Tensor
    spread: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.centre, self.spread, training=self.training)


class Several(Steps):
    """A root with more than one output."""

    def __init__(self, body: nn.Module, head: Sequence[Piece], how: str) -> None:
        super().__init__()
        self.body, self.how = body, how
        self.head = self.hold("head", head)

    def forward(self, x: Tensor) -> Any:
        features = self.body(x)
        out = self.run(self.head, features)
        if self.how == "tuple":
            return out, features
        if self.how == "dict":
            return {"out": out, "inner": [features], "name": "random"}
        if self.how == "auxiliary":
            return (out, features) if self.training else out
        return out
