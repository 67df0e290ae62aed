"""Sums that are written as a join: ``torch.stack([x, f(x)]).sum(0)``, a concatenation that is folded and averaged.

However it is written, what comes of a join is a sum if it is one: what stands between is run on numbers, each part of
the join in turn, and a sum gives every part back, times a constant. What gives one part back alone has taken it out
again. Factors that are not known, such as weights of an ``einsum``, may only be constants or a gate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from normfree.tracing.roles import Role, function_role, name_of
from normfree.tracing.traces import Graph

__all__ = ["Mixture", "call", "unjoin"]

_JOINING = ("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack", "row_stack")
_CONTRACTING = ("einsum", "tensordot", "matmul", "mv", "inner", "linear")
"""What sums products with something over a dimension: over a new one it adds what has been stacked."""
_RENAMING = ("unsqueeze", "getitem", "view", "reshape")
"""What leaves a tensor what it was, if it leaves it as many entries."""

Inputs = Mapping[fx.Node, tuple[fx.Node, ...]]


@dataclass(frozen=True)
class Mixture:
    """What a node makes of a join.

    Attributes:
        parts: What it adds; one alone has been taken out again.
        gates: What decides how much of each.
        over: Nodes on the way, which nobody needs who knows the parts.
        known: Whether it is sure that it adds them.
    """

    parts: tuple[fx.Node, ...]
    gates: tuple[fx.Node, ...]
    over: tuple[fx.Node, ...]
    known: bool = True

    @property
    def is_taken_out(self) -> bool:
        """Whether it is nothing but one part."""
        return len(self.parts) == 1 and not self.gates

    @property
    def doubt(self) -> str:
        """Why it may be no sum that a scalar can be put into."""
        if not self.known:
            return "an operator of somebody's own makes one of two, and does not say whether it adds them"
        return "the input decides how much of each goes into it" if self.gates else ""


def unjoin(graph: Graph, inputs: dict[fx.Node, tuple[fx.Node, ...]]) -> dict[fx.Node, Mixture]:
    """Return the nodes that add what has been joined, and give them the parts of the join for their data inputs."""
    found = _mixtures(graph, inputs)
    taken = {node: mixture.parts[0] for node, mixture in found.items() if mixture.is_taken_out}
    inputs.update((node, mixture.parts + mixture.gates) for node, mixture in found.items())
    for node, given in inputs.items() if taken else ():
        while not taken.keys().isdisjoint(given):
            given = inputs[node] = tuple(taken.get(source, source) for source in given)
    over = {node for mixture in found.values() for node in mixture.over} | taken.keys()
    for node in sorted(over, key=lambda node: graph.order[node], reverse=True):
        if not any(node in given for given in inputs.values()):
            del inputs[node]
    return found


def _mixtures(graph: Graph, inputs: Inputs) -> dict[fx.Node, Mixture]:
    """Return the nodes that add what has been joined, or take it out again; ``inputs`` are the data inputs of each."""
    chains: dict[fx.Node, tuple[fx.Node, ...]] = {}
    found: dict[fx.Node, Mixture] = {}
    memo: dict[Any, Any] = {}
    for node, given in inputs.items():
        if name_of(node) in _JOINING and len(given) > 1:
            joins = isinstance(node.args[0], (list, tuple)) and len(node.args[0]) == len(given)
            chains |= {node: (node,)} if joins else {}
        elif len(given) > 1 and _is_foreign(node):
            shapes = {graph.shape(part) for part in (node, *given)}
            if len(shapes) == 1 and None not in shapes:
                found[node] = Mixture(given, (), (), known=_adds(node, given, *shapes))
        elif node.op in ("call_function", "call_method") and (held := [s for s in given if s in chains]):
            if len(given) > 1:  # a gate may be made of the join itself, and is smaller
                held = [source for source in held if graph.shape(source) == graph.shape(node)]
                if function_role(node) is not Role.MUL or len(held) != 1:
                    continue
            chain = (*chains[held[0]], node)
            mixture = _mixture(graph, inputs, chain, memo)
            if mixture is not None:
                found[node] = mixture
            elif function_role(node) is not Role.CONV:
                chains[node] = chain
    return found


def _mixture(graph: Graph, inputs: Inputs, chain: tuple[fx.Node, ...], memo: dict[Any, Any]) -> Mixture | None:
    """Say what the end of a chain is, of which the join is the beginning."""
    join, end = chain[0], chain[-1]
    shapes = [graph.shape(node) for node in inputs[join]]
    if None in shapes or {_squeezed(shape) for shape in shapes} != {_squeezed(graph.shape(end))}:
        return None
    names = [_renamed(graph, inputs, part, join) for part in inputs[join]]
    parts, over = [part for part, _ in names], [node for _, nodes in names for node in nodes]
    gates = tuple(source for node in chain[1:] for source in inputs[node] if source not in chain)
    numbers = {node: str(i) for i, node in enumerate((*inputs[join], *chain))}
    told = tuple((node.target, str(fx.map_arg((node.args, node.kwargs), numbers.get))) for node in chain)
    key = (told, *shapes)
    if key not in memo:  # many blocks of a network are alike
        memo[key] = _factors(chain, [shape for shape in shapes if shape is not None])
    factors = memo[key]
    wide = _squeezed(graph.shape(join)) or ()
    new = sorted(wide) == sorted((*(_squeezed(shapes[0]) or ()), len(shapes)))
    if factors is None and not (new and name_of(end) in _CONTRACTING):
        return None
    kept = [part for i, part in enumerate(parts) if factors is None or factors[i]]
    return Mixture(tuple(kept), gates, (*chain[:-1], *over)) if kept else None


def _renamed(graph: Graph, inputs: Inputs, part: fx.Node, join: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Return what a part of a join is without the dimension that it got for that, and what has given it that."""
    if name_of(part) not in _RENAMING or list(part.users) != [join] or len(inputs[part]) != 1:
        return part, []
    source = inputs[part][0]
    same = _squeezed(graph.shape(source)) == _squeezed(graph.shape(part))
    return (source, [part]) if same else (part, [])


def _squeezed(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if shape is None else tuple(size for size in shape if size != 1)


def _is_foreign(node: fx.Node) -> bool:
    """Whether a node calls an operator that is not torch's own, or a function in TorchScript."""
    if node.op != "call_function" or function_role(node) is not Role.OTHER:
        return False
    own = str(getattr(node.target, "_qualified_op_name", "")).partition("::")[0] or str(node.target).partition(".")[0]
    return isinstance(node.target, torch.jit.ScriptFunction) or (
        type(node.target).__module__ in ("torch._ops", "torch._library.custom_ops") and own not in ("aten", "prims")
    )


@torch.no_grad()
def _adds(node: fx.Node, given: tuple[fx.Node, ...], shape: Any) -> bool:
    """Whether an operator makes of two tensors what it makes of their sum and of nothing."""
    one, nothing = torch.linspace(-1, 2, math.prod(shape)).reshape(shape), torch.zeros(shape)
    cases = ((one, -one.flip(0) / 3), (one - one.flip(0) / 3, nothing), (nothing, one - one.flip(0) / 3))
    results = [call(node, dict(zip(given, case, strict=True))) for case in cases if len(given) == len(case)]
    first = results[0] if results else None
    if not all(isinstance(result, Tensor) and result.is_floating_point() for result in results) or first is None:
        return False
    return all(torch.allclose(result, first, atol=1e-6) for result in results) and bool(first.any())


def call(node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """Call what a node stands for; ``None`` if that needs something that the graph does not tell."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: known.get(source, "constant"))
    try:
        target: Any = getattr(args[0], node.target) if isinstance(node.target, str) else node.target
        return target(*args[isinstance(node.target, str) :], **kwargs)
    except Exception:  # whatever it raises
        return None


@torch.no_grad()
def _factors(chain: tuple[fx.Node, ...], shapes: list[tuple[int, ...]]) -> list[float] | None:
    """Return by what a chain multiplies each part of the join before it adds them, if it does just that."""
    nothing = _run(chain, [torch.zeros(shape) for shape in shapes])
    if nothing is None:
        return None
    found: list[float] = []
    for i, shape in enumerate(shapes):
        part = torch.linspace(-1, 2, math.prod(shape))  # of both signs: a maximum or a square gives other values back
        result = _run(chain, [part.reshape(shape) if i == j else torch.zeros(other) for j, other in enumerate(shapes)])
        if result is None or result.numel() != part.numel():
            return None
        added = (result - nothing).flatten().float()
        found.append(float(added[-1]) / 2)
        if not torch.allclose(added, found[-1] * part, atol=1e-6):
            return None
    return found


def _run(chain: tuple[fx.Node, ...], parts: list[Tensor]) -> Tensor | None:
    """Run a chain on numbers, without what it multiplies by or adds."""
    joined: Any = chain[0].args[0]
    nodes = dict.fromkeys(item for item in joined if isinstance(item, fx.Node))  # one that stands there twice once
    first, known = dict(zip(nodes, parts, strict=True)), dict[fx.Node, Any]()
    for node in chain:
        sources = [known[source] for source in node.all_input_nodes if source in known]
        if node is not chain[0] and function_role(node) in (Role.MUL, Role.ADD, Role.PASS):
            known[node] = sources[0]
            continue
        known[node] = call(node, first | known)
        if known[node] is None:
            return None
    result = known[chain[-1]]
    return result if isinstance(result, Tensor) and result.is_floating_point() else None
