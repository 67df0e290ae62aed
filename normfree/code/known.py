"""Calls between two layers of which is known what they do with what they are given: they hand on what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normfree.code.branching import is_stored
from normfree.code.bytecode import Step, called_by, callee, function_of, instructions
from normfree.tracing.callers import Place

__all__ = ["asks_for_shape", "is_own", "known_calls", "through_identity"]

_LIKE = ("reshape_as", "view_as", "expand_as")
_LISTED = ("BUILD_TUPLE", "BUILD_LIST", "LIST_EXTEND")


def known_calls(place: Place, start: int, end: int, passed: Set[Any]) -> list[Step]:
    """Return the instructions that call what stood between two layers, or ask for a size, and make lists for it.

    Args:
        place: The function.
        start: The number of its first instruction between the two.
        end: The number of that behind the last.
        passed: The modules, and the names of torch's functions, that stood there in a run.
    """
    steps, found = instructions(place.code), list[Step]()
    for i in range(start, end if passed else start):
        if steps[i].opname in ("CALL", "CALL_KW") and _is_known(place, callee(called_by(steps, i)), passed):
            found.append(steps[i])
    return [*found, *(step for step in steps[start:end] if step.opname in _LISTED)] if found else []


def _is_known(place: Place, parts: Sequence[Step], passed: Set[Any]) -> bool:
    """Whether what is called is such a module of this one's, such a function of torch's, or a method of a tensor."""
    if not parts or not parts[-1].opname.startswith("LOAD_"):
        return False
    name = parts[-1].argval
    if is_own(place, parts[0]) and len(parts) == 2:
        return place.owner is not None and _is_part(place.owner._modules.get(name), passed)
    if name not in passed | {"size"}:
        return False
    if parts[0].opname == "LOAD_GLOBAL" and all(step.opname.startswith("LOAD_") for step in parts):
        value = function_of(parts, _globals(place))
        return value is not None and value in (getattr(torch, name, None), getattr(F, name, None))
    return parts[-1].opname == "LOAD_METHOD" and (parts[-2].opname == "CALL" or len(parts) == 2)


def _is_part(module: nn.Module | None, passed: Set[Any]) -> bool:
    """Whether a module stood there, or calls nothing else one after the other."""
    held = type(module) is nn.Sequential and module is not None and all(_is_part(m, passed) for m in module.children())
    return module in passed or held


def asks_for_shape(steps: Sequence[Step], i: int) -> bool:
    """Whether a variable is read for the shape of what it holds alone: ``x.size(0)``, ``y.reshape_as(x)``."""
    load, then = steps[i], steps[i + 1] if i + 1 < len(steps) else steps[i]
    if not load.opname.startswith("LOAD_FAST"):
        return False
    if then.opname in ("LOAD_ATTR", "LOAD_METHOD"):
        return then.argval in ("shape", "size", "dim", "ndim")
    function = callee(called_by(steps, i + 1)) if then.opname == "CALL" and then.arg == 1 else ()
    return bool(function) and function[-1].opname == "LOAD_METHOD" and function[-1].argval in _LIKE


def _globals(place: Place) -> dict[str, Any]:
    """Return the globals of a function that is a method of the module it belongs to."""
    methods = (value for cls in type(place.owner).__mro__ for value in vars(cls).values())
    own = (m for m in methods if isinstance(m, FunctionType) and m.__code__ is place.code)
    return next((m.__globals__ for m in own), {})


def through_identity(place: Place, steps: Sequence[Step]) -> Sequence[Step]:
    """Return what calls ``self.part(x)`` at once, but for ``x``, if that part is an identity that nobody watches."""
    load, method, given, call = steps
    if not is_own(place, load) or method.opname != "LOAD_METHOD" or place.owner is None:
        return ()
    part = place.owner._modules.get(method.argval)
    watched = part is not None and any(value for name, value in vars(part).items() if name.endswith("_hooks"))
    simple = given.opname == "LOAD_FAST" and call.opname == "CALL" and call.arg == 1
    return (load, method, call) if simple and type(part) is nn.Identity and not watched else ()


def is_own(place: Place, load: Step) -> bool:
    """Whether an instruction takes the module whose forward this is."""
    first = next(iter(place.code.co_varnames), None)
    return load.opname.startswith("LOAD_FAST") and load.argval == first and not is_stored(place.code, first)
