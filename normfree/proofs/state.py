"""Proof 6: nothing of the norms is left in the state, and everything else is what the plan makes of the original."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from normfree.errors import some
from normfree.norms import is_norm, looks_like_norm
from normfree.plans import Plan
from normfree.proofs.case import Case, Found
from normfree.proofs.entries import departures, settings
from normfree.rewriting.comparing import error_between
from normfree.tracing.copying import deep_copy
from normfree.training.initialization import fan_in

__all__ = ["clean_state"]

_ROUNDINGS = 16
"""How many roundings of a tensor's type its values may be off, of its largest: another device computes another way."""
_UNLIKELY = 7.0
"""Standard deviations: one draw in 10^11 is as far out."""


def clean_state(case: Case) -> Found:
    """6: no statistics are left, and every module, tensor, setting and hook is what the plan makes of the original."""
    state = case.model.state_dict()
    gone = [path for path, raw in case.alphas_in(case.model).items() if raw is None]
    problems = {"statistics left": list(_statistics(case)), "alpha is gone": gone}
    lines = []
    if case.made is not None:
        if case.made.model is None:
            lines.append(case.made.why_not)
        else:
            problems |= departures(case.made.model, case.model)
            if case.made.known:
                problems["values changed"] = _moved(case.made.model, case.model, case.plan)
            if any(problems.get(what) for what in _MOVING):
                moving = _moved_by_a_run(case, case.made.model)
                problems |= {what: [x for x in problems.get(what, ()) if x not in moving] for what in _MOVING}
    lines += [f"{what}: {some(found)}" for what, found in problems.items() if found]
    return Found(not lines, float(len(lines)), "; ".join(lines) or f"{len(state)} keys, none of them statistics")


_MOVING = ("another setting", "values changed")


def _moved_by_a_run(case: Case, made: nn.Module) -> set[str]:
    """Name the settings and buffers that a forward moves: calls that are counted, outputs that are kept."""
    before, after = deep_copy(made), deep_copy(made)
    for training in (True, False):
        with contextlib.suppress(Exception), torch.no_grad():  # the other proofs tell of it
            case.run(after.train(training), dtype=next((p.dtype for p in made.parameters()), None))
    pairs = zip(before.named_modules(), after.modules(), strict=True)
    named = {f"{name}.{key}".strip(".") for (name, m), n in pairs for key, _ in settings(m) ^ settings(n)}
    buffers = dict(after.named_buffers(remove_duplicate=False))
    return named | {n for n, b in before.named_buffers(remove_duplicate=False) if not torch.equal(b, buffers[n])}


def _statistics(case: Case) -> Iterator[str]:
    """Name what a norm, or what stands in the slot of one, holds of a batch."""
    slots = {name for edit in case.plan.removed for name in (edit.name, *edit.aliases)}
    for name, module in case.model.named_modules():
        norm = is_norm(module) or looks_like_norm(module) is not None
        if name not in case.kept and (norm or name in slots):
            yield from (f"{name}.{key}" for key, buffer in module._buffers.items() if buffer is not None)


@torch.no_grad()
def _moved(made: nn.Module, model: nn.Module, plan: Plan) -> list[str]:
    """Name the tensors that hold other values than the plan makes; none of a model that was trained.

    A model was trained if most of what it learns has moved: what a hand changes is less.
    """
    ours, theirs = made.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    layers = {f"{path}.weight": (model.get_submodule(path), gain) for path, gain in plan.drawn}
    drawn = {id(theirs[key]): layer for key, layer in layers.items() if key in theirs}
    found: list[str] = []
    held = learns = 0
    for key in ours.keys() & theirs.keys():
        tensor = theirs[key]
        if not isinstance(tensor, Tensor) or ours[key].shape != tensor.shape:
            continue
        layer = drawn.get(id(tensor))
        off = not _is_close(ours[key], tensor) if layer is None else not _may_be_drawn(tensor, *layer)
        found += [key] if off else []
        if layer is None and tensor.requires_grad:
            learns, held = learns + 1, held + (not off)
    trained = learns > 2 and held < learns / 2
    return [] if trained else sorted(found)


def _is_close(made: Tensor, tensor: Tensor) -> bool:
    made, tensor = made.detach().cpu(), tensor.detach().cpu()
    if not made.is_floating_point() or not tensor.is_floating_point():
        return torch.equal(made, tensor)
    eps = max(torch.finfo(made.dtype).eps, torch.finfo(tensor.dtype).eps)
    return error_between([made], [tensor]) <= _ROUNDINGS * eps or torch.equal(made.double(), tensor.double())


def _may_be_drawn(weight: Tensor, layer: nn.Module, gain: float) -> bool:
    """Whether a weight may come from ``N(0, gain^2 / fan_in)``: its mean, and the squares of each filter."""
    z = weight.detach().double().flatten(1) * math.sqrt(fan_in(layer)) / gain
    count = z.shape[1]
    # Of a chi-squared variable of n degrees the cube root over n is about normal (Wilson & Hilferty 1931).
    spread = 2 / (9 * count)
    root = (z.square().mean(1) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return bool((root.abs() <= _UNLIKELY).all()) and abs(float(z.sum())) <= _UNLIKELY * math.sqrt(z.numel())
