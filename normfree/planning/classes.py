"""Whether a forward goes another way once layers have other classes.

A conversion puts something else where a norm was, and makes a layer that carries a scalar the subclass of what it was.
``isinstance(self.conv, nn.Conv2d)`` still holds then, ``type(self.conv) is nn.Conv2d`` does not, and nothing about
the norm does. Most such questions change nothing; whether one does is seen by running the model with other answers.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from normfree.code.chains import chains
from normfree.code.reach import forward_functions, functions_of
from normfree.code.using import calls_variable
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


def asked_unseen(model: nn.Module, norms: Mapping[str, object], seen: bool) -> frozenset[str]:
    """Return the norms of whose class some code seems to ask where no run saw it: it names what they are.

    Args:
        model: The model.
        norms: The norms that it has, by name.
        seen: Whether forwards were seen running. Then only what calls something matters, on a path that none took.
    """
    found: set[str] = set()
    modules = dict(model.named_modules(remove_duplicate=False))
    children = {name.rpartition(".")[2] for name in modules}
    for function in functions_of(model, forward_functions(model, (), {}), {}):
        names = set(_names_in_code(function.code))
        calls = calls_variable(function.code) or any(c.calls and c.names[0] in children for c in chains(function.code))
        if names.isdisjoint(_ASKING) or function.broken or not (calls if seen else function.forward):
            continue
        places = [
            path for path, module in modules.items() if function.owner is None or isinstance(module, function.owner)
        ]
        for name in (name for name in norms if any(not path or name.startswith(f"{path}.") for path in places)):
            bases = type(modules[name]).__mro__[: type(modules[name]).__mro__.index(nn.Module)]
            found.update([name] if not names.isdisjoint(base.__name__ for base in bases) else [])
    return frozenset(found)


_ASKING = ("type", "__class__", "_get_name", "isinstance", "issubclass")


def _names_in_code(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):  # a comprehension or a lambda
            yield from _names_in_code(constant)
