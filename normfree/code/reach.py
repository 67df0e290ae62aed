"""The functions by which a model may be used: the methods of its classes, what these name, and what it holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from types import CodeType, FunctionType

from torch import nn

from normfree.code.failing import failing
from normfree.code.functions import bases, codes_of, is_foreign, methods_of, named_by, names_in, plain

__all__ = ["Function", "forward_functions", "functions_named_by", "functions_of", "own_functions"]

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
    """Yield the functions by which a model may be used.

    Args:
        model: The model.
        forward: What a forward comes to.
        held: The functions that the model, or what was yielded before, holds, and the methods of objects, with their
            classes.
    """
    owners: dict[FunctionType, type | None] = {function: cls for cls, _, function in _methods_of(model)}
    others = [*(function for function in owners if function.__name__ != "__init__"), *held]
    broken = failing(set(owners) - forward)
    methods, owners = owners.keys(), {**held, **owners}
    for function in {**dict.fromkeys(others), **dict.fromkeys(_closure(others, {})), **dict.fromkeys(forward)}:
        owner = owners.get(function)
        own = {} if owner is None else {name: value for name, value in vars(owner).items() if function in plain(value)}
        bound = bool(own) and not any(isinstance(value, (staticmethod, classmethod)) for value in own.values())
        first = function.__code__.co_varnames[: function.__code__.co_argcount and bound]
        known = frozenset({function.__name__, *own}), owner, function in forward, next(iter(first), None)
        of_object = function in held and function not in methods
        for code in codes_of(function.__code__):
            yield Function(code, function, *known, of_object, function in broken)


def _methods_of(model: nn.Module) -> Iterator[tuple[type, str, FunctionType]]:
    """Yield the methods of a model's classes, each with its class and its name."""
    for cls in dict.fromkeys(base for module in model.modules() for base in bases(type(module))):
        for name, function in methods_of(cls):
            yield cls, name, function


def functions_named_by(
    function: FunctionType, names: Set[str], among: Mapping[FunctionType, Function]
) -> set[FunctionType]:
    """Return the functions that one may call by a name, as it or its file knows them, and methods of such a name."""
    values = list(named_by(function))
    made = {base for value in values if isinstance(value, type) for base in value.__mro__}
    own = {inner for value in values for inner in plain(value)}
    return {
        f
        for f, read in among.items()
        if f in own or (read.of_object and read.owner in made) or (read.owner and not names.isdisjoint(read.names))
    }


def own_functions(module: nn.Module) -> set[FunctionType]:
    """Return the forward of a module with the methods and functions that it comes to, but not those of its parts."""
    by_name: dict[str, list[FunctionType]] = defaultdict(list)
    for name, function in (pair for cls in reversed(bases(type(module))) for pair in methods_of(cls)):
        by_name[name] = [function]
    return _closure(by_name["forward"], by_name)


def _closure(start: Iterable[FunctionType], methods: _Methods) -> set[FunctionType]:
    """Return some functions with the methods and the functions that they name, and that these name."""
    found: set[FunctionType] = set()
    waiting = list(start)
    while waiting:
        function = waiting.pop()
        if function in found or is_foreign(function):
            continue
        found.add(function)
        for name in names_in(function):
            waiting += methods.get(name, ())
        waiting += [other for value in named_by(function) for other in plain(value)]
    return found
