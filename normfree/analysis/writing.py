"""Who writes in place into what a norm returns or was given: once the norm is gone, the two are one."""

from __future__ import annotations

from torch import fx

from normfree.analysis.flow import Flow, Role, is_inplace
from normfree.tracing.roles import name_of

__all__ = ["is_born_in", "is_fresh", "shares_memory", "writers_of", "writes_into"]


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
    order = flow.graph.order
    return [user for user in flow.writers.get(flow.graph.memory(node), ()) if order[user] > order[since]]


def is_fresh(flow: Flow, source: fx.Node, node: fx.Node) -> bool:
    """Whether a norm alone reads what ``source`` returns, a tensor of its own that is not kept for backward."""
    new = flow.roles[source] is Role.CONV or name_of(source) in ("add", "cat", "concat", "concatenate")
    return new and flow.graph.holders.get(flow.graph.memory(source)) == [source] and list(source.users) == [node]


def shares_memory(flow: Flow, node: fx.Node, other: fx.Node) -> bool:
    """Whether what two nodes returned lies in the same memory."""
    return flow.graph.memory(node) is not None and flow.graph.memory(node) == flow.graph.memory(other)


def is_born_in(flow: Flow, node: fx.Node, path: str) -> bool:
    """Whether the memory of what a node returned was new to a module: what it was given lies elsewhere."""
    first = min(flow.graph.holders[flow.graph.memory(node)], key=flow.graph.order.__getitem__)
    return first.target == path or f"{flow.graph.owners[first]}.".startswith(f"{path}." if path else "")


def _writes_unannounced(flow: Flow, node: fx.Node) -> bool:
    """Whether the module that a node calls writes into its input without an ``inplace`` flag that could be switched."""
    return is_inplace(flow, node) and not hasattr(flow.modules[str(node.target)], "inplace")
