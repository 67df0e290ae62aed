"""Whether some code does no more with a sequence of modules than call those in it as wholes: ``for s in stages: s(x)``.

Else it may take apart what is in it, wherever that is a sequence again.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import CodeType

from normfree.code.bytecode import Step, called_by, callee, instructions
from normfree.code.using import MOVING, ONE_BY_ONE, asks, taken

__all__ = ["calls_whole", "calls_wholes"]

_ASKING = ("COMPARE_OP", "CONTAINS_OP", "IS_OP", "POP_TOP", "FORMAT_")
_LOADS = ("LOAD_FAST",)


def calls_wholes(code: CodeType, i: int, seen: frozenset[str] = frozenset(), *, counted: bool = False) -> bool:
    """Whether a sequence that an instruction puts onto the stack is only called, or what is in it, or asked.

    Args:
        code: The code.
        i: The number of the instruction.
        seen: Variables that are being followed.
        counted: Whether what it hands out comes with numbers.
    """
    steps = instructions(code)
    if _is_callee(steps, i):
        return True
    end = taken(steps, i)
    step = steps[end]
    if any(between.opname.startswith(MOVING) for between in steps[i + 1 : end + 1]):
        return False
    if step.opname == "STORE_FAST":
        loads = _loads(code, step.argval)
        return loads is not None and (
            step.argval in seen or all(calls_wholes(code, k, seen | {step.argval}, counted=counted) for k in loads)
        )
    if step.opname == "BINARY_SLICE" or (step.opname == "BINARY_SUBSCR" and steps[end - 1].opname == "BUILD_SLICE"):
        return calls_wholes(code, end, seen, counted=counted)
    if step.opname == "BINARY_SUBSCR":
        return calls_whole(code, end, seen)
    if step.opname == "GET_ITER" and steps[end + 1].opname == "FOR_ITER":
        store = steps[end + 2 + 2 * counted]
        loads = _loads(code, store.argval) if store.opname == "STORE_FAST" else None
        pair = not counted or (steps[end + 2].opname == "UNPACK_SEQUENCE" and steps[end + 2].arg == 2)
        return pair and loads is not None and all(calls_whole(code, k, seen | {store.argval}) for k in loads)
    own = callee(called_by(steps, end))
    if len(own) == 1 and own[0].opname == "LOAD_GLOBAL" and own[0].argval in ONE_BY_ONE and step.arg == 1:
        return calls_wholes(code, end, seen, counted=counted or own[0].argval == "enumerate")
    return step.opname.startswith(_ASKING) or asks(steps, end)


def calls_whole(code: CodeType, i: int, seen: frozenset[str] = frozenset()) -> bool:
    """Whether a part of a sequence, which an instruction puts onto the stack, is only called, or asked."""
    steps = instructions(code)
    end = taken(steps, i)
    if steps[end].opname == "STORE_FAST" and steps[end].argval not in seen:
        loads = _loads(code, steps[end].argval)
        return loads is not None and all(calls_whole(code, k, seen | {steps[end].argval}) for k in loads)
    return _is_callee(steps, i) or steps[end].opname.startswith(_ASKING) or asks(steps, end)


def _is_callee(steps: Sequence[Step], i: int) -> bool:
    return callee(called_by(steps, taken(steps, i)))[-1:] == steps[i : i + 1]


def _loads(code: CodeType, name: str) -> list[int] | None:
    """Return where a variable is read, or nothing if functions inside may read it, too."""
    if name in code.co_cellvars:
        return None
    return [k for k, step in enumerate(instructions(code)) if step.argval == name and step.opname.startswith(_LOADS)]
