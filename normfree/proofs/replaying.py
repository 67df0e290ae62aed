"""Running a model a second time, to look at the tensors that the first time has shown to matter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from normfree.analysis.flow import Flow
from normfree.tracing.recorder import Recorder
from normfree.tracing.running import leaves_of, record
from normfree.tracing.traces import MODES, Graph

__all__ = ["replay"]


W = TypeVar("W")


def replay(
    model: nn.Module,
    sites: frozenset[str],
    arguments: Any,
    watch: Callable[[Flow], W],
    modes: Collection[str] = MODES,
) -> Iterator[W]:
    """Run a model that nobody else uses twice in each mode, and yield what has watched the second time.

    What watches is made of what the first run has shown. Its ``nodes`` are those whose tensors it hears of
    (``made(node, tensor)``); before one of its ``additions`` runs it is told what it has heard of
    (``before(node, tensors)``).
    """
    run = functools.partial(record, model, sites, leaves_of(model, sites), arguments)
    modules = dict(model.named_modules(remove_duplicate=False))
    for mode in modes:
        graph = run(training=mode == "train")
        watching = watch(Flow(graph, modules, sites))
        run(training=mode == "train", recorder=functools.partial(_Watched, graph=graph, watch=watching))
        yield watching


class _Watched(Recorder):
    """Tells a watch of the nodes that it is after: a run that is repeated writes down the same ones again."""

    values_count = True

    def __init__(self, *args: Any, graph: Graph, watch: Any) -> None:
        super().__init__(*args)
        self._watch = watch
        self._wanted = {graph.order[node]: node for node in watch.nodes}
        self._announced: dict[int, list[fx.Node]] = {}
        for node in watch.additions:
            self._announced.setdefault(graph.steps[node], []).append(node)
        self._known: dict[fx.Node, Tensor] = {}

    def next_step(self) -> None:
        super().next_step()
        for node in self._announced.get(self.step, ()):
            self._watch.before(node, self._known)

    def value(self, node: fx.Node, tensor: Tensor, *, writes: bool = False, handed_on: bool = False) -> None:
        earlier = self.seen.values.get(node)
        # What a layer wrote into is told first; it may return something else, as a ReLU in place that alpha scales.
        known = earlier is not None and (writes or not earlier.writes)
        super().value(node, tensor, writes=writes, handed_on=handed_on)
        wanted = None if known else self._wanted.get(self.seen.order[node])
        if wanted is not None:
            self._known[wanted] = tensor
            self._watch.made(wanted, tensor)
