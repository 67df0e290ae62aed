"""What a look at a model is: a graph for each mode, what it was run on, or why there is none."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from normfree.errors import UsageError
from normfree.tracing.roles import Role, function_role, makes_constants

__all__ = ["MODES", "Graph", "Trace", "Value", "memory_of"]

MODES = ("eval", "train")


def memory_of(tensor: Tensor) -> int:
    """Return what tells the memory of a tensor from any other.

    Raises:
        UsageError: It stands for many, whose memory nobody is told of.
    """
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError as error:
        what = "what runs inside torch.vmap or another transform of torch.func cannot be written down"
        raise UsageError(f"{what}: call these layers on the batch itself") from error


@dataclass(frozen=True)
class Value:
    """What is known of the tensor that a node returned: whether it was written into by it, or handed on as it came."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    memory: int
    writes: bool = False
    handed_on: bool = False

    @classmethod
    def of(cls, tensor: Tensor, *, writes: bool = False, handed_on: bool = False) -> Value:
        """Describe a tensor."""
        if tensor.layout is not torch.strided:
            return cls(tuple(tensor.shape), (), 0, id(tensor), writes, handed_on)
        offset = int(tensor.storage_offset())
        return cls(tuple(tensor.shape), tensor.stride(), offset, memory_of(tensor), writes, handed_on)

    def covers(self, other: Value) -> bool:
        """Whether both are one and the same part of one memory."""
        places = [(value.memory, value.shape, value.strides, value.offset) for value in (self, other)]
        return places[0] == places[1]


@dataclass(frozen=True)
class Graph:
    """What one run of the model did.

    Attributes:
        nodes: The graph.
        owners: For each node, the path of the module whose forward created it.
        exits: For each node, the paths of the modules that return it, innermost first.
        calls: How often each module was called.
        called: The modules that were running when each norm, or layer that may take its gain, was called last.
        read: Norms of which a forward reads a tensor, each with the first that it reads.
        elsewhere: Modules in whose forward something is computed by code that was not seen.
        optional: Modules that are called with more than their defaults.
        values: What each node returned.
        written: The memory that each node has written into.
        order: The number of each node.
        steps: The number of the operation that was running when the node was written down.
    """

    nodes: fx.Graph
    owners: dict[fx.Node, str] = field(default_factory=dict)
    exits: dict[fx.Node, tuple[str, ...]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    called: dict[str, tuple[str, ...]] = field(default_factory=dict)
    read: dict[str, str] = field(default_factory=dict)
    elsewhere: set[str] = field(default_factory=set)
    optional: set[str] = field(default_factory=set)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    written: dict[fx.Node, frozenset[int]] = field(default_factory=dict)
    order: dict[fx.Node, int] = field(default_factory=dict)
    steps: dict[fx.Node, int] = field(default_factory=dict)

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """Return the shape of the tensor that a node returned, if it is known."""
        value = self.values.get(node)
        return None if value is None else value.shape

    def memory(self, node: fx.Node) -> int | None:
        """Return what tells the memory of the tensor that a node returned, if it is known."""
        value = self.values.get(node)
        return None if value is None else value.memory

    @functools.cached_property
    def holders(self) -> Mapping[int | None, list[fx.Node]]:
        """The nodes that returned each memory."""
        found: dict[int | None, list[fx.Node]] = {}
        for node, value in self.values.items():
            found.setdefault(value.memory, []).append(node)
        return found

    @functools.cached_property
    def spelled(self) -> list[tuple[object, ...]]:
        """What the graph does to its inputs, in a form that can be compared.

        Left out is what makes no difference to an analysis: whether a dropout is on, and how a value is made that
        depends on no input, such as a table of biases that is cached in eval mode.
        """
        names: dict[fx.Node, str] = {}
        told: list[tuple[object, ...]] = []
        for node in self.nodes.nodes:
            fed = any(source in names for source in node.all_input_nodes) and not makes_constants(node)
            if fed or node.op in ("placeholder", "output"):
                switch = node.op in ("call_function", "call_method") and function_role(node) is Role.PASS
                given = (node.all_input_nodes,) if switch else (node.args, node.kwargs)
                args = fx.map_arg(given, lambda source: names.get(source, "constant"))
                names[node] = f"%{len(names)}"
                written = node in self.values and self.values[node].writes
                told.append((node.op, node.target, str(args), written))
        return told


@dataclass(frozen=True)
class Trace:
    """Everything that running a model has shown: a graph for each of the modes that ran, or why not all are here.

    A model is ``deaf`` if it did the same while all layers answered to other classes; ``again`` runs it with others.
    """

    graphs: Mapping[str, Graph]
    looked: str = ""
    unseen: str = ""
    deaf: bool = False
    again: Callable[[Mapping[str, type[nn.Module]]], Mapping[str, Graph]] = field(default=lambda _: {}, repr=False)

    @functools.cached_property
    def distinct(self) -> list[Graph]:
        """The graphs that differ: what holds for one of two equal graphs holds for the other."""
        graphs = list(self.graphs.values())
        same = len(graphs) == 2 and (graphs[0] is graphs[1] or graphs[0].spelled == graphs[1].spelled)
        return graphs[:1] if same else graphs
