"""What can be read from the bytecode of a function without knowing what it is for."""

from __future__ import annotations

import bisect
import dis
import functools
import inspect
from collections.abc import Container, Sequence
from types import CodeType

from normfree.tracing.callers import Place

__all__ = ["JUMPS", "LAST", "ONE_WAY", "called_by", "index_of", "instructions", "is_plain", "loads_method", "returns"]

JUMPS = frozenset(dis.hasjrel + dis.hasjabs)
ONE_WAY = ("JUMP_FORWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT")
LAST = ("RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE")
_PLAIN: tuple[str, ...] = (
    "LOAD_",
    "STORE_FAST",
    "COPY",
    "SWAP",
    "ROT_",
    "DUP_",
    "PUSH_NULL",
    "PRECALL",
    "NOP",
    "EXTENDED_ARG",
)
_PLAIN += ("BINARY_SUBSCR", "KW_NAMES", "RESUME", "MAKE_CELL", "NOT_TAKEN", "CACHE")
"""Instructions that only move values between variables, attributes and the stack."""


@functools.lru_cache(maxsize=4096)
def instructions(code: CodeType) -> tuple[dis.Instruction, ...]:
    """Return the instructions of a function."""
    return tuple(dis.get_instructions(code))


def loads_method(step: dis.Instruction) -> bool:
    """Whether an instruction takes an attribute only to call it."""
    return step.opname == "LOAD_METHOD" or (step.opname == "LOAD_ATTR" and "NULL" in step.argrepr)


def index_of(place: Place) -> int:
    """Return the number of the instruction at which a function stands; what follows a call in its code is no other."""
    return bisect.bisect_right([i.offset for i in instructions(place.code)], place.offset) - 1


def is_plain(steps: Sequence[dis.Instruction], entered: Container[int] = ()) -> bool:
    """Whether instructions follow each other whatever happens, and only move values.

    Args:
        steps: The instructions.
        entered: Where jumps lead that have been accounted for.
    """
    return all(
        (step.opname.startswith(_PLAIN) or _takes_by_name(steps, i))
        and (not step.is_jump_target or step.offset in entered)
        for i, step in enumerate(steps)
    )


def _takes_by_name(steps: Sequence[dis.Instruction], i: int) -> bool:
    """Whether a call is ``getattr(self.layers, "0")``: the attributes of torch.fx's graphs are no identifiers."""
    put = [step for step in called_by(steps, i) if step.opname not in ("PRECALL", "CACHE")]
    named = bool(put) and put[0].argval == "getattr" and steps[i].arg == 2
    return named and put[-1].opname == "LOAD_CONST" and isinstance(put[-1].argval, str)


def returns(code: CodeType) -> list[int]:
    """Return the numbers of the instructions at which a function hands something out; none if it is a generator."""
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        return []
    return [i for i, step in enumerate(instructions(code)) if step.opname.startswith("RETURN_")]


def called_by(steps: Sequence[dis.Instruction], end: int) -> Sequence[dis.Instruction]:
    """Return what puts function and arguments of a call onto the stack, if it is one and nothing decides in it."""
    height, i = 0, end if steps[end].opname.startswith("CALL") else -1
    while i >= 0 and (i == end or steps[i].opcode not in JUMPS):
        step = steps[i]
        height += dis.stack_effect(step.opcode, step.arg)
        if height == 1 and step.opname != "PRECALL":
            return [s for s in steps[i:end] if s.opname != "PUSH_NULL"]
        if step.is_jump_target:
            break
        i -= 1
    return []
