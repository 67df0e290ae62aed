"""Whether a forward goes another way once layers have other classes.

A conversion puts something else where a norm was, and makes a layer that carries a scalar the subclass of what it was.
``isinstance(self.conv, nn.Conv2d)`` still holds then, ``type(self.conv) is nn.Conv2d`` does not, and nothing about
the norm does. Most such questions change nothing; whether one does is seen by asking it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from normfree.layers import scaled_weight_class
from normfree.plans import Plan
from normfree.rewriting.preparing import prepare
from normfree.tracing.asking import names_in
from normfree.tracing.trace import trace
from normfree.tracing.traces import Trace

__all__ = ["asked_unseen", "changed_classes", "goes_another_way"]


def changed_classes(plan: Plan) -> frozenset[str]:
    """Return the modules that will have another class, or whose place something else will take."""
    carried = {layer.path for layer in plan.carried}
    return frozenset({edit.name for edit in plan.removed} | carried | {alpha.path for alpha in plan.alphas})


def goes_another_way(model: nn.Module, traced: Trace, sites: frozenset[str], plan: Plan) -> bool:
    """Trace once more with the classes that the modules will have, and say whether anything else happens.

    Args:
        model: What the trace was taken from.
        traced: The trace.
        sites: The norms, as in the trace.
        plan: What is going to be done.
    """
    with _classes(model, plan):
        after = trace(model, sites)
    return _told(after) != _told(traced)


def _told(traced: Trace) -> tuple[object, ...]:
    graphs = [(part.path, mode, graph.spelled()) for part in traced.parts for mode, graph in part.graphs.items()]
    return list(traced.opaque), graphs


@contextlib.contextmanager
def _classes(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Give every module the class that the plan gives it, and the behaviour that it has."""
    writes = prepare(model, replace(plan, inplace_activations=True))  # a copy would be one more operation
    after: dict[str, type[nn.Module]] = {path: type(slot) for path, slot in writes.slots.items()}
    for path, carrier in writes.carriers.items():
        if carrier.changes_class:
            after[path] = scaled_weight_class(type(model.get_submodule(path)))
    for path, (_, made) in (writes.outputs | writes.blocks).items():
        original = type(model.get_submodule(path))
        after[path] = type(made.__name__, (original,), {"__module__": made.__module__})
    modules = {path: model.get_submodule(path) for path in after}
    before = {path: type(module) for path, module in modules.items()}
    try:
        for path, module in modules.items():
            module.__class__ = after[path]
        yield
    finally:
        for path, module in modules.items():
            module.__class__ = before[path]


def asked_unseen(modules: Mapping[str, nn.Module], traced: Trace) -> frozenset[str]:
    """Return the modules of whose class a forward that no trace sees seems to ask: it names what they are."""
    found: set[str] = set()
    for path in traced.opaque:
        names = names_in(type(modules[path]))
        exact = not names.isdisjoint(("type", "__class__", "_get_name"))
        if not exact and "isinstance" not in names:
            continue
        inside = f"{path}." if path else ""
        for name, module in modules.items():
            if name.startswith(inside) and name != path:
                bases = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
                found.update([name] if not names.isdisjoint(base.__name__ for base in bases) else [])
    return frozenset(found)
