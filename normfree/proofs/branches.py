"""Proof 4: at alpha = 0 the network is exactly its skip paths."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor, fx, nn

from normfree.analysis.additions import additions_of, sum_names
from normfree.analysis.flow import Flow
from normfree.analysis.sums import find_sums
from normfree.errors import some
from normfree.proofs.case import Case, Found
from normfree.proofs.replaying import replay
from normfree.rewriting.comparing import error_between
from normfree.tracing.copying import deep_copy
from normfree.tracing.traces import MODES

__all__ = ["branches_vanish"]


@torch.no_grad()
def branches_vanish(case: Case) -> Found:
    """4: alpha = 0 makes every scaled branch exactly zero, and nothing writes into a skip path."""
    if case.plan.fused:
        return Found(None, None, "the model is fused: its scalars are part of its weights")
    scaled = {total.name: len(total.alphas) for total in case.plan.sums if total.alphas}
    zero, written = _watch(case, case.at_alpha(training=False, zero=True), set(scaled))
    model = case.at_alpha(training=False)  # what is written of a branch shows only where the branch is not zero
    written = list(dict.fromkeys([*written, *_watch(case, model, set(scaled), ("train",))[1]]))
    if written and case.structure is not None:
        theirs = _watch(case, case.exact(case.structure, training=False), set(scaled))[1]
        written = [name for name in written if name not in theirs]
    alive = [name for name in scaled if name in zero and zero[name] < scaled[name]]
    unseen = [name for name in scaled if name not in zero]
    moved, tolerance = _inplace_error(case, model), case.tolerance(model)
    if moved > tolerance and case.structure is not None:
        moved = 0.0 if _inplace_error(case, case.exact(case.structure, training=False)) else moved
    problems = [
        *([f"branch not zero at {some(alive)}"] if alive else []),
        *([f"not reached: {some(unseen)}"] if unseen else []),
        *([f"skip path overwritten at {some(written)}"] if written else []),
        *([f"in-place activations change the output by {moved:.1e}"] if moved > tolerance else []),
    ]
    total, missing = sum(scaled.values()), len(case.plan.unseen)
    detail = "; ".join(problems) or f"{total} branches exactly zero at alpha = 0, their skip paths untouched"
    if missing:  # sums around them have no scalar, and nobody has counted them
        detail += f"; not proven for what is around {missing} norms that went unseen"
    return Found(False if problems else None if missing else True, float(len(problems)), detail)


def _watch(
    case: Case, model: nn.Module, names: set[str], modes: Collection[str] = MODES
) -> tuple[dict[str, int], list[str]]:
    """Return how many branches are zero at each sum that ran, and where a skip path was overwritten."""
    zero: dict[str, int] = {}
    written: list[str] = []
    for done in replay(model, case.plan.sites, case.inputs(), functools.partial(_Looks, names=names), modes):
        for name, count in done.zero_branches.items():
            zero[name] = min(count, zero.get(name, count))
        written += done.written
    return zero, list(dict.fromkeys(written))


class _Looks:
    """Counts branches that are zero, and finds skip paths that were written into, at the moment they are added.

    Not later: ``y += x; z + y`` writes over a branch once it has been added, and no harm is done.
    """

    def __init__(self, flow: Flow, names: set[str]) -> None:
        self._branches: dict[fx.Node, list[tuple[str, tuple[fx.Node, ...], tuple[fx.Node, ...]]]] = {}
        named = sum_names(flow)
        for found in find_sums(flow):
            if named[found.node] not in names or found.skip is None or found.base is None:
                continue
            for addition in additions_of(flow, found.node):
                operands = flow.inputs[addition]
                intact = (found.skip, found.base) if found.skip in operands else ()
                looked = named[found.node], tuple(b for b in found.branches if b in operands), intact
                self._branches.setdefault(addition, []).append(looked)
        self.additions = set(self._branches)
        looks = [look for found in self._branches.values() for look in found]
        self._intact = {node for *_, intact in looks for node in intact}
        self.nodes = self._intact | {node for _, branches, _ in looks for node in branches}
        self._copies: dict[fx.Node, Tensor] = {}
        self.zero_branches: Counter[str] = Counter()
        self.written: list[str] = []

    def made(self, node: fx.Node, value: Tensor) -> None:
        """Keep a copy of a skip path."""
        if node in self._intact:
            self._copies[node] = value.detach().clone()

    def before(self, node: fx.Node, values: dict[fx.Node, Tensor]) -> None:
        """Look at what is about to be added."""
        for name, branches, intact in self._branches[node]:
            self.zero_branches[name] += sum(not torch.any(values[branch]) for branch in branches)
            if not all(torch.equal(values[kept], self._copies[kept]) for kept in intact):
                self.written.append(name)


def _inplace_error(case: Case, model: nn.Module) -> float:
    """How far the output moves when every in-place activation works out of place."""
    worst = 0.0
    for training in (True, False):
        apart = deep_copy(model.train(training))  # a norm that stays updates its statistics in train mode
        for module in apart.modules():
            if getattr(module, "inplace", False) is True:
                module.__dict__["inplace"] = False
        worst = max(worst, error_between(case.run(model), case.run(apart)))
    return worst
