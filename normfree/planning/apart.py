"""Which layers and norms are used besides the calls that were seen, with what stands around them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from normfree.analysis.findings import Findings
from normfree.code.naming import Named, find_named

__all__ = ["used_apart"]


def used_apart(modules: Mapping[str, nn.Module], findings: Findings) -> Named:
    """Return what is used besides its call: by code that no run came to, by another module, or by a forward itself."""
    sites = {name: site for name, site in findings.sites.items() if site.producer is not None}
    called = {id(modules[path]): calls for path, calls in findings.called.items()}
    pairs: dict[int, frozenset[int]] = {}
    for name, site in sites.items():
        producer = str(site.producer)
        around = {path for call in findings.called[producer] for path in call.modules}
        fronts = {id(modules[path]) for path in site.between if path in around}
        backs = {id(modules[path]) for path in site.between if path not in around}
        called.update(dict.fromkeys(fronts, findings.called[producer]) | dict.fromkeys(backs, findings.called[name]))
        pairs.update(dict.fromkeys({*fronts, id(modules[producer])}, frozenset({*backs, id(modules[name])})))
    found = find_named(modules[""], called, pairs)
    named = dict(modules[""].named_parameters(remove_duplicate=False))
    taken = {id(named[name]) for name in findings.parameters if name in named}
    holders: dict[int, set[tuple[str, int]]] = {}
    for module in modules.values():
        for name, parameter in module._parameters.items():
            if parameter is not None and name in found.read:
                holders.setdefault(id(parameter), set()).add((name, id(module)))
    for tensor, held in holders.items():
        for name, owner in held if tensor in taken or len(held) > 1 else ():
            found.read[name].add(owner)
    return found
