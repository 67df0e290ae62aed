"""Proofs 1 and 3: what a forward pass computes, and with which operators."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from normfree.deployment.fuse import bake_
from normfree.errors import some
from normfree.proofs.case import ROUNDINGS, TOLERANCE, Case, Found
from normfree.proofs.observing import NormSpy, Steady, module_stack
from normfree.proofs.remaking import plain_form
from normfree.rewriting.applying import rewrite
from normfree.rewriting.comparing import error_between
from normfree.tracing.copying import deep_copy
from normfree.tracing.inputs import tensors

__all__ = ["form_of", "no_norm_runs", "same_function"]


@torch.no_grad()
def no_norm_runs(case: Case) -> Found:
    """1: no batch-norm operator sees an activation, in train and in eval mode."""
    seen: dict[str, None] = {}
    for training in (True, False):
        model = case.exact(case.model, training)
        args, kwargs = case.inputs()
        with module_stack(model) as stack, NormSpy(tensors((args, kwargs)), stack) as spy, Steady():
            model(*args, **kwargs)
        seen.update(dict.fromkeys(spy.seen))
    found = [name for name in seen if name not in case.kept]
    kept = f"; {len(case.kept)} norms stay as planned" if case.kept else ""
    detail = f"{len(found)} batch-norm operators on activations" + (f": {some(found)}" if found else "") + kept
    return Found(not found, float(len(found)), detail)


@torch.no_grad()
def same_function(case: Case) -> Found:
    """3: ``preserve`` computes in eval mode what the original computes; any conversion what its plan makes of it.

    In train mode too, beside the original with its norms frozen.
    """
    other = _departures(case)
    if case.plan.init != "preserve" or case.plan.alpha != 1:
        claim = Found(None, None, f"init is {case.plan.init} and alpha starts at {case.plan.alpha:g}")
    elif case.original is None:
        claim = _same_as_reference(case)
    else:
        claim = _same_as_original(case, case.original)
    return Found(False, claim.figure, f"{'; '.join(other)}; {claim.detail}") if other else claim


def form_of(case: Case, model: nn.Module) -> nn.Module | None:
    """Return the plain form of what an exact copy of the model is to be, in its mode; ``None`` without one."""
    if case.made is None or case.made.model is None:
        return None
    there = next((p.device for p in model.parameters()), torch.device("cpu"))
    return plain_form(case.exact(case.made.model, model.training).to(there), model)


def _departures(case: Case) -> list[str]:
    """Say in which modes the model computes something else than its plan makes of the original, at random alpha."""
    found = []
    for training in (False, True):
        model = case.at_alpha(training)
        form = form_of(case, model)
        error = 0.0 if form is None else error_between(case.run(form), case.run(model))
        if error > case.tolerance(model):
            mode = "train" if training else "eval"
            found.append(f"in {mode} mode it is not what the plan makes of the original, by {error:.1e}")
    return found


def _same_as_original(case: Case, original: nn.Module) -> Found:
    before, after = deep_copy(original).eval(), deep_copy(case.model).eval()
    if case.dtype != torch.float64:
        error, tolerance = error_between(case.run(before), case.run(after)), case.tolerance(before)
        return Found(error <= tolerance, error, f"relative error {error:.1e}, where {tolerance:.1e} is rounding")
    exact = case.run(case.exact(original, training=False))
    # Constants are stored in the model's own dtype: that the edits are exact shows when they are made in float64.
    again = _made_anew(case, original)
    error = error_between(exact, case.run(again))
    theirs = next((p.dtype for p in before.parameters() if p.is_floating_point()), case.own_dtype)
    rounding = error_between(exact, case.run(before, dtype=theirs))
    own = error_between(exact, case.run(after, dtype=case.own_dtype))
    train = _error_in_train_mode(case, again)
    if train > TOLERANCE:  # what counts its calls has been called once more than the original
        train = _error_in_train_mode(case, _made_anew(case, original))
    passed = max(error, train) <= TOLERANCE and own <= ROUNDINGS * max(rounding, torch.finfo(case.own_dtype).eps)
    figures = f"{own:.1e} in {str(case.own_dtype)[6:]}, where the original's is {rounding:.1e}"
    worse = f" and {train:.1e} in train mode" if train > TOLERANCE else ""
    if not passed and max(error, train) <= TOLERANCE:
        figures += "; made anew it is exact: trained since, or of another model?"
    return Found(passed, error, f"relative error {error:.1e} in float64{worse}; {figures}")


def _made_anew(case: Case, original: nn.Module) -> nn.Module:
    again = case.exact(original, training=False)
    rewrite(again, case.plan, {})
    if case.plan.fused:
        bake_(again, case.plan.merged)
    return again


def _error_in_train_mode(case: Case, again: nn.Module) -> float:
    """Compare with the original in train mode, with its norms frozen, as far as it runs so."""
    again.train()
    for name in case.kept:
        again.get_submodule(name).training = False
    with contextlib.suppress(Exception):  # whatever it says to a norm that does not learn
        expected = case.run(case.frozen(training=True))
        return error_between(expected, case.run(again))
    return 0.0


def _same_as_reference(case: Case) -> Found:
    error = None if case.reference is None else case.reference.error(case.model)
    if case.reference is None or error is None:
        return Found(None, None, "the original is not here to compare with", missing=True)
    rounding = case.reference.rounding
    detail = (
        f"relative error {error:.1e} to the recorded output in {case.reference.dtype}; the original's is {rounding:.1e}"
    )
    return Found(error <= max(ROUNDINGS * rounding, TOLERANCE), error, detail)
