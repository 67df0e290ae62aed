"""Whether a branch ends at a higher resolution than it starts with: a decoder's path, and no residual branch.

Two kinds of upward steps are none: one in the gate of a product, whose other factor has the resolution already, and
one that takes back a downward step of the same module (attention on a coarser grid).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from normfree.graph import Flow, Role

__all__ = ["rising_step"]


def rising_step(flow: Flow, path: Sequence[fx.Node], operand: fx.Node, owner: str) -> fx.Node | None:
    """Return the first step upwards that counts on the way to ``operand``, or ``None``.

    Args:
        flow: The graph.
        path: The nodes of the branch in topological order, its end included.
        operand: The end of the branch.
        owner: The module whose forward adds it to the skip path.
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


def _operations(flow: Flow, node: fx.Node, owner: str) -> set[str]:
    """Return the modules below ``owner`` whose own forward a node belongs to; a container has none."""
    path, found = flow.graph.owners[node], set()
    while path.startswith(f"{owner}." if owner else "") and path not in ("", owner):
        if type(flow.modules[path]) is not nn.Sequential:
            found.add(path)
        path = path.rpartition(".")[0]
    return found


def _is_upward(flow: Flow, node: fx.Node) -> bool:
    transposed = bool(getattr(flow.module(node), "transposed", False))
    return flow.roles[node] is Role.UPSAMPLE or (transposed and _is_strided(flow, node))


def _is_downward(flow: Flow, node: fx.Node) -> bool:
    return flow.roles[node] is Role.POOL or (flow.roles[node] is Role.CONV and _is_strided(flow, node))


def _is_strided(flow: Flow, node: fx.Node) -> bool:
    stride = getattr(flow.module(node), "stride", 1)
    return (max(stride) if isinstance(stride, tuple) else stride) != 1
