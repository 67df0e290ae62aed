"""Trace -> Findings: what is there, told without deciding anything.

Both modes of every part are analysed; a fact holds only if every graph in which the module appears agrees.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from normfree.activations import Activation, as_activation
from normfree.graph import Flow, Role, is_inplace
from normfree.layers import is_carrier
from normfree.norms import describe
from normfree.sums import Kind, SumNode, find_sums, sum_names
from normfree.tails import Candidate, find_candidates
from normfree.tracing import MODES, Trace

__all__ = ["Branch", "Findings", "Site", "Sum", "analyse", "flows"]


@dataclass(frozen=True)
class Site:
    """What the graphs say about one norm.

    Attributes:
        name: Qualified name.
        feed: What computes its input, for people.
        producer: The conv or linear that feeds it and nothing else, if both are called once; else ``None``.
        why: Why there is no producer.
        feeds: Convolutions and linears that its output reaches through activations.
        fresh: Its input is a new tensor that nobody else reads, so writing into it is harmless.
        writers: Modules that write into its output in place, and so into its input once it is gone.
        unsafe_write: An operation that does the same and has no module to switch.
    """

    name: str
    feed: str
    producer: str | None
    why: str
    feeds: tuple[str, ...]
    fresh: bool
    writers: tuple[str, ...]
    unsafe_write: bool


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
        functional: Places where ``F.batch_norm`` normalises an activation.
    """

    sites: Mapping[str, Site]
    sums: tuple[Sum, ...]
    rescaled: Mapping[str, Activation | None]
    functional: tuple[str, ...]


def flows(model: nn.Module, trace: Trace, sites: Iterable[str]) -> Iterator[tuple[str, str, Flow]]:
    """Yield ``(part, mode, flow)`` for every graph of a trace."""
    for part in trace.parts:
        prefix = f"{part.path}." if part.path else ""
        below = frozenset(site.removeprefix(prefix) for site in sites if site.startswith(prefix))
        modules = dict(model.get_submodule(part.path).named_modules(remove_duplicate=False))
        for mode in MODES:
            yield prefix, mode, Flow(part.graphs[mode], modules, below)


def analyse(model: nn.Module, trace: Trace, sites: Iterable[str]) -> Findings:
    """Analyse every graph of a trace; ``model`` is the module it was taken from."""
    found_sites: dict[str, Site] = {}
    found_sums: dict[str, Sum] = {}
    functional: dict[str, None] = {}
    rescaled: dict[str, Activation | None] = {}
    for prefix, _, flow in flows(model, trace, sites):
        functional.update(dict.fromkeys(_functional_norms(flow, prefix)))
        rescaled.update({prefix + path: activation for path, activation in _rescaled(flow)})
        for node in flow.nodes:
            if flow.roles[node] is Role.NORM:
                site = _site(flow, node, prefix)
                found_sites[site.name] = _agree(found_sites.get(site.name), site)
        names = sum_names(flow)
        for found in find_sums(flow):
            total = _sum(flow, found, prefix, names[found.node])
            found_sums[total.name] = _agree_sum(found_sums.get(total.name), total)
    return Findings(found_sites, tuple(found_sums.values()), rescaled, tuple(functional))


def _site(flow: Flow, node: fx.Node, prefix: str) -> Site:
    source = flow.inputs[node][0]
    producer, why = _producer(flow, node, source)
    writers, unsafe = _writers(flow, node)
    return Site(
        name=prefix + str(node.target),
        feed=_feed(flow, source, prefix),
        producer=None if producer is None else prefix + producer,
        why=why,
        feeds=tuple(prefix + path for path in dict.fromkeys(_feeds(flow, node))),
        fresh=_is_fresh(flow, source) and flow.users[source] == [node],
        writers=tuple(prefix + path for path in writers),
        unsafe_write=unsafe,
    )


def _feed(flow: Flow, source: fx.Node, prefix: str) -> str:
    module = flow.module(source)
    if module is not None:
        return f"{prefix}{source.target} ({type(module).__name__})"
    return "input" if source.op == "placeholder" else source.name


def _producer(flow: Flow, node: fx.Node, source: fx.Node) -> tuple[str | None, str]:
    """Return the conv or linear whose weight can take the norm's gain, or why there is none."""
    module = flow.module(source)
    calls = flow.graph.calls[str(node.target)]
    if calls != 1:
        return None, f"the norm is called {calls} times"
    if module is None or flow.roles[source] is not Role.CONV:
        return None, "not fed by a convolution or linear"
    if not is_carrier(module):
        return None, f"fed by {type(module).__name__}, whose forward or weight is not torch's own"
    if not flow.called_once(source):
        return None, f"{source.target} is called {flow.graph.calls[str(source.target)]} times"
    others = [user.name for user in flow.users[source] if user is not node]
    if others:
        return None, f"{source.target} also feeds {', '.join(others)}"
    if _features(module) != describe(flow.modules[str(node.target)]).features:
        return None, "the norm's channels are not the output features of what feeds it"
    if isinstance(module, nn.Linear) and not _is_matrix(flow, source):
        return None, "fed by a linear whose output may have tokens in dimension 1"
    return str(source.target), ""


def _features(module: nn.Module) -> int:
    return int(getattr(module, "out_channels", 0) or getattr(module, "out_features", 0))


def _is_matrix(flow: Flow, node: fx.Node) -> bool:
    """Whether the graph itself shows that ``node`` has shape ``(N, C)``."""
    while True:
        role, module = flow.roles[node], flow.module(node)
        if role is Role.RESHAPE:
            if isinstance(module, nn.Flatten):
                return (module.start_dim, module.end_dim) == (1, -1)
            dims = (*node.args[1:], *node.kwargs.values())
            if node.target in (torch.flatten, "flatten"):
                return dims == (1,)
            return node.target in ("view", "reshape") and len(dims) == 2
        keeps_rank = isinstance(module, (nn.Linear, nn.BatchNorm1d)) or role is Role.PASS
        if not (keeps_rank or as_activation(flow, node) is not None):
            return False
        if len(flow.inputs[node]) != 1:
            return False
        node = flow.inputs[node][0]


def _feeds(flow: Flow, node: fx.Node) -> Iterator[str]:
    for user in flow.users[node]:
        module = flow.module(user)
        if module is not None and is_carrier(module):
            yield str(user.target)
        elif flow.roles[user] in (Role.PASS, Role.PAD) or as_activation(flow, user) is not None:
            yield from _feeds(flow, user)


def _rescaled(flow: Flow) -> Iterator[tuple[str, Activation | None]]:
    """Yield the layers whose output a norm divides by its deviation, at once or further down the same path."""
    norms = sum(flow.bit(node) for node in flow.nodes if flow.roles[node] is Role.NORM)
    fed = {path for node in flow.nodes if flow.roles[node] is Role.NORM for path in _feeds(flow, node)}
    for node in flow.nodes:
        if flow.roles[node] is not Role.CONV or node.op != "call_module" or not flow.descendants[node] & norms:
            continue
        if str(node.target) in fed or any(flow.roles[user] is Role.NORM for user in flow.users[node]):
            yield str(node.target), _activation(flow, node)


def _activation(flow: Flow, node: fx.Node) -> Activation | None:
    """Return the first activation behind ``node``, seen through norms and what else keeps the distribution."""
    while True:
        for user in flow.users[node]:
            function = as_activation(flow, user)
            if function is not None:
                return function
        if len(flow.users[node]) != 1:
            return None
        node = flow.users[node][0]
        if flow.roles[node] is Role.NORM:
            act = flow.activation_in(node)
            if act is not None:
                return act
        elif flow.roles[node] not in (Role.PASS, Role.RESHAPE):
            return None


def _writers(flow: Flow, node: fx.Node) -> tuple[tuple[str, ...], bool]:
    """Find what writes in place into the norm's output, directly or through a view."""
    writers: list[str] = []
    unsafe = False
    aliases = [node]
    while aliases:
        alias = aliases.pop()
        for user in flow.users[alias]:
            if is_inplace(user, flow.modules) and (user.op == "call_module" or user.args[0] is alias):
                if user.op == "call_module":
                    writers.append(str(user.target))
                else:
                    unsafe = True
                aliases.append(user)
            elif flow.roles[user] in (Role.PASS, Role.RESHAPE, Role.SLICE, Role.SPLIT):
                aliases.append(user)
    return tuple(dict.fromkeys(writers)), unsafe


def _is_fresh(flow: Flow, source: fx.Node) -> bool:
    """Whether ``source`` is a tensor of its own that its operation did not keep for backward."""
    module = flow.module(source)
    if module is not None:
        return is_carrier(module)
    return flow.roles[source] in (Role.CONV, Role.CAT) or source.target in (torch.add, operator.add)


def _sum(flow: Flow, found: SumNode, prefix: str, name: str) -> Sum:
    branches = []
    for operand in found.branches:
        norms = _norms_between(flow, found.base, operand, prefix)
        candidates, why = find_candidates(flow, operand, found.node)
        branches.append(Branch(norms, tuple(_prefixed(c, prefix) for c in candidates), why))
    return Sum(prefix + name, found.kind, found.reason, tuple(branches))


def _norms_between(flow: Flow, base: fx.Node | None, end: fx.Node, prefix: str) -> tuple[str, ...]:
    if base is None:
        return ()
    return tuple(prefix + str(n.target) for n in flow.between(base, end) if flow.roles[n] is Role.NORM)


def _prefixed(candidate: Candidate, prefix: str) -> Candidate:
    through = tuple(prefix + name for name in candidate.through)
    return Candidate(prefix + candidate.path, candidate.place, through, candidate.channels)


def _functional_norms(flow: Flow, prefix: str) -> Iterator[str]:
    for node in flow.nodes:
        if node.op == "call_function" and "batch_norm" in getattr(node.target, "__name__", ""):
            yield (prefix + flow.graph.owners[node]).rstrip(".") or "the root's forward"


def _agree(known: Site | None, site: Site) -> Site:
    """Join what two graphs say about one norm: a producer only if it is the same in both."""
    if known is None or known == site:
        return site
    same = known.producer == site.producer
    return Site(
        name=site.name,
        feed=known.feed,
        producer=known.producer if same else None,
        why=known.why or site.why or ("" if same else "fed differently in train and in eval mode"),
        feeds=tuple(dict.fromkeys(known.feeds + site.feeds)),
        fresh=known.fresh and site.fresh,
        writers=tuple(dict.fromkeys(known.writers + site.writers)),
        unsafe_write=known.unsafe_write or site.unsafe_write,
    )


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
