"""The text of a function, where it is known and is what runs."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any, cast

from torch import nn

from normfree.code.functions import names_in

__all__ = ["UNKNOWN", "attribute_in", "compiled", "is_shared", "module_at", "reads", "suites", "tree_of", "uses"]

UNKNOWN = object()
"""What names lead to that only a run would tell."""


@functools.lru_cache(maxsize=1024)
def tree_of(function: FunctionType) -> ast.FunctionDef | None:
    """Return the text of a function, if it is known and compiles to what runs; nobody may change it.

    A file may have been edited since it was read, and a decorator may have put another function in place of one.
    """
    try:
        lines, start = inspect.getsourcelines(function.__code__)
        head, shift = ("if True:\n", 2) if lines[0][:1].isspace() else ("", 1)  # a method stands in its class
        tree: ast.AST = ast.parse("".join((head, *lines))).body[0]
        tree = cast(ast.If, tree).body[0] if head else tree
        if not isinstance(tree, ast.FunctionDef):
            return None
        ast.increment_lineno(tree, start - shift)
        tree.decorator_list = []
        return tree if _does(compiled(tree, function)) == _does(function.__code__) else None
    except (OSError, TypeError, SyntaxError, ValueError, IndexError, StopIteration):
        return None


def suites(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """Yield the rows of statements in a text, each below what it belongs to."""
    for node in ast.walk(tree):
        held = (getattr(node, field, None) for field in ("body", "orelse", "finalbody"))
        yield from (rows for rows in held if isinstance(rows, list))


def attribute_in(node: ast.AST) -> tuple[ast.expr | None, str | None]:
    """Return whose attribute is asked for, and which, if that is known: ``x.a`` or ``getattr(x, "a")``."""
    if isinstance(node, ast.Attribute):
        return node.value, node.attr
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) > 1:
        name = node.args[1]
        return node.args[0], name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else None
    return None, None


def module_at(names: ast.expr, function: FunctionType, own: nn.Module | None) -> Any:
    """Return the module that some names in a function lead to: ``None`` if there is none, :data:`UNKNOWN` in doubt.

    ``own`` is the module of which the function is a method, if it is one.
    """
    code = function.__code__
    if isinstance(names, ast.Name):
        if own is not None and names.id in code.co_varnames[: min(code.co_argcount, 1)]:
            return own
        is_variable = names.id in code.co_varnames + code.co_cellvars
        return UNKNOWN if is_variable else _module(function.__globals__.get(names.id))
    of, name = (names.value, None) if isinstance(names, ast.Subscript) else attribute_in(names)
    holder = UNKNOWN if of is None else module_at(of, function, own)
    if not isinstance(holder, nn.Module):
        return holder
    if name is not None:
        found = holder._modules.get(name, holder.__dict__.get(name))
        return UNKNOWN if isinstance(found, (list, tuple, dict)) else _module(found)
    which = getattr(names, "slice", None)
    if not isinstance(which, ast.Constant) or not isinstance(holder, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return UNKNOWN
    try:
        return holder[which.value]  # type: ignore[index]  # whatever its text says
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def _module(found: object) -> nn.Module | None:
    return found if isinstance(found, nn.Module) else None


def uses(node: ast.AST, name: str, kind: type[ast.expr_context] = ast.expr_context) -> int:
    """Count how often a variable is named; with ``kind``, how often it is read, assigned or taken away."""
    return sum(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, kind) for n in ast.walk(node))


def reads(node: ast.AST, name: str) -> int:
    """Count how often a variable is read: ``x += 1`` reads it too."""
    added = (getattr(n.target, "id", None) for n in ast.walk(node) if isinstance(n, ast.AugAssign))
    return uses(node, name, ast.Load) + list(added).count(name)


def is_shared(function: ast.FunctionDef, name: str) -> bool:
    """Whether a variable is taken away, is none of the function's own, or is read by a function inside of it."""
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef, ast.GeneratorExp)
    nodes = [node for node in ast.walk(function) if node is not function]
    declared = any(isinstance(node, (ast.Global, ast.Nonlocal)) and name in node.names for node in nodes)
    captured = any(isinstance(node, inner) and uses(node, name) for node in nodes)
    return declared or captured or uses(function, name, ast.Del) > 0


def compiled(tree: ast.FunctionDef, like: FunctionType, helpers: Sequence[str] = ()) -> CodeType:
    """Compile the text of a function ``like`` one as if it stood in its file; ``helpers`` come from around it too."""
    code, names = like.__code__, like.__globals__
    around = cast(ast.FunctionDef, ast.parse(f"def around({', '.join([*code.co_freevars, *helpers])}): 0").body[0])
    around.body = [tree]
    # A method of what is imported is called by other instructions.
    others = (name for name in sorted(names_in(like)) if getattr(names.get(name), "__module__", "") != like.__module__)
    imports = [ast.Import([ast.alias(name)]) for name in others if name in names]
    module = ast.fix_missing_locations(ast.Module([*imports, around], []))
    found = compile(module, code.co_filename, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True)
    for name in ("around", tree.name):
        found = next(c for c in found.co_consts if isinstance(c, CodeType) and c.co_name == name)
    return cast(CodeType, found)


_FUTURE = 0x1FF0000
"""The flags of what is imported from ``__future__``."""


def _does(code: CodeType) -> tuple[object, ...]:
    """Return what two codes have in common that do the same."""
    constants = [_does(c) if isinstance(c, CodeType) else (type(c), _without_place(c)) for c in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, constants


def _without_place(constant: object) -> object:
    """Return a constant, without where a function stands: Python 3.10 keeps the names of inner functions among them."""
    return constant.rpartition(".<locals>.")[2] if isinstance(constant, str) else constant
