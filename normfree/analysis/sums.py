"""Which additions are residual sums.

A **residual sum** adds a skip path to a residual branch: the skip path reaches, through linear operations only
(identity, pooling, padding, a projection), a node that also feeds the branch. In a **parallel sum** every operand is
such a path with at most one convolution (RepVGG). Everything else is a **merge sum**: the paths come from different
places, or the branch contains whole blocks or changes resolution (feature pyramids, U-Net, HRNet).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import fx

from normfree.analysis.additions import adds, flattened, inners_of, is_inner
from normfree.analysis.decoders import is_only_a_gate, rising_step
from normfree.analysis.flow import Flow, Role
from normfree.tracing.roles import name_of

__all__ = ["Kind", "SumNode", "find_sums", "norms_between"]

Kind = Literal["residual", "parallel", "merge"]

_LINEAR = {Role.CONV, Role.NORM, Role.PASS, Role.RESHAPE, Role.POOL, Role.PAD, Role.SLICE, Role.UPSAMPLE}


@dataclass(frozen=True)
class SumNode:
    """One addition in one graph.

    Attributes:
        node: The addition.
        kind: What it adds.
        reason: Why it is of that kind.
        base: Where skip path and branches split; residual sums only.
        skip: The operand that is the skip path; residual sums only.
        branches: The operands that are residual branches; residual sums only.
    """

    node: fx.Node
    kind: Kind
    reason: str
    base: fx.Node | None = None
    skip: fx.Node | None = None
    branches: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class _Position:
    """A node on the way up from an operand, and what was passed to get there."""

    node: fx.Node
    convs: int = 0
    steps: int = 0
    sliced: fx.Node | None = None
    preactivated: bool = False


def find_sums(flow: Flow) -> tuple[SumNode, ...]:
    """Classify every addition of two activations, in topological order.

    A difference, or a mean with weights, counts where it takes a branch from its skip path: ``f(x) - x`` is no sum.
    """
    found: dict[fx.Node, SumNode] = {}
    for node in flow.nodes:
        if flow.roles[node] is not Role.ADD or is_inner(flow, node):
            continue
        doubt = flow.mixtures[node].doubt if node in flow.mixtures else ""
        if adds(node) and not doubt:
            _classify_group(flow, node, found)
            continue
        total = _classify(flow, node, flow.operands(node), found)
        taken = "lerp" in name_of(node) or total.skip is flow.operands(node)[0]
        if doubt or len(flow.inputs[node]) > 2:
            found[node] = SumNode(node, "merge", doubt or "the input decides how much of each goes into it")
        elif total.kind == "residual" and taken:
            found[node] = total
    return tuple(found.values())


def _classify_group(flow: Flow, node: fx.Node, found: dict[fx.Node, SumNode]) -> None:
    """Classify ``a + b + c`` as one sum if that makes sense of it, else each addition by itself."""
    flat = list(flattened(flow, node))
    if len(flat) > 2:
        whole = _classify(flow, node, flat, found)
        if whole.kind != "merge" and not (whole.kind == "residual" and _ends_in_parallel(flow, node, found)):
            found[node] = whole
            return
        for inner in inners_of(flow, flow.inputs[node]):
            _classify_group(flow, inner, found)
    found[node] = _classify(flow, node, flow.operands(node), found)


def _ends_in_parallel(flow: Flow, node: fx.Node, found: Mapping[fx.Node, SumNode]) -> bool:
    """Whether one operand is a parallel sum by itself, such as the end of a RepGhost branch: one branch, not two."""
    inners = inners_of(flow, flow.inputs[node])
    return any(_classify(flow, inner, list(flattened(flow, inner)), found).kind == "parallel" for inner in inners)


def _classify(flow: Flow, node: fx.Node, operands: list[fx.Node], found: Mapping[fx.Node, SumNode]) -> SumNode:
    walks = [list(_walk(flow, operand)) for operand in operands]
    shared = set.intersection(*({p.node for p in walk if p.convs <= 1 and not p.preactivated} for walk in walks))
    if shared:
        return SumNode(node, "parallel", "every operand is linear, at most one convolution deep, from the same input")
    refusal = "no operand is a skip path: the paths come from different places"
    options: list[tuple[_Position, int]] = []
    for i, walk in enumerate(walks):
        others = [o for j, o in enumerate(operands) if j != i]
        position = next((p for p in walk if all(_splits(flow, p, o) for o in others)), None)
        if position is None:
            continue
        if flow.shape(operands[i]) != flow.shape(node) and node not in flow.mixtures:
            refusal = "the skip path is broadcast over the sum"
            continue
        problem = next((r for o in others if (r := _not_a_branch(flow, position, o, found))), None)
        if problem is None:
            options.append((position, i))
        else:
            refusal = problem
    if not options:
        return SumNode(node, "merge", refusal)
    position, i = min(options, key=lambda option: (option[0].preactivated, option[0].convs, option[0].steps))
    branches = tuple(o for j, o in enumerate(operands) if j != i)
    path = "identity" if position.steps == 0 else "projection" if position.convs else "linear path"
    reason = f"skip path: {path} from {position.node.name}"
    return SumNode(node, "residual", reason, position.node, operands[i], branches)


def _walk(flow: Flow, operand: fx.Node) -> Iterator[_Position]:
    """Walk up from an operand for as long as it can be a skip path, nearest position first."""
    position = _Position(operand)
    while True:
        yield position
        node, role = position.node, flow.roles[position.node]
        if role not in _LINEAR or len(flow.inputs[node]) != 1:
            break
        if role is Role.NORM and flow.activation_in(node) is not None:
            break
        source = flow.inputs[node][0]
        if flow.roles[source] is Role.SPLIT:
            return
        # A slice of what a convolution returns is a narrower convolution: only one in front of it picks channels of x.
        sliced = node if role is Role.SLICE else None if role is Role.CONV else position.sliced
        position = _Position(source, position.convs + (role is Role.CONV), position.steps + 1, sliced)
    # A pre-activation block may project what its own norm and activation return: bn -> relu -> conv.
    if position.convs == 1:
        origin = _before_preactivation(flow, position.node)
        if origin is not None:
            yield _Position(origin, 1, position.steps + 1, position.sliced, preactivated=True)


def _before_preactivation(flow: Flow, node: fx.Node) -> fx.Node | None:
    if flow.roles[node] is Role.OTHER and node.op in ("call_module", "call_function") and len(flow.inputs[node]) == 1:
        node = flow.inputs[node][0]
    return flow.inputs[node][0] if flow.roles[node] is Role.NORM else None


def _splits(flow: Flow, position: _Position, other: fx.Node) -> bool:
    """Whether the branch to ``other`` starts at ``position``, and not at different channels of it."""
    base = position.node
    if base is other or not flow.feeds(base, other):
        return False
    if position.sliced is None:
        return True
    path = set(flow.between(base, other))
    layers = any(flow.roles[node] is Role.CONV for node in path)  # else it is arithmetic, as with the sides of a box
    return _is_read_whole(flow, base, path, position.sliced if layers else None)


def _is_read_whole(flow: Flow, node: fx.Node, path: set[fx.Node], part: fx.Node | None) -> bool:
    """Whether the path takes more of ``node`` than other slices than ``part``, dropout and the like aside."""
    users = [user for user in flow.users[node] if user in path and not _is_other_part(flow, user, part)]
    return any(flow.roles[user] is not Role.PASS or _is_read_whole(flow, user, path, part) for user in users)


def _is_other_part(flow: Flow, node: fx.Node, part: fx.Node | None) -> bool:
    one, other = flow.graph.values.get(node), flow.graph.values.get(part) if part is not None else None
    return flow.roles[node] is Role.SLICE and (one is None or other is None or not one.covers(other))


def _not_a_branch(flow: Flow, position: _Position, operand: fx.Node, found: Mapping[fx.Node, SumNode]) -> str | None:
    """Say why the path from ``position`` to ``operand`` is no residual branch, or return ``None``."""
    path = flow.between(position.node, operand)
    inside = set(path) | {position.node}
    blocks = [
        inner
        for node in path
        if (inner := found.get(node)) and inner.kind == "residual" and inner.base in inside and _holds_norm(flow, inner)
    ]
    if len(blocks) > 1 or (blocks and not _wraps(flow, position.node, blocks[0], operand)):
        owner = flow.graph.owners[blocks[0].node]
        return f"the branch contains whole blocks ({owner or blocks[0].node.name})"
    rise = rising_step(flow, path, operand, owner=flow.graph.owners[flow.users[operand][0]])
    if rise is not None:
        return f"the branch changes resolution upwards ({rise.name})"
    if is_only_a_gate(flow, position.node, operand):
        return "the skip path only gates what comes from elsewhere"
    if position.preactivated and sum(flow.roles[node] is Role.CONV for node in path) < 2:
        return "both paths are one convolution deep"
    return None


def _wraps(flow: Flow, base: fx.Node, inner: SumNode, operand: fx.Node) -> bool:
    """Whether the branch is a block around another, with convolutions before and behind: attention in the middle."""
    start = inner.base or base
    before = [base, start, *flow.between(base, start)] if flow.feeds(base, start) else []
    behind = flow.between(inner.node, operand)
    return all(any(flow.roles[node] is Role.CONV for node in part if node is not base) for part in (before, behind))


def _holds_norm(flow: Flow, found: SumNode) -> bool:
    return any(norms_between(flow, found.base, branch) for branch in found.branches)


def norms_between(flow: Flow, base: fx.Node | None, end: fx.Node) -> tuple[str, ...]:
    """Return the names of the norms on a residual branch; of another sum there is no ``base``."""
    return () if base is None else tuple(norm for node in flow.between(base, end) for norm in flow.norms_in(node))
