"""What a node of an fx graph is, and which nodes feed which, told by data and not by shapes.

``x.reshape(y.shape)`` depends on the data of ``x`` alone; counting ``y`` as an input would make every reshaped tensor
look as if it were used twice. :class:`Flow` is the graph with such edges removed.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Mapping
from types import EllipsisType
from typing import Any

from torch import fx, nn

from normfree.layers import ChannelAffine, Copy, ScaledWeight, SkipInit, is_carrier
from normfree.norms import describe, is_norm
from normfree.tracing.roles import Role, elementwise, function_role, is_shape, method_role, module_role
from normfree.tracing.traces import Graph

__all__ = ["Flow", "Role", "is_inplace", "writes_unannounced"]


_SHAPE_FROM_SECOND = {"reshape_as", "view_as", "expand_as", "type_as"}


class Flow:
    """One graph in topological order, with data edges, ancestors and descendants.

    Attributes:
        nodes: The nodes that carry data, in order.
        graph: Where they come from.
        modules: The modules of the part by their paths in it.
        sites: Paths of the norms, or of what has taken their place.
        shared: Identities of modules that other parts call too, or that must keep their class.
        index: Position of each node in ``nodes``.
        inputs: The data inputs of each node.
        users: The data users of each node (``output`` counts).
        ancestors: For each node, a bit set over ``nodes`` of everything it depends on.
        descendants: For each node, a bit set over ``nodes`` of everything that depends on it.
        roles: What each node does.
        memo: Answers that hold for the whole graph, for whoever asks twice.
    """

    def __init__(
        self, graph: Graph, modules: Mapping[str, nn.Module], sites: Iterable[str], shared: Container[int] = ()
    ) -> None:
        self.graph = graph
        self.modules = modules
        self.shared = shared
        self.sites = frozenset(sites)
        self.memo: dict[Any, bool] = {}
        self._inner: dict[str, tuple[str, ...]] = {}
        self.inputs: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for node in graph.nodes.nodes:
            found = () if is_shape(node) else tuple(i for i in _data_arguments(node) if i in self.inputs)
            if found or node.op == "placeholder":
                self.inputs[node] = found
        self.nodes = tuple(self.inputs)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.users: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.nodes}
        self.ancestors: dict[fx.Node, int] = {}
        for node in self.nodes:
            bits = 0
            for source in self.inputs[node]:
                self.users[source].append(node)
                bits |= self.ancestors[source] | self.bit(source)
            self.ancestors[node] = bits
        self.descendants: dict[fx.Node, int] = {}
        for node in reversed(self.nodes):
            bits = 0
            for user in self.users[node]:
                bits |= self.descendants[user] | self.bit(user)
            self.descendants[node] = bits
        self.roles: dict[fx.Node, Role] = {}
        for node in self.nodes:
            self.roles[node] = self._role(node)

    def bit(self, node: fx.Node) -> int:
        """Return the bit of ``node`` in ``ancestors`` and ``descendants``."""
        return 1 << self.index[node]

    def between(self, base: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
        """Return the nodes on the paths from ``base`` (excluded) to ``end`` (included)."""
        bits = self.descendants[base] & (self.ancestors[end] | self.bit(end))
        return tuple(
            node for node in self.nodes[self.index[base] : self.index[end] + 1] if bits >> self.index[node] & 1
        )

    def feeds(self, base: fx.Node, end: fx.Node) -> bool:
        """Whether ``end`` depends on ``base``."""
        return bool(self.ancestors[end] & self.bit(base))

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that ``node`` calls, if it calls one."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def carries(self, node: fx.Node) -> bool:
        """Whether ``node`` calls a layer on whose weight gain and alpha can live."""
        module = self.module(node)
        key = ("carries", id(module))
        if key not in self.memo:
            self.memo[key] = module is not None and is_carrier(module)
        return self.memo[key]

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
        if path in self.sites:
            return (path,)
        if path not in self._inner:
            composite = any(True for _ in self.modules[path].children())
            below = (site for site in sorted(self.sites) if site.startswith(f"{path}.")) if composite else ()
            self._inner[path] = tuple(below)
        return self._inner[path]

    def calls(self, path: str) -> int:
        """Return how often a module is called; 0 if another part calls it too, or if it must stay as it is."""
        return 0 if id(self.modules[path]) in self.shared else self.graph.calls.get(path, 0)

    def called_once(self, node: fx.Node) -> bool:
        """Whether the module that ``node`` calls is called nowhere else, in this graph or in another part."""
        return self.calls(str(node.target)) == 1

    def _role(self, node: fx.Node) -> Role:
        if node.op == "placeholder":
            return Role.INPUT
        if node.op == "call_module":
            return Role.NORM if node.target in self.sites else module_role(self.modules[str(node.target)])
        if node.op == "call_method":
            role = method_role(node)
        elif node.target is operator.getitem:
            role = _getitem_role(node, self.roles.get(self.inputs[node][0]))
        else:
            role = function_role(node)
        return self._arithmetic(node, role) if role in (Role.ADD, Role.MUL, Role.DIV) else role

    def _arithmetic(self, node: fx.Node, role: Role) -> Role:
        """Only two activations make a sum or a product; a constant factor commutes with alpha, a summand does not."""
        operands = [arg for arg in node.args if isinstance(arg, fx.Node) and arg in self.inputs]
        if len(operands) == 2:
            return Role.OTHER if role is Role.DIV else role
        if role is Role.DIV:
            return Role.PASS if operands == [node.args[0]] else Role.OTHER
        neutral = role is Role.ADD and any(isinstance(arg, (int, float)) and arg == 0 for arg in node.args)
        return Role.PASS if len(operands) == 1 and (role is Role.MUL or neutral) else Role.OTHER


def _getitem_role(node: fx.Node, source: Role | None) -> Role:
    index = node.args[1]
    tensor = index is None or isinstance(index, (tuple, slice, EllipsisType))
    return Role.SLICE if tensor or source is Role.SPLIT else Role.OTHER


def _data_arguments(node: fx.Node) -> tuple[fx.Node, ...]:
    if node.op == "call_method" and node.target in _SHAPE_FROM_SECOND and isinstance(node.args[0], fx.Node):
        return (node.args[0],)
    return tuple(node.all_input_nodes)


def is_inplace(flow: Flow, node: fx.Node) -> bool:
    """Whether a node writes, or may write, into its first argument."""
    if node.op == "call_module":
        return bool(getattr(flow.modules[str(node.target)], "inplace", False)) or writes_unannounced(flow, node)
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    in_place_name = name.endswith("_") and not name.endswith("__")
    return bool(node.kwargs.get("inplace")) or in_place_name or node.target in _IN_PLACE_OPERATORS


def writes_unannounced(flow: Flow, node: fx.Node) -> bool:
    """Whether the module that a node calls may write into its input without an ``inplace`` flag to say so.

    torch's own layers say so. Of anybody else's only what works entry by entry is known by trying it.
    """
    module = flow.modules[str(node.target)]
    if type(module).__module__.startswith("torch.nn") or hasattr(module, "inplace") or is_norm(module):
        return False
    if module_role(module) is not Role.OTHER or isinstance(module, (SkipInit, ChannelAffine, ScaledWeight, Copy)):
        return False
    key = ("writes", id(module))
    if key not in flow.memo:
        flow.memo[key] = elementwise(module) != "pure"
    return flow.memo[key]


_IN_PLACE_OPERATORS = {operator.iadd, operator.imul, operator.isub, operator.itruediv}
