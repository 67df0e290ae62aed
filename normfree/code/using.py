"""What some code does with a layer that it names as a value, without calling it at once."""

from __future__ import annotations

import builtins
import functools
from collections.abc import Sequence
from types import CodeType

from torch import nn

from normfree.code.bytecode import Step, called_by, callee, instructions

__all__ = ["asks", "calls_variable", "is_called", "is_read", "is_sequence", "is_test", "part_of", "passes", "taken"]
__all__ += ["takes_some"]

_ASKING = ("isinstance", "issubclass", "type", "len", "id", "hasattr", "callable")
"""Functions that call nothing that they are given."""
_TESTS = ("POP_JUMP_IF_NONE", "POP_JUMP_IF_NOT_NONE")
_PUTTING_NOTHING = ("STORE_", "DELETE_", "POP_", "LIST_", "SET_", "MAP_")
"""Instructions that take from the stack and leave nothing there."""
_READING = ("BINARY_SUBSCR", "BINARY_SLICE", "COMPARE_OP", "CONTAINS_OP", "IS_OP")


def asks(steps: Sequence[Step], call: int) -> bool:
    """Whether a call is one of Python's own, which calls nothing that it is given."""
    parts = called_by(steps, call)
    return bool(parts) and parts[0].opname in ("LOAD_GLOBAL", "LOAD_NAME") and parts[0].argval in _ASKING


def taken(steps: Sequence[Step], i: int) -> int:
    """Return the instruction that takes from the stack what another has put there, or may jump with it."""
    height, end = 1, i + 1
    while end < len(steps) - 1:
        step = steps[end]
        if step.opname == "JUMP_FORWARD" and height == 1:
            end = next(k for k in range(end, len(steps)) if steps[k].offset == step.argval)
            continue
        height += step.effect
        if step.jumps or height < (1 if step.opname.startswith(_PUTTING_NOTHING) else 2):
            break
        end += 1
    return end


def is_called(steps: Sequence[Step], i: int) -> bool:
    """Whether the value that an instruction puts onto the stack is called, and not handed on."""
    parts = called_by(steps, taken(steps, i))
    return bool(parts) and parts[0] is steps[i]


def is_test(steps: Sequence[Step], i: int) -> bool:
    """Whether a value is only asked whether it is there."""
    if steps[i].opname in _TESTS:
        return True
    none = steps[i].opname == "LOAD_CONST" and steps[i].argval is None
    return none and steps[i + 1].opname == "IS_OP"


def is_read(steps: Sequence[Step], i: int) -> bool:
    """Whether a value that an instruction puts onto the stack is only looked into, or compared."""
    end = taken(steps, i)
    return steps[end].opname.startswith((*_READING, "POP_JUMP_IF_")) or asks(steps, end)


def passes(steps: Sequence[Step], name: str | None) -> bool:
    """Whether some code gives what a variable holds to a function, as an argument, and not to ``super``."""
    for i, step in enumerate(steps):
        if step.opname in ("LOAD_FAST", "LOAD_DEREF") and step.argval == name and name is not None:
            attribute = i + 1 < len(steps) and steps[i + 1].opname.endswith(("_ATTR", "_METHOD"))
            own = i > 0 and (steps[i - 1].argval in ("__class__", "getattr", "setattr", "delattr", "isinstance"))
            end = taken(steps, i)
            called = called_by(steps, end)[:1]  # one of Python's own goes into nothing: ``enumerate(self)``
            known = bool(called) and called[0].opname == "LOAD_GLOBAL" and hasattr(builtins, str(called[0].argval))
            if not attribute and not own and not known and steps[end].opname.startswith(("CALL", "BUILD_")):
                return True
    return False


def takes_some(steps: Sequence[Step], i: int) -> bool:
    """Whether something is taken out of the sequence that an instruction puts onto the stack, and nobody knows what."""
    end = taken(steps, i)
    some = steps[end].opname in ("BINARY_SUBSCR", "BINARY_SLICE") or steps[end].jumps
    constants = ("LOAD_CONST", "BUILD_SLICE")
    return some and not all(step.opname in constants for step in steps[i + 1 : end])


def part_of(module: nn.Module, steps: Sequence[Step]) -> nn.Module | None:
    """Return what a number behind the name of a sequence or list takes out of it: of ``self.rep[0]`` the first."""
    if not is_sequence(module) or len(steps) < 2:
        return None
    constant, subscript = steps[0], steps[1]
    index, held = constant.argval, list(module._modules.values())
    if constant.opname != "LOAD_CONST" or subscript.opname != "BINARY_SUBSCR":
        return None
    return held[index] if type(index) is int and -len(held) <= index < len(held) else None


def is_sequence(module: nn.Module) -> bool:
    """Whether a module is torch's sequence or list, as to what one gets by a number or in a loop."""
    found = [getattr(type(module), name, None) for name in ("__getitem__", "__iter__")]
    return any(found == [kind.__getitem__, kind.__iter__] for kind in (nn.Sequential, nn.ModuleList))


@functools.lru_cache(maxsize=4096)
def calls_variable(code: CodeType, *, result: bool = False) -> bool:
    """Whether a function calls what one of its variables holds.

    Args:
        code: What it does.
        result: Whether to count, too, the call of what it has just been given: ``next(self.children())(x)``.
    """
    steps = instructions(code)
    ends = (i for i, step in enumerate(steps) if step.opname.startswith("CALL"))
    calls = [callee(called_by(steps, i, deciding=True)) for i in ends]
    kinds = ("LOAD_FAST", "LOAD_DEREF", *(("CALL", "BINARY_S") if result else ()))
    return any(not function or function[-1].opname.startswith(kinds) for function in calls)
