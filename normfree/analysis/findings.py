"""Trace -> Findings: what is there, told without deciding anything.

Both modes of every part are analysed; a fact holds only if every graph in which the module appears agrees.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import fx, nn

from normfree.analysis.activations import Activation
from normfree.analysis.additions import additions_of, sum_names
from normfree.analysis.flow import Flow, Role
from normfree.analysis.moments import known_inputs
from normfree.analysis.sites import Site, agree, find_site, rescaled_layers
from normfree.analysis.sums import Kind, SumNode, find_sums, norms_between
from normfree.analysis.tails import Candidate, find_candidates
from normfree.tracing.traces import Trace

__all__ = ["Branch", "Findings", "Site", "Sum", "analyse", "flows"]


@dataclass(frozen=True)
class Branch:
    """One residual branch of a sum: its norms, where alpha could live, or why nowhere.

    A norm ``behind`` the sum is all that the sum goes into, as in a post-norm transformer: it scales the sum down, and
    without it nothing would hold the signal, so the branch must start at nothing as well.
    """

    norms: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    why: str
    behind: tuple[str, ...] = ()


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
        sites: Norms that were reached by a run.
        sums: Additions, in topological order.
        rescaled: Layers whose output scale a norm used to set, with the activation that follows each.
        known: Layers of whose input norms tell the mean, and whether a norm follows each.
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


def flows(model: nn.Module, trace: Trace, sites: Iterable[str], fixed: Iterable[str] = ()) -> Iterator[Flow]:
    """Yield every graph of a trace that differs from the others."""
    modules = dict(model.named_modules(remove_duplicate=False))
    shared = {id(modules[path]) for path in fixed}
    for graph in trace.distinct:
        yield Flow(graph, modules, sites, shared)


def analyse(
    model: nn.Module, trace: Trace, norms: Mapping[str, tuple[str, ...]], fixed: Iterable[str] = ()
) -> Findings:
    """Analyse every graph of a trace of a model, of which :func:`normfree.norms.find_norms` has returned the norms.

    Modules that are ``fixed`` must keep their class.
    """
    found_sites: dict[str, Site] = {}
    found_sums: dict[str, Sum] = {}
    rescaled: dict[str, Activation | None] = {}
    known, functional = dict[str, bool](), dict[str, None]()
    read: dict[str, str] = {}
    parameters: set[str] = set()
    consumers: dict[str, set[str | None]] = {}
    owners: dict[str, str] = {}
    first = {name: known for known, more in norms.items() for name in (known, *more)}
    for flow in flows(model, trace, first, fixed):
        read.update(flow.graph.read)
        parameters.update(str(n.target) for n in flow.graph.nodes.nodes if n.op == "get_attr" and n.users)
        known.update({path: known.get(path) or after for path, after in known_inputs(flow).items()})
        rescaled.update(rescaled_layers(flow))
        for node in flow.nodes:
            if flow.roles[node] is Role.NORM:
                site = find_site(flow, node)
                if id(flow.modules[str(node.target)]) in flow.shared:  # what follows its other calls is not known
                    site = replace(site, fresh=False, unsafe_write=True)
                found_sites[site.name] = agree(found_sites.get(site.name), site)
                owners.setdefault(site.name, flow.graph.owners[node])
            elif flow.roles[node] is Role.CONV and node.op == "call_module":
                consumers.setdefault(str(node.target), set()).add(_only_norm(flow, node))
            elif node.op == "call_function" and "batch_norm" in getattr(node.target, "__name__", ""):
                functional[flow.graph.owners[node] or "the root's forward"] = None
        names = sum_names(flow)
        for found in find_sums(flow):
            total = _sum(flow, found, names[found.node], first)
            found_sums[total.name] = _agree_sum(found_sums.get(total.name), total)
    unseen = [name for name in norms if name not in found_sites]
    found_sites = {
        name: _without_doubtful_producer(site, consumers, owners, unseen) for name, site in found_sites.items()
    }
    sums, held = tuple(found_sums.values()), frozenset(parameters)
    return Findings(found_sites, sums, rescaled, known, frozenset(fixed), tuple(functional), read, held)


def _only_norm(flow: Flow, node: fx.Node) -> str | None:
    """Return the norm that alone reads what ``node`` returns, or ``None`` if somebody else does."""
    user = flow.reader(node, (Role.RESHAPE,))
    return str(user.target) if user is not None and flow.roles[user] is Role.NORM else None


def _without_doubtful_producer(
    site: Site, consumers: Mapping[str, set[str | None]], owners: Mapping[str, str], unseen: list[str]
) -> Site:
    """Take the producer back where another mode, or another argument, may use its output otherwise."""
    if site.producer is None:
        return site
    if consumers[site.producer] != {site.name}:
        return replace(site, producer=None, why=f"{site.producer} feeds something else in the other mode")
    holder = owners[site.name]
    inside = f"{holder}." if holder else ""
    others = tuple(f"{owner}." for owner in owners.values() if owner.startswith(inside) and owner != holder)
    beside = [name for name in unseen if name.startswith(inside) and not name.startswith(others)]
    if beside:
        why = f"{beside[0]}, which no run calls, may take its place for other arguments"
        return replace(site, producer=None, why=why)
    return site


def _sum(flow: Flow, found: SumNode, name: str, first: Mapping[str, str]) -> Sum:
    branches = []
    added = set(additions_of(flow, found.node))
    user = flow.reader(found.node, (Role.PASS, Role.RESHAPE))
    behind = () if user is None or flow.roles[user] is not Role.NORM else (str(user.target),)
    for operand in found.branches:
        norms = tuple(first[norm] for norm in norms_between(flow, found.base, operand))
        direct = next(user for user in flow.users[operand] if user in added)
        twice = found.branches.count(operand) > 1
        candidates, why = ((), "the branch is added twice") if twice else find_candidates(flow, operand, direct)
        branches.append(Branch(norms, candidates, why, behind))
    return Sum(name, found.kind, found.reason, tuple(branches))


def _agree_sum(known: Sum | None, total: Sum) -> Sum:
    if known is None or known == total:
        return total
    if known.kind != total.kind or len(known.branches) != len(total.branches):
        return Sum(total.name, "merge", "train and eval mode add different things here")
    branches = []
    for one, other in zip(known.branches, total.branches, strict=True):
        norms, behind = (tuple(dict.fromkeys(a + b)) for a, b in ((one.norms, other.norms), (one.behind, other.behind)))
        calls = {replace(c, calls=0): c.calls for c in other.candidates}
        both = ((c, calls.get(replace(c, calls=0), 0)) for c in one.candidates)
        candidates = tuple(replace(c, calls=max(c.calls, more)) for c, more in both if more)
        why = one.why or other.why or ("" if candidates else "train and eval mode end the branch differently")
        branches.append(Branch(norms, candidates, why, behind))
    return Sum(total.name, total.kind, total.reason, tuple(branches))
