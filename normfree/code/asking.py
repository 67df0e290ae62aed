"""What becomes of a layer that some code takes as a value: is it only asked something, handed out, or may it be called?

What is not known to be harmless counts as a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import CodeType, FunctionType
from typing import Any

from normfree.code.bytecode import called_by, instructions
from normfree.code.using import asks, taken
from normfree.code.words import is_way_in, looks_at_variables

__all__ = ["Fate", "fate_of"]

_SEQUENCE = ("GET_ITER", "BINARY_S", "STORE_S", "STORE_FAST", "STORE_DEREF", "DELETE_S", "UNPACK_")
"""What takes something out of a sequence, or keeps it for later."""
_MOVING = ("COPY", "SWAP", "ROT_", "DUP_")
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


_Seen = frozenset[tuple[CodeType, str]]
"""Variables that are being followed."""


def _follow(code: CodeType, i: int, around: Mapping[str, Any], seen: _Seen) -> Fate:
    steps = instructions(code)
    end = taken(steps, i)
    step = steps[end]
    if any(between.opname.startswith(_MOVING) for between in steps[i + 1 : end + 1]):
        return Fate.USED  # there may be two of it now
    if step.opname.startswith(("RETURN_", "YIELD_")):
        return Fate.HANDED_OUT
    if step.opname.startswith("BUILD_"):
        return max(_follow(code, end, around, seen), Fate.HANDED_OUT)
    if step.opname == "STORE_FAST":
        return _of_variable(code, step.argval, around, seen)
    asked = step.opname.startswith(_ASKING)
    if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR"):  # what is stored there itself is kept
        stored = step.opname == "STORE_ATTR" and end > i + 1 and steps[end - 1].opname != "JUMP_FORWARD"
        asked = not stored and not is_way_in(step.argval, code)
    if step.opname.startswith("CALL"):
        asked = asks(steps, end) or _is_asked_by(code, i, end, around, seen)
    return Fate.ASKED if asked else Fate.USED


def _of_variable(code: CodeType, name: str, around: Mapping[str, Any], seen: _Seen) -> Fate:
    """Return what becomes of what a variable holds, wherever it is read."""
    if name in code.co_cellvars or looks_at_variables(code):
        return Fate.USED
    if (code, name) in seen:
        return Fate.ASKED
    loads = [i for i, s in enumerate(instructions(code)) if s.argval == name and s.opname.startswith("LOAD_FAST")]
    return max((_follow(code, i, around, seen | {(code, name)}) for i in loads), default=Fate.ASKED)


def _is_asked_by(code: CodeType, i: int, call: int, around: Mapping[str, Any], seen: _Seen) -> bool:
    """Whether a value is given to a function of some file, which only asks it something."""
    steps = instructions(code)
    parts = called_by(steps, call)
    function = around.get(parts[0].argval) if parts and parts[0].opname == "LOAD_GLOBAL" else None
    if not isinstance(function, FunctionType) or steps[call].opname != "CALL" or parts[1].opname in _LOADED:
        return False
    before = sum(step.effect for step in parts[1 : i - (call - len(parts)) + 1]) - 1
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return before < len(names) and not _of_variable(function.__code__, names[before], function.__globals__, seen)


_LOADED = ("LOAD_ATTR", "LOAD_METHOD")
