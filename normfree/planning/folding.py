"""Whether what stays in the slot of a norm may move onto the layer behind it, once the model is fused."""

from __future__ import annotations

from collections.abc import Mapping, Set

from torch import nn

from normfree.analysis.findings import Site
from normfree.planning.hooks import any_global_hook, hooks_on

__all__ = ["may_be_absorbed"]


def may_be_absorbed(modules: Mapping[str, nn.Module], norm: str, site: Site, apart: Set[int]) -> bool:
    """Whether nobody sees what passes from a norm to the layer behind it, or uses the weight of that apart.

    Args:
        modules: The modules of the model.
        norm: The norm.
        site: What the graphs say about it.
        apart: The identities of the layers whose weight or bias is used elsewhere.
    """
    if site.into is None or any_global_hook():
        return False
    layer, others = modules[site.into], [modules[path] for path in (norm, *site.behind)]
    between = [module for path in site.through for module in modules[path].modules()]
    return not (any(map(hooks_on, (*others, *between))) or hooks_on(layer) - {"_forward_hooks"} or id(layer) in apart)
