"""Proofs 1 to 3: what a forward pass computes, and with which operators."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from normfree.observing import NormSpy, Still, module_stack, tensors
from normfree.proofs.case import TOLERANCE, Case, Proof, error_between, some
from normfree.rewriting import rewrite

__all__ = ["batch_independent", "no_norm_runs", "same_function"]


@torch.no_grad()
def no_norm_runs(case: Case) -> Proof:
    """1: no batch-norm operator sees an activation, in train and in eval mode."""
    seen: dict[str, None] = {}
    for training in (True, False):
        model = case.double(case.model, training)
        args, kwargs = case.inputs()
        with module_stack(model) as stack, NormSpy(tensors((args, kwargs)), stack) as spy, Still():
            model(*args, **kwargs)
        seen.update(dict.fromkeys(spy.seen))
    found = [name for name in seen if name not in case.kept]
    kept = f"; {len(case.kept)} norms stay as planned" if case.kept else ""
    detail = f"{len(found)} batch-norm operators on activations" + (f": {some(found)}" if found else "") + kept
    return Proof(1, "no batch-norm operator runs", not found, float(len(found)), detail)


@torch.no_grad()
def batch_independent(case: Case) -> Proof:
    """2: in train mode with dropout off, ``f(x)[i] == f(x[i:i+1])``."""
    name = "no output depends on the rest of the batch"
    if case.kept:
        return Proof(2, name, None, None, f"{len(case.kept)} norms stay as planned")
    model = case.double(case.model, training=True)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    together = case.run(model)
    size = next(x.shape[0] for x in tensors((case.args, case.kwargs)) if x.dim() > 0)
    worst = 0.0
    for i in range(size):
        for buffer, value in buffers:
            buffer.copy_(value)  # some move from call to call, as spectral norm's do
        alone = case.run(model, sample=i)
        mine = [_sample(x, i, size, other) for x, other in itertools.zip_longest(together, alone)]
        worst = max(worst, error_between(mine, alone))
    return Proof(2, name, worst <= TOLERANCE, worst, f"largest relative difference {worst:.1e}")


def _sample(x: Tensor | None, i: int, size: int, alone: Tensor | None) -> Tensor:
    """Return one sample of an output; its batch dimension is the one that has shrunk in what it was alone."""
    if x is None or alone is None or x.dim() != alone.dim():
        return torch.empty(0)
    shrunk = [d for d, (many, one) in enumerate(zip(x.shape, alone.shape, strict=True)) if (many, one) == (size, 1)]
    return x.narrow(shrunk[0], i, 1) if shrunk else x


@torch.no_grad()
def same_function(case: Case) -> Proof:
    """3: ``preserve`` computes in eval mode what the original computes."""
    name = "output equals the original's in eval mode"
    if case.plan.init != "preserve" or case.plan.alpha != 1:
        return Proof(3, name, None, None, f"init is {case.plan.init} and alpha starts at {case.plan.alpha:g}")
    if case.original is None:
        return _same_as_reference(case, name)
    exact = case.run(case.double(case.original, training=False))
    # Gains are stored in the model's own dtype: that the edits are exact shows when they are made in float64.
    again = case.double(case.original, training=False)
    rewrite(again, case.plan)
    error = error_between(exact, case.run(again))
    dtype = next((p.dtype for p in case.model.parameters() if p.is_floating_point()), torch.float64)
    before, after = case.copy(case.original, training=False), case.copy(case.model, training=False)
    rounding = error_between(exact, case.run(before, dtype=dtype))
    own = error_between(exact, case.run(after, dtype=dtype))
    # The same function in another order of operations rounds differently, not worse.
    passed = error <= TOLERANCE and own <= max(8 * rounding, TOLERANCE)
    detail = (
        f"relative error {error:.1e} in float64; {own:.1e} in {str(dtype)[6:]}, where the original's is {rounding:.1e}"
    )
    return Proof(3, name, passed, error, detail)


def _same_as_reference(case: Case, name: str) -> Proof:
    error = None if case.reference is None else case.reference.error(case.model)
    if case.reference is None or error is None:
        return Proof(3, name, None, None, "the original is not here to compare with")
    rounding = case.reference.rounding
    detail = (
        f"relative error {error:.1e} to the recorded output in {case.reference.dtype}; the original's is {rounding:.1e}"
    )
    return Proof(3, name, error <= max(8 * rounding, TOLERANCE), error, detail)
