"""nn.Module -> Trace: torch.fx graphs, for reading only.

The graphs are taken from a copy whose tensors live on the meta device, because tracing runs the module's own Python:
in train mode that updates buffers for real. Both modes are traced, since auxiliary heads and distillation make them
differ. A module whose forward cannot be traced (it loops over data, or branches on shapes) is found by its error,
treated as opaque together with every other module of its type, and its children are traced as parts of their own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normfree.tracer import Tracer, calls_batch_norm, is_layer, untraceable_functions
from normfree.traces import MODES, Graph, Part, Trace

__all__ = ["trace"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def _trace_part(
    model: nn.Module, sites: frozenset[str], opaque: dict[type[nn.Module], str], arguments: Mapping[str, Any] | None
) -> dict[str, Graph] | None:
    """Trace one module in both modes; ``None`` if its own forward cannot be traced.

    ``opaque`` collects the types found to be untraceable, with the reason.
    """
    if "forward" in model.__dict__:
        opaque[type(model)] = "its forward is patched on the instance"  # torch.fx would trace the class's
        return None
    layers = {id(module): is_layer(module) for module in model.modules()}
    # In a converted model the norms are gone, but what held them is looked into as before.
    layers.update((id(m), False) for m in _holders(model, sites) if not type(m).__module__.startswith("torch.nn"))
    constants = _constants(model, arguments)
    make = functools.partial(Tracer, sites, functions=untraceable_functions(model))
    while True:
        try:
            tracer = make(set(opaque), layers)
            evaluating = _one_graph(model, MODES[0], tracer, constants)
            if _same_in_both_modes(model, tracer.asked, functools.partial(make, set(opaque)), layers, constants):
                return dict.fromkeys(MODES, evaluating)
            tracer = make(set(opaque), layers)
            return dict(zip(MODES, (evaluating, _one_graph(model, MODES[1], tracer, constants)), strict=True))
        except Exception as error:  # whatever the user's forward raises when it meets a proxy
            if tracer.failed is None:
                opaque[type(model)] = _one_line(error)
                return None
            opaque[type(model.get_submodule(tracer.failed))] = _one_line(error)


def _holders(model: nn.Module, sites: frozenset[str]) -> Iterator[nn.Module]:
    """Yield the modules that hold a site, at any depth."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in {site[:i] for site in sites for i, letter in enumerate(site) if letter == "."}:
        yield modules[path]


def _one_graph(model: nn.Module, mode: str, tracer: Tracer, constants: dict[str, Any]) -> Graph:
    graph = tracer.look(model, mode, constants)
    exits = {node: tuple(paths) for node, paths in tracer.exits.items()}
    return Graph(graph, tracer.owners, exits, tracer.calls, tracer.read)


def _same_in_both_modes(
    model: nn.Module,
    asked: set[str],
    make: Callable[[dict[int, bool]], Tracer],
    layers: dict[int, bool],
    constants: dict[str, Any],
) -> bool:
    """Whether nothing that is looked into acts on the mode.

    What asked for it is known from the trace in eval mode. Where that is little, two traces that stop everywhere else
    are cheaper than a second one of everything.
    """
    if not asked:
        return True
    steps = (path.split(".") for path in asked)
    above = {".".join(names[:i]) for names in steps for i in range(len(names) + 1)}
    asking = {id(model.get_submodule(path)) for path in above}
    if 2 * len(asking) > sum(not layer for layer in layers.values()):
        return False
    coarse = {key: layer or key not in asking for key, layer in layers.items()}
    try:
        first, second = (_one_graph(model, mode, make(coarse), constants).spelled() for mode in MODES)
    except Exception:  # what the train mode raises is seen when it is traced in full
        return False
    return first == second


def _constants(model: nn.Module, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments that are no proxies.

    Optional arguments keep their defaults: a proxy would take every ``if mask is not None``. Where the arguments of a
    call are known, everything in them that is no tensor stays what it is.
    """
    if arguments is not None:
        return {
            name: value
            for name, value in arguments.items()
            if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
        }
    given = inspect.signature(model.forward).parameters.values()
    parameters = [p for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if parameters and all(p.default is not p.empty for p in parameters):
        parameters = parameters[1:]  # one of them must be the input
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def trace(model: nn.Module, sites: frozenset[str], arguments: Mapping[str, Any] | None = None) -> Trace:
    """Trace ``model`` in train and eval mode.

    Args:
        model: A model on the meta device that nobody else uses: see :func:`normfree.copying.meta_copy`.
        sites: Qualified names that are leaves: the norms, or what has taken their place.
        arguments: Arguments of one call by name, to trace what that call does; by default optional arguments are left
            out.
    """
    parts: list[Part] = []
    opaque: dict[str, str] = {}
    types: dict[type[nn.Module], str] = {}
    for path in _roots(model, sites, ""):
        _collect(model, path, sites, types, parts, opaque, arguments)
    return Trace(tuple(parts), opaque)


def _collect(
    model: nn.Module,
    path: str,
    sites: frozenset[str],
    types: dict[type[nn.Module], str],
    parts: list[Part],
    opaque: dict[str, str],
    arguments: Mapping[str, Any] | None = None,
) -> None:
    module = model.get_submodule(path)
    prefix = f"{path}." if path else ""
    below = frozenset(site.removeprefix(prefix) for site in sites if site.startswith(prefix))
    graphs = None if type(module) in types else _trace_part(module, below, types, arguments)
    unseen = [""] if graphs is None else _opaque_calls(module, graphs, set(types))
    if graphs is not None:
        parts.append(Part(path, graphs))
    for name in unseen:
        inner = f"{prefix}{name}" if name else path
        opaque[inner] = types[type(model.get_submodule(inner))]
        for child in _roots(model, sites, inner, descend=True):
            _collect(model, child, sites, types, parts, opaque)


def _opaque_calls(module: nn.Module, graphs: Mapping[str, Graph], types: set[type[nn.Module]]) -> list[str]:
    if not types:
        return []
    called = dict.fromkeys(name for graph in graphs.values() for name in graph.calls)
    return [name for name in called if type(module.get_submodule(name)) in types]


def _roots(model: nn.Module, sites: frozenset[str], path: str, descend: bool = False) -> Iterator[str]:
    """Yield what can be traced at or below ``path``: containers have no forward of their own."""
    module = model.get_submodule(path)
    if not descend and not isinstance(module, _CONTAINERS):
        yield path
        return
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        inside = any(site.startswith(f"{inner}.") for site in sites) or any(map(calls_batch_norm, child.modules()))
        if inside and inner not in sites and not isinstance(child, torch.jit.ScriptModule):
            yield from _roots(model, sites, inner)
