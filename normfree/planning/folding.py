"""Whether gain and bias of a norm may move onto a neighbour: nobody may see what passes between, or use one alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from normfree.analysis.findings import Site
from normfree.code.naming import Named
from normfree.planning.hooks import any_global_hook, hooks_on

__all__ = ["may_be_absorbed", "why_not_folded"]

Modules = Mapping[str, nn.Module]


def why_not_folded(modules: Modules, norm: str, site: Site, apart: Named | None) -> str:
    """Say why gain and bias may not move onto the layer in front, or return nothing.

    Args:
        modules: The modules of the model.
        norm: The norm.
        site: What the graphs say about it.
        apart: What is used besides its call, where what is folded must be the same on every path.
    """
    return _hook_between(modules, norm, site) or ("" if apart is None else _doubt(modules, norm, site, apart))


def may_be_absorbed(modules: Modules, norm: str, site: Site, apart: Named) -> bool:
    """Whether what stays in a slot may move onto the layer behind it: nobody sees what passes, or uses either apart."""
    if site.into is None or any_global_hook():
        return False
    layer, others = modules[site.into], [modules[path] for path in (norm, *site.behind)]
    between = [module for path in site.through for module in modules[path].modules()]
    if any(map(hooks_on, (*others, *between))) or hooks_on(layer) - {"_forward_hooks"}:
        return False
    shared = any(id(layer) in apart.read[name] for name in ("weight", "bias"))
    return not shared and not _apart((layer, *others), apart)


def _hook_between(modules: Modules, norm: str, site: Site) -> str:
    """Name the module whose hook sees, and may change, what passes from producer to norm, or its gradient."""
    if site.producer is None:
        return ""
    watched = {path: hooks_on(modules[path]) for path in (site.producer, *site.between, norm)}
    watched[site.producer] -= {"_forward_pre_hooks"}  # what a layer is given stays what it is
    found = next((path for path, hooks in watched.items() if hooks), None)
    if found is not None or any_global_hook():
        return f"a hook on {found or 'every module'} sees what passes from {site.producer} to {norm}"
    return ""


def _doubt(modules: Modules, norm: str, site: Site, apart: Named) -> str:
    """Say why a layer and the norm behind it may be used apart, or return nothing if it is known that they are not."""
    if site.producer is None or site.apart:
        return site.apart
    layer = modules[site.producer]
    if _apart([modules[path] for path in (site.producer, *site.between, norm)], apart):
        return f"{site.producer} or {norm} may be called elsewhere too"
    return f"the bias of {site.producer} may be used elsewhere too" if id(layer) in apart.read["bias"] else ""


def _apart(between: Iterable[nn.Module], apart: Named) -> bool:
    """Whether two layers may be called apart, or what stands around one of them."""
    held = {id(module) for module in between}
    return bool(held & apart.called) or any(first in held and second in held for first, second in apart.pairs)
