"""What a forward asks about classes: whether something is a tensor, and what kind of layer another is.

During a trace a proxy stands for a tensor, and after a conversion another class stands for a layer's. Where a forward
asks ``isinstance`` or ``type``, the first would send it another way at once and the second later, both without an
error. So these two names mean something else in the modules that define the forwards while a trace runs: a proxy is
what the graph says it is, and every question about a layer is written down.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

__all__ = ["answering", "names_in"]


@contextlib.contextmanager
def answering(
    modules: Iterable[nn.Module], type_of: Callable[[fx.Node], type | None], note: Callable[[nn.Module], None]
) -> Iterator[None]:
    """Answer ``isinstance`` and ``type`` for what the forwards of some modules ask.

    Args:
        modules: The modules whose forwards run.
        type_of: Tells the type of what a node computes.
        note: Is told of every module whose class is asked for.

    Raises:
        TypeError: In the forward that asks, where the type is not known: it then counts as untraceable.
    """
    scopes = list(_scopes(modules))
    kind, instance = _stand_ins(type_of, note)
    for scope in scopes:
        scope["isinstance"], scope["type"] = instance, kind
    try:
        yield
    finally:
        for scope in scopes:
            scope.pop("isinstance", None)
            scope.pop("type", None)


def _scopes(modules: Iterable[nn.Module]) -> Iterator[dict[str, Any]]:
    """Yield the global names of every forward, of the functions it imports, and of ``torch.is_tensor``."""
    own = {id(scope): scope for cls in {type(m) for m in modules} for scope in _scopes_of(cls)}
    imported = [f for scope in own.values() for f in scope.values() if type(f) is types.FunctionType]
    found = own | {id(f.__globals__): f.__globals__ for f in imported if not _is_elsewhere(f.__module__)}
    for scope in (*found.values(), torch.__dict__):
        if "isinstance" not in scope and "type" not in scope:
            yield scope


def _scopes_of(cls: type) -> Iterator[dict[str, Any]]:
    for base in cls.__mro__:
        forward = base.__dict__.get("forward")
        while forward is not None:
            if not _is_elsewhere(getattr(forward, "__module__", None)) and hasattr(forward, "__globals__"):
                yield forward.__globals__
            forward = getattr(forward, "__wrapped__", None)


def _is_elsewhere(name: str | None) -> bool:
    """Whether a module of Python or of torch has this name: what they ask is none of a forward's questions."""
    top = (name or "builtins").partition(".")[0]
    return top == "torch" or top in sys.stdlib_module_names


def _stand_ins(
    type_of: Callable[[fx.Node], type | None], note: Callable[[nn.Module], None]
) -> tuple[type, Callable[[Any, Any], bool]]:
    def find(thing: Any) -> type:
        cls = type(thing)
        if issubclass(cls, fx.Proxy):
            found = type_of(thing.node)
            if found is None:
                raise TypeError(f"the forward asks what type {thing.node.name} has, which no trace knows")
            return found
        if issubclass(cls, nn.Module):
            note(thing)
        return cls

    def instance(thing: Any, classes: Any) -> bool:
        find(thing) if builtins.isinstance(thing, nn.Module) else None
        if issubclass(type(thing), fx.Proxy) and not builtins.isinstance(thing, classes):
            return issubclass(find(thing), classes)
        return builtins.isinstance(thing, classes)

    class Meta(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return find(*args) if len(args) == 1 else type(*args, **kwargs)

        def __instancecheck__(cls, thing: Any) -> bool:
            return builtins.isinstance(thing, type)

    return Meta("type", (type,), {}), instance


def names_in(cls: type[nn.Module]) -> frozenset[str]:
    """Return the names and texts in the forward of a class, in the methods that it names, and in theirs."""
    found: set[str] = set()
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        function = getattr(cls, waiting.pop(), None)
        function = inspect.unwrap(function.fget if isinstance(function, property) else function)  # type: ignore[arg-type]
        if _is_elsewhere(getattr(function, "__module__", "torch")) or not hasattr(function, "__code__"):
            continue
        names = set(_names_in_code(function.__code__))
        found |= names
        methods = {name for name in names if name.isidentifier() and hasattr(cls, name)} - seen
        seen |= methods
        waiting += methods
    return frozenset(found)


def _names_in_code(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):  # a comprehension or a lambda
            yield from _names_in_code(constant)
