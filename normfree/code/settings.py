"""What a forward reads besides what it is given: plain values of its module, of what that holds, and of its file.

A forward that is written anew from one run goes the way that these told it, so it must ask whether they still say so.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from normfree.code.bytecode import called_by, function_of, instructions
from normfree.code.chains import chains
from normfree.code.functions import codes_of
from normfree.code.reach import own_functions

__all__ = ["Setting", "asks_the_process", "settings_of"]

_PLAIN = (bool, int, float, str, type(None), torch.dtype)


@dataclass(frozen=True)
class Setting:
    """A plain value at the end of some names: the first is one of a module, or of a file."""

    names: tuple[str, ...]
    value: Any
    file: dict[str, Any] | None = None

    def now(self, module: nn.Module) -> Any:
        """Return what stands there now."""
        if self.file is not None:
            return self.file.get(self.names[0])
        found: Any = module
        for name in self.names:
            found = getattr(found, name, NotImplemented)
        return found


def settings_of(module: nn.Module) -> tuple[Setting, ...]:
    """Return the plain values that the forward of a module reads of it, of what it holds and of its file.

    Of its own mode nothing is said, of the modes of other modules that is.
    """
    found: dict[tuple[str, ...], Setting] = {}
    for function in own_functions(module):
        for code in codes_of(function.__code__):
            named = {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
            plain = {name: copy.copy(value) for name, value in named.items() if _is_plain(value)}
            found |= {(name,): Setting((name,), value, function.__globals__) for name, value in plain.items()}
            for chain in (chain for chain in chains(code) if not chain.puts):
                value: Any = module
                for end, name in enumerate(chain.names, 1):
                    held = value._modules if isinstance(value, nn.Module) else {}
                    value = held[name] if name in held else inspect.getattr_static(value, name, NotImplemented)
                    names = chain.names[:end]
                    if _is_plain(value) and names != ("training",):
                        found[names] = Setting(names, copy.copy(value))
    return tuple(found.values())


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, (tuple, list)) else isinstance(value, _PLAIN)


def asks_the_process(module: nn.Module) -> str:
    """Name a function of C that the forward of a module calls without arguments: what that returns may be another."""
    return next((name for function in own_functions(module) for name in _asked(function)), "")


def _asked(function: FunctionType) -> Iterator[str]:
    for code in codes_of(function.__code__):
        steps = instructions(code)
        for i in (i for i, step in enumerate(steps) if step.opname.startswith("CALL") and step.arg == 0):
            parts = called_by(steps, i)
            if isinstance(function_of(parts, function.__globals__), BuiltinFunctionType):
                yield str(parts[-1].argval)
