"""Trace -> Findings: what is there, told without deciding anything.

Both modes of every part are analysed; a fact holds only if every graph in which the module appears agrees.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import fx, nn

from normfree.analysis.activations import Activation
from normfree.analysis.flow import Flow, Role
from normfree.analysis.moments import known_inputs
from normfree.analysis.sites import Site, agree, find_site, rescaled_layers
from normfree.analysis.sums import Kind, SumNode, additions_of, find_sums, sum_names
from normfree.analysis.tails import Candidate, find_candidates
from normfree.tracing.traces import MODES, Trace

__all__ = ["Branch", "Findings", "Site", "Sum", "analyse", "flows"]


@dataclass(frozen=True)
class Branch:
    """One residual branch of a sum: its norms, where alpha could live, or why nowhere."""

    norms: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    why: str


@dataclass(frozen=True)
class Sum:
    """One addition of activations; ``branches`` is empty unless it is a residual sum."""

    name: str
    kind: Kind
    reason: str
    branches: tuple[Branch, ...] = ()


@dataclass(frozen=True)
class Findings:
    """Everything the plan needs to know.

    Attributes:
        sites: Norms that were reached by a trace.
        sums: Additions, in topological order.
        rescaled: Layers whose output scale a norm used to set, with the activation that follows each.
        known: Layers of whose input the norms tell the mean, each with whether a norm follows it.
        fixed: Modules that must keep their class.
        functional: Places where ``F.batch_norm`` normalises an activation.
        read: Norms of which a forward reads a tensor besides calling it, with the name of the tensor.
        parameters: Parameters that a forward reads itself, other than by calling the module that holds them.
    """

    sites: Mapping[str, Site]
    sums: tuple[Sum, ...]
    rescaled: Mapping[str, Activation | None]
    known: Mapping[str, bool]
    fixed: frozenset[str]
    functional: tuple[str, ...]
    read: Mapping[str, str]
    parameters: frozenset[str]


def flows(
    model: nn.Module, trace: Trace, sites: Iterable[str], *, distinct: bool = False, fixed: Iterable[str] = ()
) -> Iterator[tuple[str, str, Flow]]:
    """Yield ``(part, mode, flow)`` for every graph of a trace, or only for those that differ."""
    sites = tuple(sites)
    shared = _shared_between_parts(model, trace) | {id(model.get_submodule(path)) for path in fixed}
    for part in trace.parts:
        prefix = f"{part.path}." if part.path else ""
        below = frozenset(site.removeprefix(prefix) for site in sites if site.startswith(prefix))
        modules = dict(model.get_submodule(part.path).named_modules(remove_duplicate=False))
        for mode in part.distinct if distinct else MODES:
            yield prefix, mode, Flow(part.graphs[mode], modules, below, shared)


def _shared_between_parts(model: nn.Module, trace: Trace) -> frozenset[int]:
    """Return the identities of modules that more than one part calls, or may call under another name."""
    if len(trace.parts) == 1 and not trace.opaque:
        return frozenset()
    homes: dict[int, set[str]] = {}
    for part in trace.parts:
        root = model.get_submodule(part.path)
        for path in {path for graph in part.graphs.values() for path in graph.calls}:
            homes.setdefault(id(root.get_submodule(path)), set()).add(part.path)
    for name, module in model.named_modules(remove_duplicate=False):
        part_path = _innermost(name, (part.path for part in trace.parts))
        opaque = _innermost(name.rpartition(".")[0], trace.opaque) if name else None
        outside = part_path is None or (opaque is not None and len(opaque) >= len(part_path))
        homes.setdefault(id(module), set()).add(f"in the untraceable {opaque}" if outside else str(part_path))
    return frozenset(module for module, places in homes.items() if len(places) > 1)


def _innermost(name: str, paths: Iterable[str]) -> str | None:
    """Return the longest of the paths at or above ``name``."""
    above = [path for path in paths if not path or name == path or name.startswith(f"{path}.")]
    return max(above, key=len, default=None)


def analyse(
    model: nn.Module, trace: Trace, norms: Mapping[str, tuple[str, ...]], fixed: Iterable[str] = ()
) -> Findings:
    """Analyse every graph of a trace.

    Args:
        model: The module it was taken from.
        trace: The trace.
        norms: The first name of every norm with its further names, as :func:`normfree.norms.find_norms` returns them.
        fixed: Modules that must keep their class.
    """
    found_sites: dict[str, Site] = {}
    found_sums: dict[str, Sum] = {}
    rescaled: dict[str, Activation | None] = {}
    known: dict[str, bool] = {}
    functional: dict[str, None] = {}
    read: dict[str, str] = {}
    parameters: set[str] = set()
    consumers: dict[str, set[str | None]] = {}
    owners: dict[str, str] = {}
    first = {name: known for known, more in norms.items() for name in (known, *more)}
    for prefix, _, flow in flows(model, trace, first, distinct=True, fixed=fixed):
        functional.update(dict.fromkeys(_functional_norms(flow, prefix)))
        read.update({first[prefix + norm]: prefix + tensor for norm, tensor in flow.graph.read.items()})
        parameters.update(prefix + str(n.target) for n in flow.graph.nodes.nodes if n.op == "get_attr" and n.users)
        for path, followed in known_inputs(flow).items():
            known[prefix + path] = known.get(prefix + path, False) or followed
        rescaled.update({prefix + path: activation for path, activation in rescaled_layers(flow)})
        for node in flow.nodes:
            if flow.roles[node] is Role.NORM:
                site = find_site(flow, node, prefix)
                site = replace(site, name=first[site.name])
                if id(flow.modules[str(node.target)]) in flow.shared:  # what follows its other calls is not known
                    site = replace(site, fresh=False, unsafe_write=True)
                if site.producer is not None and _may_be_called_apart(flow, node, prefix):
                    why = "what calls it cannot be traced and may call its layers one by one"
                    site = replace(site, producer=None, why=why, fresh=False)
                found_sites[site.name] = agree(found_sites.get(site.name), site)
                owners.setdefault(site.name, prefix + flow.graph.owners[node])
            elif flow.roles[node] is Role.CONV and node.op == "call_module":
                consumers.setdefault(prefix + str(node.target), set()).add(_only_norm(flow, node, prefix, first))
        names = sum_names(flow)
        for found in find_sums(flow):
            total = _sum(flow, found, prefix, names[found.node], first)
            found_sums[total.name] = _agree_sum(found_sums.get(total.name), total)
    found_sites = {
        name: _without_doubtful_producer(site, consumers, owners, [n for n in norms if n not in found_sites], trace)
        for name, site in found_sites.items()
    }
    return Findings(
        found_sites,
        tuple(found_sums.values()),
        rescaled,
        known,
        frozenset(fixed),
        tuple(functional),
        read,
        frozenset(parameters),
    )


def _only_norm(flow: Flow, node: fx.Node, prefix: str, first: Mapping[str, str]) -> str | None:
    """Return the norm that alone reads what ``node`` returns, or ``None`` if somebody else does."""
    users = flow.users[node]
    single = len(users) == 1 and flow.roles[users[0]] is Role.NORM
    return first[prefix + str(users[0].target)] if single else None


def _without_doubtful_producer(
    site: Site, consumers: Mapping[str, set[str | None]], owners: Mapping[str, str], unseen: list[str], trace: Trace
) -> Site:
    """Take the producer back where another mode, or another argument, may use its output otherwise."""
    if site.producer is None:
        return site
    if consumers[site.producer] != {site.name}:
        return replace(site, producer=None, why=f"{site.producer} feeds something else in the other mode")
    holder = owners[site.name]
    inside = f"{holder}." if holder else ""
    beside = [name for name in unseen if name.startswith(inside) and _is_held_by(name, holder, owners, trace)]
    if beside:
        why = f"{beside[0]}, which no trace calls, may take its place for other arguments"
        return replace(site, producer=None, why=why)
    return site


def _is_held_by(name: str, holder: str, owners: Mapping[str, str], trace: Trace) -> bool:
    """Whether ``holder`` itself, and no traced or untraceable module below it, would call the norm ``name``."""
    path = name.rpartition(".")[0]
    while path != holder and path:
        if path in owners.values() or path in trace.opaque:
            return False
        path = path.rpartition(".")[0]
    return path == holder


def _may_be_called_apart(flow: Flow, node: fx.Node, prefix: str) -> bool:
    """Whether only plain ``nn.Sequential`` containers stand between a layer and a module that cannot be traced.

    Such a module may well iterate over the container or index it, and use what lies between its layers.
    """
    if not prefix:
        return False
    owner = flow.graph.owners[node]
    chain = ["", *(owner[: i + 1] for i in range(len(owner)) if i + 1 == len(owner) or owner[i + 1] == ".")]
    return all(type(flow.modules[path]) is nn.Sequential for path in chain)


def _sum(flow: Flow, found: SumNode, prefix: str, name: str, first: Mapping[str, str]) -> Sum:
    branches = []
    added = set(additions_of(flow, found.node))
    for operand in found.branches:
        norms = tuple(first[norm] for norm in _norms_between(flow, found.base, operand, prefix))
        direct = next(user for user in flow.users[operand] if user in added)
        candidates, why = find_candidates(flow, operand, direct, whole=not prefix)
        branches.append(Branch(norms, tuple(_prefixed(c, prefix, first) for c in candidates), why))
    return Sum(prefix + name, found.kind, found.reason, tuple(branches))


def _norms_between(flow: Flow, base: fx.Node | None, end: fx.Node, prefix: str) -> tuple[str, ...]:
    if base is None:
        return ()
    return tuple(prefix + norm for n in flow.between(base, end) for norm in flow.norms_in(n))


def _prefixed(candidate: Candidate, prefix: str, first: Mapping[str, str]) -> Candidate:
    path = prefix + candidate.path if candidate.path else prefix.rstrip(".")
    through = tuple(first[prefix + name] for name in candidate.through)
    return replace(candidate, path=first.get(path, path), through=through)


def _functional_norms(flow: Flow, prefix: str) -> Iterator[str]:
    for node in flow.nodes:
        if node.op == "call_function" and "batch_norm" in getattr(node.target, "__name__", ""):
            yield (prefix + flow.graph.owners[node]).rstrip(".") or "the root's forward"


def _agree_sum(known: Sum | None, total: Sum) -> Sum:
    if known is None or known == total:
        return total
    if known.kind != total.kind or len(known.branches) != len(total.branches):
        return Sum(total.name, "merge", "train and eval mode add different things here")
    branches = []
    for one, other in zip(known.branches, total.branches, strict=True):
        norms = tuple(dict.fromkeys(one.norms + other.norms))
        candidates = tuple(c for c in one.candidates if c in other.candidates)
        why = one.why or other.why or ("" if candidates else "train and eval mode end the branch differently")
        branches.append(Branch(norms, candidates, why))
    return Sum(total.name, total.kind, total.reason, tuple(branches))
