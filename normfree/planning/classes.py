"""Whether a forward goes another way once layers have other classes.

A conversion puts something else where a norm was, and makes a layer that carries a scalar the subclass of what it was.
``isinstance(self.conv, nn.Conv2d)`` still holds then, ``type(self.conv) is nn.Conv2d`` does not, and nothing about
the norm does. Most such questions change nothing; whether one does is seen by running the model with other answers.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace

from torch import nn

from normfree.code.functions import bases, codes_of, forward_functions, names_in, other_functions
from normfree.code.text import tree_of
from normfree.plans import Plan
from normfree.rewriting.preparing import prepare
from normfree.tracing.traces import Trace

__all__ = ["asked", "asked_unseen"]


def asked(model: nn.Module, traced: Trace, plan: Plan) -> frozenset[str]:
    """Return the modules whose new class, which a plan gives them, would send a forward of the model another way."""
    if traced.deaf or not traced.graphs or _differs(traced, {}):  # of what never does the same twice nothing is known
        return frozenset()
    return frozenset(_culprits(traced, _classes(model, plan)))


def _culprits(traced: Trace, classes: Mapping[str, type[nn.Module]]) -> list[str]:
    """Return which of these classes make a difference, by halving; all of them if they do so together only."""
    if not classes or not _differs(traced, classes):
        return []
    names, middle = list(classes), len(classes) // 2
    halves = (names[:middle], names[middle:]) if middle else ()
    return [name for half in halves for name in _culprits(traced, {n: classes[n] for n in half})] or names


def _differs(traced: Trace, classes: Mapping[str, type[nn.Module]]) -> bool:
    try:
        graphs = traced.again(classes)
    except Exception:  # whatever a forward raises that meets another class
        return True
    return any(graph.spelled != traced.graphs[mode].spelled for mode, graph in graphs.items())


def _classes(model: nn.Module, plan: Plan) -> dict[str, type[nn.Module]]:
    """Return the class that the plan gives to each module whose class changes."""
    writes = prepare(model, replace(plan, inplace_activations=True))  # a copy is of another class than no copy
    after: dict[str, type[nn.Module]] = {path: type(slot) for path, slot in writes.slots.items()}
    for path, made in writes.classes.items():
        original = type(model.get_submodule(path))
        named_alike = type(made.__name__, (original,), {"__module__": made.__module__})
        after[path] = made if path in writes.carriers else named_alike
    return after


def asked_unseen(model: nn.Module, norms: Iterable[str], seen: bool) -> frozenset[str]:
    """Return the norms of whose class some code seems to ask where no run saw it: it names what they are.

    If forwards were ``seen`` running, only what calls parts matters, on a path that none took.
    """
    found: set[str] = set()
    modules = dict(model.named_modules(remove_duplicate=False))
    parts = {name.rpartition(".")[2] for name in modules}
    kinds = dict.fromkeys(cls for module in modules.values() for cls in bases(type(module)))
    owners = {function: cls for cls in kinds for function in vars(cls).values() if callable(function)}
    for function in forward_functions(model) | (other_functions(model) if seen else set()):
        constants = (constant for code in codes_of(function.__code__) for constant in code.co_consts)
        words = names_in(function) | {constant for constant in constants if isinstance(constant, str)}
        if words.isdisjoint(_ASKING) or (seen and not _calls_parts(function, parts)):
            continue
        owner = owners.get(function)
        places = [path for path, module in modules.items() if owner is None or isinstance(module, owner)]
        for name in (name for name in norms if any(not path or name.startswith(f"{path}.") for path in places)):
            kind = type(modules[name])
            own = {base.__name__ for base in kind.__mro__[: kind.__mro__.index(nn.Module)]}
            found.update([name] if words & own else [])
    return frozenset(found)


_ASKING = ("type", "__class__", "_get_name", "isinstance", "issubclass")


def _calls_parts(function: types.FunctionType, parts: Set[str]) -> bool:
    """Whether a function calls what one of its variables holds, or a part of a module."""
    tree, variables = tree_of(function), function.__code__.co_varnames + function.__code__.co_cellvars
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)] if tree is not None else []
    own = (isinstance(f, (ast.Subscript, ast.Call)) or getattr(f, "id", "") in variables for f in calls)
    return tree is None or any(own) or any(getattr(f, "attr", None) in parts for f in calls)
