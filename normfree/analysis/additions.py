"""Additions of activations: their names, and which of them make up one sum ``a + b + c``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import fx

from normfree.analysis.flow import Flow, Role
from normfree.tracing.roles import name_of

__all__ = ["additions_of", "adds", "flattened", "inners_of", "is_inner", "sum_names"]


def sum_names(flow: Flow) -> dict[fx.Node, str]:
    """Name every addition by the module whose forward adds, counted within it: ``layer1.0.add``."""
    counts: Counter[str] = Counter()
    names = {}
    for node in flow.nodes:
        if flow.roles[node] is Role.ADD:
            owner, verb = flow.graph.owners[node], "add" if adds(node) else name_of(node)
            stem = f"{owner}.{verb}" if owner else verb
            names[node] = f"{stem}_{counts[stem]}" if counts[stem] else stem
            counts[stem] += 1
    return names


def adds(node: fx.Node) -> bool:
    """Whether an addition is no difference, nor a mean with weights of its own."""
    return name_of(node) not in ("sub", "subtract", "lerp")


def additions_of(flow: Flow, node: fx.Node) -> Iterator[fx.Node]:
    """Yield the additions that make up ``a + b + c``, the outermost first."""
    yield node
    for inner in inners_of(flow, flow.operands(node)):
        yield from additions_of(flow, inner)


def flattened(flow: Flow, node: fx.Node) -> Iterator[fx.Node]:
    """Yield ``a``, ``b`` and ``c`` of ``a + b + c``."""
    for operand in flow.operands(node):
        inners = inners_of(flow, [operand])
        yield from flattened(flow, inners[0]) if inners else [operand]


def is_inner(flow: Flow, node: fx.Node) -> bool:
    """Whether ``node`` goes into one addition and nowhere else, dropout and the like aside."""
    user = flow.reader(node, (Role.PASS,))
    return user is not None and flow.roles[user] is Role.ADD and adds(node) and adds(user)


def inners_of(flow: Flow, operands: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the additions whose results are some of these operands, and nothing else."""
    found = (flow.above(operand, (Role.PASS,)) for operand in operands)
    return [inner for inner in found if flow.roles[inner] is Role.ADD and is_inner(flow, inner)]
