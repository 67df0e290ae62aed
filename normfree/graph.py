"""What a node of an fx graph is, and which nodes feed which, told by data and not by shapes.

``x.reshape(y.shape)`` depends on the data of ``x`` alone; counting ``y`` as an input would make every reshaped tensor
look as if it were used twice. :class:`Flow` is the graph with such edges removed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from normfree.layers import ChannelAffine
from normfree.norms import describe, is_norm
from normfree.tracing import Graph

__all__ = ["Flow", "Role", "is_inplace"]


class Role(Enum):
    """What a node does to its (first) data input."""

    NORM = auto()
    CONV = auto()  # convolution or linear of any kind
    PASS = auto()  # identity, dropout, stochastic depth: commutes with a scalar, keeps zero zero
    RESHAPE = auto()
    POOL = auto()
    PAD = auto()
    UPSAMPLE = auto()
    SLICE = auto()
    SPLIT = auto()
    ADD = auto()
    MUL = auto()
    CAT = auto()
    INPUT = auto()
    OTHER = auto()  # activations, and everything unknown


_SHAPE_METHODS = {"size", "dim", "ndimension", "numel", "stride", "is_contiguous", "is_floating_point", "get_device"}
_SHAPE_FROM_SECOND = {"reshape_as", "view_as", "expand_as", "type_as"}

_FUNCTIONS: dict[Callable[..., Any], Role] = {
    operator.add: Role.ADD,
    operator.iadd: Role.ADD,
    torch.add: Role.ADD,
    operator.mul: Role.MUL,
    operator.imul: Role.MUL,
    torch.mul: Role.MUL,
    torch.cat: Role.CAT,
    torch.concat: Role.CAT,
    torch.chunk: Role.SPLIT,
    torch.split: Role.SPLIT,
    torch.unbind: Role.SPLIT,
    torch.flatten: Role.RESHAPE,
    torch.reshape: Role.RESHAPE,
    torch.permute: Role.RESHAPE,
    torch.transpose: Role.RESHAPE,
    torch.squeeze: Role.RESHAPE,
    torch.unsqueeze: Role.RESHAPE,
    F.pad: Role.PAD,
    F.interpolate: Role.UPSAMPLE,
    F.dropout: Role.PASS,
    F.dropout1d: Role.PASS,
    F.dropout2d: Role.PASS,
    F.dropout3d: Role.PASS,
    torch.dropout: Role.PASS,
    F.linear: Role.CONV,
    F.conv1d: Role.CONV,
    F.conv2d: Role.CONV,
    F.conv3d: Role.CONV,
}
_FUNCTION_NAMES: dict[str, Role] = {
    "stochastic_depth": Role.PASS,
    "drop_path": Role.PASS,
    **{f"{kind}_pool{dims}d": Role.POOL for kind in ("avg", "max") for dims in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{dims}d": Role.POOL for kind in ("avg", "max") for dims in (1, 2, 3)},
}
_METHODS: dict[str, Role] = {
    "add": Role.ADD,
    "add_": Role.ADD,
    "mul": Role.MUL,
    "mul_": Role.MUL,
    "chunk": Role.SPLIT,
    "split": Role.SPLIT,
    "unbind": Role.SPLIT,
    **dict.fromkeys(
        ("flatten", "reshape", "view", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "reshape_as"),
        Role.RESHAPE,
    ),
    "view_as": Role.RESHAPE,
}
_MODULES: tuple[tuple[tuple[type[nn.Module], ...], Role], ...] = (
    ((nn.modules.conv._ConvNd, nn.Linear), Role.CONV),
    ((nn.Identity, nn.modules.dropout._DropoutNd), Role.PASS),
    ((nn.Flatten, nn.Unflatten), Role.RESHAPE),
    ((nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._LPPoolNd), Role.POOL),
    ((nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd), Role.POOL),
    (
        (
            nn.modules.padding._ConstantPadNd,
            nn.modules.padding._ReflectionPadNd,
            nn.modules.padding._ReplicationPadNd,
            nn.modules.padding._CircularPadNd,
        ),
        Role.PAD,
    ),
    ((nn.Upsample, nn.PixelShuffle), Role.UPSAMPLE),
)
# By qualified name, since these libraries must not be imported for it.
_MODULE_NAMES: dict[str, Role] = {
    "timm.layers.drop.DropPath": Role.PASS,
    "torchvision.ops.stochastic_depth.StochasticDepth": Role.PASS,
    "timm.layers.blur_pool.BlurPool2d": Role.POOL,
}


class Flow:
    """One graph in topological order, with data edges, ancestors and descendants.

    Attributes:
        nodes: The nodes that carry data, in order.
        graph: Where they come from.
        index: Position of each node in ``nodes``.
        inputs: The data inputs of each node.
        users: The data users of each node (``output`` counts).
        ancestors: For each node, a bit set over ``nodes`` of everything it depends on.
        descendants: For each node, a bit set over ``nodes`` of everything that depends on it.
        roles: What each node does.
        memo: Answers that hold for the whole graph, for whoever asks twice.
    """

    def __init__(self, graph: Graph, modules: Mapping[str, nn.Module], sites: Iterable[str]) -> None:
        self.graph = graph
        self.modules = modules
        self.sites = frozenset(sites)
        self.memo: dict[Any, bool] = {}
        self.inputs: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for node in graph.fx.nodes:
            found = () if _is_shape(node) else tuple(i for i in _data_arguments(node) if i in self.inputs)
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
        return 1 << self.index[node]

    def between(self, base: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
        """Return the nodes on the paths from ``base`` (excluded) to ``end`` (included)."""
        bits = self.descendants[base] & (self.ancestors[end] | self.bit(end))
        return tuple(node for node in self.nodes[self.index[base] : self.index[end] + 1] if bits >> self.index[node] & 1)

    def feeds(self, base: fx.Node, end: fx.Node) -> bool:
        return bool(self.ancestors[end] & self.bit(base))

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def activation_in(self, node: fx.Node) -> nn.Module | None:
        """Return the activation that a norm, or what has taken its place, applies itself."""
        module = self.modules[str(node.target)]
        if is_norm(module):
            return describe(module).act
        return module.act if isinstance(module, ChannelAffine) else None

    def called_once(self, node: fx.Node) -> bool:
        return self.graph.calls.get(str(node.target)) == 1

    def _role(self, node: fx.Node) -> Role:
        if node.op == "placeholder":
            return Role.INPUT
        if node.op == "call_module":
            return Role.NORM if node.target in self.sites else _module_role(self.modules[str(node.target)])
        if node.op == "call_method":
            role = _METHODS.get(str(node.target), Role.OTHER)
        elif node.target is operator.getitem:
            role = _getitem_role(node, self.roles.get(self.inputs[node][0]))
        else:
            role = _FUNCTIONS.get(node.target) or _FUNCTION_NAMES.get(getattr(node.target, "__name__", ""), Role.OTHER)
        if role in (Role.ADD, Role.MUL):
            operands = [arg for arg in node.args if isinstance(arg, fx.Node) and arg in self.inputs]
            if len(operands) == 2:
                return role
            # A constant factor commutes with alpha, a constant summand does not.
            return Role.PASS if role is Role.MUL and len(operands) == 1 else Role.OTHER
        return role


def _getitem_role(node: fx.Node, source: Role | None) -> Role:
    index = node.args[1]
    tensor = isinstance(index, (tuple, slice)) or index is None or index is Ellipsis
    return Role.SLICE if tensor or source is Role.SPLIT else Role.OTHER


def _module_role(module: nn.Module) -> Role:
    if isinstance(module, nn.Sequential) and len(module) == 0:
        return Role.PASS
    for kinds, role in _MODULES:
        if isinstance(module, kinds):
            return role
    cls = type(module)
    return _MODULE_NAMES.get(f"{cls.__module__}.{cls.__qualname__}", Role.OTHER)


def _is_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] not in ("T", "mT", "real", "data")


def _data_arguments(node: fx.Node) -> tuple[fx.Node, ...]:
    if node.op == "call_method" and node.target in _SHAPE_FROM_SECOND and isinstance(node.args[0], fx.Node):
        return (node.args[0],)
    return tuple(node.all_input_nodes)


def is_inplace(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node writes into its first argument."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    in_place_name = name.endswith("_") and not name.endswith("__")
    return bool(node.kwargs.get("inplace")) or in_place_name or node.target in _IN_PLACE_OPERATORS


_IN_PLACE_OPERATORS = {operator.iadd, operator.imul, operator.isub, operator.itruediv}
