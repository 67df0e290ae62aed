"""Functions that fail once a model has no norms: they read the statistics of one, which are gone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import takewhile
from types import FunctionType
from typing import Any

from normfree.code.bytecode import Step, callee, function_of, instructions
from normfree.code.functions import codes_of, names_in, plain, tells_nothing

__all__ = ["failing", "fails_by"]

_STATISTICS = frozenset({"running_mean", "running_var"})


def failing(functions: set[FunctionType]) -> set[FunctionType]:
    """Return the functions that read the statistics of a norm, which are gone, or first of all call one that does."""
    found = {f for f in functions if _reads(f, names_in(f))}
    while more := {f for f in functions - found if not _calls(f).isdisjoint({other.__name__ for other in found})}:
        found |= more
    return found


def _calls(function: FunctionType) -> set[Any]:
    """Return the names of what a function comes by whatever is decided, or of all, if it returns nothing anyway."""
    steps = instructions(function.__code__)
    sure = steps if tells_nothing(function) else takewhile(lambda step: not step.jumps, steps)
    return {step.argval for step in sure if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL")}


def _reads(function: FunctionType, names: set[str]) -> bool:
    others = (other for name in names for other in plain(function.__globals__.get(name)))  # torch's too
    read = (_STATISTICS & set(code.co_names) for other in others for code in codes_of(other.__code__))
    return not _STATISTICS.isdisjoint(names) or any(read)


def fails_by(called: Sequence[Step], name: str | None, owner: type | None, around: Mapping[str, Any]) -> bool:
    """Whether a call is of a function that reads the statistics of norms.

    Args:
        called: The instructions of the call.
        name: What the code calls the instance of its class.
        owner: That class.
        around: The globals of the code.
    """
    own = callee(called)
    method = len(own) == 2 and own[0].argval == name and owner is not None
    value = inspect.getattr_static(owner, own[1].argval, None) if method else function_of(called, around)
    return any(not _STATISTICS.isdisjoint(names_in(other)) for other in plain(value))
