"""Behind which layers of a sequence a loop over it may hand something out: ``if i == self.ends[k]: found.append(x)``.

A method that returns what lies between the layers of a sequence comes to each of them by another way. But where its
loop calls one after the other, and does anything else only if the number of a layer is among numbers that the module
holds, what a layer of another number returns goes into the next layer and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from normfree.code.branching import is_stored
from normfree.code.bytecode import ONE_WAY, Step, instructions
from normfree.code.reach import Function
from normfree.code.words import looks_at_variables

__all__ = ["Loop", "loop_over"]

_CALLS = ("STORE_FAST", "LOAD_FAST", "LOAD_FAST", "CALL", "STORE_FAST")
"""``layer = ...; x = layer(x)``."""
_CUTS = (("BUILD_SLICE", "BINARY_SUBSCR"), ("BINARY_SLICE",))
_UP_TO = ("LOAD_CONST", "LOAD_FAST", "LOAD_ATTR", "LOAD_", "BINARY_SUBSCR", "LOAD_CONST", "BINARY_OP")
"""``: self.ends[k] + 1`` of ``self.layers[: self.ends[k] + 1]``."""


@dataclass(frozen=True)
class Loop:
    """A loop over a sequence that a module holds, which begins with its first layer.

    Attributes:
        seen: The numbers of the layers behind which something may be handed out, or the loop may end early.
        told_by: The attributes of the module that tell these.
        mentions: How often the code names the sequence for it.
    """

    seen: frozenset[int]
    told_by: frozenset[str]
    mentions: int


def loop_over(function: Function, name: str, owner: nn.Module) -> Loop | None:
    """Return how a method goes through a sequence, if it does so once, or only cuts its end off.

    Args:
        function: The method.
        name: The attribute under which its module holds the sequence.
        owner: The module.
    """
    code, own = function.code, function.owner_name
    steps = instructions(code)
    jumps = {step.argval for step in steps if step.jumps}
    caught = any(step.is_jump_target and step.offset not in jumps for step in steps)
    if caught or own is None or is_stored(code, own) or looks_at_variables(code):
        return None
    heads = [i for i, step in enumerate(steps) if step.opname == "FOR_ITER"]
    mentions = [steps[i].opname for i in _about(steps, name)]
    stores = [i for i in _about(steps, name) if steps[i].opname == "STORE_ATTR"]
    if stores:  # each puts back what it cuts
        found = [_cut(steps, i - 2, own, name) if steps[i - 1].argval == own else None for i in stores]
        told: Sequence[str | None] = found if len(mentions) == 2 * len(stores) else [None]
    else:
        told = _steps_through(function, steps, heads[0], own, name) if len(heads) == 1 else [None]
        told = told if len(mentions) == max(len(told) - 1, 1) else [None]
    numbers = [_numbers(vars(owner).get(attribute)) for attribute in told if attribute]
    if None in told or None in numbers:
        return None
    seen = frozenset(n for found in numbers for n in found or ())
    return Loop(seen, frozenset(attribute for attribute in told if attribute), mentions.count("LOAD_ATTR"))


def _steps_through(function: Function, steps: Sequence[Step], head: int, own: str, name: str) -> list[str | None]:
    """Return the attributes that tell behind which layers a loop does something, and where it ends."""
    counted = steps[head + 1].opname == "UNPACK_SEQUENCE"
    start = head + 1 + 2 * counted
    end = start + len(_CALLS)
    calls = steps[start:end]
    if any(step.is_jump_target for step in steps[head + 1 : end]) or tuple(s.opname for s in calls) != _CALLS:
        return [None]
    layer, again, given, call, put = calls
    once = layer.argval == again.argval and call.arg == 1 and len(list(_about(steps, layer.argval))) == 2
    if given.argval != put.argval or not once or (counted and "enumerate" in function.whole.__globals__):
        return [None]
    test = _test(steps, head, end, own, steps[start - 1].argval if counted else None)
    return [test, *_sources(steps, head, own, name, counted)]


def _about(steps: Sequence[Step], name: str) -> Iterator[int]:
    return (i for i, step in enumerate(steps) if step.argval == name and step.opname != "LOAD_CONST")


def _numbers(value: Any) -> tuple[int, ...] | None:
    plain = isinstance(value, (list, tuple)) and all(type(n) is int and n >= 0 for n in value)
    return tuple(value) if plain else None


def _test(steps: Sequence[Step], head: int, start: int, own: str, number: str | None) -> str | None:
    """Return the attribute with which the number of a layer is compared before the loop does anything else.

    ``""`` is returned if it does nothing else, and ``None`` if that is not known.
    """

    def repeats(i: int) -> bool:
        return i == head or (steps[i].opname in ONE_WAY and steps[i].argval == steps[head].offset)

    if repeats(start):
        return ""
    end = next((i for i in range(start, len(steps)) if steps[i].jumps), start)
    where = next((i for i, step in enumerate(steps) if step.offset == steps[end].argval), start)
    otherwise = {"POP_JUMP_IF_FALSE": where, "POP_JUMP_IF_TRUE": end + 1}.get(steps[end].opname)
    test = steps[start:end]
    if otherwise is None or not repeats(otherwise) or any(step.is_jump_target for step in steps[start : end + 1]):
        return None
    names = [step.opname for step in test]
    items = [[load, "BINARY_SUBSCR", "COMPARE_OP"] for load in ("LOAD_FAST", "LOAD_CONST")]
    if names[:3] != ["LOAD_FAST", "LOAD_FAST", "LOAD_ATTR"] or names[3:] not in (*items, ["CONTAINS_OP"]):
        return None
    equal = test[-1].argval == "==" if len(names) > 4 else test[-1].arg == 0
    counted = test[0].argval == number and len(list(_about(steps, str(number)))) == 2
    return str(test[2].argval) if equal and counted and test[1].argval == own else None


def _sources(steps: Sequence[Step], head: int, own: str, name: str, counted: bool) -> list[str | None]:
    """Return for every place where the loop's sequence comes from how it is cut there."""
    end = head - 2 - counted
    if any(step.is_jump_target for step in steps[end:head]):
        return [None]
    if steps[end].opname != "LOAD_FAST":
        return ["" if _whole(steps, end, own, name) and (not counted or _counts(steps, end - 2)) else None]
    stores = [i for i in _about(steps, steps[end].argval) if i != end]
    straight = all(steps[i].opname == "STORE_FAST" and not steps[i].is_jump_target for i in stores)
    if not straight or (counted and not _counts(steps, end - 1)):
        return [None]
    return [_cut(steps, i - 1, own, name) for i in stores]


def _counts(steps: Sequence[Step], i: int) -> bool:
    return steps[i].opname == "LOAD_GLOBAL" and steps[i].argval == "enumerate"


def _whole(steps: Sequence[Step], end: int, own: str, name: str) -> bool:
    """Whether ``self.layers`` ends at an instruction."""
    load, attribute = steps[end - 1 : end + 1]
    named = load.opname == "LOAD_FAST" and load.argval == own and attribute.argval == name
    return named and attribute.opname == "LOAD_ATTR" and not attribute.is_jump_target


def _cut(steps: Sequence[Step], end: int, own: str, name: str) -> str | None:
    """Return the attribute that cuts ``self.layers[: self.ends[k] + 1]``, ``""`` for ``self.layers``, or ``None``."""
    if _whole(steps, end, own, name):
        return ""
    names = tuple(step.opname for step in steps[: end + 1])
    cut = next((cut for cut in _CUTS if names[-len(cut) :] == cut), ())
    last = end + 1 - len(cut)
    first = last - len(_UP_TO)
    known = all(map(str.startswith, names[first:last], _UP_TO)) and names[first + 3] in ("LOAD_FAST", "LOAD_CONST")
    if not cut or not known or not _whole(steps, first - 1, own, name):
        return None
    start, holder, attribute, _, _, one, plus = steps[first:last]
    straight = not any(step.is_jump_target for step in steps[first : end + 1])
    from_first = start.argval is None and holder.argval == own
    return attribute.argval if straight and from_first and one.argval == 1 and plus.told == "+" else None
