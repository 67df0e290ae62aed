"""What a forward reads besides what it is given: plain values of its module, of what that holds, and of its file.

A forward that is written anew from one run goes the way that these told it, so it must ask whether they still say so.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from normfree.code.functions import names_in, own_functions
from normfree.code.text import attribute_in, tree_of

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
        around = function.__globals__
        for name in names_in(function) & around.keys():
            if _is_plain(around[name]):
                found[(name,)] = Setting((name,), copy.copy(around[name]), around)
        for chain in _chains(function):
            value: Any = module
            for end, name in enumerate(chain, 1):
                held = value._modules if isinstance(value, nn.Module) else {}
                value = held[name] if name in held else inspect.getattr_static(value, name, NotImplemented)
                if _is_plain(value) and chain[:end] != ("training",):
                    found[chain[:end]] = Setting(chain[:end], copy.copy(value))
    return tuple(found.values())


def _chains(function: FunctionType) -> Iterator[tuple[str, ...]]:
    """Yield the names behind a variable, ``self.a.b``, or all names where no text is known."""
    tree = tree_of(function)
    if tree is None:
        yield from ((name,) for name in names_in(function))
        return
    for node in ast.walk(tree):
        names: list[str] = []
        holder, name = attribute_in(node)
        while holder is not None and name is not None and not isinstance(getattr(node, "ctx", None), ast.Store):
            names.insert(0, name)
            node = holder
            holder, name = attribute_in(node)
        if names and isinstance(node, ast.Name):
            yield tuple(names)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, (tuple, list)) else isinstance(value, _PLAIN)


def asks_the_process(module: nn.Module) -> str:
    """Name a function of C that the forward of a module calls without arguments: what that returns may be another."""
    for function in own_functions(module):
        tree = tree_of(function)
        for node in () if tree is None else ast.walk(tree):
            if isinstance(node, ast.Call) and not node.args and not node.keywords:
                value, name = _named(node.func, function.__globals__)
                if isinstance(value, BuiltinFunctionType):
                    return name
    return ""


def _named(node: ast.expr, around: dict[str, Any]) -> tuple[Any, str]:
    """Return what globals have under some names, and the last of these."""
    if isinstance(node, ast.Name):
        return around.get(node.id), node.id
    if isinstance(node, ast.Attribute):
        return inspect.getattr_static(_named(node.value, around)[0], node.attr, None), node.attr
    return None, ""
