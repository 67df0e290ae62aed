"""The text of a method, in which a layer and the slot behind it are called together where they are called in a row.

``x = self.conv(x)`` and then ``x = self.bn(x)`` becomes

    x = held(self.conv, self.bn, x)
    x = taken(self.bn, x)

so that the layer waits for the slot, if both are a pair, and is called at once if not: what is no such pair goes the
way that it always went. A method whose text cannot be had, or is not what runs, stays as it is.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import TypeGuard

from normfree.code.text import attribute_in, compiled, is_shared, reads, suites, tree_of, uses
from normfree.layers.pairs import held, taken

__all__ = ["Row", "rows_in", "text_with", "with_rows"]

_HELPERS = {"_normfree_held": held, "_normfree_taken": taken}
_LOOKING = frozenset(("locals", "vars", "eval", "exec", "globals", "dir", "_getframe", "currentframe"))
"""Who names these may see which variables there are."""


@dataclass(frozen=True)
class Row:
    """Two calls, of which the second is given what the first returns, and nobody else is.

    Attributes:
        first: What is called first.
        second: What is called on what that returns.
        tests: What must be so if the second is to come directly behind the first.
    """

    first: ast.Call
    second: ast.Call
    tests: tuple[ast.expr, ...] = ()

    @property
    def key(self) -> tuple[int, int]:
        """Line and column of the second call, in which a function has no other."""
        return self.second.lineno, self.second.col_offset


def rows_in(function: FunctionType) -> tuple[Row, ...]:
    """Return the calls in a row of a function; none where its text is not known."""
    tree = _tree(function)
    return () if tree is None else tuple(_all_rows(tree))


def with_rows(function: FunctionType, keys: frozenset[tuple[int, int]]) -> FunctionType:
    """Return a function that does the same, and calls together what it calls in these rows.

    Raises:
        ValueError: Its text is not known.
    """
    tree = _tree(function)
    if tree is None:
        raise ValueError(f"the text of {function.__qualname__} is not known")
    code = compiled(_change(copy.deepcopy(tree), keys), function, tuple(_HELPERS))
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells |= {name: CellType(helper) for name, helper in _HELPERS.items()}
    closure = tuple(cells[name] for name in code.co_freevars)
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    made.__dict__.update(function.__dict__)
    return made


def text_with(text: str, scope: dict[str, object]) -> str:
    """Return the text of functions in which every row is called together, and put into ``scope`` what it names."""
    tree = ast.parse(text)
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        _change(function, None)
    scope.update(_HELPERS)
    return ast.unparse(ast.fix_missing_locations(tree))


def _tree(function: FunctionType) -> ast.FunctionDef | None:
    """Return the text of a function in which variables may come and go."""
    tree = tree_of(function)
    if tree is None:
        return None
    names = {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(tree)}
    mangled = any(name.startswith("__") and not name.endswith("__") for name in names)
    return None if mangled or not names.isdisjoint(_LOOKING) else tree


def _all_rows(function: ast.FunctionDef) -> list[Row]:
    found = [Row(n.args[0], n) for n in ast.walk(function) if _is_unary(n) and _is_unary(n.args[0])]
    found += (row for block in suites(function) for row in _in_block(block, function))
    return sorted(found, key=lambda row: row.key)


def _in_block(block: list[ast.stmt], function: ast.FunctionDef) -> Iterator[Row]:
    for start, statement in enumerate(block):
        name = _target(statement)
        if name is None or not (isinstance(statement, ast.Assign) and _is_unary(statement.value)):
            continue
        rest, tests = block[start + 1 :], list[ast.expr]()
        for between, behind in zip(rest, [*rest[1:], None], strict=False):
            asked = between if isinstance(between, ast.If) and _is_pure(between.test, name) else None
            second = _taker(between if asked is None else asked.body[0], name, function)
            if second is not None:
                yield Row(statement.value, second, (*tests, *([] if asked is None else [asked.test])))
            if asked is not None and not asked.orelse:
                tests.append(ast.UnaryOp(ast.Not(), asked.test))  # what stands there does not run
            elif behind is None or not _clears_another(between, name, behind):
                break


def _is_unary(node: ast.AST) -> TypeGuard[ast.Call]:
    """Whether something is called on one thing, and has a name that may be asked for twice."""
    if not isinstance(node, ast.Call) or node.keywords or len(node.args) != 1 or isinstance(node.args[0], ast.Starred):
        return False
    return _is_plain(node.func)


def _is_plain(node: ast.expr) -> bool:
    if isinstance(node, ast.Subscript):
        return _is_plain(node.value) and (isinstance(node.slice, ast.Constant) or _is_plain(node.slice))
    holder, name = attribute_in(node)
    return isinstance(node, ast.Name) if holder is None else name is not None and _is_plain(holder)


def _target(statement: ast.stmt) -> str | None:
    """Return the variable that a statement assigns, if it does nothing else."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    target = statement.targets[0]
    return target.id if isinstance(target, ast.Name) else None


def _clears_another(statement: ast.stmt, name: str, behind: ast.stmt) -> bool:
    """Whether a statement gives a constant to a variable that has nothing to do with what is behind it."""
    target = _target(statement)
    constant = isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
    return constant and target not in (None, name) and not uses(behind, str(target))


def _taker(statement: ast.stmt, name: str, function: ast.FunctionDef) -> ast.Call | None:
    """Return the call that a statement begins with, if it is on a variable that nobody reads besides."""
    if not isinstance(statement, (ast.Assign, ast.Return)) or statement.value is None or is_shared(function, name):
        return None
    gone = isinstance(statement, ast.Return) or _target(statement) == name
    alone = reads(function, name) == 1 or (gone and reads(statement, name) == 1)
    return _first_call_on(statement.value, name) if alone else None


def _is_pure(test: ast.expr, name: str) -> bool:
    """Whether a question may be asked twice, and is of something else than a variable."""
    return not uses(test, name) and not any(isinstance(node, (ast.Call, ast.NamedExpr)) for node in ast.walk(test))


def _first_call_on(node: ast.expr, name: str) -> ast.Call | None:
    """Return ``f(name)``, if that is what an expression computes first."""
    while True:
        if isinstance(node, ast.Call):
            if _is_unary(node) and isinstance(node.args[0], ast.Name) and node.args[0].id == name:
                return node
            node = node.args[0] if node.args and _is_plain(node.func) else node.func
        elif isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        elif isinstance(node, ast.BinOp):
            node = node.left
        else:
            return None


def _change(function: ast.FunctionDef, keys: frozenset[tuple[int, int]] | None) -> ast.FunctionDef:
    """Call together what is called in rows, in all of them or in some; of two that share a call in the first."""
    taken = set[int]()
    for row in [row for row in _all_rows(function) if keys is None or row.key in keys]:
        ends = {id(row.first), id(row.second)}
        if not ends & taken:
            taken |= ends
            first, second = copy.copy(row.first), copy.deepcopy(row.second.func)
            held: ast.expr = _call("_normfree_held", copy.deepcopy(first.func), second, first.args[0])
            if row.tests:
                so = [copy.deepcopy(test) for test in row.tests]
                held = ast.IfExp(so[0] if len(so) == 1 else ast.BoolOp(ast.And(), so), held, copy.deepcopy(first))
            _put(row.first, held)
            _put(row.second, _call("_normfree_taken", row.second.func, row.second.args[0]))
    return function


def _put(node: ast.Call, other: ast.expr) -> None:
    """Let a call in a text be another expression, for whoever holds it."""
    places = {name: getattr(node, name) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset")}
    node.__dict__.clear()
    node.__class__ = type(other)  # type: ignore[assignment]  # both are nodes
    node.__dict__.update(other.__dict__ | places)


def _call(name: str, *args: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(args), [])
