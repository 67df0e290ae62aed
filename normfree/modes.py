"""Which modules can tell train mode from eval mode.

Most forwards never ask. Those whose code, or a function of the same library that it calls, names ``training`` may
do something else in the other mode; a graph that depends on none of them is the same in both, and is traced only once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from torch import nn

__all__ = ["mode_dependent"]

_FLAG = "training"


def mode_dependent(model: nn.Module, layers: Mapping[int, bool]) -> set[int]:
    """Return the identities of the modules in whose subtree something may ask for the mode.

    Args:
        model: The model.
        layers: For the identity of each module whether it is a leaf of the trace, which may do inside what it likes.
    """
    known: dict[type[nn.Module], bool] = {}
    found: set[int] = set()

    def visit(module: nn.Module) -> bool:
        if layers[id(module)]:
            return False
        cls = type(module)
        if cls not in known:
            known[cls] = any(_mentions(function, 2) for function in _functions(cls))
        below = [visit(child) for child in module.children()]
        if known[cls] or "forward" in module.__dict__ or any(below):
            found.add(id(module))
            return True
        return False

    visit(model)
    return found


def _functions(cls: type[Any]) -> Iterator[FunctionType]:
    for parent in cls.__mro__:
        if parent is nn.Module:
            return
        for value in vars(parent).values():
            function = getattr(value, "fget", value) if isinstance(value, property) else value
            function = getattr(function, "__func__", function)
            if isinstance(function, FunctionType):
                yield function


def _mentions(function: FunctionType, depth: int) -> bool:
    names = set(_names(function.__code__))
    if _FLAG in names:
        return True
    called = (function.__globals__.get(name) for name in names) if depth else ()
    return any(
        isinstance(other, FunctionType) and not other.__module__.startswith("torch.") and _mentions(other, depth - 1)
        for other in called
    )


def _names(code: CodeType) -> Iterator[str]:
    """Yield every name and every string that the code uses, in nested functions too."""
    yield from code.co_names
    yield from code.co_freevars
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names(constant)
