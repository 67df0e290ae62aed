"""Who holds a layer besides the module that it belongs to: lists, closures, bound methods, objects of any kind."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["held"]

_ATOMS = (int, float, str, bytes, type(None), type, ModuleType, CodeType, BuiltinFunctionType, torch.dtype)
_OWN = ("_parameters", "_buffers", "_modules")


def held(model: nn.Module) -> tuple[set[int], dict[str, set[int]], list[FunctionType]]:
    """Follow everything that a model holds.

    Returns:
        The identities of modules that something holds besides their parent, those of modules whose weight or bias it
        holds, and the functions that were met.
    """
    modules = {id(m): m for m in model.modules()}
    owners = {id(p): (n, id(m)) for m in modules.values() for n, p in m._parameters.items() if n in ("weight", "bias")}
    owners.pop(id(None), None)
    parents = Counter(id(child) for m in modules.values() for child in m._modules.values())
    called = {module for module, count in parents.items() if count > 1}
    read: dict[str, set[int]] = {"weight": set(), "bias": set()}
    functions: list[FunctionType] = []
    waiting = [value for m in modules.values() for name, value in vars(m).items() if name not in _OWN]
    seen: dict[int, Any] = {}  # holds them, so that no other gets their identity
    while waiting:
        value = waiting.pop()
        if id(value) in modules:
            called.add(id(value))
        elif id(value) in owners:
            name, owner = owners[id(value)]
            read[name].add(owner)
        elif id(value) not in seen and not isinstance(value, (*_ATOMS, Tensor)):
            seen[id(value)] = value
            waiting += _within(value)
            if isinstance(value, MethodType) and id(value.__self__) in modules:  # it passes a new class's forward by
                for owners_of in read.values():
                    owners_of.add(id(value.__self__))
            if isinstance(value, FunctionType):
                functions.append(value)
    return called, read, functions


def _within(value: Any) -> Iterable[Any]:
    if isinstance(value, FunctionType):  # its globals are not the model's
        return [*(value.__closure__ or ()), *(value.__defaults__ or ()), *vars(value).values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    return gc.get_referents(value)
