"""Which layers and norms are used besides the calls that were seen, with what stands around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from normfree.analysis.findings import Findings
from normfree.code.naming import Named, find_named

__all__ = ["used_apart"]


def used_apart(modules: Mapping[str, nn.Module], findings: Findings) -> Named:
    """Return what is used besides its call: by code that no run came to, by another module, or by a forward itself."""
    called = {id(modules[path]): calls for path, calls in findings.called.items()}
    pairs: dict[int, frozenset[int]] = {}
    for first, second, between in _pairs(findings):
        around = {path for call in findings.called[first] for path in call.modules}
        fronts = {id(modules[path]) for path in between if path in around}
        backs = {id(modules[path]) for path in between if path not in around}
        called.update(dict.fromkeys(fronts, findings.called[first]) | dict.fromkeys(backs, findings.called[second]))
        for front in {*fronts, id(modules[first])}:
            pairs[front] = pairs.get(front, frozenset()) | {*backs, id(modules[second])}
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


def _pairs(findings: Findings) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield what is called one after the other, with the modules that stand between."""
    for name, site in findings.sites.items():
        if site.producer is not None:
            yield site.producer, name, site.between
        if site.into is not None:
            yield name, site.into, site.behind
