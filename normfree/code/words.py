"""Names by which code comes from a module to a layer in it, to its parameters, or to what passes through it."""

from __future__ import annotations

from types import CodeType, FunctionType

import torch.nn.functional as F
from torch import nn

from normfree.code.bytecode import instructions
from normfree.code.chains import ANY, Chain
from normfree.code.reach import Function, codes_of
from normfree.code.using import calls_variable, is_called

__all__ = ["holds", "is_way_in", "leads_in", "looks_at_variables", "may_take_any", "meaning"]

_ALL = {"_modules", "children", "named_children", "__dict__", "values", "items", "forward", "__call__", "_conv_forward"}
_ALL |= {"__iter__", "__getitem__"}
"""Attributes by which one comes to what a module holds, or calls it by another way."""
_OF_MODULES = {"_modules", "children", "named_children"}
_DEEP = {"modules", "named_modules", "get_submodule", "apply"}
"""Those by which one comes to what is held by that, too."""
_READ = {"parameters", "named_parameters", "get_parameter", "state_dict", "_parameters"}
"""Those by which one comes to a weight and a bias."""
_ANY_ATTRIBUTE = frozenset({"attrgetter", "methodcaller", "__getattr__", "__getattribute__"})
_ANY_GLOBAL = frozenset({"eval", "exec"})
"""Names by which a text may become any attribute."""
_FRAMES = frozenset({"locals", "vars", "dir", "_getframe", "currentframe"})
"""Names by which one comes to the variables of a function."""
_ABOUT = {"shape", "dtype", "device", "ndim", "size", "dim", "numel", "requires_grad", "is_cuda"}
"""What can be asked of a weight without its values."""
_CHANGING = {"pop", "append", "insert", "extend", "__delitem__", "__setitem__", "add_module", "update"}
"""By these a sequence comes to hold something else."""
_HARMLESS = {"train", "eval", "requires_grad_", "to", "type", "float", "half", "double", "zero_grad"}
_RUNNING = {"forward"}
"""Methods of torch's modules by which they run."""
for _ in range(3):
    _RUNNING |= {
        name
        for name, method in vars(nn.Module).items()
        if isinstance(method, FunctionType) and not _RUNNING.isdisjoint(method.__code__.co_names)
    }
_FUNCTIONS = frozenset(name for name in vars(F) if not name.startswith("_")) | {"matmul", "einsum"}
"""By these a weight works."""


def meaning(chain: Chain, module: nn.Module, rest: tuple[str, ...], function: Function) -> str:
    """Say what it means for a module that some code names an attribute of it.

    Returns:
        ``"weight"`` or ``"bias"``: it is read; ``"parameters"``: all below are; ``"use"``: the module may be called, or
        seen; ``"change"``: what it holds may; ``"open"``: somebody comes to what it holds; ``"open all"``: to all below
        it; ``""``: nothing.
    """
    name, code = rest[0], function.code
    codes = codes_of(function.whole.__code__)
    reaches = function.forward or any(calls_variable(inner, result=True) for inner in codes)
    works = function.forward or not (function.broken or _FUNCTIONS.isdisjoint(code.co_names))
    if name in ("weight", "bias"):
        return name if works and not chain.puts and _ABOUT.isdisjoint(rest[1:2]) else ""
    if name in _READ:
        behind = [s.argval for s in instructions(code)[chain.end + 1 : chain.end + 8] if s.opname.startswith("LOAD_")]
        return "parameters" if works and _ABOUT.isdisjoint(behind[:1]) else ""
    if name.startswith("register_") and name.endswith("hook"):
        return "use"
    if name in _CHANGING and holds(module):
        return "" if function.broken else "change"
    if name in _DEEP and reaches:
        return "open all"
    if (name in _ALL and reaches) or (name.endswith(ANY) and function.forward):
        return "open"
    if name in _RUNNING or (name == "_conv_forward" and not module._modules):
        return "use"
    method = getattr(type(module), name, None)
    own = function.forward and not module._modules and name not in _HARMLESS
    return "use" if own and isinstance(method, FunctionType) else ""


def is_way_in(name: str, code: CodeType) -> bool:
    """Whether an attribute of a layer, or of what holds some, may lead to a call, or to a weight that works."""
    if name in _READ or name in ("weight", "bias"):
        return not _FUNCTIONS.isdisjoint(code.co_names)
    return name in _RUNNING or leads_in(name) or name in _CHANGING or (name.startswith("register") and "hook" in name)


def leads_in(name: str, *, unknown: bool = False) -> bool:
    """Whether an attribute of any module leads to others; if ``unknown``, whether none but a module has such a one."""
    return name in (_DEEP | _OF_MODULES if unknown else _ALL | _DEEP | _READ) or name.endswith(ANY)


def holds(module: nn.Module) -> bool:
    """Whether a module is a sequence of others."""
    return hasattr(type(module), "__iter__")


def may_take_any(code: CodeType) -> bool:
    """Whether a function makes attributes of texts in ways that cannot be read, or an object one of another class."""
    steps = instructions(code)
    loaded = {i: s.argval for i, s in enumerate(steps) if s.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    named = not (_ANY_ATTRIBUTE.isdisjoint(code.co_names) and _ANY_GLOBAL.isdisjoint(loaded.values()))
    classes = any(step.opname == "STORE_ATTR" and step.argval == "__class__" for step in steps)
    inside = "vars" in loaded.values() and calls_variable(code, result=True)
    given = code.co_name == "__get__" and not _OF_MODULES.isdisjoint(code.co_names)
    return (
        named
        or classes
        or inside
        or given
        or any(n == "getattr" and not is_called(steps, i) for i, n in loaded.items())
    )


def looks_at_variables(code: CodeType) -> bool:
    """Whether a function asks for the variables of a function."""
    return not _FRAMES.isdisjoint(code.co_names)
