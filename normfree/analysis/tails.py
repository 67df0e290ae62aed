"""Where the alpha of a residual branch can live.

Walking up from the sum, every place whose output goes nowhere but into the sum and in which a scalar scales the whole
branch is a candidate; the plan takes the cheapest (a weight costs nothing per image).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx, nn

from normfree.analysis.flow import Flow, Role
from normfree.analysis.writing import is_born_in, shares_memory
from normfree.layers import Channels, scaled_output_class
from normfree.rewriting.blocks import operations_of, why_not_scalable
from normfree.tracing.recorder import optional_arguments

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


def find_candidates(flow: Flow, branch: fx.Node, addition: fx.Node) -> tuple[tuple[Candidate, ...], str]:
    """Return the candidates for a branch, an operand of an addition, outermost first; the reason if there is none."""
    places = _walk(flow, branch, addition, Candidate("", "slot"))
    if _writes_into(flow, addition, branch):  # what others hold would not be written to any more
        places = (c for c in places if c.place not in ("slot", "output") or _is_own(flow, c.path, addition))
    found = tuple(dict.fromkeys(places))
    if any(candidate.calls == 1 for candidate in found):
        return found, ""
    own, why = _own_forward(flow, branch, addition)
    if own is not None or found:  # whether every call of what was found ends a branch is not known here
        return found if own is None else (*found, own), ""
    others = [u.name for u in flow.users[branch] if u is not addition]
    if others:
        return (), f"the branch's output is also used by {', '.join(others)}"
    passing = tuple(_passing(flow, branch, addition))
    if passing:
        return passing, ""
    return (), f"the branch ends in {branch.name}, which no module of its own returns; {why}"


def _passing(flow: Flow, node: fx.Node, user: fx.Node) -> Iterator[Candidate]:
    """Yield the dropouts and the like at the end of a branch: the last resort, in the units of no layer."""
    while flow.roles[node] is Role.PASS and _only_user(flow, node, user):
        if node.op == "call_module":
            yield from _output(flow, str(node.target), Candidate("", "output"))
        node, user = flow.inputs[node][0], node


def _own_forward(flow: Flow, branch: fx.Node, addition: fx.Node) -> tuple[Candidate | None, str]:
    """The module whose own forward adds: its forward can be rewritten, if it is not the root."""
    owner = flow.graph.owners[addition]
    if not owner:
        return None, "the addition stands in the root's own forward, and the root keeps its class"
    calls = flow.calls(owner)
    if not calls:
        return None, f"a forward asks for the class of {owner}"
    if optional_arguments(flow.modules[owner]) and owner in flow.graph.optional:
        return None, f"{owner} is given more than the defaults of its optional arguments"
    own = flow.additions(owner)
    if len(own) % calls:
        return None, f"{owner} adds in one of its calls and not in another"
    if addition not in own or branch not in addition.args:
        return None, f"{owner} does not write the sum as one addition of two"
    number, operand = own.index(addition) % (len(own) // calls), addition.args.index(branch)
    done = operations_of(flow, owner)
    writes = _writes_into(flow, addition, branch)
    if writes and not is_born_in(flow, branch, owner):
        return None, f"{owner} adds in place, to what others hold"
    once = done[: len(done) // calls]
    key = (_settings(flow.modules[owner]), number, operand, *once, writes)
    # Many blocks of a network are alike.
    problem = flow.once(key, lambda: why_not_scalable(flow.modules[owner], number, operand, once, writes))
    if problem is not None:
        return None, f"the forward of {owner} cannot be rewritten: {problem}"
    return Candidate(owner, "sum", addition=number, operand=operand, calls=calls), ""


def _settings(block: nn.Module) -> tuple[Any, ...]:
    """Return what decides the way that a forward goes: classes and plain attributes of the block and its parts."""
    plain = (int, float, bool, str, type(None))
    found = [(name, type(m), "forward" in vars(m)) for name, m in block.named_modules()]
    values = [(k, v) for m in block.modules() for k, v in vars(m).items() if type(v) in plain]
    return *found, *values, *(type(v) for v in vars(block).values())


def _is_own(flow: Flow, path: str, addition: fx.Node) -> bool:
    """Whether what an addition writes into is nothing that a module was given and has returned."""
    returned = (node for node in flow.nodes if node.target == path or path in flow.graph.exits.get(node, ()))
    return all(is_born_in(flow, node, path) for node in returned if shares_memory(flow, addition, node))


def _writes_into(flow: Flow, addition: fx.Node, branch: fx.Node) -> bool:
    """Whether an addition writes its result over the branch."""
    value = flow.graph.values.get(addition)
    return value is not None and value.writes and shares_memory(flow, addition, branch)


def _walk(flow: Flow, node: fx.Node, user: fx.Node, so_far: Candidate) -> Iterator[Candidate]:
    """Yield the candidates at or above ``node``; ``so_far`` carries the norms passed and the channels in use."""
    if not _only_user(flow, node, user):
        return
    role = flow.roles[node]
    path = str(node.target)
    calls = flow.calls(path) if node.op == "call_module" else 0
    module = flow.module(node)
    above: Iterator[Candidate] = iter(())
    shape = flow.shape(node)
    used = None if shape is not None and so_far.channels == (0, *shape[1:2]) else so_far.channels
    if role is Role.NORM and module is not None:
        if calls:
            yield replace(so_far, path=path, place="norm", channels=used, calls=calls)
        if flow.activation_in(node) is None:
            above = _walk(flow, flow.inputs[node][0], node, replace(so_far, through=(*so_far.through, path)))
    elif module is not None and role is not Role.PASS:
        # The features of a linear are its last dimension, and channels the second: the same only for a matrix.
        if calls and flow.carries(node) and (so_far.channels is None or not isinstance(module, nn.Linear)):
            yield replace(so_far, path=path, place="weight", channels=used, calls=calls)
        elif so_far.channels is None:
            yield from _output(flow, path, so_far)
    elif role is Role.PASS or (role is Role.RESHAPE and so_far.channels is None):
        if calls and type(module) is nn.Identity:
            yield replace(so_far, path=path, place="slot", calls=calls)
        above = _walk(flow, flow.inputs[node][0], node, so_far)
    elif role is Role.MUL and so_far.channels is None and len(flow.inputs[node]) > 1:
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
        if not inside.startswith(f"{path}."):
            yield from _output(flow, path, so_far)


def _output(flow: Flow, path: str, so_far: Candidate) -> Iterator[Candidate]:
    """Yield the output of a module, if a scalar can be put on it."""
    module, calls = flow.modules[path], flow.calls(path)
    if not calls or isinstance(module, torch.jit.ScriptModule) or "forward" in module.__dict__:
        return
    try:
        scaled_output_class(type(module))
    except TypeError:  # a class that may not be derived
        return
    if not hasattr(module, "alpha") or not module.state_dict():
        yield replace(so_far, path=path, place="output", calls=calls)


def _only_user(flow: Flow, node: fx.Node, user: fx.Node) -> bool:
    users = flow.users[node]
    if len(users) == 1:
        return True
    mine = _channel_slice(flow, user)
    others = [_channel_slice(flow, other) for other in users if other is not user]
    return mine is not None and all(o is not None and (mine[1] <= o[0] or o[1] <= mine[0]) for o in others)


def _channel_slice(flow: Flow, node: fx.Node) -> Channels:
    """Return ``(start, stop)`` of a node that takes a range of channels and nothing else away; ``None`` for the rest.

    What it takes is seen from where it lies in the memory of what it was given.
    """
    if flow.roles.get(node) is not Role.SLICE or len(flow.inputs[node]) != 1:
        return None
    source = flow.inputs[node][0]
    if flow.roles[source] is Role.SPLIT:
        source = flow.inputs[source][0]
    whole, part = flow.graph.values.get(source), flow.graph.values.get(node)
    if whole is None or part is None or whole.memory != part.memory or whole.strides != part.strides:
        return None
    if len(whole.shape) < 2 or whole.shape[:1] + whole.shape[2:] != part.shape[:1] + part.shape[2:]:
        return None
    start, rest = divmod(part.offset - whole.offset, max(whole.strides[1], 1))
    return None if rest else (start, start + part.shape[1])
