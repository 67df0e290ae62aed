"""Proof 2: no sample learns anything about the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from normfree.proofs.case import Case, Proof, error_between

__all__ = ["batch_independent"]

_NAME = "no output depends on the rest of the batch"


@torch.no_grad()
def batch_independent(case: Case) -> Proof:
    """2: in train mode with dropout off, ``f(x)[i] == f(x[i:i+1])``.

    Where no sample runs alone, ``f(x)[i]`` must stay what it is when ``x[i]`` takes the place of all the others.
    """
    if case.kept:
        return Proof(2, _NAME, None, None, f"{len(case.kept)} norms stay as planned")
    model = case.exact(case.model, training=True)
    try:
        worst = _alone(case, model)
    except Exception as error:  # whatever a model raises for a batch that is too small for it
        return _in_company(case, model, f"no sample runs alone ({type(error).__name__})")
    return Proof(2, _NAME, worst <= case.tolerance(model), worst, f"largest relative difference {worst:.1e}")


def _runs(case: Case, model: nn.Module, picks: Iterable[slice | Tensor | None]) -> Iterator[list[Tensor]]:
    """Run some samples after others, from the same buffers: some move from call to call, as spectral norm's do."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for samples in picks:
        for buffer, value in buffers:
            buffer.copy_(value)
        yield case.run(model, samples)


def _alone(case: Case, model: nn.Module) -> float:
    """Return how far the outputs are from those of each sample alone."""
    together, *each = _runs(case, model, [None, *(slice(i, i + 1) for i in range(case.size))])
    worst = 0.0
    for i, alone in enumerate(each):
        mine = [_sample(x, i, case.size, other) for x, other in itertools.zip_longest(together, alone)]
        worst = max(worst, error_between(mine, alone))
    return worst


def _sample(x: Tensor | None, i: int, size: int, alone: Tensor | None) -> Tensor:
    """Return one sample of an output; its batch dimension is the one that has shrunk in what it was alone."""
    if x is None or alone is None or x.dim() != alone.dim():
        return torch.empty(0)
    shrunk = [d for d, (many, one) in enumerate(zip(x.shape, alone.shape, strict=True)) if (many, one) == (size, 1)]
    return x.narrow(shrunk[0], i, 1) if shrunk else x


def _in_company(case: Case, model: nn.Module, why: str) -> Proof:
    """Prove it by replacing the other samples, for as few at a time as the original, in eval mode, looks at together.

    A video network may take the frames of a clip as samples and return one row a clip: clips must not mix.
    """
    rows = math.gcd(case.size, *(x.shape[0] if x.dim() else 1 for x in case.run(model)))
    for groups in (n for n in range(rows, 1, -1) if rows % n == 0):
        worst = _replaced(case, model, groups)
        passed = worst <= case.tolerance(model)
        if passed or not _mixes(case, groups):
            company = "" if groups == case.size else f", {case.size // groups} at a time"
            detail = f"{why}; with the others replaced{company} the largest relative difference is {worst:.1e}"
            return Proof(2, _NAME, passed, worst, detail)
    return Proof(2, _NAME, None, None, f"{why}, and what the original returns in eval mode tells no samples apart")


def _replaced(case: Case, model: nn.Module, groups: int) -> float:
    """Return how far each group of samples moves when it takes the place of all the others."""
    alike = [torch.arange(case.size).chunk(groups)[group].repeat(groups) for group in range(groups)]
    together, *each = _runs(case, model, [None, *alike])
    worst = 0.0
    for group, found in enumerate(each):
        before, after = ([x.chunk(groups)[group] for x in outputs] for outputs in (together, found))
        worst = max(worst, error_between(before, after))
    return worst


def _mixes(case: Case, groups: int) -> bool:
    """Whether the original itself, in eval mode, mixes groups of samples."""
    if case.structure is None:
        return False
    original = case.exact(case.structure, training=False)
    return _replaced(case, original, groups) > case.tolerance(original)
