"""Proof 2: no sample learns anything about the others."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from normfree.norms import describe, find_norms
from normfree.proofs.case import Case, Found
from normfree.rewriting.comparing import error_between

__all__ = ["batch_independent"]

Measure = Callable[[Case, nn.Module], list[float]]
"""For each output, how far it moves when the rest of the batch is another."""


@torch.no_grad()
def batch_independent(case: Case) -> Found:
    """2: in train mode with dropout off, ``f(x)[i] == f(x[i:i+1])``, at random alpha: at 0 nobody sees a branch.

    Where no sample runs alone, ``f(x)[i]`` must stay what it is when ``x[i]`` takes the place of all the others. What
    the original computes of the whole batch with its norms frozen, such as a mean loss, is not the norms' doing.
    """
    if case.kept:
        return Found(None, None, f"{len(case.kept)} norms stay as planned")
    model = case.at_alpha(training=True)
    unlike = _two_calls(case, model)
    if unlike > case.tolerance(model):
        own = case.structure is not None and _two_calls(case, case.frozen(training=True)) > 0
        return Found(None if own else False, unlike, f"two identical calls differ by {unlike:.1e}")
    try:
        errors = _alone(case, model)
    except Exception as error:  # whatever a model raises for a batch that is too small for it
        return _in_company(case, model, f"no sample runs alone ({type(error).__name__})")
    mixed = _mixed(case, model, errors, _alone)
    claimed = [error for i, error in enumerate(errors) if i not in mixed]
    aside = f"the original with its norms frozen mixes the samples too in {len(mixed)} of {len(errors)} outputs"
    if not claimed:
        return Found(None, None, aside)
    detail = f"largest relative difference {max(claimed):.1e}" + (f"; {aside}" if mixed else "")
    return Found(max(claimed) <= case.tolerance(model), max(claimed), detail)


def _mixed(case: Case, model: nn.Module, errors: list[float], measure: Measure) -> set[int]:
    """Return the outputs in which the original, its norms frozen, mixes samples, if there is an error to be explained.

    Norms without statistics mix them too: where the original has such, it explains nothing.
    """
    structure = case.structure
    if structure is None or max(errors) <= case.tolerance(model):
        return set()
    if any(describe(structure.get_submodule(name)).mean is None for name in find_norms(structure)):
        return set()
    found: set[int] = set()
    for training in (False, True):  # a loss of its own may be there in train mode only
        with contextlib.suppress(Exception):  # a norm that does not learn may not be what a forward expects
            original = case.frozen(training)
            bound = case.tolerance(original)
            found |= {i for i, error in enumerate(measure(case, original)) if error > bound and i < len(errors)}
    return found


def _two_calls(case: Case, model: nn.Module) -> float:
    """Return by how much two calls differ that should not."""
    first, second = _runs(case, model, [None, None])
    return error_between(first, second)


def _runs(case: Case, model: nn.Module, picks: Iterable[slice | Tensor | None]) -> Iterator[list[Tensor]]:
    """Run some samples after others, from the same buffers: some move from call to call, as spectral norm's do."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for samples in picks:
        for buffer, value in buffers:
            buffer.copy_(value)
        yield case.run(model, samples)


def _alone(case: Case, model: nn.Module) -> list[float]:
    """Measure each sample alone."""
    together, *each = _runs(case, model, [None, *(slice(i, i + 1) for i in range(case.size))])
    if any(len(alone) != len(together) for alone in each):
        return [float("inf")]
    outputs = zip(together, *each, strict=True)
    return [error_between([_sample(x, i, case.size, y) for i, y in enumerate(alone)], alone) for x, *alone in outputs]


def _sample(x: Tensor, i: int, size: int, alone: Tensor) -> Tensor:
    """Return one sample of an output; its batch dimension is the one that has shrunk in what it was alone."""
    if x.dim() != alone.dim():
        return x
    shrunk = [d for d, (many, one) in enumerate(zip(x.shape, alone.shape, strict=True)) if (many, one) == (size, 1)]
    return x.narrow(shrunk[0], i, 1) if shrunk else x


def _in_company(case: Case, model: nn.Module, why: str) -> Found:
    """Prove it by replacing the other samples, for as few at a time as the original, norms frozen, looks at together.

    A video network may take the frames of a clip as samples and return one row a clip: clips must not mix.
    """
    rows = math.gcd(case.size, *(x.shape[0] if x.dim() else 1 for x in case.run(model)))
    for groups in (n for n in range(rows, 1, -1) if rows % n == 0):
        measure = functools.partial(_replaced, groups=groups)
        errors = measure(case, model)
        if not _mixed(case, model, errors, measure):
            worst, company = max(errors), "" if groups == case.size else f", {case.size // groups} at a time"
            detail = f"{why}; with the others replaced{company} the largest relative difference is {worst:.1e}"
            return Found(worst <= case.tolerance(model), worst, detail)
    return Found(None, None, f"{why}, and what the original returns with its norms frozen tells no samples apart")


def _replaced(case: Case, model: nn.Module, groups: int) -> list[float]:
    """Measure each group of samples in the place of all the others."""
    alike = [torch.arange(case.size).chunk(groups)[group].repeat(groups) for group in range(groups)]
    together, *each = _runs(case, model, [None, *alike])
    outputs = zip(together, *each, strict=True)
    return [
        error_between(list(x.chunk(groups)), [y.chunk(groups)[group] for group, y in enumerate(replaced)])
        for x, *replaced in outputs
    ]
