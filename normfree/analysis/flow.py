"""What a node of a graph is, and which nodes feed which, told by data and not by shapes.

``x.view_as(y)`` depends on the data of ``x`` alone; counting ``y`` as an input would make every reshaped tensor look as
if it were used twice. :class:`Flow` is the graph with such edges removed.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Container, Hashable, Iterable, Mapping
from types import EllipsisType
from typing import Any, TypeVar

from torch import fx, nn

from normfree.analysis.joining import unjoin
from normfree.layers import ChannelAffine, is_carrier
from normfree.norms import describe, is_norm
from normfree.tracing.roles import Role, elementwise, function_role, makes_constants, module_role, name_of, scales
from normfree.tracing.traces import Graph

__all__ = ["Flow", "Role", "is_inplace"]

T = TypeVar("T")


class Flow:
    """One graph in topological order, with data edges, ancestors and descendants.

    Attributes:
        nodes: The nodes that carry data, in order.
        graph: Where they come from.
        modules: The modules of the model by name.
        sites: Paths of the norms, or of what has taken their place.
        shared: Identities of modules that must keep their class.
        index: Position of each node in ``nodes``.
        inputs: The data inputs of each node.
        mixtures: What adds a join of its data inputs.
        users: The data users of each node (``output`` counts).
        ancestors: For each node, a bit set over ``nodes`` of everything it depends on.
        descendants: For each node, a bit set over ``nodes`` of everything that depends on it.
        roles: What each node does.
        shape: As of the graph.
    """

    def __init__(
        self, graph: Graph, modules: Mapping[str, nn.Module], sites: Iterable[str], shared: Container[int] = ()
    ) -> None:
        self.graph = graph
        self.modules = modules
        self.shared = shared
        self.sites = frozenset(sites)
        self.shape = graph.shape
        self._answers: dict[Any, Any] = {}
        self.inputs: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for node in graph.nodes.nodes:
            found = () if makes_constants(node) else tuple(i for i in _data_arguments(node) if i in self.inputs)
            if found or node.op == "placeholder":
                self.inputs[node] = found
        self.mixtures = unjoin(graph, self.inputs)
        self.nodes = tuple(self.inputs)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.users: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for source in self.inputs[node]:
                self.users[source].append(node)
        self.ancestors = self._reached(self.nodes, self.inputs)
        self.descendants = self._reached(self.nodes[::-1], self.users)
        self.roles: dict[fx.Node, Role] = {}
        self._weighted = 0
        for node in self.nodes:
            role = self.roles[node] = self._role(node)
            self._weighted |= self.bit(node) if role in (Role.CONV, Role.NORM) else 0

    def _reached(self, nodes: Iterable[fx.Node], edges: Mapping[fx.Node, Iterable[fx.Node]]) -> dict[fx.Node, int]:
        """Return all that edges lead to from each node, by a bit each; the nodes come in the other direction."""
        found: dict[fx.Node, int] = {}
        for node in nodes:
            bits = 0
            for other in edges[node]:
                bits |= found[other] | self.bit(other)
            found[node] = bits
        return found

    def once(self, key: Hashable, answer: Callable[[], T]) -> T:
        """Return an answer that holds for the whole graph, worked out the first time that it is asked for."""
        if key not in self._answers:
            self._answers[key] = answer()
        found: T = self._answers[key]
        return found

    def bit(self, node: fx.Node) -> int:
        """Return the bit of ``node`` in ``ancestors`` and ``descendants``."""
        return 1 << self.index[node]

    def between(self, base: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
        """Return the nodes on the paths from ``base`` (excluded) to ``end`` (included)."""
        bits = self.descendants[base] & (self.ancestors[end] | self.bit(end))
        nodes = self.nodes[self.index[base] : self.index[end] + 1]
        return tuple(node for node in nodes if bits >> self.index[node] & 1)

    def feeds(self, base: fx.Node, end: fx.Node) -> bool:
        """Whether ``end`` depends on ``base``."""
        return bool(self.ancestors[end] & self.bit(base))

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that ``node`` calls, if it calls one."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def carries(self, node: fx.Node) -> bool:
        """Whether ``node`` calls a layer on whose weight gain and alpha can live."""
        module = self.module(node)
        return module is not None and self.once(("carries", id(module)), lambda: is_carrier(module))

    def activation_in(self, node: fx.Node) -> nn.Module | None:
        """Return the activation that a norm, or what has taken its place, applies itself."""
        module = self.modules[str(node.target)]
        if is_norm(module):
            return describe(module).act
        return module.act if isinstance(module, ChannelAffine) else None

    def norms_in(self, node: fx.Node) -> tuple[str, ...]:
        """Return the paths of the norms that run in a node: itself, or those inside a module not looked into."""
        if node.op != "call_module" or not self.sites:
            return ()
        path = str(node.target)
        if path in self.sites or not any(True for _ in self.modules[path].children()):
            return (path,) if path in self.sites else ()
        return self.once(("inside", path), lambda: tuple(s for s in sorted(self.sites) if s.startswith(f"{path}.")))

    def calls(self, path: str) -> int:
        """Return how often a module is called; 0 if it must stay as it is."""
        return 0 if id(self.modules[path]) in self.shared else self.graph.calls.get(path, 0)

    def called_once(self, node: fx.Node) -> bool:
        """Whether the module that ``node`` calls is called nowhere else."""
        return self.calls(str(node.target)) == 1

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the activations that an addition adds, one that is added twice twice."""
        given = [arg for arg in node.args[:2] if isinstance(arg, fx.Node) and arg in self.inputs]
        return given if len(given) > 1 else list(self.inputs[node])

    def additions(self, owner: str | None = None) -> list[fx.Node]:
        """Return what adds two activations, in the forward of one module or anywhere."""
        found = (node for node in self.nodes if node.op != "call_module" and name_of(node) == "add")
        return [n for n in found if len(self.operands(n)) == 2 and owner in (None, self.graph.owners.get(n, ""))]

    def above(self, node: fx.Node, roles: Container[Role]) -> fx.Node:
        """Return what computes ``node``, seen past what has one of these roles."""
        while self.roles[node] in roles:
            node = self.inputs[node][0]
        return node

    def reader(self, node: fx.Node, roles: Container[Role]) -> fx.Node | None:
        """Return what alone reads ``node``, seen past what has one of these roles; ``None`` if several do."""
        users = self.users[node]
        while len(users) == 1 and self.roles[users[0]] in roles:
            users = self.users[users[0]]
        return users[0] if len(users) == 1 else None

    @functools.cached_property
    def writers(self) -> Mapping[int | None, list[fx.Node]]:
        """What writes into each memory, or would in train mode, in order."""
        found: dict[int | None, list[fx.Node]] = {}
        for node in self.nodes:
            written: set[int | None] = set(self.graph.written.get(node, ()))
            for memory in written | ({self.graph.memory(self.inputs[node][0])} if is_inplace(self, node) else set()):
                found.setdefault(memory, []).append(node)
        return found

    def _role(self, node: fx.Node) -> Role:
        if node.op == "placeholder":
            return Role.INPUT
        if node.op == "call_module":
            if node.target in self.sites:
                return Role.NORM
            role = module_role(self.modules[str(node.target)])
            return Role.PASS if role is Role.OTHER and self._passes(node) else role
        if node in self.mixtures:
            return Role.PASS if self.mixtures[node].is_taken_out else Role.ADD
        role = function_role(node)
        if node.target is operator.getitem:
            index, of_split = node.args[1], self.roles.get(self.inputs[node][0]) is Role.SPLIT
            part = of_split or index is None or isinstance(index, (tuple, slice, EllipsisType))
            role = Role.SLICE if part else Role.OTHER
        if role is Role.CAT and len(self.inputs[node]) == 1:
            return Role.PAD  # the rest is constants
        if role is Role.PAD and self._broadcasts(node):
            return Role.OTHER
        return self._arithmetic(node, role) if role in (Role.ADD, Role.MUL, Role.DIV) else role

    def _passes(self, node: fx.Node) -> bool:
        """Whether a module of any class hands on its input, or multiplies it by a number."""
        value, module = self.graph.values.get(node), self.modules[str(node.target)]
        if value is not None and value.handed_on:
            return not isinstance(module, nn.modules.dropout._DropoutNd)
        if isinstance(module, ChannelAffine) or any(True for _ in module.parameters()) or len(self.inputs[node]) != 1:
            return False
        key = ("passes", type(module), repr(module))
        return self.once(key, lambda: elementwise(module) and scales(module))

    def _broadcasts(self, node: fx.Node) -> bool:
        """Whether a node repeats what has one entry only in some dimension: a statistic, and no skip path."""
        before, after = self.shape(self.inputs[node][0]), self.shape(node)
        if before is None or after is None or name_of(node) == "pad" or len(before) > len(after):
            return False
        return any(many > one == 1 for one, many in zip(before[::-1], after[::-1], strict=False))

    def _arithmetic(self, node: fx.Node, role: Role) -> Role:
        """Only two activations make a sum or a product; a constant factor commutes with alpha, a summand does not.

        A difference, or a mean of two with weights, is a sum if layers stand in only one of the ways to it: ``x`` less
        its own mean is none.
        """
        operands = self.operands(node)
        if len(operands) == 2:
            if role is Role.ADD and name_of(node) != "add" and not self._differ(*operands):
                return Role.OTHER
            return Role.OTHER if role is Role.DIV else role
        if role is Role.DIV:
            return Role.PASS if operands == [node.args[0]] else Role.OTHER
        nothing = any(isinstance(arg, (int, float)) and arg == 0 for arg in node.args)
        neutral = role is Role.MUL or (len(node.args) == 2 and nothing)
        return Role.PASS if len(operands) == 1 and neutral else Role.OTHER

    def _differ(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether a layer with weights stands before one of two nodes alone, and neither is a mean."""
        if self.shape(one) != self.shape(other):
            return False
        ways = [self.ancestors[node] | self.bit(node) for node in (one, other)]
        return bool((ways[0] ^ ways[1]) & self._weighted)


def _data_arguments(node: fx.Node) -> tuple[fx.Node, ...]:
    if name_of(node) in ("reshape_as", "view_as", "expand_as", "type_as") and isinstance(node.args[0], fx.Node):
        return (node.args[0],)
    return tuple(node.all_input_nodes)


def is_inplace(flow: Flow, node: fx.Node) -> bool:
    """Whether a node writes into its first argument, or would in train mode."""
    value = flow.graph.values.get(node)
    flagged = node.op == "call_module" and getattr(flow.modules[str(node.target)], "inplace", False) is True
    return bool(flagged or node.kwargs.get("inplace") or (value is not None and value.writes))
