"""Where the alpha of a residual branch can live.

Walking up from the sum, every place whose output goes nowhere but into the sum and in which a scalar scales the whole
branch is a candidate; the plan takes the cheapest (a weight costs nothing per image).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx, nn

from normfree.analysis.activations import as_activation
from normfree.analysis.flow import Flow, Role
from normfree.layers import Channels, scaled_output_class
from normfree.rewriting.blocks import optional_arguments, why_not_scalable

__all__ = ["Candidate", "Place", "find_candidates"]

Place = Literal["weight", "norm", "slot", "output", "sum"]


@dataclass(frozen=True)
class Candidate:
    """A module that could carry alpha.

    Attributes:
        path: The module.
        place: ``weight`` of a conv or linear, slot of a ``norm``, ``slot`` of an ``nn.Identity``, or ``output`` of any
            other module; ``sum``: the operand of an addition in the module's own forward, which is rewritten.
        through: Norms between the module and the sum; all of them must turn into nothing for alpha to commute.
        channels: The range of the module's channels that goes into the sum, or all of them.
        addition: Which of the additions in the module's own forward, for ``sum``.
        operand: Which operand of it, for ``sum``.
        calls: How often the module is called: every call must end such a branch.
    """

    path: str
    place: Place
    through: tuple[str, ...] = ()
    channels: Channels = None
    addition: int = 0
    operand: int = 0
    calls: int = 1


def find_candidates(
    flow: Flow, branch: fx.Node, addition: fx.Node, *, whole: bool
) -> tuple[tuple[Candidate, ...], str]:
    """Return the candidates for one branch, outermost first, and the reason if there is none.

    Args:
        flow: The graph.
        branch: The operand that is the branch.
        addition: The addition that it is an operand of.
        whole: Whether the graph is that of the whole model and not of a part: the model itself keeps its class.
    """
    found = tuple(dict.fromkeys(_walk(flow, branch, addition, Candidate("", "slot"))))
    if any(candidate.calls == 1 for candidate in found):
        return found, ""
    own, why = _own_forward(flow, branch, addition, whole)
    if own is not None or found:  # whether every call of what was found ends a branch is not known here
        return found if own is None else (*found, own), ""
    others = [u.name for u in flow.users[branch] if u is not addition]
    if others:
        return (), f"the branch's output is also used by {', '.join(others)}"
    return (), f"the branch ends in {branch.name}, which no module of its own returns; {why}"


def _own_forward(flow: Flow, branch: fx.Node, addition: fx.Node, whole: bool) -> tuple[Candidate | None, str]:
    """The module whose own forward adds: its forward can be rewritten, if it is not the root."""
    owner = flow.graph.owners[addition]
    if not owner and whole:
        return None, "the addition stands in the root's own forward, and the root keeps its class"
    calls = flow.calls(owner) if owner else 1
    if not calls:
        return None, f"another part of the model calls {owner} too, or a forward asks for its class"
    if optional_arguments(flow.modules[owner]) and (not owner or owner in flow.graph.optional):
        return None, f"{owner or 'the block'} is given more than the defaults of its optional arguments, or may be"
    own = [n for n in flow.nodes if flow.roles[n] is Role.ADD and flow.graph.owners[n] == owner]
    if len(own) % calls:
        return None, f"{owner} adds in one of its calls and not in another"
    number, operand = own.index(addition) % (len(own) // calls), addition.args.index(branch)
    problem = why_not_scalable(flow.modules[owner], number, operand)
    if problem is not None:
        return None, f"the forward of {owner} cannot be rewritten: {problem}"
    return Candidate(owner, "sum", addition=number, operand=operand, calls=calls), ""


def _walk(flow: Flow, node: fx.Node, user: fx.Node, so_far: Candidate) -> Iterator[Candidate]:
    """Yield the candidates at or above ``node``; ``so_far`` carries the norms passed and the channels in use."""
    if not _only_user(flow, node, user):
        return
    role = flow.roles[node]
    path = str(node.target)
    calls = flow.calls(path) if node.op == "call_module" else 0
    module = flow.module(node)
    above: Iterator[Candidate] = iter(())
    if role is Role.NORM and module is not None:
        if calls:
            yield replace(so_far, path=path, place="norm", calls=calls)
        if flow.activation_in(node) is None:
            above = _walk(flow, flow.inputs[node][0], node, replace(so_far, through=(*so_far.through, path)))
    elif module is not None and role is not Role.PASS:
        # The features of a linear are its last dimension, and channels the second: the same only for a matrix.
        if calls and flow.carries(node) and (so_far.channels is None or not isinstance(module, nn.Linear)):
            yield replace(so_far, path=path, place="weight", calls=calls)
        elif calls and so_far.channels is None and _can_scale_output(module):
            yield replace(so_far, path=path, place="output", calls=calls)
    elif role is Role.PASS or (role is Role.RESHAPE and so_far.channels is None):
        if calls and type(module) is nn.Identity:
            yield replace(so_far, path=path, place="slot", calls=calls)
        above = _walk(flow, flow.inputs[node][0], node, so_far)
    elif role is Role.MUL and so_far.channels is None:
        above = (c for factor in reversed(flow.inputs[node]) for c in _walk(flow, factor, node, so_far))
    elif role is Role.SLICE and so_far.channels is None:
        channels = _channel_slice(flow, node)
        if channels is not None:
            above = _walk(flow, flow.inputs[node][0], node, replace(so_far, channels=channels))
    yield from above
    if so_far.channels is None:
        yield from _exits(flow, node, user, so_far)


def _exits(flow: Flow, node: fx.Node, user: fx.Node, so_far: Candidate) -> Iterator[Candidate]:
    """A traced module that returns ``node``: its own output can be scaled, whatever happens inside."""
    inside = f"{flow.graph.owners[user]}."
    for path in flow.graph.exits.get(node, ()):
        outside = not inside.startswith(f"{path}.")
        if outside and flow.calls(path) and _can_scale_output(flow.modules[path]):
            yield replace(so_far, path=path, place="output", calls=flow.calls(path))


def _can_scale_output(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or "forward" in module.__dict__:
        return False
    try:
        scaled_output_class(type(module))
    except TypeError:  # a class that may not be derived
        return False
    return not hasattr(module, "alpha") or not module.state_dict()


def _only_user(flow: Flow, node: fx.Node, user: fx.Node) -> bool:
    users = flow.users[node]
    if len(users) == 1:
        return True
    mine = _channel_slice(flow, user)
    if mine is None:
        return False
    return all(other is user or _disjoint(mine, _channel_slice(flow, other)) for other in users)


def _disjoint(mine: Channels, other: Channels) -> bool:
    return mine is not None and other is not None and (mine[1] <= other[0] or other[1] <= mine[0])


def _channel_slice(flow: Flow, node: fx.Node) -> Channels:
    """Return ``(start, stop)`` of ``x[:, start:stop]``, with a huge stop where it is open; ``None`` for the rest."""
    if node.op != "call_function" or node.target is not operator.getitem:
        return None
    index = node.args[1]
    everything = slice(None)
    if not isinstance(index, tuple) or len(index) < 2 or any(i != everything for i in (index[0], *index[2:])):
        return None
    picked = index[1]
    if not isinstance(picked, slice) or picked.step not in (None, 1):
        return None
    start = _number(flow, picked.start) if picked.start is not None else 0
    stop = _number(flow, picked.stop) if picked.stop is not None else _OPEN
    if not (isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop):
        return None
    return start, stop


_OPEN = 1 << 62


def _number(flow: Flow, value: object) -> object:
    """Return an index as a number, also where it is written ``x.shape[1]`` and the graph knows the channels of x."""
    if not isinstance(value, fx.Node) or not value.args or not isinstance(value.args[0], fx.Node):
        return value
    if value.op == "call_method" and value.target == "size" and value.args[1:] == (1,):
        return _channels(flow, value.args[0])
    shape = value.args[0]
    indexed = value.target is operator.getitem and value.args[1] == 1 and shape.op in ("call_function", "call_method")
    named = shape.target == "size" or (shape.target is getattr and shape.args[1] == "shape")
    return _channels(flow, shape.args[0]) if indexed and named and isinstance(shape.args[0], fx.Node) else value


def _channels(flow: Flow, node: fx.Node) -> int | None:
    """Return how many channels ``node`` has, seen through what keeps their number."""
    while node in flow.inputs:
        module = flow.module(node)
        if isinstance(module, nn.modules.conv._ConvNd):
            return module.out_channels
        keeps = flow.roles[node] in (Role.NORM, Role.PASS, Role.POOL, Role.UPSAMPLE, Role.ADD)
        if not (keeps or as_activation(flow, node) is not None):
            return None
        node = flow.inputs[node][0]
    return None
