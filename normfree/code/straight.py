"""Whether two layers are always called one after the other, by the code that calls them.

A run sees one path, and the code may have others. So what stands between the two calls is read: if nothing there calls,
decides or keeps, and no jump leads in or out, then every run that comes by the one comes by the other, with what the
first returned. What cannot be told is told no.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence, Set
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from normfree.code.branching import behind
from normfree.code.bytecode import LAST, ONE_WAY, Step, index_of, instructions, is_plain, returns
from normfree.code.chains import Chain
from normfree.code.known import asks_for_shape, is_own, known_calls, through_identity
from normfree.tracing.callers import Call, Place

__all__ = ["always_together", "comes_elsewhere", "passes_on", "shared"]

_TESTS = ("POP_JUMP_IF_NONE", "POP_JUMP_IF_NOT_NONE", "POP_JUMP_IF_FALSE", "POP_JUMP_IF_TRUE")
_CHAIN = nn.Sequential.forward.__code__
"""Calls everything that it holds, one after the other."""


def always_together(layer: Call, norm: Call, passed: Set[Any] = frozenset()) -> bool:
    """Whether a norm is called on what a layer returns whenever either is called, and nobody keeps that.

    Args:
        layer: The call of the first.
        norm: The call of the second.
        passed: The modules, and the names of torch's functions, that stood between the two.
    """
    count = shared(layer, norm)
    if count == 0:
        return False
    one, other = layer.places[count - 1], norm.places[count - 1]
    meet = one.code is _CHAIN or _is_straight(one, behind(one, layer.places[count:])[0], index_of(other), passed)
    return (
        meet
        and all(p.code is _CHAIN or _returns(p, passed) for p in layer.places[count:])
        and all(p.code is _CHAIN or _is_straight(p, 0, index_of(p), passed) for p in norm.places[count:])
        and all(_is_dead(p.code, name, index_of(p)) for p in norm.places for name in p.holding)
    )


def shared(layer: Call, norm: Call) -> int:
    """Return how many of the functions that were running are the same for two calls."""
    same = [a.frame == b.frame for a, b in zip(layer.places, norm.places, strict=False)]
    return same.index(False) if False in same else len(same)


def comes_elsewhere(layer: Call, norm: Call, loads: Mapping[object, int], texts: Set[str]) -> bool:
    """Whether a function that calls only one of two, for one that calls both, may be called by others too.

    The methods of the whole model are there for whoever uses it, but for those whose names begin with ``_``.

    Args:
        layer: A call of the first.
        norm: One of the second.
        loads: How often each name is taken, or written as a text, in the code that was read.
        texts: With what the names begin that are made there.
    """
    count = shared(layer, norm)
    known = behind(layer.places[count - 1], layer.places[count:])[1] if count else 1
    model, by_text = layer.places[0].owner, tuple(texts)
    inside = [place for place in (*layer.places[count:], *norm.places[count:]) if not _is_forward(place.code.co_name)]
    called = [(name, place.owner is model is not None) for place in inside for name in _names(place)]
    return any(
        name == "<lambda>" or loads[name] > known or name.startswith(by_text) or (own and name[0] != "_")
        for name, own in called
    )


def _is_forward(name: str) -> bool:
    return name == "forward" or name.endswith(("comp>", "genexpr>"))


def _names(place: Place) -> set[str]:
    """Return the names of a function: its own, and those that its module's class has for it."""
    own = ((n, getattr(value, "__code__", None)) for cls in type(place.owner).__mro__ for n, value in vars(cls).items())
    return {place.code.co_name, *(name for name, code in own if code is place.code)}


def _is_straight(place: Place, start: int, end: int, passed: Set[Any]) -> bool:
    steps = instructions(place.code)
    if start > end:
        return False
    known = known_calls(place, start, end, passed)
    between, entered = [step for step in steps[start:end] if step not in known], list[int]()
    for i in range(start, end - 2):
        there = _over_missing(place, steps[i : i + 3])
        if there is not None and steps[i] in between:
            entered.append(there)
            between = [step for step in between if not steps[i].offset <= step.offset < there]
        idle = through_identity(place, steps[i : i + 4]) if i + 4 <= end else ()
        between = [step for step in between if step not in idle]
    own = next(iter(place.code.co_varnames), None)
    kept = {step.argval for step in between if known and step.opname.endswith(("_FAST", "_DEREF"))} - {own}
    if not all(_is_dead(place.code, name, end) for name in kept):
        return False  # what is handed on has been there before, as something else
    if steps[end].is_jump_target and steps[end].offset not in entered:
        return False
    asked = [i for i, step in enumerate(between) if step.opname in _TESTS and _asks_for_called(between, i)]
    return is_plain([step for i, step in enumerate(between) if i not in asked], entered)


def _over_missing(place: Place, steps: Sequence[Step]) -> int | None:
    """Return to where ``if self.part is not None`` jumps, if it always does.

    A part that is put there later, where there was none, makes another network of it.
    """
    load, attribute, jump = steps
    if not is_own(place, load) or attribute.opname != "LOAD_ATTR" or not jump.opname.endswith("_IF_NONE"):
        return None
    whole = instructions(place.code)
    ways = [step for step in whole if step.jumps and step.argval == jump.argval]
    forward = jump.argval > jump.offset and len(ways) == 1
    missing = place.owner is not None and _is_missing(place.owner, attribute.argval)
    return jump.argval if forward and missing else None


def _is_missing(owner: nn.Module, name: str) -> bool:
    """Whether a module has ``None`` under a name, and nothing in its file but what builds it puts something there."""
    if vars(owner).get(name, owner._modules.get(name, owner)) is not None:
        return False
    kinds = type(owner).__mro__[: type(owner).__mro__.index(nn.Module)]
    if any(name in vars(kind) or "__getattribute__" in vars(kind) for kind in kinds):
        return False
    return not any(_is_stored_in(kind.__module__, name) for kind in kinds)


def _is_stored_in(module: str, name: str) -> bool:
    """Whether functions of a file assign an attribute, but for those that build a module; a notebook's grow."""
    held = [value for value in vars(sys.modules[module]).values() if getattr(value, "__module__", None) == module]
    own = [vars(value).items() if isinstance(value, type) else [("", value)] for value in held]
    codes = [m.__code__ for items in own for key, m in items if key != "__init__" and isinstance(m, FunctionType)]
    puts = (step for code in codes if name in code.co_names for step in instructions(code))
    return any(step.opname == "STORE_ATTR" and step.argval == name for step in puts)


def _asks_for_called(steps: Sequence[Step], jump: int) -> bool:
    """Whether a jump asks for nothing but whether there is what is called behind it: ``if self.norm is not None``."""
    loads = [i for i, step in enumerate(steps) if step.opname in ("LOAD_ATTR", "LOAD_METHOD")]
    before = [i for i in loads if i < jump]
    if not before or steps[loads[-1]].opname != "LOAD_METHOD" or loads[-1] < jump:
        return False
    test, called = before[-1], loads[-1]
    same = [(steps[i - 1].argval, steps[i].argval) for i in (test, called)]
    return test == jump - 1 and same[0] == same[1]


def _returns(place: Place, passed: Set[Any]) -> bool:
    """Whether a function returns what it has just been given, whenever it returns anything."""
    start, end = index_of(place) + 1, returns(place.code)
    known = known_calls(place, start, end[0], passed) if end else []
    return (
        len(end) == 1
        and is_plain([step for step in instructions(place.code)[start : end[0]] if step not in known])
        and not instructions(place.code)[end[0]].is_jump_target
    )


def _is_dead(code: CodeType, name: str, index: int) -> bool:
    """Whether nothing behind an instruction reads a variable before something else is put into it."""
    if name in code.co_cellvars + code.co_freevars:
        return False
    steps = instructions(code)
    where = {step.offset: i for i, step in enumerate(steps)}
    known = {step.argval for step in steps if step.jumps and not step.opname.startswith("SETUP_")}
    caught = [i for i, step in enumerate(steps) if step.is_jump_target and step.offset not in known]
    waiting, seen = [index + 1, *caught], set[int]()
    while waiting:
        i = waiting.pop()
        if i in seen or i >= len(steps):
            continue
        seen.add(i)
        step = steps[i]
        if "_FAST" in step.opname and step.argval == name and not asks_for_shape(steps, i):
            if step.opname != "STORE_FAST":
                return False
            continue
        if step.jumps:
            waiting.append(where[step.argval])
        if step.opname not in (*ONE_WAY, *LAST):
            waiting.append(i + 1)
    return True


def passes_on(
    code: CodeType, chain: Chain, norms: frozenset[int], ends: Mapping[tuple[int, int], Chain]
) -> tuple[int, int] | None:
    """Return where a norm is named, and its identity, whose call directly follows that of the layer in front of it."""
    steps = instructions(code)
    calls = [i for i in range(chain.end + 1, len(steps)) if steps[i].opname.startswith("CALL")][:2]
    if len(calls) < 2 or not is_plain(steps[chain.end + 1 : calls[0]]) or not is_plain(steps[calls[0] + 1 : calls[1]]):
        return None
    named = [(end, module) for end, module in ends if module in norms and ends[end, module].calls]
    between = [(end, module) for end, module in named if calls[0] < end < calls[1] or end == chain.start - 1]
    kept = [step.argval for step in steps[calls[0] : calls[1]] if step.opname.startswith("STORE_FAST")]
    dead = all(isinstance(name, str) and _is_dead(code, name, calls[1]) for name in kept)
    return between[0] if len(between) == 1 and dead and steps[calls[1]].arg == 1 else None
