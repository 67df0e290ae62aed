"""What can be read from the bytecode of a function without knowing what it is for.

Every Python writes the same code in other instructions. They are read into one vocabulary here, that of a stack machine
whose calls take a function and its arguments and leave a result, so that what is built on it holds for all; an
instruction that nobody knows keeps its name, and counts as one that may do anything.
"""

from __future__ import annotations

import bisect
import dis
import functools
import inspect
import itertools
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any, NamedTuple

from normfree.tracing.callers import Place

__all__ = ["LAST", "ONE_WAY", "Step", "attribute_of", "called_by", "callee", "function_of", "index_of", "instructions"]
__all__ += ["is_plain", "raw", "read", "returns"]

ONE_WAY = ("JUMP_FORWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT")
LAST = ("RETURN_VALUE", "RAISE_VARARGS", "RERAISE")
_PLAIN = {"LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_CONST", "LOAD_ATTR"}
_PLAIN |= {"LOAD_METHOD", "STORE_FAST", "COPY", "SWAP", "ROT_TWO", "ROT_THREE", "ROT_FOUR", "NOP", "BINARY_SUBSCR"}
"""Instructions that only move values between variables, attributes and the stack."""
_NOTHING = {"CACHE", "NOP", "NOT_TAKEN", "EXTENDED_ARG", "PRECALL", "RESUME", "MAKE_CELL", "PUSH_NULL", "TO_BOOL"}
_NOTHING |= {"GEN_START", "COPY_FREE_VARS"}
_SAME = {
    "LOAD_FAST_BORROW": "LOAD_FAST",
    "LOAD_FAST_CHECK": "LOAD_FAST",
    "LOAD_SMALL_INT": "LOAD_CONST",
    "CALL_FUNCTION": "CALL",
    "CALL_METHOD": "CALL",
    "CALL_FUNCTION_KW": "CALL_KW",
    "CALL_INTRINSIC_1": "INTRINSIC_1",
    "CALL_INTRINSIC_2": "INTRINSIC_2",
    "DUP_TOP": "COPY",
}
_PAIRS = {
    f"{one}_{two}": (_SAME.get(one, one), _SAME.get(two, two))
    for one in ("LOAD_FAST", "LOAD_FAST_BORROW", "STORE_FAST")
    for two in ("LOAD_FAST", "LOAD_FAST_BORROW", "STORE_FAST")
}
_EFFECTS = {"LOAD_GLOBAL": 1, "LOAD_ATTR": 0, "LOAD_METHOD": 0, "LOAD_FAST": 1, "LOAD_CONST": 1}
_EFFECTS |= {"STORE_FAST": -1, "RETURN_VALUE": -1}


class Step(NamedTuple):
    """An instruction: of some Python, and as :func:`read` has it the same of every one.

    Attributes:
        opname: Its name.
        argval: What it is about: a name, a constant, where a jump leads.
        arg: Its number.
        offset: Where it stands.
        is_jump_target: Whether something jumps to it.
        jumps: Whether it may jump.
        effect: By how much the stack grows, if it does not jump.
        told: What is said about its argument.
    """

    opname: str
    argval: Any
    arg: int | None
    offset: int
    is_jump_target: bool
    jumps: bool
    effect: int
    told: str = ""


@functools.lru_cache(maxsize=4096)
def instructions(code: CodeType) -> tuple[Step, ...]:
    """Return the instructions of a function."""
    return tuple(read(raw(code)))


def raw(code: CodeType) -> list[Step]:
    """Return the instructions of a function as this Python has them."""
    jumps = {*dis.hasjrel, *dis.hasjabs}
    found = list(dis.Bytecode(code))  # which tells what exceptions lead to, too
    values = ((i.opname, i.argval, i.arg, i.offset, i.is_jump_target, i.opcode in jumps) for i in found)
    effects = (dis.stack_effect(i.opcode, i.arg, jump=False) for i in found)
    return [Step(*own, effect, i.argrepr) for own, effect, i in zip(values, effects, found, strict=True)]


def read(steps: Iterable[Step]) -> Iterator[Step]:
    """Yield the instructions of any Python in the one vocabulary."""
    waiting: list[Step] = []  # LOAD_CONST None, and IS_OP behind it: with the jump that follows they are one
    named, before, last, kept = False, "", "", ""
    for step in steps:
        before, last = last, step.opname
        name = re.sub("JUMP_(FORWARD|BACKWARD)_IF", "JUMP_IF", _SAME.get(step.opname, step.opname))
        if name in _NOTHING and not step.is_jump_target:
            continue
        if name in _NOTHING:
            name, step = "NOP", step._replace(effect=0)
        kept, behind = step.opname, kept
        if waiting and (step.is_jump_target or name not in ("IS_OP", "POP_JUMP_IF_TRUE", "POP_JUMP_IF_FALSE")):
            yield from waiting
            waiting = []
        if waiting and name == "IS_OP":
            waiting.append(step)
        elif len(waiting) == 2:
            missing = (waiting[1].arg == 0) == name.endswith("TRUE")
            name = "POP_JUMP_IF_NONE" if missing else "POP_JUMP_IF_NOT_NONE"
            yield step._replace(opname=name, offset=waiting[0].offset, is_jump_target=waiting[0].is_jump_target)
            waiting = []
        elif waiting:
            yield from (*waiting, step._replace(opname=name))
            waiting = []
        elif name == "LOAD_CONST" and step.argval is None:
            waiting = [step._replace(effect=1)]
        elif name in _PAIRS:
            for i, half in enumerate(_PAIRS[name]):
                first = step.is_jump_target and i == 0
                yield Step(half, step.argval[i], None, step.offset + i, first, False, _EFFECTS[half])
        elif name == "RETURN_CONST":
            yield step._replace(opname="LOAD_CONST", effect=1)
            yield Step("RETURN_VALUE", None, None, step.offset + 1, False, False, -1)
        elif name == "KW_NAMES":
            named = True
            yield step._replace(opname="LOAD_CONST", effect=1)
        elif name in ("CALL", "CALL_KW"):
            keyed, named = named or name == "CALL_KW", False
            count = 1 if behind == "GET_ITER" else step.arg or 0  # of a comprehension, what it goes through
            yield step._replace(opname="CALL_KW" if keyed else "CALL", arg=count, effect=-count - keyed)
        elif name == "CALL_FUNCTION_EX":  # the latest Pythons tell by a null that no keywords are given
            keyed = before != "PUSH_NULL" if step.arg is None else step.arg % 2 == 1
            yield step._replace(argval=None, arg=None, effect=-1 - keyed)
        elif name == "BINARY_OP" and step.told == "[]":
            yield step._replace(opname="BINARY_SUBSCR", argval=None, arg=None)
        elif name == "LOAD_SUPER_ATTR":  # what it takes is ``super``, a class, and the module
            yield step._replace(opname="LOAD_METHOD" if "NULL" in step.told else "LOAD_ATTR", effect=-2)
        elif name == "LOAD_ATTR":
            yield step._replace(opname="LOAD_METHOD" if "NULL" in step.told else name, effect=0)
        else:
            yield step._replace(opname=name, effect=_EFFECTS.get(name, step.effect))
    yield from waiting


def index_of(place: Place) -> int:
    """Return the number of the instruction at which a function stands; what follows a call in its code is no other."""
    return bisect.bisect_right([i.offset for i in instructions(place.code)], place.offset) - 1


def is_plain(steps: Sequence[Step], entered: Container[int] = ()) -> bool:
    """Whether instructions follow each other whatever happens, and only move values.

    Args:
        steps: The instructions.
        entered: Where jumps lead that have been accounted for.
    """
    return all(
        (step.opname in _PLAIN or _takes_by_name(steps, i)) and (not step.is_jump_target or step.offset in entered)
        for i, step in enumerate(steps)
    )


def _takes_by_name(steps: Sequence[Step], i: int) -> bool:
    """Whether a call is ``getattr(self.layers, "0")``: the attributes of torch.fx's graphs are no identifiers."""
    put = called_by(steps, i)
    named = bool(put) and put[0].argval == "getattr" and steps[i].arg == 2
    return named and put[-1].opname == "LOAD_CONST" and isinstance(put[-1].argval, str)


def returns(code: CodeType) -> list[int]:
    """Return the numbers of the instructions at which a function hands something out; none if it is a generator."""
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        return []
    return [i for i, step in enumerate(instructions(code)) if step.opname.startswith("RETURN_")]


def called_by(steps: Sequence[Step], end: int, *, deciding: bool = False) -> Sequence[Step]:
    """Return what puts function and arguments of a call onto the stack, if it is one.

    Args:
        steps: The code.
        end: The number of the instruction that may be a call.
        deciding: Whether something may be decided in it, as in ``part(x or y)``.
    """
    height, i = 0, end if steps[end].opname.startswith("CALL") else -1
    while i >= 0 and (i == end or not steps[i].jumps or (deciding and steps[i].opname not in ONE_WAY)):
        height += steps[i].effect
        if height == 1:
            ways = {step.argval for step in steps[i:end] if step.jumps}
            inside = {step.offset for step in steps[i + 1 : end + 1] if step.is_jump_target}
            return steps[i:end] if ways == inside else []
        i -= 1
    return []


def callee(parts: Sequence[Step]) -> Sequence[Step]:
    """Return what puts the function onto the stack, of what :func:`called_by` returns."""
    heights = list(itertools.accumulate(step.effect for step in parts))
    first = next((i for i, step in enumerate(parts) if step.jumps), len(parts))
    before = heights[:first]
    decided = first < len(parts) and heights[first] - parts[first].effect < 2  # the function itself
    return parts[: first - before[::-1].index(1)] if 1 in before and not decided else ()


def function_of(parts: Sequence[Step], names: Mapping[str, Any]) -> Any:
    """Return what a call calls, if globals lead to it: ``torch.utils.checkpoint.checkpoint``.

    Args:
        parts: What :func:`called_by` returns.
        names: The globals.
    """
    return attribute_of(callee(parts), names)


def attribute_of(parts: Sequence[Step], names: Mapping[str, Any]) -> Any:
    """Return what instructions put onto the stack, if they take it from globals: ``torch.nn.Sequential``."""
    found = names.get(parts[0].argval) if parts and parts[0].opname == "LOAD_GLOBAL" else None
    for step in parts[1:]:
        attribute = step.opname in ("LOAD_ATTR", "LOAD_METHOD")
        found = inspect.getattr_static(found, step.argval, None) if attribute else None
    return found
