"""What becomes of a layer that some code takes as a value: is it only asked something, handed out, or may it be called?

What is not known to be harmless counts as a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from normfree.code.bytecode import called_by, callee, function_of, instructions
from normfree.code.chains import Chain
from normfree.code.reach import Function
from normfree.code.using import asks, taken
from normfree.code.words import is_way_in, looks_at_variables

__all__ = ["Fate", "fate_of", "may_call"]

_SEQUENCE = ("GET_ITER", "BINARY_S", "STORE_S", "STORE_FAST", "STORE_DEREF", "DELETE_S", "UNPACK_")
"""What takes something out of a sequence, or keeps it for later."""
_MOVING = ("COPY", "SWAP", "ROT_", "DUP_")
_HOLDERS = (nn.Sequential, nn.ModuleList)
_TAKING_IN = ("append", "extend", "insert")
_ASKING = ("COMPARE_OP", "CONTAINS_OP", "IS_OP", "POP_")


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
    if steps[end].opname.startswith(_SEQUENCE) or (steps[end].opname.startswith("CALL") and not asks(steps, end)):
        return Fate.USED
    return Fate.HANDED_OUT if steps[end].opname.startswith(("RETURN_", "YIELD_", "BUILD_", "LIST_")) else Fate.ASKED


_Seen = frozenset[tuple[CodeType, str, bool]]
"""Variables that are being followed."""


def _follow(code: CodeType, i: int, around: Mapping[str, Any], seen: _Seen, listed: bool = False) -> Fate:
    """Return what becomes of a value, or, if ``listed``, of what has been put into it."""
    steps = instructions(code)
    end = taken(steps, i)
    step = steps[end]
    if any(between.opname.startswith(_MOVING) for between in steps[i + 1 : end + 1]):
        return Fate.USED  # there may be two of it now
    if step.opname.startswith(("RETURN_", "YIELD_")):
        return Fate.HANDED_OUT
    if step.opname == "STORE_FAST":
        return _of_variable(code, step.argval, around, seen, listed)
    called = called_by(steps, end)
    function = function_of(called, around)
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
        way_in = not filled and is_way_in(step.argval, code)
        asked = not stored and (step.argval in _TAKING_IN if listed else not way_in)
    elif step.opname == "CALL" and isinstance(function, FunctionType):  # of some file
        before = sum(part.effect for part in called[len(own) : i - (end - len(called)) + 1]) - 1
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        known = 0 <= before < len(names)
        asked = known and not _of_variable(function.__code__, names[before], function.__globals__, seen, listed)
    return Fate.ASKED if asked else Fate.USED


def _of_variable(code: CodeType, name: str, around: Mapping[str, Any], seen: _Seen, listed: bool) -> Fate:
    """Return what becomes of what a variable holds, wherever it is read."""
    if name in code.co_cellvars or looks_at_variables(code):
        return Fate.USED
    if (code, name, listed) in seen:
        return Fate.ASKED
    seen |= {(code, name, listed)}
    loads = [i for i, s in enumerate(instructions(code)) if s.argval == name and s.opname.startswith("LOAD_FAST")]
    return max((_follow(code, i, around, seen, listed) for i in loads), default=Fate.ASKED)


def may_call(chain: Chain, function: Function) -> bool:
    """Whether what a chain ends at, whatever that is, may be called."""
    return not chain.puts and fate_of(function.code, chain.value, function.whole.__globals__) is Fate.USED
