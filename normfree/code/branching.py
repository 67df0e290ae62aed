"""Whether branches that meet have done the same: called a layer, and put what it returned into one variable.

``if self.checkpointing: y = self.checkpointed(x)`` and ``else: y = self.part(x)`` come to the same layer, whichever is
taken, if one calls the function in which the layer was seen called, and the other a function that does nothing but
return what that one returns. Functions are followed as far as they are methods of the same module, checkpointing of
torch's, and closures that these are given.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from normfree.code.bytecode import LAST, ONE_WAY, Step, called_by, callee, function_of, index_of, instructions, returns
from normfree.code.using import taken
from normfree.tracing.callers import Place

__all__ = ["behind", "is_run_whole", "is_stored"]

_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_LOADS = ("LOAD_FAST", "LOAD_DEREF")
_DEEP = 4
"""How many functions may stand between a branch and the one that calls the layer."""


def behind(place: Place, inner: Sequence[Place]) -> tuple[int, int]:
    """Return the number of the instruction behind a call, or behind where branches meet that all call the same.

    With it comes how many branches these are.

    Args:
        place: Where the function stands.
        inner: Where those stand that it has called.
    """
    steps, after = instructions(place.code), index_of(place) + 1
    store = steps[after]
    if store.opname != "STORE_FAST" or not inner or place.owner is None or inner[0].owner is not place.owner:
        return after, 1
    meet = after + 1
    if steps[meet].opname == "JUMP_FORWARD":
        meet = next(i for i, step in enumerate(steps) if step.offset == steps[meet].argval)
    offset = steps[meet].offset
    ways = [i for i, step in enumerate(steps) if step.jumps and step.argval == offset]
    through = [i for i in ways if steps[i].opname == "JUMP_FORWARD"]
    if not ways or through != ways:
        return after, 1
    ends = [*through, *([meet] if steps[meet - 1].opname not in (*ONE_WAY, *LAST) else [])]
    home = _Home(place.owner, inner[0].code)
    same = all(
        i - 1 == after or (_puts(steps, i - 1, store.argval) and home.leads(steps, i - 2, place.code, {})) for i in ends
    )
    return (meet + 1, len(ends)) if same and steps[meet].opname.startswith("LOAD_") else (after, 1)


def _puts(steps: Sequence[Step], i: int, name: str) -> bool:
    return steps[i].opname == "STORE_FAST" and steps[i].argval == name and not steps[i].is_jump_target


@dataclass(frozen=True)
class _Home:
    """The method of a module in which its layer was seen called, and which returns what that returns."""

    owner: nn.Module
    code: CodeType

    def leads(self, steps: Sequence[Step], call: int, code: CodeType, names: Mapping[str, Any], depth: int = 0) -> bool:
        """Whether the call at an instruction gives what the method returns; ``names`` are the globals around it."""
        parts = _simple(steps, call)
        if len(parts) < 2 or depth > _DEEP:
            return False
        own, attribute = parts[0], parts[1]
        further = len(parts) > 2 and parts[2].opname in _ATTRIBUTES
        if own.opname in _LOADS and own.argval == self._name(code) and attribute.opname in _ATTRIBUTES and not further:
            method = inspect.getattr_static(type(self.owner), attribute.argval, None)
            if not isinstance(method, FunctionType) or attribute.argval in vars(self.owner):
                return False
            return method.__code__ is self.code or self._returns(method.__code__, method.__globals__, depth + 1)
        given = _first_given(parts, names, _DEEP)
        inside = None if given is None else _made(code, given)
        return inside is not None and self._returns(inside, names, depth + 1)

    def _returns(self, code: CodeType, names: Mapping[str, Any], depth: int) -> bool:
        steps, ends = instructions(code), returns(code)
        return bool(ends) and all(
            not steps[i].is_jump_target and self.leads(steps, i - 1, code, names, depth) for i in ends
        )

    def _name(self, code: CodeType) -> str | None:
        """Return what a function calls the module, if it never calls anything else so."""
        methods = (vars(cls).values() for cls in type(self.owner).__mro__)
        outer = next((m.__code__ for own in methods for m in own if _holds(m, code)), None)
        name = outer.co_varnames[0] if outer is not None and outer.co_argcount else None
        inner = outer is code or name in code.co_freevars
        return name if inner and outer is not None and not is_stored(outer, name) else None


def _simple(steps: Sequence[Step], call: int) -> Sequence[Step]:
    """Return function and arguments of a call that contains no other: ``self.part(x).tanh()`` is one of ``tanh``."""
    parts = called_by(steps, call)
    return [] if any(step.opname.startswith(("CALL", "BINARY_")) for step in parts) else parts


def _holds(value: Any, code: CodeType) -> bool:
    return isinstance(value, FunctionType) and (value.__code__ is code or code in value.__code__.co_consts)


def is_stored(code: CodeType, name: str | None) -> bool:
    """Whether a function, or one that it makes, puts something into a variable."""
    codes = [code, *(c for c in code.co_consts if isinstance(c, CodeType))]
    return any(s.argval == name and s.opname.startswith(("STORE", "DELETE")) for c in codes for s in instructions(c))


def _first_given(parts: Sequence[Step], names: Mapping[str, Any], deep: int) -> str | None:
    """Return the variable that a function is given first, if all that this does is to call it and return the result."""
    first = next(iter(parts[len(callee(parts)) :]), None)
    whole = first is not None and first.opname in _LOADS and _runs_whole(function_of(parts, names), deep)
    return str(first.argval) if whole and first is not None else None


def _runs_whole(function: Any, deep: int = _DEEP) -> bool:
    """Whether a function is torch's checkpointing, or hands its first argument on to that."""
    if function is checkpoint or not isinstance(function, FunctionType) or deep == 0:
        return function is checkpoint
    code = function.__code__
    steps, first = instructions(code), next(iter(code.co_varnames), None)
    given = [_first_given(_simple(steps, i - 1), function.__globals__, deep - 1) for i in returns(code)]
    whole = all(name == first for name in given) and not any(steps[i].is_jump_target for i in returns(code))
    return bool(given) and whole and code.co_argcount > 0 and not is_stored(code, first)


def is_run_whole(steps: Sequence[Step], start: int, end: int, names: Mapping[str, Any]) -> bool:
    """Whether what some instructions leave on the stack is what a checkpointing call runs."""
    call = taken(steps, end)
    parts = called_by(steps, call)
    first = call - len(parts) + len(callee(parts)) == start
    return bool(parts) and first and _runs_whole(function_of(parts, names))


def _made(code: CodeType, name: str) -> CodeType | None:
    """Return the code of the closure that a variable holds, if it never holds anything else."""
    steps = instructions(code)
    stores = [i for i, s in enumerate(steps) if s.argval == name and s.opname.startswith(("STORE", "DELETE"))]
    if len(stores) != 1 or not steps[stores[0] - 1].opname.startswith(("MAKE_FUNCTION", "SET_FUNCTION")):
        return None
    found = [step.argval for step in steps[: stores[0]] if isinstance(step.argval, CodeType)]
    return found[-1] if found else None
