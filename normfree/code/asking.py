"""What becomes of a layer that some code takes as a value: is it only asked something, handed out, or may it be called?

What is not known to be harmless counts as a call.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import partial
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from normfree.code.bytecode import Step, called_by, callee, function_of, instructions
from normfree.code.chains import ANY, Chain
from normfree.code.reach import Function
from normfree.code.using import MOVING, ONE_BY_ONE, asks, taken
from normfree.code.words import is_way_in, looks_at_variables

__all__ = ["Fate", "fate_inside", "fate_of", "values_of"]

_HOLDERS = (nn.Sequential, nn.ModuleList)
_TAKING_IN = ("append", "extend", "insert")
_ASKING = ("COMPARE_OP", "CONTAINS_OP", "IS_OP", "POP_", "FORMAT_")
_VARIABLES = ("LOAD_FAST", "LOAD_DEREF")
_BY_TEXT = ("getattr", "setattr", "delattr")

_UNPACKED = ("GET_ITER", "FOR_ITER", "UNPACK_SEQUENCE", "STORE_FAST")
_FAR = 50
"""Variables that a value is followed through."""
_ONE_BY_ONE: set[tuple[str, ...]] = {(name,) for name in ("modules", "named_modules", "children", "named_children")}
_ONE_BY_ONE |= {("_modules", name) for name in ("values", "items")}
"""By these a loop comes to modules."""


class Fate(IntEnum):
    """What becomes of a value, the worse the greater."""

    ASKED = 0
    HANDED_OUT = 1
    USED = 2


def fate_of(code: CodeType, i: int, around: Mapping[str, Any], *, holds: bool = False) -> Fate:
    """Return what becomes of the value that an instruction puts onto the stack.

    Args:
        code: The code.
        i: The number of the instruction.
        around: The globals of the code.
        holds: Whether the value is a sequence, of which the question is only whether something is taken out at once.
    """
    if not holds:
        return _follow(code, i, around, frozenset())
    steps = instructions(code)
    end = taken(steps, i)
    moved = any(between.opname.startswith(MOVING) for between in steps[i + 1 : end + 1])
    if steps[end].opname.startswith(("RETURN_", "YIELD_")) and not moved:
        return Fate.HANDED_OUT
    known = steps[end].opname.startswith((*_ASKING, "LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR"))
    return Fate.ASKED if (known or asks(steps, end)) and not moved else Fate.USED


_Seen = frozenset[tuple[CodeType, str, bool]]
"""Variables that are being followed."""


def _follow(code: CodeType, i: int, around: Mapping[str, Any], seen: _Seen, listed: bool = False) -> Fate:
    """Return what becomes of a value, or, if ``listed``, of what has been put into it."""
    steps = instructions(code)
    end = taken(steps, i)
    step = steps[end]
    if any(between.opname.startswith(MOVING) for between in steps[i + 1 : end + 1]):
        return Fate.USED  # there may be two of it now
    if step.opname.startswith(("RETURN_", "YIELD_")):
        return Fate.HANDED_OUT
    if step.opname == "STORE_FAST":
        return _of_variable(code, step.argval, around, seen, listed)
    called = called_by(steps, end)
    function = function_of(called, around)
    if step.opname == "BUILD_TUPLE" and steps[end + 1].opname == "LIST_APPEND" and steps[i - 1].opname == "STORE_FAST":
        return Fate.HANDED_OUT  # the first of each tuple in a list
    put = step.opname.startswith("BUILD_") or (listed and step.opname == "BINARY_OP")
    if put or any(function is kind for kind in _HOLDERS):
        return max(_follow(code, end, around, seen, listed=True), Fate.HANDED_OUT)
    own = callee(called)
    if len(own) == 2 and own[0].opname == "LOAD_FAST" and own[1].argval in _TAKING_IN:
        return max(_of_variable(code, own[0].argval, around, seen, listed=True), Fate.HANDED_OUT)
    asked = step.opname.startswith(_ASKING) or asks(steps, end)
    if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR"):  # what is stored there itself is kept
        stored = step.opname == "STORE_ATTR" and end > i + 1 and steps[end - 1].opname != "JUMP_FORWARD"
        filled = step.argval in ("weight", "bias") and str(steps[end + 1].argval).endswith("_")  # ``weight.copy_(w)``
        if (step.argval,) in _ONE_BY_ONE and not listed:
            return _fate_of_all(code, end, around, seen)
        way_in = not filled and is_way_in(step.argval, code, end, around)
        asked = not stored and (step.argval in _TAKING_IN if listed else not way_in)
    elif step.opname == "CALL" and (isinstance(function, FunctionType) or _is_itself(own, code)):
        inner, there = (function.__code__, function.__globals__) if function is not None else (code, around)
        before = sum(part.effect for part in called[len(own) : i - (end - len(called)) + 1]) - 1
        names = inner.co_varnames[: inner.co_argcount]
        asked = 0 <= before < len(names) and not _of_variable(inner, names[before], there, seen, listed)
    elif len(own) == 1 and own[0].argval in _BY_TEXT and called[1 : i - (end - len(called)) + 1] == steps[i : i + 1]:
        text = steps[i + 1].argval if steps[i + 1].opname == "LOAD_CONST" else ANY  # ``getattr(layer, "kind", None)``
        asked = own[0].argval != "getattr" or not is_way_in(str(text), code, end, around)
    return Fate.ASKED if asked else Fate.USED


def _fate_of_all(code: CodeType, i: int, around: Mapping[str, Any], seen: _Seen = frozenset()) -> Fate:
    """Return what becomes of all that a method hands out one by one, as of modules in ``for m in self.modules()``.

    Args:
        code: The code.
        i: The number of the instruction that names the method.
        around: The globals of the code.
        seen: Variables that are being followed.
    """
    steps, name = instructions(code), str(instructions(code)[i].argval)
    if steps[i + 1].opname != "CALL":
        return Fate.USED
    end, numbered = i + 1, False
    while (by := _builtin(steps, taken(steps, end))) in ONE_BY_ONE:
        end, numbered = taken(steps, end), numbered or by == "enumerate"
    if by == "len":
        return Fate.ASKED
    inner, head = code, end + 2
    if steps[end + 1].opname != "GET_ITER":
        return Fate.USED
    if steps[head].opname == "CALL":  # of a comprehension
        made = [step.argval for step in called_by(steps, head)[:1]]
        inner = made[0] if made and isinstance(made[0], CodeType) else code
        head = next((k for k, step in enumerate(instructions(inner)) if step.opname == "FOR_ITER"), -1)
    steps = instructions(inner)
    if head < 0 or steps[head].opname != "FOR_ITER" or (inner is not code and steps[head - 1].argval != ".0"):
        return Fate.USED
    count = steps[head + 1].arg or 0 if steps[head + 1].opname == "UNPACK_SEQUENCE" else 0
    last = steps[head + 1 + count]  # what comes before it is a name
    paired = numbered + name.startswith(("named", "items"))  # by a number or a name, but not by both
    known = last.opname == "STORE_FAST" and paired < 2 and count == 2 * paired
    fate = _of_variable(inner, last.argval, around, seen, listed=False) if known else Fate.USED
    if inner is code or fate is not Fate.HANDED_OUT:
        return fate
    return _of_first(code, end + 3, around, seen)


def _builtin(steps: Sequence[Step], i: int) -> str:
    """Return which function of one argument an instruction calls, if a name alone leads to it."""
    own = callee(called_by(steps, i))
    return str(own[0].argval) if len(own) == 1 and own[0].opname == "LOAD_GLOBAL" and steps[i].arg == 1 else ""


def _of_first(code: CodeType, i: int, around: Mapping[str, Any], seen: _Seen) -> Fate:
    """Return what becomes of the first of each tuple in a list that an instruction stores, if only loops go through."""
    steps = instructions(code)
    loads = [k for k, step in enumerate(steps) if step.opname == "LOAD_FAST" and step.argval == steps[i].argval]
    loops = [tuple(step.opname for step in steps[k + 1 : k + 5]) == _UNPACKED for k in loads]
    if steps[i].opname != "STORE_FAST" or not all(loops) or steps[i].argval in code.co_cellvars:
        return Fate.USED
    return max((_of_variable(code, steps[k + 4].argval, around, seen, False) for k in loads), default=Fate.ASKED)


def _is_itself(own: Sequence[Step], code: CodeType) -> bool:
    """Whether a function inside of another calls itself."""
    return len(own) == 1 and own[0].opname == "LOAD_DEREF" and own[0].argval == code.co_name


def _of_variable(code: CodeType, name: str, around: Mapping[str, Any], seen: _Seen, listed: bool) -> Fate:
    """Return what becomes of what a variable holds, wherever it is read."""
    if name in code.co_cellvars or looks_at_variables(code) or len(seen) > _FAR:
        return Fate.USED
    if (code, name, listed) in seen:
        return Fate.ASKED
    seen |= {(code, name, listed)}
    loads = [i for i, s in enumerate(instructions(code)) if s.argval == name and s.opname.startswith("LOAD_FAST")]
    return max((_follow(code, i, around, seen, listed) for i in loads), default=Fate.ASKED)


def values_of(code: CodeType, name: str | None) -> list[int]:
    """Return the instructions at which some code takes what a variable holds, and not an attribute of it."""
    steps = instructions(code)
    loads = [i for i, step in enumerate(steps[:-1]) if step.argval == name and step.opname in _VARIABLES]
    return [i for i in loads if name is not None and not steps[i + 1].opname.endswith(("_ATTR", "_METHOD"))]


def fate_inside(chain: Chain, names: tuple[str, ...], function: Function) -> Fate:
    """Return what becomes of what some code takes out of what holds layers, by the last names of a chain."""
    around = function.whole.__globals__
    if chain.puts:
        return Fate.ASKED
    if names[0].endswith(ANY):
        fate = fate_of(function.code, chain.value, around)
        return Fate.USED if fate is Fate.HANDED_OUT and function.forward else fate
    if names == ("apply",) and chain.calls:
        return _fate_of_applied(chain, function)
    asked = chain.calls and names in _ONE_BY_ONE and _fate_of_all(function.code, chain.value, around) is Fate.ASKED
    return Fate.ASKED if asked else Fate.USED


def _fate_of_applied(chain: Chain, function: Function) -> Fate:
    """Return what a function does with modules, in ``self.apply(self.start)`` or ``net.apply(partial(start))``."""
    steps, around, i = instructions(function.code), function.whole.__globals__, chain.end + 1
    while steps[i].opname == "LOAD_GLOBAL" and around.get(steps[i].argval) is partial:
        i += 1
    own = steps[i].argval == function.owner_name is not None
    name = steps[i + own].argval
    value = inspect.getattr_static(function.owner, name, None) if own else around.get(name)
    ended = steps[taken(steps, i + own)].opname.startswith("CALL")
    if not ended or not isinstance(value, FunctionType) or value.__code__.co_argcount <= own:
        return Fate.USED
    return _of_variable(value.__code__, value.__code__.co_varnames[own], value.__globals__, frozenset(), listed=False)
