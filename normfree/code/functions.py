"""The functions of a model: the methods of its classes, and what these name."""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["MERGING", "bases", "codes_of", "forward_functions", "names_in", "other_functions", "own_functions"]

MERGING = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods by which blocks merge their branches, in the order in which timm looks for them; they want norms."""


def forward_functions(model: nn.Module) -> set[FunctionType]:
    """Return the functions that a forward of a model, or of a part of it, comes to."""
    by_name = _by_name(model)
    made = {name: own for name, own in by_name.items() if name != "__init__"}  # of a new object
    return _closure([*by_name["forward"], *by_name["__call__"]], made)


def other_functions(model: nn.Module) -> set[FunctionType]:
    """Return the functions that no forward comes to, but for those that only building a model, or merging it, runs."""
    by_name = _by_name(model)
    built = _closure([function for name in ("__init__", *MERGING) for function in by_name[name]], by_name)
    others = {function for own in by_name.values() for function in own} - built
    return _closure(others, {}) - built - forward_functions(model)


def own_functions(module: nn.Module) -> set[FunctionType]:
    """Return the forward of a module with the methods and functions that it comes to, but not those of its parts."""
    own = {name: [found] for cls in reversed(bases(type(module))) for name, found in _methods_of(cls)}
    return _closure(own.get("forward", ()), own)


def bases(cls: type) -> list[type]:
    """Return a class and those that it derives from, as far as they are not torch's."""
    return [base for base in cls.__mro__ if not f"{base.__module__}.".startswith(("torch.", "builtins."))]


def names_in(function: FunctionType) -> set[str]:
    """Return the names in the code of a function, and of those inside of it."""
    return {name for code in codes_of(function.__code__) for name in code.co_names}


def codes_of(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function, and of those inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_of(constant)


def _by_name(model: nn.Module) -> dict[str, list[FunctionType]]:
    found: dict[str, list[FunctionType]] = defaultdict(list)
    for cls in dict.fromkeys(base for module in model.modules() for base in bases(type(module))):
        for name, function in _methods_of(cls):
            found[name].append(function)
    return found


def _methods_of(cls: type) -> list[tuple[str, FunctionType]]:
    found = ((name, function) for name, value in vars(cls).items() for function in _plain(value))
    return [(name, function) for name, function in found if not _is_foreign(function)]


def _closure(start: Iterable[FunctionType], methods: Mapping[str, list[FunctionType]]) -> set[FunctionType]:
    """Return some functions with the methods and the functions that they name, and that these name."""
    found: set[FunctionType] = set()
    waiting = list(start)
    while waiting:
        function = waiting.pop()
        if function in found or _is_foreign(function):
            continue
        found.add(function)
        for name in names_in(function):
            waiting += methods.get(name, ())
        waiting += [other for value in _named_by(function) for other in _plain(value)]
    return found


def _plain(value: Any) -> list[FunctionType]:
    """Return the function in a method, a property or whatever is wrapped around it, and what is wrapped around."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, functools.cached_property):
        value = value.func
    found = list[Any]()
    while callable(value) and len(found) < _WRAPPED:
        found.append(value)
        value = getattr(value, "__wrapped__", None)
    return [link for link in found if isinstance(link, FunctionType)]


_WRAPPED = 10
"""Decorators around a function."""


def _named_by(function: FunctionType) -> Iterator[Any]:
    """Yield what a function names of its file, of files that it imports, and of classes, with these themselves."""
    names = names_in(function)
    home = function.__globals__.get("__package__")
    waiting, seen = [function.__globals__.get(name) for name in names], set[int]()
    waiting += [sys.modules.get(name) or sys.modules.get(f"{home}.{name}") for name in names]  # imported inside
    while waiting:
        value = waiting.pop()
        if not isinstance(value, ModuleType):
            yield value
        if isinstance(value, (type, ModuleType)) and id(value) not in seen and not _is_foreign(value):
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


def _is_foreign(value: Any) -> bool:
    """Whether a function, a class or a module is Python's own, or of what knows nothing of models."""
    if isinstance(value, FunctionType):
        return _is_of_others(value.__code__.co_filename)
    module = value if isinstance(value, ModuleType) else sys.modules.get(value.__module__)
    file = getattr(module, "__file__", None)  # what is typed in has none
    return getattr(module, "__name__", "") in sys.builtin_module_names if file is None else _is_of_others(file)
