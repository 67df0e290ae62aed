"""Functions as they are: what is wrapped around them, what they name, and whose they are."""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

from normfree.code.bytecode import instructions, returns

__all__ = [
    "bases",
    "codes_of",
    "is_dunder",
    "is_foreign",
    "methods_of",
    "named_by",
    "names_in",
    "plain",
    "tells_nothing",
]


def is_dunder(name: str) -> bool:
    """Whether Python itself calls a method of such a name."""
    return name[:2] == "__" == name[-2:]


def tells_nothing(function: FunctionType) -> bool:
    """Whether a function returns nothing, and yields nothing."""
    steps, ends = instructions(function.__code__), returns(function.__code__)
    return bool(ends) and all(steps[i - 1].opname == "LOAD_CONST" and steps[i - 1].argval is None for i in ends)


def bases(cls: type) -> list[type]:
    """Return a class and those that it derives from, as far as they are not torch's."""
    return [base for base in cls.__mro__ if not f"{base.__module__}.".startswith(("torch.", "builtins."))]


def methods_of(cls: type) -> list[tuple[str, FunctionType]]:
    """Return the methods that a class brings by itself, each with its name."""
    found = ((name, function) for name, value in vars(cls).items() for function in plain(value))
    return [(name, function) for name, function in found if not is_foreign(function)]


def plain(value: Any) -> list[FunctionType]:
    """Return the function in a method, a property or whatever is wrapped around it, and what is wrapped around."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, functools.cached_property):
        value = value.func
    found = list[FunctionType]()
    while callable(value) and len(found) < _WRAPPED:
        found += [value] if isinstance(value, FunctionType) else []
        value = getattr(value, "__wrapped__", None)
    return found


_WRAPPED = 10
"""Decorators around a function."""


def names_in(function: FunctionType) -> set[str]:
    """Return the names in the code of a function, and of those inside of it."""
    return {name for code in codes_of(function.__code__) for name in code.co_names}


def named_by(function: FunctionType) -> Iterator[Any]:
    """Yield what a function names of its file, of files that it imports, and of classes, with these themselves."""
    names = {name for code in codes_of(function.__code__) for name in code.co_names}
    home = function.__globals__.get("__package__")
    waiting, seen = [function.__globals__.get(name) for name in names], set[int]()
    waiting += [sys.modules.get(name) or sys.modules.get(f"{home}.{name}") for name in names]  # imported inside
    while waiting:
        value = waiting.pop()
        if not isinstance(value, ModuleType):
            yield value
        if isinstance(value, (type, ModuleType)) and id(value) not in seen and not is_foreign(value):
            seen.add(id(value))
            waiting += [vars(value)[name] for name in names if name in vars(value)]


_INSTALLED = tuple(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
_OTHERS = tuple(Path(str(module.__file__)).parent for module in (torch, sys.modules["normfree"]))


@functools.cache
def _is_of_others(file: str) -> bool:
    """Whether a file is one of Python's own, of torch or of this package; anybody may have one of the same name."""
    path, installed = Path(file), file.startswith(_INSTALLED) or "site-packages" in file
    own = file.startswith("<frozen ") or (file.startswith(sysconfig.get_paths()["stdlib"]) and not installed)
    return own or "numpy" in path.parts or any(other in path.parents for other in _OTHERS)


def is_foreign(value: Any) -> bool:
    """Whether a function, a class or a module is Python's own, or of what knows nothing of models."""
    if isinstance(value, FunctionType):
        return _is_of_others(value.__code__.co_filename)
    module = value if isinstance(value, ModuleType) else sys.modules.get(value.__module__)
    file = getattr(module, "__file__", None)  # what is typed in has none
    return getattr(module, "__name__", "") in sys.builtin_module_names if file is None else _is_of_others(file)


def codes_of(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function, and of those inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_of(constant)
