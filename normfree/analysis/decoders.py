"""What tells a decoder's path from a residual branch: it rises to a higher resolution, or it comes from elsewhere.

Two kinds of upward steps do not count: one in the gate of a product, whose other factor has the resolution already, and
one that takes back a downward step of the same module (attention on a coarser grid).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from torch import fx, nn

from normfree.analysis.flow import Flow, Role

__all__ = ["is_only_a_gate", "rising_step"]


def rising_step(flow: Flow, path: Sequence[fx.Node], operand: fx.Node, owner: str) -> fx.Node | None:
    """Return the first step upwards that counts on the way to ``operand``, the end of a branch, or ``None``.

    The ``path`` is the branch in topological order, its end included; ``owner`` adds it to the skip path.
    """
    inside = set(path)
    lowered: set[str] = set()
    rises: dict[fx.Node, fx.Node | None] = {}
    for node in path:
        own = None
        if _is_upward(flow, node):
            own = None if lowered & _operations(flow, node, owner) else node
        elif _is_downward(flow, node):
            lowered |= _operations(flow, node, owner)
        earlier = [rises[source] for source in flow.inputs[node] if source in inside]
        if flow.roles[node] is Role.MUL and not all(earlier):
            earlier = []  # the other factor is at this resolution without any step
        rises[node] = next((rise for rise in earlier if rise is not None), own)
    return rises[operand]


def is_only_a_gate(flow: Flow, base: fx.Node, operand: fx.Node) -> bool:
    """Whether ``operand`` is another feature map times a gate pooled from ``base``: attention between two levels."""
    while flow.roles[operand] is not Role.MUL and len(flow.inputs[operand]) == 1:
        operand = flow.inputs[operand][0]
    if flow.roles[operand] is not Role.MUL or len(flow.inputs[operand]) != 2:
        return False
    fed = [factor for factor in flow.inputs[operand] if factor is base or flow.feeds(base, factor)]
    return len(fed) == 1 and any(flow.roles[node] is Role.POOL for node in flow.between(base, fed[0]))


def _operations(flow: Flow, node: fx.Node, owner: str) -> set[str]:
    """Return the modules below ``owner`` whose own forward a node belongs to; a container has none."""
    inside = f"{owner}." if owner else ""
    above = accumulate(flow.graph.owners[node].split("."), "{}.{}".format)
    return {path for path in above if path.startswith(inside) and type(flow.modules[path]) is not nn.Sequential} - {""}


def _is_upward(flow: Flow, node: fx.Node) -> bool:
    """Whether a node returns at least twice as many places as it was given, whatever its class."""
    before, after = flow.shape(flow.inputs[node][0]) if flow.inputs[node] else None, flow.shape(node)
    if before is None or after is None or len(before) != len(after) or len(after) < 3:
        return False
    resizes = flow.roles[node] is Role.UPSAMPLE or getattr(flow.module(node), "transposed", False) is True
    unknown = flow.roles[node] is Role.OTHER and node.op == "call_module" and len(after) > 3
    return (resizes or unknown) and math.prod(after[2:]) >= 2 * math.prod(before[2:])


def _is_downward(flow: Flow, node: fx.Node) -> bool:
    stride = getattr(flow.module(node), "stride", 1)
    strided = (max(stride) if isinstance(stride, tuple) else stride) != 1
    return flow.roles[node] is Role.POOL or (flow.roles[node] is Role.CONV and strided)
