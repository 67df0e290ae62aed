"""Names by which code comes from a module to a layer in it, to its parameters, or to what passes through it."""

from __future__ import annotations

from collections.abc import Mapping
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from normfree.code.bytecode import instructions
from normfree.code.chains import ANY, Chain
from normfree.code.reach import Function
from normfree.code.using import ABOUT, calls_variable, is_called, works

__all__ = ["holds", "is_way_in", "leads_deep", "leads_in", "looks_at_variables", "may_take_any", "meaning"]

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


def meaning(chain: Chain, module: nn.Module, rest: tuple[str, ...], function: Function) -> str:
    """Say what it means for a module that some code names an attribute of it.

    Returns:
        ``"weight"`` or ``"bias"``: it is read; ``"parameters"``: all below are; ``"use"``: the module may be called, or
        seen; ``"change"``: what it holds may; ``"open"``: somebody comes to what it holds; ``""``: nothing.
    """
    name, code = rest[0], function.code
    around, value = function.whole.__globals__, chain.value - len(rest[1:])
    work = function.forward or not (function.broken or chain.puts or not works(code, value, around))
    if name in ("weight", "bias"):
        return name if work and not chain.puts and ABOUT.isdisjoint(rest[1:2]) else ""
    if name in _READ:
        behind = [s.argval for s in instructions(code)[chain.end + 1 : chain.end + 8] if s.opname.startswith("LOAD_")]
        return "parameters" if work and ABOUT.isdisjoint(behind[:1]) else ""
    if name.startswith("register_") and name.endswith("hook"):
        return "use"
    if name in _CHANGING and holds(module):
        return "" if function.broken else "change"
    if name in _RUNNING or (name == "_conv_forward" and not module._modules):
        return "use"
    if name in _ALL or leads_deep(name) or name.endswith(ANY):
        return "" if chain.puts else "open"
    method = getattr(type(module), name, None)
    own = function.forward and not module._modules and name not in _HARMLESS
    return "use" if own and isinstance(method, FunctionType) else ""


def is_way_in(name: str, code: CodeType, i: int, around: Mapping[str, Any]) -> bool:
    """Whether an attribute of a layer, or of what holds some, may lead to a call, or to a weight that works.

    Args:
        name: The attribute.
        code: The code.
        i: The number of the instruction that takes it.
        around: The globals of the code.
    """
    if name in _READ or name in ("weight", "bias"):
        return works(code, i, around)
    return name in _RUNNING or leads_in(name) or name in _CHANGING or (name.startswith("register") and "hook" in name)


def leads_deep(name: str) -> bool:
    """Whether an attribute of any module leads to all below it."""
    return name in _DEEP


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
    taken_by_name = {s.argval for s in steps if s.opname.startswith(("LOAD_", "IMPORT_")) and isinstance(s.argval, str)}
    named = not (_ANY_ATTRIBUTE.isdisjoint(taken_by_name) and _ANY_GLOBAL.isdisjoint(loaded.values()))
    classes = any(step.opname == "STORE_ATTR" and step.argval == "__class__" for step in steps)
    classes |= any(step.opname == "MATCH_CLASS" for step in steps)  # the attributes are no names of the code
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
