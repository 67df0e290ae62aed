"""Whether a forward goes another way once layers have other classes.

A conversion puts something else where a norm was, and makes a layer that carries a scalar the subclass of what it was.
``isinstance(self.conv, nn.Conv2d)`` still holds then, ``type(self.conv) is nn.Conv2d`` does not, and nothing about
the norm does. Most such questions change nothing; whether one does is seen by running the model with other answers.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from normfree.layers import scaled_weight_class
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
    for path, carrier in writes.carriers.items():
        if carrier.changes_class:
            after[path] = scaled_weight_class(type(model.get_submodule(path)))
    for path, (_, made) in (writes.outputs | writes.blocks).items():
        original = type(model.get_submodule(path))
        after[path] = type(made.__name__, (original,), {"__module__": made.__module__})
    return after


def asked_unseen(modules: Mapping[str, nn.Module], norms: Mapping[str, object]) -> frozenset[str]:
    """Return the norms of whose class some forward seems to ask, where none was seen: it names what they are."""
    found: set[str] = set()
    for path, module in modules.items():
        inside = f"{path}." if path else ""
        below = [name for name in norms if name.startswith(inside) and name != path]
        names = names_in(type(module)) if below else frozenset()
        if names.isdisjoint(("type", "__class__", "_get_name", "isinstance")):
            continue
        for name in below:
            bases = type(modules[name]).__mro__[: type(modules[name]).__mro__.index(nn.Module)]
            found.update([name] if not names.isdisjoint(base.__name__ for base in bases) else [])
    return frozenset(found)


def names_in(cls: type[nn.Module]) -> frozenset[str]:
    """Return the names and texts in the forward of a class, in the methods that it names, and in theirs."""
    found: set[str] = set()
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        function = inspect.unwrap(getattr(cls, waiting.pop(), None))  # type: ignore[arg-type]  # it may be anything
        top = (getattr(function, "__module__", None) or "builtins").partition(".")[0]
        if top == "torch" or top in sys.stdlib_module_names or not hasattr(function, "__code__"):
            continue
        found.update(_names_in_code(function.__code__))
        methods = {name for name in found if name.isidentifier() and hasattr(cls, name)} - seen
        seen |= methods
        waiting += methods
    return frozenset(found)


def _names_in_code(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):  # a comprehension or a lambda
            yield from _names_in_code(constant)
