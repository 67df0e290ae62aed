"""The functions by which a model may be used: the methods of its classes, what these name, and what it holds."""

from __future__ import annotations

import functools
import inspect
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from normfree.code.bytecode import instructions, returns

__all__ = [
    "Function",
    "codes_of",
    "forward_functions",
    "functions_of",
    "is_foreign",
    "methods_of",
    "named_by",
    "own_functions",
]


_STATISTICS = frozenset({"running_mean", "running_var"})
_Methods = Mapping[str, list[FunctionType]]


@dataclass(frozen=True)
class Function:
    """A function, or one inside of it.

    Attributes:
        code: What it does.
        whole: The function itself.
        names: What it is called by.
        owner: The class whose method it is, of the model's modules or of objects.
        forward: Whether a forward comes to it.
        owner_name: What it calls the instance of its class.
        of_object: Whether it is no method of the model's modules, and held: it may be called under any name.
        broken: Whether it works with the statistics of a norm, which are gone: it may call a layer, but what it hands
            a layer to will fail, or is not run.
    """

    code: CodeType
    whole: FunctionType
    names: frozenset[str]
    owner: type | None
    forward: bool
    owner_name: str | None
    of_object: bool
    broken: bool


def forward_functions(model: nn.Module, held: Iterable[FunctionType], methods: _Methods) -> set[FunctionType]:
    """Return the functions that a forward of a model comes to.

    Args:
        model: The model.
        held: The functions that it holds, and which may therefore be called under any name.
        methods: The methods of other objects that it holds, by their names.
    """
    by_name: dict[str, list[FunctionType]] = defaultdict(list, {name: list(own) for name, own in methods.items()})
    for _, name, function in _methods_of(model):
        by_name[name].append(function)
    start = [*by_name["forward"], *by_name["__call__"], *held]
    return _closure(start, {name: own for name, own in by_name.items() if name != "__init__"})  # of a new object


def functions_of(
    model: nn.Module, forward: Set[FunctionType], held: Mapping[FunctionType, type | None]
) -> Iterator[Function]:
    """Yield the functions by which a model may be used, but not those that only build it.

    Args:
        model: The model.
        forward: What a forward comes to.
        held: The functions that the model, or what was yielded before, holds, and the methods of objects, with their
            classes.
    """
    by_name: dict[str, list[FunctionType]] = defaultdict(list)
    owners: dict[FunctionType, type | None] = {}
    for cls, name, function in _methods_of(model):
        by_name[name].append(function)
        owners[function] = cls
    torchs = [name for name in by_name if hasattr(nn.Module, name) and name != "__getattr__"]  # moving, loading, modes
    built = _closure([function for name in torchs for function in by_name[name]], by_name, calls=True)
    built -= {f for f in built if not hasattr(nn.Module, f.__name__) and f.__name__[0] != "_" and not tells_nothing(f)}
    others = [*(function for function in owners if function not in built), *held]
    broken = _broken(set(owners) - forward)
    methods, owners = owners.keys(), {**held, **owners}
    for function in {**dict.fromkeys(others), **dict.fromkeys(_closure(others, {})), **dict.fromkeys(forward)}:
        owner = owners.get(function)
        own = {} if owner is None else {name: value for name, value in vars(owner).items() if _plain(value) is function}
        bound = bool(own) and not any(isinstance(value, (staticmethod, classmethod)) for value in own.values())
        first = function.__code__.co_varnames[: function.__code__.co_argcount and bound]
        known = frozenset({function.__name__, *own}), owner, function in forward, next(iter(first), None)
        of_object = function in held and function not in methods
        for code in codes_of(function.__code__):
            yield Function(code, function, *known, of_object, function in broken)


def tells_nothing(function: FunctionType) -> bool:
    """Whether a function returns nothing, and yields nothing."""
    steps, ends = instructions(function.__code__), returns(function.__code__)
    return bool(ends) and all(steps[i - 1].opname == "LOAD_CONST" and steps[i - 1].argval is None for i in ends)


def _methods_of(model: nn.Module) -> Iterator[tuple[type, str, FunctionType]]:
    """Yield the methods of a model's classes, each with its class and its name."""
    for cls in dict.fromkeys(base for module in model.modules() for base in _bases(type(module))):
        for name, function in methods_of(cls):
            yield cls, name, function


def functions_named_by(
    function: FunctionType, names: Set[str], among: Mapping[FunctionType, Function]
) -> set[FunctionType]:
    """Return the functions that one may call by a name, as it or its file knows them, and methods of such a name."""
    values = list(named_by(function))
    made = {base for value in values if isinstance(value, type) for base in value.__mro__}
    own = {plain for value in values if (plain := _plain(value)) is not None}
    return {
        f
        for f, read in among.items()
        if f in own or (read.of_object and read.owner in made) or (read.owner and not names.isdisjoint(read.names))
    }


def own_functions(module: nn.Module) -> set[FunctionType]:
    """Return the forward of a module with the methods and functions that it comes to, but not those of its parts."""
    by_name: dict[str, list[FunctionType]] = defaultdict(list)
    for name, function in (pair for cls in reversed(_bases(type(module))) for pair in methods_of(cls)):
        by_name[name] = [function]
    return _closure(by_name["forward"], by_name)


def _broken(functions: set[FunctionType]) -> set[FunctionType]:
    """Return the functions that read the statistics of a norm, which are gone, or call one that does."""
    lost, found = set(_STATISTICS), set[FunctionType]()
    while more := {f for f in functions - found if _names(f, lost)}:
        found |= more
        lost |= {function.__name__ for function in more}
    return found


def _names(function: FunctionType, lost: set[str]) -> bool:
    names = {name for code in codes_of(function.__code__) for name in code.co_names}
    others = (_plain(function.__globals__.get(name)) for name in names)  # torch's too, as what fuses a norm
    read = (
        _STATISTICS & set(code.co_names) for other in others if other is not None for code in codes_of(other.__code__)
    )
    return bool(lost & names) or any(read)


def _bases(cls: type) -> list[type]:
    """Return a class and those that it derives from, as far as they are not torch's."""
    return [base for base in cls.__mro__ if not f"{base.__module__}.".startswith(("torch.", "builtins."))]


def methods_of(cls: type) -> list[tuple[str, FunctionType]]:
    """Return the methods that a class brings by itself, each with its name."""
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


def _closure(start: Iterable[Any], methods: _Methods, calls: bool = False) -> set[FunctionType]:
    """Return some functions with the methods and the functions that they name, or only call, and that these name."""
    found: set[FunctionType] = set()
    waiting = [function for function in start if isinstance(function, FunctionType)]
    while waiting:
        function = waiting.pop()
        if function in found or is_foreign(function):
            continue
        found.add(function)
        for name in {name for code in codes_of(function.__code__) for name in code.co_names if not calls}:
            waiting += methods.get(name, ())
        waiting += [other for value in named_by(function) if (other := _plain(value)) is not None]
        for step in (step for code in codes_of(function.__code__) if calls for step in instructions(code)):
            waiting += methods.get(step.argval, ()) if step.opname == "LOAD_METHOD" else ()
    return found


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
