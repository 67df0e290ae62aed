"""How large a signal arrives at every residual sum, and how much of it the branch brings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, fx, nn

from normfree.analysis.additions import additions_of, sum_names
from normfree.analysis.flow import Flow
from normfree.analysis.sums import find_sums
from normfree.conversion import convert
from normfree.edits import Init
from normfree.errors import UsageError
from normfree.norms import find_norms
from normfree.planning.plan import plan as make_plan
from normfree.plans import plan_on
from normfree.proofs.replaying import replay
from normfree.tracing.copying import deep_copy
from normfree.tracing.inputs import Inputs, arguments
from normfree.tracing.trace import example_input
from normfree.training.drawing import cells, plot
from normfree.training.initialization import draw_

__all__ = ["Moments", "Signal", "Signals", "before_and_after", "signals"]


@dataclass(frozen=True)
class Moments:
    """Moments of an activation ``(N, C, *)`` over batch and space, averaged over its channels.

    Attributes:
        second: The second moment.
        mean: The squared mean of a channel.
        variance: The variance of a channel: ``second - mean``.
    """

    second: float
    mean: float
    variance: float

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Measure an activation; the channels of one without space ``(N, C)`` are its second dimension, too."""
        values = x.detach().double().movedim(1, 0).flatten(1)
        second, mean = values.square().mean(1), values.mean(1).square()
        return cls(float(second.mean()), float(mean.mean()), float((second - mean).mean()))


@dataclass(frozen=True)
class Signal:
    """What is added at one residual sum.

    Attributes:
        name: The sum, as :func:`normfree.plan` names it.
        skip: The skip path.
        branch: The residual branch; the sum of them where there are several.
        total: What the addition returns.
    """

    name: str
    skip: Moments
    branch: Moments
    total: Moments

    @property
    def share(self) -> float:
        """Second moment of the branch over that of the sum; not a number if the sum is zero."""
        return self.branch.second / self.total.second if self.total.second else float("nan")


@dataclass(frozen=True)
class Signals:
    """The residual sums of a model in the order in which they run; printing it shows a table.

    Attributes:
        rows: One entry a sum.

    Example:
        >>> import normfree, timm, torch
        >>> found = normfree.signals(timm.create_model("resnetv2_18"), torch.randn(8, 3, 64, 64))
        >>> isinstance(found, normfree.Signals), found.rows[0].name
        (True, 'stages.0.blocks.0.add')
        >>> str(found).split()[:4]
        ['sum', 'skip', 'x2', 'skip']
    """

    rows: tuple[Signal, ...]

    def __str__(self) -> str:
        lines = cells(self)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
        return "\n".join("  ".join(line).rstrip() for line in padded)

    def plot(self, path: str | Path) -> None:
        """Draw second moments and the branch's share; the ending of ``path`` says in what format.

        Raises:
            UsageError: matplotlib is not installed.
        """
        plot({"": self}, path)


def signals(model: nn.Module, x: Inputs | None = None) -> Signals:
    """Measure what the skip path and the residual branch bring to every residual sum.

    At initialisation batch norm makes each branch as large as the input of its stage, so that the ``l``-th sum of a
    stage takes ``1 / (l + 1)`` of its second moment from its branch (De & Smith, NeurIPS 2020, section 2): deep blocks
    are close to the identity. Where norms are deleted and nothing takes their place, the signal grows with every block
    instead; after :func:`normfree.convert` with ``init="skipinit"`` it stays what it was.

    A copy of the model is run in train mode, so norms use the statistics of the batch, with dropout off.

    Args:
        model: Any model, converted or not; it is not changed.
        x: What it is run on: a tensor ``(N, C, *)``, a tuple of arguments, or a mapping of keyword arguments. Default:
            white noise ``(16, C, *)`` of a shape the model takes.

    Returns:
        A row for each residual sum that ran, with the moments of skip path, branch and sum over ``(N, *)``.

    Raises:
        UsageError: No residual sum ran, or no input is known for the model.

    Example:
        >>> import normfree, timm, torch
        >>> model = normfree.convert(timm.create_model("resnetv2_18"))
        >>> rows = normfree.signals(model, torch.randn(8, 3, 64, 64)).rows
        >>> len(rows), rows[1].share
        (8, 0.0)
    """
    plan = plan_on(model)
    sites = frozenset(find_norms(model)) if plan is None else plan.sites
    given = arguments(example_input(model, batch=16) if x is None else x)
    found: dict[str, Signal] = {}
    for probe in replay(deep_copy(model), sites, given, _Probe, modes=("train",)):
        for row in probe.rows():
            found.setdefault(row.name, row)
    if not found:
        raise UsageError(f"no residual sum of this {type(model).__name__} ran: there is nothing to measure")
    return Signals(tuple(found.values()))


def before_and_after(model: nn.Module, init: Init | Literal["auto"] = "auto") -> Iterator[tuple[str, nn.Module]]:
    """Yield a model as it is, with its norms deleted (every alpha fixed at one), and converted, each with a title.

    From scratch all three get the weights that the conversion would draw, so that only the norms make the difference.

    Args:
        model: A model with norms; it is not changed.
        init: The starting point, as in :func:`normfree.convert`.
    """
    plan, model = make_plan(model, init=init), deep_copy(model)
    draw_([(model.get_submodule(path), gain) for path, gain in plan.drawn])
    yield "with its norms", model
    yield "norms deleted", convert(model, init="skipinit", alpha=1.0, reset=False)
    yield f"converted ({plan.init})", convert(model, init=plan.init, reset=False)


class _Probe:
    """Measures the operands and the result of every residual sum."""

    def __init__(self, flow: Flow) -> None:
        self._names = sum_names(flow)
        self._sums = [total for total in find_sums(flow) if total.skip is not None]
        self._operands: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = {}
        for total in self._sums:
            for addition in additions_of(flow, total.node):
                added = [n for n in (total.skip, *total.branches) if n is not None and n in flow.inputs[addition]]
                self._operands.setdefault(addition, []).extend((total.node, n) for n in added)
        self.additions = set(self._operands)
        self._totals = {total.node for total in self._sums}
        self.nodes = self._totals | {n for found in self._operands.values() for _, n in found}
        self._measured: dict[tuple[fx.Node, fx.Node | None], Moments] = {}

    def made(self, node: fx.Node, value: Tensor) -> None:
        """Measure what a sum has returned."""
        if node in self._totals:
            self._measured[node, node] = Moments.of(value)

    def before(self, node: fx.Node, values: dict[fx.Node, Tensor]) -> None:
        """Measure what is about to be added: the addition may write into it."""
        for total, operand in self._operands[node]:
            self._measured[total, operand] = Moments.of(values[operand])

    def rows(self) -> Iterator[Signal]:
        """Yield what was measured."""
        for total in self._sums:
            parts = [self._measured.get((total.node, operand)) for operand in (total.skip, *total.branches, total.node)]
            known = [part for part in parts if part is not None]
            if len(known) == len(parts):
                yield Signal(self._names[total.node], known[0], _together(known[1:-1]), known[-1])


def _together(branches: list[Moments]) -> Moments:
    """Add the moments of several branches, as if they were independent."""
    return Moments(*(sum(getattr(m, name) for m in branches) for name in ("second", "mean", "variance")))
