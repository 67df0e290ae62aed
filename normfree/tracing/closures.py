"""Functions that a model holds and that come by a closure, or a default, to its modules: a copy needs its own.

``copy.deepcopy`` takes a function for an atom, so that the copy of a model that holds ``lambda x: self.f(x)`` would go
on calling the original's layers.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from types import CellType, FunctionType
from typing import Any

from torch import nn

__all__ = ["bind_anew", "rebound"]

_OWN = ("_parameters", "_buffers", "_modules")
_SEQUENCES, _MAPPINGS = (list, tuple), (dict, OrderedDict)
_HOLDING = {FunctionType, functools.partial, *_SEQUENCES, *_MAPPINGS}


def bind_anew(copied: nn.Module, memo: dict[int, Any]) -> None:
    """Let the functions that a copy holds refer to the copy; ``memo`` tells what became of each object."""
    for module in copied.modules():
        for name, value in module.__dict__.items():
            if type(value) in _HOLDING and value and name not in _OWN:
                module.__dict__[name] = rebound(value, memo)


def rebound(value: Any, memo: dict[int, Any]) -> Any:
    """Return what a value is in a copy: itself, if it comes to nothing that was copied."""
    if id(value) in memo:
        return memo[id(value)]
    kind = type(value)
    if kind is FunctionType:
        return _function(value, memo)
    if kind in _SEQUENCES and value:
        items = [rebound(item, memo) for item in value]
        return kind(items) if _differ(items, value) else value
    if kind in _MAPPINGS and value:
        items = [rebound(item, memo) for item in value.values()]
        return kind(zip(value, items, strict=True)) if _differ(items, value.values()) else value
    if kind is functools.partial:
        function, args, kwargs = (rebound(part, memo) for part in (value.func, value.args, value.keywords))
        same = function is value.func and args is value.args and kwargs is value.keywords
        return value if same else functools.partial(function, *args, **kwargs)
    return value


def _function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    if not (function.__closure__ or function.__defaults__ or function.__kwdefaults__):
        return function
    cells = tuple(CellType() for _ in function.__closure__ or ())
    memo[id(function)] = made = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    for cell, before in zip(cells, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # an empty cell: a name that has no value yet
            cell.cell_contents = rebound(before.cell_contents, memo)
    made.__defaults__ = rebound(function.__defaults__, memo)
    made.__kwdefaults__ = rebound(function.__kwdefaults__, memo)
    made.__dict__.update(function.__dict__)
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    return made


def _differ(items: list[Any], before: Any) -> bool:
    return any(item is not old for item, old in zip(items, before, strict=True))
