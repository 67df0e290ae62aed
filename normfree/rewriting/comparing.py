"""A conversion is held to its original before it returns: both compute the same, or the user hears of it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from normfree.analysis.moments import Moments
from normfree.errors import InexactError
from normfree.plans import Plan
from normfree.rewriting.applying import rewrite
from normfree.tracing.copying import deep_copy, in_float64, sharing_copy
from normfree.tracing.inputs import Guess, Inputs, arguments, fresh, guesses, tensors
from normfree.tracing.randomness import Still, random_halves

__all__ = ["error_between", "rewrite_and_compare"]

_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}
"""A difference that needs no second look, relative to the largest output."""
_EXACT = 1e-8
"""In float64."""

Call = tuple[tuple[Any, ...], dict[str, Any]]


def rewrite_and_compare(model: nn.Module, plan: Plan, met: Mapping[str, Moments], inputs: Inputs | None) -> None:
    """Apply a plan in place, and compare what the model computes in eval mode before and after.

    ``met`` is what its carried layers meet, by path. ``inputs``, what it runs on, are found, and small, if not given;
    where nothing is found, nothing is compared.

    Raises:
        InexactError: It computes something else. The model is unchanged.
    """
    call, before = (None, []) if _may_differ(model, plan) else _first_that_runs(model, inputs)
    if call is None:
        rewrite(model, plan, met)
        return
    rounding = _ROUNDING.get(before[0].dtype, 0.0) if before else 0.0

    def compare() -> None:
        if error_between(before, _run(sharing_copy(model), call)) > rounding:
            raise _SecondLookError

    try:
        rewrite(model, plan, met, last=compare)
    except _SecondLookError:  # the model is what it was
        _compare_exactly(model, plan, met, call)
        rewrite(model, plan, met)


class _SecondLookError(Exception):
    """More than rounding, or more rounding than usual."""


def _may_differ(model: nn.Module, plan: Plan) -> bool:
    """Whether the function is to be another one, or there is none yet."""
    return plan.init != "preserve" or plan.alpha != 1.0 or any(p.is_meta for p in model.parameters())


def _first_that_runs(model: nn.Module, inputs: Inputs | None) -> tuple[Call | None, list[Tensor]]:
    """Return a call that the model takes in eval mode, and the numbers that it answers with."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    found = guesses(model, small=True) if inputs is None else iter([Guess(*arguments(inputs), "as given")])
    shared = sharing_copy(model)
    for guess in found:
        with contextlib.suppress(Exception), warnings.catch_warnings():  # whatever it says of what it does not take
            warnings.simplefilter("ignore")
            call = guess.real(like)
            return call, _run(shared, call)
    return None, []


@torch.no_grad()
def _run(model: nn.Module, call: Call) -> list[Tensor]:
    args, kwargs = fresh(call)
    with random_halves(), torch.random.fork_rng(devices=[]), Still():
        return [t for t in tensors(model.eval()(*args, **kwargs)) if t.is_floating_point() and t.numel()]


def error_between(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest difference over the largest value, of all outputs; infinite where that is no number."""
    if [x.shape for x in a] != [y.shape for y in b]:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.is_floating_point() and x.numel():
            difference = (x.double() - y.double()).abs().max() / x.double().abs().max().clamp_min(1e-300)
            worst = max(worst, float(difference)) if bool(torch.isfinite(difference)) else float("inf")
    return worst


def _compare_exactly(model: nn.Module, plan: Plan, met: Mapping[str, Moments], call: Call) -> None:
    """Convert a copy in float64 and compare it with another.

    Raises:
        InexactError: They differ.
    """
    before, after = in_float64(deep_copy(model)), in_float64(deep_copy(model))
    rewrite(after, plan, met)
    wide = _in_float64(call)
    with _watching(before, plan) as first, _watching(after, plan) as second:
        outputs = _run(before, wide), _run(after, wide)
    error = error_between(*outputs)
    if error <= _EXACT or not all(bool(x.isfinite().all()) for x in outputs[0]):
        return
    if error_between(outputs[0], _run(before, _in_float64(call, 1 + 2**-40))) > _EXACT:  # a few roundings
        return  # the original itself tells nothing: boxes of a detector change places for a rounding
    place = next((name for name in first if error_between(first[name], second.get(name, [])) > _EXACT), None)
    behind = "" if place is None else f", and the first that differs is {place}"
    raise InexactError(
        f"the converted {type(model).__name__} computes something else: its output differs by {error:.1e}, relative to "
        f"the largest{behind}. Exclude what is named (exclude=), or convert with check=False if that is no error; it "
        "is one of this package, please report it"
    )


def _in_float64(call: Call, times: float = 1.0) -> Call:
    return cast(Call, tree_map_only(Tensor, lambda x: x.double() * times if x.is_floating_point() else x, call))


@contextlib.contextmanager
def _watching(model: nn.Module, plan: Plan) -> Iterator[dict[str, list[Tensor]]]:
    """Yield what the norms of a plan, or what took their place, returned last, in the order of their first calls."""
    seen: dict[str, list[Tensor]] = {}

    def look(name: str) -> Any:
        return lambda _, __, out: seen.update({name: [out.detach().clone()]} if isinstance(out, Tensor) else {})

    with contextlib.ExitStack() as hooks:
        for edit in plan.removed:
            hooks.enter_context(model.get_submodule(edit.name).register_forward_hook(look(edit.name)))
        yield seen
