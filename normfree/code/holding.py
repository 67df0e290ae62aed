"""Who holds a layer besides the module that it belongs to: lists, closures, bound methods, objects of any kind."""

from __future__ import annotations

import functools
import gc
from collections import Counter, OrderedDict
from collections.abc import Iterable
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from normfree.code.reach import Function, functions_of, is_foreign, named_by

__all__ = ["Held", "reached"]

_ATOMS = (int, float, str, bytes, bool, type(None), type, ModuleType, CodeType, BuiltinFunctionType, torch.dtype)
_METHODS = (property, staticmethod, classmethod, functools.cached_property)
_NOTHING = (*_ATOMS, Tensor)
_EMPTY = (dict, OrderedDict)  # most of what a module holds: hooks that nobody has hung
_KEEPERS = ("builtins", "functools", "collections", "types")
_OWN = ("_parameters", "_buffers", "_modules")


class Held:
    """What a model holds, and what its functions name.

    Attributes:
        called: The identities of modules that something holds besides their parent.
        read: Those of modules whose weight or bias it holds.
        functions: The functions that were met.
        bound: The identities of modules whose ``forward`` it holds.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = modules = {id(m): m for m in model.modules()}
        own = {id(p): (n, id(m)) for m in modules.values() for n, p in m._parameters.items() if n in ("weight", "bias")}
        own.pop(id(None), None)
        self._owners = own
        parents = Counter(id(child) for m in modules.values() for child in m._modules.values())
        self.called = {module for module, count in parents.items() if count > 1}
        self.read: dict[str, set[int]] = {"weight": set(), "bias": set()}
        self.functions: list[FunctionType] = []
        self.bound: set[int] = set()
        self._seen: dict[int, Any] = {}  # holds them, so that no other gets their identity
        kept = (value for m in modules.values() for name, value in vars(m).items() if name not in _OWN)
        self.follow(value for value in kept if type(value) not in _ATOMS and (type(value) not in _EMPTY or value))
        classes = {cls for m in modules.values() for cls in type(m).__mro__ if not is_foreign(cls)}
        self.follow(value for cls in classes for value in vars(cls).values() if _may_hold(value))

    def follow(self, values: Iterable[Any]) -> None:
        """Note what some values are, and what they hold."""
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            if id(value) in self._modules:
                self.called.add(id(value))
            elif id(value) in self._owners:
                name, owner = self._owners[id(value)]
                self.read[name].add(owner)
            elif id(value) not in self._seen and not isinstance(value, _NOTHING):
                self._seen[id(value)] = value
                waiting += _within(value)
                if isinstance(value, MethodType) and id(value.__self__) in self._modules:  # of the class as it is now
                    self.bound |= {id(value.__self__)} if value.__name__ == "forward" else set()
                    for owners in self.read.values():
                        owners.add(id(value.__self__))
                if isinstance(value, FunctionType):
                    self.functions.append(value)


def _within(value: Any) -> Iterable[Any]:
    if isinstance(value, FunctionType):  # its globals are not the model's
        return [*(value.__closure__ or ()), *(value.__defaults__ or ()), *vars(value).values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if hasattr(type(value), "__dict__") and not is_foreign(type(value)):  # it may be called, or asked
        methods = [part for part in vars(type(value)).values() if isinstance(part, FunctionType)]
        return [*gc.get_referents(value), *methods]
    return gc.get_referents(value)


def reached(model: nn.Module) -> tuple[Held, list[Function]]:
    """Return what a model holds, with what its functions name, and these functions."""
    held, met, functions = Held(model), -1, list[Function]()
    while met < len(held.functions):
        met, functions = len(held.functions), list(functions_of(model, held.functions))
        whole = {function.whole for function in functions}
        held.follow(value for function in whole for value in named_by(function) if _may_hold(value))
        for function in whole:
            held.follow((*(function.__closure__ or ()), *(function.__defaults__ or ())))
    return held, functions


def _may_hold(value: object) -> bool:
    """Whether a value of a file may hold a layer, or come to one: a list, a partial, an object of somebody's class."""
    kind = type(value)
    plain = isinstance(value, (nn.Module, FunctionType, *_METHODS))
    return not plain and (kind.__module__ in _KEEPERS or not is_foreign(kind))
