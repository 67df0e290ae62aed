"""What of a call is the default one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["is_default", "is_default_call"]


def is_default_call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call gives an optional argument nothing but its default."""
    if len(args) + len(kwargs) <= 1 and not kwargs:
        return True  # most calls; the first argument is hardly ever optional
    signature = inspect.signature(module.forward)
    optional = {p.name: p.default for p in signature.parameters.values() if p.default is not p.empty}
    given = signature.bind(*args, **kwargs).arguments
    return all(is_default(given[name], default) for name, default in optional.items() if name in given)


def is_default(value: Any, default: Any) -> bool:
    """Whether a value is the default, or a number or text that is equal to it."""
    return value is default or (type(value) is type(default) and type(value) in _ATOMS and value == default)


_ATOMS = (int, float, bool, str)  # a tuple: torch 2.8 compiles no question to a set of classes
