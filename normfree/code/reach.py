"""The functions by which a model may be used: the methods of its classes, what these name, and what it holds."""

from __future__ import annotations

import functools
import inspect
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from normfree.code.bytecode import instructions, loads_method

__all__ = ["Function", "functions_of"]


_STATISTICS = frozenset({"running_mean", "running_var"})


@dataclass(frozen=True)
class Function:
    """A function, or one inside of it.

    Attributes:
        code: What it does.
        owner: The class whose method it is.
        forward: Whether a forward comes to it.
        owner_name: What it calls the instance of its class.
        broken: Whether it works with the statistics of a norm, which are gone: it may call a layer, but what it hands
            a layer to will fail, or is not run.
    """

    code: CodeType
    owner: type | None
    forward: bool
    owner_name: str | None
    broken: bool


def functions_of(model: nn.Module, held: Iterable[FunctionType]) -> Iterator[Function]:
    """Yield the functions by which a model may be used, but not those that only build it."""
    methods = {cls: _methods(cls) for module in model.modules() for cls in _bases(type(module))}
    by_name: dict[str, list[Any]] = defaultdict(list)
    owners: dict[Any, type] = {}
    for cls, own in methods.items():
        for name, function in own:
            by_name[name].append(function)
            owners[function] = cls
    forward = _closure([*by_name["forward"], *by_name["__call__"], *held], by_name)
    torchs = [name for name in by_name if hasattr(nn.Module, name)]  # moving, loading, changing the mode
    built = _closure([function for name in torchs for function in by_name[name]], by_name, calls=True)
    broken = _broken(set(owners) - forward)
    for function in {**owners, **dict.fromkeys(forward)}:
        if function in forward or function not in built:
            owner = owners.get(function)
            first = function.__code__.co_varnames[:1] if owner is not None and function.__code__.co_argcount else ()
            for code in _codes(function.__code__):
                yield Function(code, owner, function in forward, next(iter(first), None), function in broken)


def _broken(functions: set[Any]) -> set[Any]:
    """Return the functions that read the statistics of a norm, which are gone, or call one that does."""
    lost, found = set(_STATISTICS), set[Any]()
    while more := {f for f in functions - found if _names(f, lost)}:
        found |= more
        lost |= {function.__name__ for function in more}
    return found


def _names(function: FunctionType, lost: set[str]) -> bool:
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    others = (_plain(function.__globals__.get(name)) for name in names)  # torch's too, as what fuses a norm
    read = (
        _STATISTICS & set(code.co_names) for other in others if other is not None for code in _codes(other.__code__)
    )
    return bool(lost & names) or any(read)


def _bases(cls: type) -> list[type]:
    """Return a class and those that it derives from, as far as they are not torch's."""
    return [base for base in cls.__mro__ if not f"{base.__module__}.".startswith(("torch.", "builtins."))]


def _methods(cls: type) -> list[tuple[str, FunctionType]]:
    return [(name, function) for name, value in vars(cls).items() if (function := _plain(value)) is not None]


def _plain(value: Any) -> FunctionType | None:
    """Return the function in a method, a property or whatever is wrapped around it."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, functools.cached_property):
        value = value.func
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def _closure(start: Iterable[Any], methods: dict[str, list[Any]], calls: bool = False) -> set[Any]:
    """Return some functions with the methods and the functions that they name, or only call, and that these name."""
    found: set[Any] = set()
    waiting = [function for function in start if isinstance(function, FunctionType)]
    while waiting:
        function = waiting.pop()
        if function in found or _is_foreign(function):
            continue
        found.add(function)
        for name in {name for code in _codes(function.__code__) for name in code.co_names}:
            waiting += () if calls else methods.get(name, ())
            other = _plain(function.__globals__.get(name))
            waiting += [] if other is None else [other]
        for step in (step for code in _codes(function.__code__) if calls for step in instructions(code)):
            waiting += methods.get(step.argval, ()) if loads_method(step) else ()
    return found


@functools.cache
def _is_of_others(top: str) -> bool:
    return top in ("torch", "numpy", "normfree") or top in sys.stdlib_module_names


def _is_foreign(function: FunctionType) -> bool:
    return _is_of_others((function.__module__ or "builtins").partition(".")[0])


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
