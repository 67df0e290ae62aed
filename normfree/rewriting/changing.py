"""A module changes where it stands: whoever holds it, holds what it has become. And all of it can be taken back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HOOKS", "Changes", "all_or_nothing", "become", "set_class"]

_HELD = ("_parameters", "_buffers", "_modules")
HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)
"""Where a module keeps what was hung on it."""


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, whatever its own class says to assignments."""
    if type(module) is not cls:
        object.__setattr__(module, "__class__", cls)


def become(module: nn.Module, other: nn.Module) -> None:
    """Turn ``module`` into what ``other`` is; it keeps its hooks, since handles must still find what they remove."""
    contents = other.__dict__ | {name: module.__dict__[name] for name in HOOKS}
    set_class(module, type(other))
    _refill(module.__dict__, contents)


class Changes(contextlib.ExitStack):
    """What was before: classes and contents of modules, and the values of tensors; leaving it puts all back."""

    def keep(self, *modules: nn.Module) -> None:
        """Remember modules as they are, before they are written to."""
        for module in modules:
            self.callback(set_class, module, type(module))
            for contents in (module.__dict__, *(module.__dict__[name] for name in _HELD)):
                self.callback(_refill, contents, dict(contents))

    def set_values(self, tensor: Tensor, values: Tensor) -> None:
        """Give a tensor other values, in memory of their own."""
        self.callback(setattr, tensor, "data", tensor.data)
        tensor.data = values


def _refill(contents: dict[str, Any], others: dict[str, Any]) -> None:
    contents.clear()
    contents.update(others)


@contextlib.contextmanager
def all_or_nothing() -> Iterator[Changes]:
    """Take every change back on any exception, be it an interrupt or a lack of memory."""
    with Changes() as changes, torch.no_grad():
        yield changes
        changes.pop_all()
