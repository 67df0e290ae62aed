"""What stands between a norm and the layer that takes its gain and bias: it moves values about, or lets both pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from torch import fx, nn

from normfree.analysis.flow import Flow, Role
from normfree.layers.linearity import takes_affine
from normfree.layers.passing import Moves, passes, weakest
from normfree.norms import describe
from normfree.tracing.roles import name_of

__all__ = ["Taker", "around_one", "find_taker", "moved_from"]

_FUNCTIONS: dict[str, Moves] = {
    **dict.fromkeys(("relu", "leaky_relu"), "gain"),
    **{f"adaptive_avg_pool{dims}d": "affine" for dims in (1, 2, 3)},
    **{f"avg_pool{dims}d": "affine" for dims in (1, 2, 3)},
    **{f"max_pool{dims}d": "positive" for dims in (1, 2, 3)},
    **dict.fromkeys(("flatten", "reshape", "view", "squeeze", "unsqueeze", "contiguous"), "affine"),
}
_TURNED = ("transpose", "swapaxes", "permute")


@dataclass(frozen=True)
class Taker:
    """The layer that alone reads what a norm returns, behind what lets some of it pass, and is always called with it.

    Attributes:
        path: The layer.
        moves: What it can take of the norm.
        through: The modules between the two, and those that hold these alone.
        behind: Modules whose forward only one of the two is called in.
    """

    path: str
    moves: Moves
    through: tuple[str, ...]
    behind: tuple[str, ...]


def find_taker(flow: Flow, node: fx.Node) -> Taker | None:
    """Return what takes gain and bias of the norm that ``node`` calls, if anything can."""
    act, axis, through, owners = flow.activation_in(node), 1, list[str](), list[str]()
    found = ["affine" if act is None else passes(act)]
    given, next_ = node, _only(flow, node)
    while next_ is not None and not flow.carries(next_):
        passed = _passed(flow, next_, axis)
        if passed is None or not flow.called_once(node):
            return None
        found.append(passed[0])
        axis = passed[1]
        if next_.op == "call_module":
            through.append(str(next_.target))
        owners.append(flow.graph.owners[next_])
        given, next_ = next_, _only(flow, next_)
    layer = None if next_ is None or not flow.called_once(next_) else flow.module(next_)
    if next_ is None or layer is None or not flow.called_once(node) or not _fits(flow, given, axis, node, layer):
        return None
    moves = weakest([*found, takes_affine(layer)])
    ends = f"{node.target}.", f"{next_.target}."
    above = {path for owner in owners if owner for path in accumulate(owner.split("."), "{}.{}".format)}
    around = {path for path in above if not any(end.startswith(f"{path}.") for end in ends)}
    if moves is None:
        return None
    norm, path = str(node.target), str(next_.target)
    return Taker(path, moves, (*through, *sorted(around)), around_one(flow, norm, path))


def around_one(flow: Flow, first: str, second: str) -> tuple[str, ...]:
    """Return the modules that were running when one of two layers was called, and not when the other was."""
    one, other = flow.graph.called[first], flow.graph.called[second]
    return tuple(path for path in dict.fromkeys(one + other) if (path in one) != (path in other))


def moved_from(flow: Flow, node: fx.Node) -> fx.Node:
    """Return what feeds a norm, seen through functions that only move its channels to their place."""
    first, between = flow.inputs[node][0], list[fx.Node]()
    above = first
    while above.op in ("call_method", "call_function") and flow.roles[above] is Role.RESHAPE:
        between.append(above)
        above = flow.inputs[above][0]
    axis = len(flow.shape(above) or ()) - 1 if isinstance(flow.module(above), nn.Linear) else 1
    for moved in reversed(between):
        passed = _passed(flow, moved, axis) if len(flow.users[moved]) == 1 else None
        if passed is None:
            return first
        axis = passed[1]
    return above if axis == 1 and flow.roles[above] is Role.CONV else first


def _only(flow: Flow, node: fx.Node) -> fx.Node | None:
    """Return what alone reads a node, and nothing else."""
    users = flow.users[node]
    return users[0] if len(users) == 1 and list(flow.inputs[users[0]]) == [node] else None


def _fits(flow: Flow, given: fx.Node, axis: int, norm: fx.Node, layer: nn.Module) -> bool:
    """Whether a layer multiplies along the channels of the norm, each of which may be several of its own."""
    width, dims = describe(flow.modules[str(norm.target)]).features, len(flow.shape(given) or ())
    if isinstance(layer, nn.Linear):
        return axis == dims - 1 and layer.in_features % width == 0
    kernel = getattr(layer, "kernel_size", ())
    return axis == 1 and dims == len(kernel) + 2 and getattr(layer, "in_channels", None) == width


def _passed(flow: Flow, node: fx.Node, axis: int) -> tuple[Moves, int] | None:
    """Return what may be moved behind a node, with the dimension in which it hands out the channels."""
    before, after = flow.shape(flow.inputs[node][0]), flow.shape(node)
    if before is None or after is None:
        return None
    module, name = flow.module(node), name_of(node)
    if name in _TURNED or name == "mean":
        return _turned(node, name, len(before), axis)
    moves = _FUNCTIONS.get(name) if module is None else passes(module)
    if name.startswith("avg") and [*node.args[3:], *node.kwargs]:
        return None  # padding, or another divisor
    flat = len(after) == 2 and axis == 1 and after[0] == before[0] and after[1] % before[1] == 0
    if flow.roles[node] is Role.POOL or isinstance(module, nn.Sequential):
        kept = axis == 1 and len(after) == len(before) > 2 and after[:2] == before[:2]
        moved = 1 if kept or (flat and module is not None) else None
    else:
        moved = axis if after == before else 1 if flat else _reshaped(before, after, axis)
    return None if moves is None or moved is None else (moves, moved)


def _turned(node: fx.Node, name: str, count: int, axis: int) -> tuple[Moves, int] | None:
    """Return where the channels are once some dimensions are exchanged or averaged away."""
    rest, options = list(node.args[1:]) or [None], dict(node.kwargs)
    keep = bool(options.pop("keepdim", rest.pop() if type(rest[-1]) is bool else False))
    given = [value for value in (*rest, *options.values()) if value is not None]
    listed = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
    dims = [dim % count for dim in listed if type(dim) is int]
    if not dims or len(dims) != len(listed):
        return None
    if name == "mean":
        return None if {0, axis} & {*dims} else ("affine", axis if keep else axis - sum(dim < axis for dim in dims))
    return "affine", dims.index(axis) if name == "permute" else {dims[0]: dims[-1], dims[-1]: dims[0]}.get(axis, axis)


def _reshaped(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """Return where the channels of a tensor are once its shape is another; values stay in their order."""
    if after[: axis + 1] == before[: axis + 1]:
        return axis
    if axis == len(before) - 1 and after[-1:] == before[-1:] and math.prod(after) == math.prod(before):
        return len(after) - 1
    return None
