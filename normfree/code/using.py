"""What some code does with a layer that it names as a value, without calling it at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any

import torch.nn.functional as F
from torch import nn

from normfree.code.bytecode import Step, called_by, callee, function_of, instructions
from normfree.code.functions import is_foreign

__all__ = [
    "ABOUT",
    "MOVING",
    "ONE_BY_ONE",
    "asks",
    "calls_variable",
    "contained",
    "is_called",
    "is_read",
    "is_sequence",
    "is_test",
    "part_of",
    "taken",
]
__all__ += ["takes_own", "takes_some", "uses_called", "works"]

_ASKING = ("isinstance", "issubclass", "type", "len", "id", "hasattr", "callable", "str", "repr", "format", "print")
"""Functions that call nothing that they are given."""
ABOUT = frozenset({"shape", "dtype", "device", "ndim", "size", "dim", "numel", "requires_grad", "grad", "keys"})
"""What can be asked of a weight without its values."""
_FUNCTIONS = frozenset(name for name, value in vars(F).items() if name.islower() and callable(value))
_FUNCTIONS |= {"matmul", "einsum", "mm", "addmm", "bmm", "baddbmm", "addmv", "tensordot", "inner", "functional_call"}
"""By these a weight works."""
_KEEPS = ("BUILD_", "LIST_", "BINARY_OP", "RETURN_", "YIELD_", "STORE_ATTR")
_RUNNING = ("forward", "__call__", "_conv_forward")
_GATHERING = ("list", "tuple", "dict", "iter", "next", "reversed", "sorted", "zip")
MOVING = ("COPY", "SWAP", "ROT_", "DUP_")
"""Instructions behind which a value may be there twice."""
ONE_BY_ONE = ("enumerate", "reversed", "list", "tuple", "iter", "sorted", "set")
"""Functions that hand on what they are given one by one."""
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
        ended = height < (1 if step.opname.startswith(_PUTTING_NOTHING) else 2)
        if step.jumps or step.opname.startswith("UNPACK_") or ended:
            break
        end += 1
    return end


def is_argument(steps: Sequence[Step], i: int) -> bool:
    """Whether what an instruction puts onto the stack is given to a call as it is."""
    return steps[taken(steps, i)].opname.startswith("CALL")


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


def works(code: CodeType, i: int, around: Mapping[str, Any], seen: frozenset[str] = frozenset()) -> bool:
    """Whether a weight that an instruction takes may do the work of a layer, by a function that gets it.

    Args:
        code: The code, to which no forward comes.
        i: The number of the instruction.
        around: The globals of the code.
        seen: Variables that are being followed.
    """
    steps = instructions(code)
    end = taken(steps, i)
    step, name = steps[end], str(steps[end].argval)
    if not _FUNCTIONS.isdisjoint(code.co_names) or step.opname.startswith(_KEEPS):
        return True
    if step.opname == "STORE_FAST" and name not in seen:
        loads = (k for k, load in enumerate(steps) if load.opname == "LOAD_FAST" and load.argval == name)
        return any(works(code, k, around, seen | {name}) for k in loads)
    if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
        result = taken(steps, end) if step.opname == "LOAD_METHOD" else end
        return not name.endswith("_") and name not in ABOUT and works(code, result, around, seen)
    if step.opname == "BINARY_SUBSCR":
        return works(code, end, around, seen)
    called = called_by(steps, end)
    own, function = callee(called), function_of(called, around)
    if own and (own[-1] == steps[i] or own[0].argval in _GATHERING):  # it is called itself; a list of it
        return works(code, end, around, seen)
    if not own:
        return step.opname.startswith("CALL")
    known = own[0].opname == "LOAD_GLOBAL" and (function is None or not isinstance(function, FunctionType))
    filled = str(own[-1].argval).endswith("_") and own[0].opname == "LOAD_GLOBAL"  # ``init.zeros_(layer.weight)``
    return not (filled or known or (isinstance(function, FunctionType) and is_foreign(function)))


def uses_called(code: CodeType) -> bool:
    """Whether a function does something with what a call of one of its variables returns."""
    steps = instructions(code)
    ends = [i for i, step in enumerate(steps[:-1]) if step.opname.startswith("CALL")]
    used = (i for i in ends if steps[i + 1].opname != "POP_TOP")
    own = (callee(called_by(steps, i, deciding=True)) for i in used)
    made = {b.argval for a, b in pairwise(steps) if a.opname in ("MAKE_FUNCTION", "SET_FUNCTION_ATTRIBUTE")}
    kinds = ("LOAD_FAST", "LOAD_DEREF", "BINARY_SUBSCR", "CALL")
    return any(parts and parts[-1].opname in kinds and parts[-1].argval not in made for parts in own)


def takes_own(code: CodeType, name: str | None) -> bool:
    """Whether a method of a layer runs it, or takes its weight or bias."""
    steps = instructions(code)
    own = [i for i, step in enumerate(steps[:-1]) if step.argval == name and step.opname.startswith("LOAD_")]
    read = any(steps[i + 1].argval in ("weight", "bias", *_RUNNING) for i in own)
    base = "super" in code.co_names and not set(_RUNNING).isdisjoint(code.co_names)
    return read or base or any(is_called(steps, i) for i in own)


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


def contained(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module, and if it is a sequence what one comes to by going through it."""
    yield module
    for part in module.children() if hasattr(type(module), "__iter__") else ():
        yield from contained(part)


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
