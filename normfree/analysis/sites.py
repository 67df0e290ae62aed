"""What the graphs say about each norm: what feeds it, what it feeds, and who would write through it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from normfree.analysis.activations import Activation, as_activation, following
from normfree.analysis.flow import Flow, Role
from normfree.analysis.passing import Taker, around_one, find_taker, moved_from
from normfree.analysis.writing import is_fresh, writers_of, writes_into
from normfree.layers.passing import weakest
from normfree.norms import describe

__all__ = ["Site", "agree", "find_site", "rescaled_layers"]


@dataclass(frozen=True)
class Site:
    """What the graphs say about one norm.

    Attributes:
        name: Qualified name.
        feed: What computes its input, for people.
        producer: The conv or linear that feeds it and nothing else, if both are called once; else ``None``.
        why: Why there is no producer.
        between: Modules whose forward only one of the two is called in.
        taker: What can take some of what it multiplies and adds.
        feeds: Convolutions and linears that its output reaches through activations.
        biasless: No bias can take its place but one in its slot: it is fed by a convolution or linear that has none and
            that we cannot give one, or neither fed by any nor feeding any.
        scaleless: Nor can anything take its scale: it is the identity branch of a parallel sum, or ends a branch alike.
        fresh: Its input is a new tensor that nobody else reads, so writing into it is harmless.
        input_written: Somebody else writes into its input in place, later.
        writers: Modules that write into its output in place, and so into its input once it is gone.
        unsafe_write: An operation that does the same and has no module to switch.
    """

    name: str
    feed: str
    producer: str | None
    why: str
    between: tuple[str, ...]
    taker: Taker | None
    feeds: tuple[str, ...]
    biasless: bool
    scaleless: bool
    fresh: bool
    input_written: bool
    writers: tuple[str, ...]
    unsafe_write: bool


def find_site(flow: Flow, node: fx.Node) -> Site:
    """Return what one graph says about the norm that ``node`` calls."""
    source = flow.inputs[node][0]
    layer = moved_from(flow, node)
    producer, why = _producer(flow, node, layer)
    writers, unsafe = writers_of(flow, node)
    feeds = tuple(dict.fromkeys(_feeds(flow, node)))
    alone = not feeds and not _is_weighted(flow, source)
    return Site(
        name=str(node.target),
        feed=_feed(flow, layer),
        producer=producer,
        why=why,
        between=() if producer is None else around_one(flow, producer, str(node.target)),
        taker=find_taker(flow, node),
        feeds=feeds,
        biasless=_is_biasless(flow, source) or alone,
        scaleless=alone and any(flow.roles[user] is Role.ADD for user in flow.users[node]),
        fresh=is_fresh(flow, source, node),
        input_written=bool(writes_into(flow, source, node)),
        writers=writers,
        unsafe_write=unsafe,
    )


def _feed(flow: Flow, source: fx.Node) -> str:
    module = flow.module(source)
    if module is not None:
        return f"{source.target} ({type(module).__name__})"
    return "input" if source.op == "placeholder" else source.name


def _producer(flow: Flow, node: fx.Node, source: fx.Node) -> tuple[str | None, str]:
    """Return the conv or linear whose weight can take the norm's gain, or why there is none."""
    module = flow.module(source)
    if not flow.called_once(node):
        return None, _called_often(flow, node, "the norm")
    if module is None or flow.roles[source] is not Role.CONV:
        return None, "not fed by a convolution or linear"
    if not flow.carries(source):
        return None, f"fed by {type(module).__name__}, whose output may not be linear in its weight"
    if not flow.called_once(source):
        return None, _called_often(flow, source, str(source.target))
    others = [user.name for user in flow.users[source] if user is not node]
    if len(flow.users[source]) > 1:
        return None, f"{source.target} also feeds {', '.join(others)}"
    features = getattr(module, "out_channels", 0) or getattr(module, "out_features", 0)
    if features != describe(flow.modules[str(node.target)]).features:
        return None, "the norm's channels are not the output features of what feeds it"
    if isinstance(module, nn.Linear) and source is flow.inputs[node][0] and len(flow.shape(source) or ()) != 2:
        return None, "fed by a linear whose output has tokens in dimension 1"
    return str(source.target), ""


def _is_biasless(flow: Flow, source: fx.Node) -> bool:
    layer = flow.above(source, (Role.RESHAPE,))
    unable = flow.roles[layer] is Role.CONV and not flow.carries(layer)
    return unable and getattr(flow.module(layer), "bias", None) is None


def _is_weighted(flow: Flow, source: fx.Node) -> bool:
    """Whether a convolution or linear computes ``source``, seen through what only moves or pools its values."""
    moving = (Role.RESHAPE, Role.PASS, Role.POOL, Role.SLICE, Role.UPSAMPLE, Role.NORM)
    return flow.roles[flow.above(source, moving)] is Role.CONV


def _called_often(flow: Flow, node: fx.Node, what: str) -> str:
    calls = flow.graph.calls[str(node.target)]
    return f"{what} is called {calls} times" if calls > 1 else f"a forward asks for the class of {what}"


def _feeds(flow: Flow, node: fx.Node) -> Iterator[str]:
    for user in flow.users[node]:
        if flow.carries(user):
            yield str(user.target)
        elif flow.roles[user] in (Role.PASS, Role.PAD) or as_activation(flow, user) is not None:
            yield from _feeds(flow, user)


def rescaled_layers(flow: Flow) -> Iterator[tuple[str, Activation | None]]:
    """Yield the layers whose output a norm divides by its deviation, at once or further down the same path."""
    norms = sum(flow.bit(node) for node in flow.nodes if flow.roles[node] is Role.NORM)
    fed = {path for node in flow.nodes if flow.roles[node] is Role.NORM for path in _feeds(flow, node)}
    for node in flow.nodes:
        module = flow.module(node)
        if flow.roles[node] is not Role.CONV or module is None or not flow.descendants[node] & norms:
            continue
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            continue  # weight normalisation and parametrisations compute it from something else
        if str(node.target) in fed or any(flow.roles[user] is Role.NORM for user in flow.users[node]):
            yield str(node.target), following(flow, node)


def agree(known: Site | None, site: Site) -> Site:
    """Join what two graphs say about one norm: a producer only if it is the same in both."""
    if known is None or known == site:
        return site
    one, other = vars(known), vars(site)
    joined = Site(**{name: _either(one[name], other[name]) for name in one})
    joined = replace(joined, fresh=known.fresh and site.fresh, taker=_same_taker(known.taker, site.taker))
    if known.producer == site.producer:
        return joined
    return replace(joined, producer=None, why=joined.why or "fed differently in train and in eval mode")


def _either(known: Any, value: Any) -> Any:
    return tuple(dict.fromkeys(known + value)) if isinstance(known, tuple) else known or value


def _same_taker(known: Taker | None, taker: Taker | None) -> Taker | None:
    if known is None or taker is None or known.path != taker.path:
        return None
    moves = weakest((known.moves, taker.moves)) or "gain"
    return Taker(known.path, moves, _either(known.through, taker.through), _either(known.behind, taker.behind))
