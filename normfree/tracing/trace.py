"""nn.Module -> Trace: torch.fx graphs, for reading only.

The graphs are taken from a copy whose tensors live on the meta device, because tracing runs the module's own Python:
in train mode that updates buffers for real. Both modes are traced, since auxiliary heads and distillation make them
differ. A module whose forward cannot be traced (it loops over data, or branches on shapes) is found by its error and
stepped over, and its children are traced as parts of their own.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normfree.errors import one_line
from normfree.tracing.leaves import calls_batch_norm, is_layer, untraceable_functions
from normfree.tracing.tracer import Tracer
from normfree.tracing.traces import MODES, Graph, Part, Trace

__all__ = ["trace"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
# torch.fx replaces methods of nn.Module while it traces, and so do we with names in the modules of the forwards.
_ONE_AT_A_TIME = threading.RLock()


def _trace_part(
    model: nn.Module, sites: frozenset[str], arguments: Mapping[str, Any] | None, inputs: Callable[[str], type | None]
) -> tuple[dict[str, Graph], Mapping[str, str]]:
    """Trace one module in both modes; return the graphs, and what could not be looked into with the reason.

    There are no graphs if its own forward cannot be traced. ``inputs`` tells the type of an argument by its name.
    """
    if "forward" in model.__dict__:  # torch.fx would trace the class's
        return {}, {"": "its forward is patched on the instance"}
    layers = {id(module): is_layer(module) for module in model.modules()}
    # In a converted model the norms are gone, but what held them is looked into as before.
    layers.update((id(m), False) for m in _holders(model, sites) if not type(m).__module__.startswith("torch.nn"))
    make = functools.partial(Tracer, sites, functions=untraceable_functions(model), inputs=inputs)
    opaque: Mapping[str, str] = {}
    try:
        constants = _constants(model, arguments)
        while True:
            tracer = make(opaque, layers)
            graphs = {MODES[0]: _one_graph(model, MODES[0], tracer, constants)}
            opaque = tracer.opaque
            if tracer.again:
                continue
            if _same_in_both_modes(model, tracer, functools.partial(make, opaque), layers, constants):
                return dict.fromkeys(MODES, graphs[MODES[0]]), opaque
            tracer = make(opaque, layers)
            graphs[MODES[1]] = _one_graph(model, MODES[1], tracer, constants)
            if not tracer.again and len(tracer.opaque) == len(opaque):
                return graphs, opaque
            opaque = tracer.opaque
    except Exception as error:  # whatever the user's forward raises when it meets a proxy
        return {}, {"": one_line(error)}


def _holders(model: nn.Module, sites: frozenset[str]) -> Iterator[nn.Module]:
    """Yield the modules that hold a site, at any depth, from the model itself on."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in {"" for _ in sites} | {site[:i] for site in sites for i, letter in enumerate(site) if letter == "."}:
        yield modules[path]


def _one_graph(model: nn.Module, mode: str, tracer: Tracer, constants: dict[str, Any]) -> Graph:
    graph = tracer.look(model, mode, constants)
    optional = frozenset(tracer.optional)
    return Graph(graph, tracer.owners, tracer.exits, tracer.calls, tracer.read, optional, tracer.kinds)


def _same_in_both_modes(
    model: nn.Module,
    tracer: Tracer,
    make: Callable[[dict[int, bool]], Tracer],
    layers: dict[int, bool],
    constants: dict[str, Any],
) -> bool:
    """Whether nothing that is looked into acts on the mode.

    What asked for it is known from the trace in eval mode. Where that is little, two traces that stop everywhere else
    are cheaper than a second one of everything.
    """
    if not tracer.asked:
        return True
    steps = (path.split(".") for path in tracer.asked)
    above = {".".join(names[:i]) for names in steps for i in range(len(names) + 1)}
    asking = {id(model.get_submodule(path)) for path in above}
    if 2 * len(asking) > sum(not layer for layer in layers.values()):
        return False
    coarse = {key: layer or key not in asking for key, layer in layers.items()}
    coarsely = [make(coarse) for _ in MODES]
    try:
        first, second = (_one_graph(model, m, t, constants).spelled() for m, t in zip(MODES, coarsely, strict=True))
    except Exception:  # what the train mode raises is seen when it is traced in full
        return False
    return first == second and all(len(coarse.opaque) == len(tracer.opaque) for coarse in coarsely)


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
    options: dict[str, Any] = {p.name: {} for p in given if p.kind is p.VAR_KEYWORD}
    options |= {p.name: () for p in given if p.kind is p.VAR_POSITIONAL and parameters}
    if parameters and all(p.default is not p.empty for p in parameters):
        parameters = parameters[1:]  # one of them must be the input
    return options | {p.name: p.default for p in parameters if p.default is not p.empty}


def trace(model: nn.Module, sites: frozenset[str], arguments: Mapping[str, Any] | None = None) -> Trace:
    """Trace ``model`` in train and eval mode.

    Args:
        model: A model on the meta device that nobody else uses: see :func:`normfree.tracing.copying.meta_copy`.
        sites: Qualified names that are leaves: the norms, or what has taken their place.
        arguments: Arguments of one call by name, to trace what that call does; by default optional arguments are left
            out.
    """
    parts: list[Part] = []
    opaque: dict[str, str] = {}
    with _ONE_AT_A_TIME:
        for path in _roots(model, sites, ""):
            _collect(model, path, sites, parts, opaque, arguments)
    return Trace(tuple(parts), opaque)


def _collect(
    model: nn.Module,
    path: str,
    sites: frozenset[str],
    parts: list[Part],
    opaque: dict[str, str],
    arguments: Mapping[str, Any] | None = None,
) -> None:
    prefix = f"{path}." if path else ""
    below = frozenset(site.removeprefix(prefix) for site in sites if site.startswith(prefix))
    graphs, unseen = _trace_part(
        model.get_submodule(path), below, arguments, functools.partial(_input, path, arguments)
    )
    if graphs:
        parts.append(Part(path, graphs))
    for name, reason in unseen.items():
        inner = f"{prefix}{name}" if name else path
        opaque[inner] = reason
        for child in _roots(model, sites, inner, descend=True):
            _collect(model, child, sites, parts, opaque)


def _input(path: str, arguments: Mapping[str, Any] | None, name: str) -> type | None:
    """The root is given tensors; what cannot be traced may give its parts anything."""
    if arguments is not None:
        return type(arguments[name]) if name in arguments else None
    return None if path else Tensor


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
