"""Proofs 1 and 3: what a forward pass computes, and with which operators."""

from __future__ import annotations

import torch

from normfree.deployment.fuse import bake_
from normfree.errors import some
from normfree.proofs.case import ROUNDINGS, TOLERANCE, Case, Proof, error_between
from normfree.proofs.observing import NormSpy, module_stack
from normfree.rewriting.applying import rewrite
from normfree.tracing.inputs import tensors
from normfree.tracing.still import Still

__all__ = ["no_norm_runs", "same_function"]


@torch.no_grad()
def no_norm_runs(case: Case) -> Proof:
    """1: no batch-norm operator sees an activation, in train and in eval mode."""
    seen: dict[str, None] = {}
    for training in (True, False):
        model = case.exact(case.model, training)
        args, kwargs = case.inputs()
        with module_stack(model) as stack, NormSpy(tensors((args, kwargs)), stack) as spy, Still():
            model(*args, **kwargs)
        seen.update(dict.fromkeys(spy.seen))
    found = [name for name in seen if name not in case.kept]
    kept = f"; {len(case.kept)} norms stay as planned" if case.kept else ""
    detail = f"{len(found)} batch-norm operators on activations" + (f": {some(found)}" if found else "") + kept
    return Proof(1, "no batch-norm operator runs", not found, float(len(found)), detail)


@torch.no_grad()
def same_function(case: Case) -> Proof:
    """3: ``preserve`` computes in eval mode what the original computes."""
    name = "output equals the original's in eval mode"
    if case.plan.init != "preserve" or case.plan.alpha != 1:
        return Proof(3, name, None, None, f"init is {case.plan.init} and alpha starts at {case.plan.alpha:g}")
    if case.original is None:
        return _same_as_reference(case, name)
    before, after = case.copy(case.original, training=False), case.copy(case.model, training=False)
    if case.dtype != torch.float64:
        error, tolerance = error_between(case.run(before), case.run(after)), case.tolerance(before)
        return Proof(
            3, name, error <= tolerance, error, f"relative error {error:.1e}, where {tolerance:.1e} is rounding"
        )
    exact = case.run(case.exact(case.original, training=False))
    # Constants are stored in the model's own dtype: that the edits are exact shows when they are made in float64.
    again = case.exact(case.original, training=False)
    rewrite(again, case.plan, {})
    if case.plan.fused:
        bake_(again, case.plan.merged)
    error = error_between(exact, case.run(again))
    rounding = error_between(exact, case.run(before, dtype=case.own_dtype))
    own = error_between(exact, case.run(after, dtype=case.own_dtype))
    passed = error <= TOLERANCE and own <= max(ROUNDINGS * rounding, TOLERANCE)
    figures = f"{own:.1e} in {str(case.own_dtype)[6:]}, where the original's is {rounding:.1e}"
    return Proof(3, name, passed, error, f"relative error {error:.1e} in float64; {figures}")


def _same_as_reference(case: Case, name: str) -> Proof:
    error = None if case.reference is None else case.reference.error(case.model)
    if case.reference is None or error is None:
        return Proof(3, name, None, None, "the original is not here to compare with")
    rounding = case.reference.rounding
    detail = (
        f"relative error {error:.1e} to the recorded output in {case.reference.dtype}; the original's is {rounding:.1e}"
    )
    return Proof(3, name, error <= max(ROUNDINGS * rounding, TOLERANCE), error, detail)
