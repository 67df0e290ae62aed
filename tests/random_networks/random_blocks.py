"""Descriptions of what holds layers: residual blocks, graphs, splits, wrappers. The builder makes modules of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from random_layers import Description


@dataclass(frozen=True, repr=False)
class Again(Description):
    """A module that stands elsewhere already, called once more; nothing where none fits."""

    back: int = 0


@dataclass(frozen=True, repr=False)
class Nest(Description):
    layers: tuple[Any, ...] = ()
    how: str = "sequential"


@dataclass(frozen=True, repr=False)
class Res(Description):
    """``post(skip(x) + branch(first(x)))``; ``nested``: the branch is a module of its own."""

    branch: tuple[Any, ...] = ()
    first: tuple[Any, ...] = ()
    post: tuple[Any, ...] = ()
    skip: str = "identity"
    how: str = "plus"
    nested: bool = True
    skip_first: bool = False
    preactivated: bool = False


@dataclass(frozen=True, repr=False)
class Wire(Description):
    layers: tuple[Any, ...] = ()
    source: int = 0
    join: str | None = None
    other: int = 0


@dataclass(frozen=True, repr=False)
class Graph(Description):
    """Any acyclic graph: parallel branches, dense concatenation, taps, merges."""

    wires: tuple[Wire, ...] = ()


@dataclass(frozen=True, repr=False)
class UNet(Description):
    """Down, through the layers, up again, and joined with where it came from."""

    layers: tuple[Any, ...] = ()
    join: str = "plus"
    transposed: bool = False


@dataclass(frozen=True, repr=False)
class Ways(Description):
    """Channels that go different ways."""

    layers: tuple[Any, ...] = ()
    how: str = "split"


@dataclass(frozen=True, repr=False)
class Wrap(Description):
    """Untraceable (``shape``, ``data``, ``loop``) or gradient checkpointing around layers."""

    layers: tuple[Any, ...] = ()
    how: str = "shape"
