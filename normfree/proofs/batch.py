"""Proof 2: no sample learns anything about the others."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from normfree.norms import describe, find_norms
from normfree.proofs.case import Case, Proof, error_between

__all__ = ["batch_independent"]

_NAME = "no output depends on the rest of the batch"
Measure = Callable[[Case, nn.Module], list[float]]
"""For each output, how far it moves when the rest of the batch is another."""


@torch.no_grad()
def batch_independent(case: Case) -> Proof:
    """2: in train mode with dropout off, ``f(x)[i] == f(x[i:i+1])``.

    Where no sample runs alone, ``f(x)[i]`` must stay what it is when ``x[i]`` takes the place of all the others. What
    the original computes of the whole batch without their help, such as a mean loss, is not the norms' doing.
    """
    if case.kept:
        return Proof(2, _NAME, None, None, f"{len(case.kept)} norms stay as planned")
    model = case.exact(case.model, training=True)
    try:
        errors = _alone(case, model)
    except Exception as error:  # whatever a model raises for a batch that is too small for it
        return _in_company(case, model, f"no sample runs alone ({type(error).__name__})")
    mixed = _mixed(case, model, errors, _alone)
    claimed = [error for i, error in enumerate(errors) if i not in mixed]
    aside = f"the original mixes the samples in eval mode too in {len(mixed)} of {len(errors)} outputs"
    if not claimed:
        return Proof(2, _NAME, None, None, aside)
    detail = f"largest relative difference {max(claimed):.1e}" + (f"; {aside}" if mixed else "")
    return Proof(2, _NAME, max(claimed) <= case.tolerance(model), max(claimed), detail)


def _mixed(case: Case, model: nn.Module, errors: list[float], measure: Measure) -> set[int]:
    """Return the outputs in which the original mixes samples in eval mode, if there is an error to be explained.

    Norms without statistics mix them too: where the original has such, it explains nothing.
    """
    structure = case.structure
    if structure is None or max(errors) <= case.tolerance(model):
        return set()
    if any(describe(structure.get_submodule(name)).mean is None for name in find_norms(structure)):
        return set()
    original = case.exact(structure, training=False)
    bound, found = case.tolerance(original), measure(case, original)
    if len(found) < len(errors):  # what is returned in train mode only, as a loss is
        original.train()
        for name in find_norms(original):
            original.get_submodule(name).eval()
        found += measure(case, original)[len(found) :]
    return {i for i, error in enumerate(found) if error > bound and i < len(errors)}


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
    found = []
    for i, alone in enumerate(each):
        pairs = zip(together, alone, strict=True)
        found.append([error_between([_sample(x, i, case.size, y)], [y]) for x, y in pairs])
    return [max(errors) for errors in zip(*found, strict=True)]


def _sample(x: Tensor, i: int, size: int, alone: Tensor) -> Tensor:
    """Return one sample of an output; its batch dimension is the one that has shrunk in what it was alone."""
    if x.dim() != alone.dim():
        return x
    shrunk = [d for d, (many, one) in enumerate(zip(x.shape, alone.shape, strict=True)) if (many, one) == (size, 1)]
    return x.narrow(shrunk[0], i, 1) if shrunk else x


def _in_company(case: Case, model: nn.Module, why: str) -> Proof:
    """Prove it by replacing the other samples, for as few at a time as the original, in eval mode, looks at together.

    A video network may take the frames of a clip as samples and return one row a clip: clips must not mix.
    """
    rows = math.gcd(case.size, *(x.shape[0] if x.dim() else 1 for x in case.run(model)))
    for groups in (n for n in range(rows, 1, -1) if rows % n == 0):
        measure = functools.partial(_replaced, groups=groups)
        errors = measure(case, model)
        if not _mixed(case, model, errors, measure):
            worst, company = max(errors), "" if groups == case.size else f", {case.size // groups} at a time"
            detail = f"{why}; with the others replaced{company} the largest relative difference is {worst:.1e}"
            return Proof(2, _NAME, worst <= case.tolerance(model), worst, detail)
    return Proof(2, _NAME, None, None, f"{why}, and what the original returns in eval mode tells no samples apart")


def _replaced(case: Case, model: nn.Module, groups: int) -> list[float]:
    """Measure each group of samples in the place of all the others."""
    alike = [torch.arange(case.size).chunk(groups)[group].repeat(groups) for group in range(groups)]
    together, *each = _runs(case, model, [None, *alike])
    found = []
    for group, outputs in enumerate(each):
        pairs = zip(together, outputs, strict=True)
        found.append([error_between([x.chunk(groups)[group]], [y.chunk(groups)[group]]) for x, y in pairs])
    return [max(errors) for errors in zip(*found, strict=True)]
