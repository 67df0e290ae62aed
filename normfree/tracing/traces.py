"""What a trace of a model is: graphs of its parts in both modes, and what could not be traced."""

from __future__ import annotations

import functools
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from torch import fx

from normfree.tracing.roles import Role, function_role, is_shape

__all__ = ["MODES", "Graph", "Part", "Trace"]

MODES = ("eval", "train")


@dataclass(frozen=True)
class Graph:
    """One fx graph of one part in one mode.

    Attributes:
        nodes: The graph; module targets are relative to the part.
        owners: For each node, the path of the module whose forward created it.
        exits: For each node, the paths of the traced modules that return it, innermost first.
        calls: How often each module was called.
        read: Norms of which a forward reads a tensor, each with the first that it reads.
        optional: Modules that are called with more than their defaults.
        kinds: Modules of whose class a forward asks.
    """

    nodes: fx.Graph
    owners: Mapping[fx.Node, str]
    exits: Mapping[fx.Node, tuple[str, ...]]
    calls: Mapping[str, int]
    read: Mapping[str, str] = field(default_factory=dict)
    optional: Container[str] = frozenset()
    kinds: frozenset[str] = frozenset()

    def spelled(self) -> list[tuple[object, ...]]:
        """Return what the graph does to its inputs, in a form that can be compared.

        Left out is what makes no difference to an analysis: whether a dropout is on, and how a value is made that
        depends on no input, such as a table of biases that is cached in eval mode.
        """
        names: dict[fx.Node, str] = {}
        told: list[tuple[object, ...]] = []
        for node in self.nodes.nodes:
            fed = any(source in names for source in node.all_input_nodes) and not is_shape(node)
            if fed or node.op in ("placeholder", "output"):
                kwargs = {key: value for key, value in node.kwargs.items() if not _is_switch(node, key)}
                args = fx.map_arg((node.args, kwargs), lambda source: names.get(source, "constant"))
                names[node] = f"%{len(names)}"
                told.append((node.op, node.target, str(args)))
        return told


def _is_switch(node: fx.Node, key: str) -> bool:
    return key == "training" and node.op == "call_function" and function_role(node) is Role.PASS


@dataclass(frozen=True)
class Part:
    """A module that was traced as a whole: the root, or a piece of a root that could not be.

    Attributes:
        path: Qualified name, empty for the root.
        graphs: One graph for each of :data:`MODES`.
    """

    path: str
    graphs: Mapping[str, Graph]

    @functools.cached_property
    def distinct(self) -> tuple[str, ...]:
        """The modes whose graphs differ: what holds for one of two equal graphs holds for the other."""
        first, second = (self.graphs[mode] for mode in MODES)
        return MODES[:1] if first is second or first.spelled() == second.spelled() else MODES


@dataclass(frozen=True)
class Trace:
    """Everything the graphs say about a model.

    Attributes:
        parts: The traced parts.
        opaque: Modules that were called but not looked into, with the error that says why.
    """

    parts: tuple[Part, ...]
    opaque: Mapping[str, str]

    @property
    def kinds(self) -> frozenset[str]:
        """Modules of whose class some forward asks."""
        graphs = ((part.path, graph) for part in self.parts for graph in part.graphs.values())
        return frozenset(f"{path}.{name}".strip(".") for path, graph in graphs for name in graph.kinds)
