"""What a run has shown so far: the nodes of a graph, and which of them made which tensor.

Writing into a tensor, or into a view of it, is an edge as well: whoever reads the memory later reads what was written.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from normfree.tracing.copying import held_by
from normfree.tracing.traces import Graph, Value, memory_of

__all__ = ["Notes", "overwritten", "tensors_in"]

Versions = list[tuple[Tensor, int]]


def overwritten(_: Any, part: Any) -> Any:
    """Stand in a graph for a tensor into a part of which somebody has written through a view."""
    return part


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a result or in arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


class Notes:
    """Writes down operations that have run: ``seen`` is the graph so far, ``step`` the number of the latest operation.

    The ``stack`` holds the names of the modules whose forward is running and looked into, innermost last.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seen = Graph(fx.Graph())
        self.stack = [""]
        self.step = 0
        self.leaked: list[Tensor] = []
        self._kept: list[Any] = []  # nothing that was seen may die: its identity would be given to another
        self._nodes: dict[int, fx.Node] = {}
        self._parts: dict[int, tuple[fx.Node, tuple[Any, ...]]] = {}
        self._writes: dict[int, fx.Node] = {}
        self._own = {id(tensor) for tensor in held_by(model)}
        self._shapes: set[tuple[int, ...]] = set()
        self._by_memory: dict[int, fx.Node] = {}
        self._parameters = {id(p): name for name, p in reversed(list(model.named_parameters()))}

    def give(self, name: str, tensor: Tensor) -> None:
        """Write down an argument of the model."""
        self._bind(tensor, self._create("placeholder", name, (), {}))

    def finish(self, returned: list[Tensor]) -> Graph:
        """Return the graph of a run that has come to its end."""
        self._create("output", "output", (tuple(filter(None, map(self.node_of, returned))),), {})
        return self.seen

    def next_step(self) -> None:
        """Count an operation that is about to run."""
        self.step += 1

    def value(self, node: fx.Node, tensor: Tensor, *, writes: bool = False, handed_on: bool = False) -> None:
        """Note what a node returned, the first time that it is known."""
        if node not in self.seen.values:
            value = self.seen.values[node] = Value.of(tensor, writes=writes, handed_on=handed_on)
            self._by_memory[value.memory] = node
            self._shapes.add(value.shape)

    def write_down(self, op: str, target: Any, args: Any, kwargs: Any, before: Versions, out: Any) -> Any:
        """Create the node of an operation that has run, with what it returned and what it wrote into."""
        node = self._create(op, target, args, kwargs)
        changed = [tensor for tensor, version in before if tensor._version != version]
        out = self._renewed(out, {id(tensor) for tensor, _ in before} - {id(tensor) for tensor in changed}, node)
        if changed:
            self.seen.written[node] = frozenset(map(memory_of, changed))
        for tensor in changed:
            self._nodes[id(tensor)] = self._writes[memory_of(tensor)] = node
            self.value(node, tensor, writes=True)
        self._bind(out, node)
        for tensor in self.leaked if op == "call_module" else ():  # a hook inside of a leaf may have kept it
            if id(tensor) not in self._parts:
                self._nodes.setdefault(id(tensor), node)
                self._kept.append(tensor)
        return out

    def _renewed(self, out: Any, given: set[int], node: fx.Node) -> Any:
        """Return another name for a tensor that is handed on as it came: what reads it now reads this operation."""
        if isinstance(out, Tensor) and id(out) in given:
            out = out.detach()
            self.value(node, out, handed_on=True)
            return out
        if type(out) in (tuple, list):
            return type(out)(item.detach() if id(item) in given else item for item in out)
        return out

    def _create(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.seen.nodes.create_node(op, target)
        if args:  # later, since torch would look for symbols in what it is given, which takes long
            node.args = args
        if kwargs:
            node.kwargs = kwargs
        self.seen.owners[node], self.seen.steps[node] = self.stack[-1], self.step
        self.seen.order[node] = len(self.seen.order)
        return node

    def _bind(self, out: Any, node: fx.Node, path: tuple[Any, ...] = ()) -> None:
        """Remember what made each tensor in a result; what takes it out of a tuple is written down once it is used."""
        if isinstance(out, Tensor):
            self._kept.append(out)
            if path:
                self._parts[id(out)] = node, path
                self._nodes.pop(id(out), None)
            else:
                self._nodes[id(out)] = node
                self.value(node, out)
        elif isinstance(out, (tuple, list)):
            for i, item in enumerate(out):
                self._bind(item, node, (*path, i))
        elif isinstance(out, Mapping):
            for key, item in out.items():
                self._bind(item, node, (*path, key))
        elif hasattr(out, "__dict__") and not isinstance(out, (nn.Module, type)):
            for key, item in vars(out).items():
                self._bind(item, node, (*path, key))

    def node_of(self, tensor: Tensor) -> fx.Node | None:
        """Return what made a tensor as it is now, or ``None`` for a constant."""
        node = self._nodes.get(id(tensor))
        if node is None and id(tensor) in self._parts:
            node, path = self._parts[id(tensor)]
            for key in path:
                node = self._create("call_function", operator.getitem, (node, key), {})
            self.value(node, tensor)
            self._nodes[id(tensor)] = node
        if node is None and id(tensor) in self._parameters:
            node = self._nodes[id(tensor)] = self._create("get_attr", self._parameters[id(tensor)], (), {})
            self._kept.append(tensor)
        if node is None and id(tensor) not in self._own and tensor.layout is torch.strided:
            node = self._from_elsewhere(tensor)
        last = self._writes.get(memory_of(tensor)) if self._writes else None
        if last is None or node is last or (node is not None and self.seen.order[node] > self.seen.order[last]):
            return node
        if not self.seen.values[last].covers(Value.of(tensor)):
            last = self._create("call_function", overwritten, (node, last), {})
            self.value(last, tensor)
        self._nodes[id(tensor)] = last
        self._kept.append(tensor)
        return last

    def _from_elsewhere(self, tensor: Tensor) -> fx.Node | None:
        """Return what made a tensor that nobody has written down: another name for one that is known, or code unseen.

        A thread, an extension or NumPy computes out of sight. What has the shape of no activation is a constant.
        """
        source = self._by_memory.get(memory_of(tensor))
        if source is not None:
            same = self.seen.values[source].shape == tuple(tensor.shape)
            node = self._create("call_function", torch.detach if same else torch.reshape, (source,), {})
        elif tensor.dim() > 1 and tuple(tensor.shape) in self._shapes:
            node = self._create("placeholder", "elsewhere", (), {})
            self.seen.elsewhere.add(self.stack[-1])
        else:
            return None
        self._bind(tensor, node)
        return node

    def argument(self, value: Any) -> Any:
        """Return what a node stores for an argument."""
        return map_aggregate(value, self._stored)

    def _stored(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            node = self.node_of(value)
            return "constant" if node is None else node
        if value is None or type(value) in _ATOMS:
            return value
        own = hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type))
        held = [self.argument(item) for item in vars(value).values()] if own else []
        found = [item for item in held if isinstance(item, fx.Node)]
        return tuple(found) if found else type(value).__name__


_ATOMS = {int, float, bool, str, torch.dtype, torch.device, type(Ellipsis)}
