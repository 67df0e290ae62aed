"""What some code does with a layer that it names as a value, without calling it at once."""

from __future__ import annotations

import builtins
import functools
from collections.abc import Sequence
from types import CodeType

from torch import nn

from normfree.code.bytecode import Step, called_by, callee, instructions

__all__ = ["calls_variable", "is_called", "is_handed_out", "is_test", "is_used", "part_of", "passes", "takes_some"]

_ASKING = ("isinstance", "issubclass", "type", "len", "id", "hasattr", "callable")
"""Functions that call nothing that they are given."""
_TESTS = ("POP_JUMP_IF_NONE", "POP_JUMP_IF_NOT_NONE")
_TAKING = ("GET_ITER", "BINARY_S", "STORE_S", "STORE_FAST", "STORE_DEREF", "DELETE_S", "UNPACK_")


def is_used(steps: Sequence[Step], i: int, holds: bool) -> bool:
    """Whether the value that an instruction puts onto the stack may be called, but not where it is only handed out.

    Args:
        steps: The code.
        i: The number of the instruction.
        holds: Whether it is a sequence, of which the question is only whether something is taken out at once.
    """
    if holds:
        end = _taken(steps, i)
        return steps[end].opname.startswith(_TAKING) or (steps[end].opname.startswith("CALL") and not _asks(steps, end))
    end, listed = _taken(steps, i), False
    while steps[end].opname.startswith(("BINARY_SUBSCR", "BUILD_")):
        listed |= steps[end].opname.startswith("BUILD_")
        end = _taken(steps, end)
    step = steps[end]
    if step.opname.startswith("CALL"):
        return not (_asks(steps, end) or (listed and _is_method(called_by(steps, end))))  # that of a list takes it in
    return step.opname in ("GET_ITER", "STORE_DEREF") or (step.opname == "STORE_FAST" and not listed)


def _asks(steps: Sequence[Step], call: int) -> bool:
    parts = called_by(steps, call)
    return bool(parts) and parts[0].opname in ("LOAD_GLOBAL", "LOAD_NAME") and parts[0].argval in _ASKING


def _taken(steps: Sequence[Step], i: int) -> int:
    """Return the instruction that takes from the stack what another has put there."""
    height = 1
    for end in range(i + 1, len(steps)):
        step = steps[end]
        if step.jumps:
            return end
        height += step.effect
        if height <= 1:
            return end
    return len(steps) - 1


def is_called(steps: Sequence[Step], i: int) -> bool:
    """Whether the value that an instruction puts onto the stack is called, and not handed on."""
    parts = called_by(steps, _taken(steps, i))
    return bool(parts) and parts[0] is steps[i]


def is_test(steps: Sequence[Step], i: int) -> bool:
    """Whether a value is only asked whether it is there."""
    if steps[i].opname in _TESTS:
        return True
    none = steps[i].opname == "LOAD_CONST" and steps[i].argval is None
    return none and steps[i + 1].opname == "IS_OP"


def is_handed_out(steps: Sequence[Step], i: int) -> bool:
    """Whether the value that an instruction puts onto the stack is returned, or put into what may be."""
    return steps[_taken(steps, i)].opname.startswith(("RETURN_", "YIELD_", "BUILD_", "LIST_"))


def passes(steps: Sequence[Step], name: str | None) -> bool:
    """Whether some code gives what a variable holds to a function, as an argument, and not to ``super``."""
    for i, step in enumerate(steps):
        if step.opname in ("LOAD_FAST", "LOAD_DEREF") and step.argval == name and name is not None:
            attribute = i + 1 < len(steps) and steps[i + 1].opname.endswith(("_ATTR", "_METHOD"))
            own = i > 0 and (steps[i - 1].argval in ("__class__", "getattr", "setattr", "delattr", "isinstance"))
            end = _taken(steps, i)
            called = called_by(steps, end)[:1]  # one of Python's own goes into nothing: ``enumerate(self)``
            known = bool(called) and called[0].opname == "LOAD_GLOBAL" and hasattr(builtins, str(called[0].argval))
            if not attribute and not own and not known and steps[end].opname.startswith(("CALL", "BUILD_")):
                return True
    return False


def takes_some(steps: Sequence[Step], i: int) -> bool:
    """Whether something is taken out of the sequence that an instruction puts onto the stack, and nobody knows what."""
    end = _taken(steps, i)
    taken = steps[end].opname in ("BINARY_SUBSCR", "BINARY_SLICE") or steps[end].jumps
    constants = ("LOAD_CONST", "BUILD_SLICE")
    return taken and not all(step.opname in constants for step in steps[i + 1 : end])


def part_of(module: nn.Module, steps: Sequence[Step]) -> nn.Module | None:
    """Return what a number behind the name of a sequence or list takes out of it: of ``self.rep[0]`` the first."""
    get = getattr(type(module), "__getitem__", None)
    if get not in (nn.Sequential.__getitem__, nn.ModuleList.__getitem__) or len(steps) < 2:
        return None
    constant, subscript = steps[0], steps[1]
    index, held = constant.argval, list(module._modules.values())
    if constant.opname != "LOAD_CONST" or subscript.opname != "BINARY_SUBSCR":
        return None
    return held[index] if type(index) is int and -len(held) <= index < len(held) else None


@functools.lru_cache(maxsize=4096)
def calls_variable(code: CodeType, *, result: bool = False) -> bool:
    """Whether a function calls what one of its variables holds.

    Args:
        code: What it does.
        result: Whether to count, too, the call of what it has just been given: ``next(self.children())(x)``.
    """
    steps = instructions(code)
    calls = [callee(called_by(steps, i)) for i, step in enumerate(steps) if step.opname.startswith("CALL")]
    kinds = ("LOAD_FAST", "LOAD_DEREF", *(("CALL", "BINARY_S") if result else ()))
    return any(not function or function[-1].opname.startswith(kinds) for function in calls)


def _is_method(parts: Sequence[Step]) -> bool:
    function = callee(parts)
    return bool(function) and function[-1].opname in ("LOAD_METHOD", "LOAD_ATTR")
