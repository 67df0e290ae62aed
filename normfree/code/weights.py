"""Whose weight or bias somebody computes with besides the layer: these must stay what they are."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from normfree.code.functions import bases, forward_functions, names_in, other_functions
from normfree.code.held import held_by
from normfree.code.text import attribute_in, module_at, suites, tree_of

__all__ = ["read_elsewhere"]

_ABOUT = {"shape", "dtype", "device", "ndim", "size", "dim", "numel", "requires_grad", "grad", "stride"}
"""What can be asked of a weight without its values."""
_ASKING = ("isinstance", "hasattr", "id", "type", "len", "print")
_ALL = {"parameters", "named_parameters", "state_dict", "_parameters", "get_parameter"}
"""By these a forward comes to every weight of a module, and who gives a module others for one call."""
_PARAMETERS = ("weight", "bias")
_RUNNING = ("forward", "_conv_forward")
_STATISTICS = {"running_mean", "running_var"}
"""Whoever reads these of a norm fails once it is gone, so what he makes of a weight with them is not made."""


def read_elsewhere(model: nn.Module, used: Iterable[str] = ()) -> dict[str, set[int]]:
    """Return the identities of the layers whose ``"weight"``, or whose ``"bias"``, may be used apart from them.

    Tied ones are; so are those that a function of the model's classes names and does something with, but for what only
    builds the model. In doubt, all that it may come to. ``used`` names the parameters that a run used apart.
    """
    found: dict[str, set[int]] = {name: set() for name in _PARAMETERS}
    named = dict(model.named_parameters(remove_duplicate=False))
    apart = {id(named[name]) for name in used if name in named}
    for value in held_by(model):
        own = value.__self__ if isinstance(value, MethodType) else None
        apart |= set(map(id, own._parameters.values())) if isinstance(own, nn.Module) else {id(value)}
    held = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    apart |= {parameter for parameter, holders in held.items() if holders > 1}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if name in found and parameter is not None and id(parameter) in apart:
                found[name].add(id(module))
    forward = forward_functions(model)
    instances: dict[Any, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for function in {f for cls in bases(type(module)) for f in vars(cls).values() if isinstance(f, FunctionType)}:
            instances[function].append(module)
    for function in forward | other_functions(model):
        for name, modules in _Reading(function, function in forward, instances.get(function)).read(model):
            found[name].update(map(id, modules))
    return found


@dataclass(frozen=True)
class _Reading:
    """What one function does with weights; ``instances`` are the modules of whose class it is a method."""

    function: FunctionType
    forward: bool
    instances: list[nn.Module] | None

    @property
    def _gives(self) -> bool:
        return self.forward or "functional_call" in names_in(self.function)

    def read(self, model: nn.Module) -> Iterator[tuple[str, Iterable[nn.Module]]]:
        """Yield whose parameters of which name may be read: single layers, or all below a module."""
        texts = {c for c in self.function.__code__.co_consts if isinstance(c, str)}
        if {*_PARAMETERS, *_RUNNING, *(_ALL if self._gives else ())}.isdisjoint(names_in(self.function) | texts):
            return
        below = self.instances or [model]
        anything = [(name, list(top.modules())) for name in _PARAMETERS for top in below]
        tree = tree_of(self.function)
        if tree is None:
            yield from anything
            return
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        failing = set() if self.forward else set(_failing(tree))
        for node in set(ast.walk(tree)) - failing:
            holder, name = attribute_in(node)
            if self._comes_to_all(node):
                yield from anything
            elif holder is not None and name in (None, *_PARAMETERS):
                use = self._use(node, parents)
                meant = [list(layers) for layers in self._meant(holder, below, doubt=use != "written") if use]
                yield from ((each, modules) for each in ([name] if name else _PARAMETERS) for modules in meant)

    def _meant(self, holder: ast.expr, below: list[nn.Module], *, doubt: bool) -> Iterator[Iterable[nn.Module]]:
        """Yield the layers that some names lead to; in doubt all, but who fills any layer is who loads or draws it."""
        for top in below:
            module = module_at(holder, self.function, top if self.instances else None)
            if not isinstance(module, nn.Module):
                yield top.modules() if doubt else ()
            elif module is not top or not self.forward:  # a layer's own forward reads its own
                yield [module]

    def _comes_to_all(self, node: ast.AST) -> bool:
        """Whether somebody asks for all parameters, or a layer is run by its class: ``nn.Conv2d.forward(layer, x)``.

        Its class knows no coordinates.
        """
        if not isinstance(node, ast.Attribute) or node.attr not in _RUNNING:
            return self._gives and isinstance(node, ast.Attribute) and node.attr in _ALL
        base: Any = node.value
        if isinstance(base, ast.Call):  # in a forward ``super()`` is what runs anyway
            return getattr(base.func, "id", "") == "super" and not self.forward
        while isinstance(base, ast.Attribute):
            base = base.value
        return isinstance(base, ast.Name) and isinstance(self.function.__globals__.get(base.id), (type, ModuleType))

    def _use(self, node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
        """Say whether something is made of a parameter, or it is ``"written"``; nothing if it is only asked for."""
        above: Any = parents.get(node)
        name, written = getattr(above, "attr", ""), "read" if self.forward else "written"
        if isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
            return written
        if name == "data":
            return self._use(above, parents)
        if name in _ABOUT or name.endswith("_"):
            return "" if name in _ABOUT else written
        if isinstance(above, ast.Compare):
            return "" if all(isinstance(op, (ast.Is, ast.IsNot)) for op in above.ops) else "read"
        if isinstance(above, ast.Call) and node is not above.func and not self.forward:
            name = getattr(above.func, "attr", getattr(above.func, "id", ""))
            return "" if name in _ASKING else "written" if name.endswith("_") else "read"
        return "" if isinstance(above, (ast.Expr, ast.If, ast.IfExp)) else "read"


def _failing(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs only together with a read of a norm's statistics: the rows of each suite that holds one."""
    for rows in suites(tree):
        if any(map(_reads_statistics, rows)):
            yield from (inner for row in rows for inner in ast.walk(row))


def _reads_statistics(node: ast.AST) -> bool:
    """Whether a row reads statistics whatever is decided in it."""
    if getattr(node, "attr", "") in _STATISTICS:
        return True
    deciding = (ast.stmt, ast.IfExp, ast.BoolOp, ast.Lambda)
    return any(_reads_statistics(child) for child in ast.iter_child_nodes(node) if not isinstance(child, deciding))
