"""A module changes where it stands: whoever holds it, holds what it has become. And all of it can be taken back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HOOKS", "Changes", "all_or_nothing", "become", "set_class"]

_HELD = ("_parameters", "_buffers", "_modules")
HOOKS = tuple(
    name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hook", "_hooks_with_kwargs", "_always_called"))
)
"""Where a module keeps what was hung on it."""


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, whatever its own class says to assignments."""
    object.__setattr__(module, "__class__", cls)


def become(module: nn.Module, other: nn.Module) -> None:
    """Turn ``module`` into what ``other`` is; it keeps its hooks, since handles must still find what they remove."""
    contents = other.__dict__ | {name: module.__dict__[name] for name in HOOKS}
    set_class(module, type(other))
    module.__dict__.clear()
    module.__dict__.update(contents)


class Changes:
    """What was before: classes and contents of modules, and the values of tensors."""

    def __init__(self) -> None:
        self._modules: dict[int, tuple[nn.Module, type[nn.Module], dict[str, Any]]] = {}
        self._held: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._values: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, *modules: nn.Module) -> None:
        """Remember modules as they are, before they are written to for the first time."""
        for module in modules:
            if id(module) not in self._modules:
                self._modules[id(module)] = module, type(module), dict(module.__dict__)
                self._held += [(held, dict(held)) for held in (module.__dict__[name] for name in _HELD)]

    def set_values(self, tensor: Tensor, values: Tensor) -> None:
        """Give a tensor other values, in memory of their own."""
        self._values.setdefault(id(tensor), (tensor, tensor.data))
        tensor.data = values

    def take_back(self) -> None:
        """Put everything back."""
        for module, cls, contents in self._modules.values():
            set_class(module, cls)
            module.__dict__.clear()
            module.__dict__.update(contents)
        for held, before in self._held:
            held.clear()
            held.update(before)
        for tensor, values in self._values.values():
            tensor.data = values


@contextlib.contextmanager
def all_or_nothing() -> Iterator[Changes]:
    """Take every change back on any exception, be it an interrupt or a lack of memory."""
    changes = Changes()
    try:
        with torch.no_grad():
            yield changes
    except BaseException:
        changes.take_back()
        raise
