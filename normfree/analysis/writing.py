"""Who writes in place into what a norm returns or was given: once the norm is gone, the two are one."""

from __future__ import annotations

from torch import fx

from normfree.analysis.flow import Flow, Role, is_inplace
from normfree.tracing.roles import name_of

__all__ = ["is_fresh", "writers_of", "writes_into"]


def writers_of(flow: Flow, node: fx.Node) -> tuple[tuple[str, ...], bool]:
    """Find what writes in place into the norm's output: what could be switched, and whether something could not.

    An activation can be switched if nobody else sees what it writes into.
    """
    found = writes_into(flow, node, node)
    alone = all(user.op == "call_module" and not _writes_unannounced(flow, user) for user in found)
    if alone and list(node.users) == found:
        return tuple(dict.fromkeys(str(user.target) for user in found)), False
    return (), bool(found)


def writes_into(flow: Flow, node: fx.Node, since: fx.Node) -> list[fx.Node]:
    """Return what writes into the memory of ``node``, or would in train mode, once another has run."""
    memory, order = _memory(flow, node), flow.graph.order
    later = (user for user in flow.nodes if order[user] > order[since])
    return [
        user
        for user in later
        if memory in flow.graph.written.get(user, ())
        or (is_inplace(flow, user) and _memory(flow, flow.inputs[user][0]) == memory)
    ]


def _memory(flow: Flow, node: fx.Node) -> int | None:
    value = flow.graph.values.get(node)
    return None if value is None else value.memory


def is_fresh(flow: Flow, source: fx.Node, node: fx.Node) -> bool:
    """Whether a norm alone reads what ``source`` returns, a tensor of its own that is not kept for backward."""
    new = (
        flow.carries(source)
        or flow.roles[source] is Role.CONV
        or name_of(source) in ("add", "cat", "concat", "concatenate")
    )
    memory = _memory(flow, source)
    alone = all(value.memory != memory for other, value in flow.graph.values.items() if other is not source)
    return new and alone and list(source.users) == [node]


def _writes_unannounced(flow: Flow, node: fx.Node) -> bool:
    """Whether the module that a node calls writes into its input without an ``inplace`` flag that could be switched."""
    return is_inplace(flow, node) and not hasattr(flow.modules[str(node.target)], "inplace")
