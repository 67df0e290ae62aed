"""What a model holds besides its modules: in lists, closures, bound methods, objects of any kind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["held_by"]

_ATOMS = (int, float, str, bytes, bool, type(None), type, ModuleType, CodeType, BuiltinFunctionType, torch.dtype)
_OWN = ("_parameters", "_buffers", "_modules")


def held_by(model: nn.Module) -> Iterator[Any]:
    """Yield the tensors and the bound methods that the modules of a model hold, but not in their own places."""
    waiting = [value for module in model.modules() for name, value in vars(module).items() if name not in _OWN]
    seen: dict[int, Any] = {}  # holds them, so that no other gets their identity
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (*_ATOMS, nn.Module)):
            continue
        seen[id(value)] = value
        if isinstance(value, (Tensor, MethodType)):
            yield value
        if isinstance(value, FunctionType):  # its globals are not the model's
            defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
            waiting += [*(value.__closure__ or ()), *defaults, *vars(value).values()]
        elif not isinstance(value, Tensor):
            waiting += gc.get_referents(value)
