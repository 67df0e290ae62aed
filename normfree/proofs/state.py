"""Proof 6: nothing of the norms is left in the state, and everything else is what the plan makes of the original."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from normfree.errors import some
from normfree.norms import is_norm, looks_like_norm
from normfree.proofs.case import Case, Found
from normfree.proofs.entries import departures, settings
from normfree.proofs.values import moved
from normfree.tracing.copying import deep_copy

__all__ = ["clean_state"]


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
                problems["values changed"] = moved(case.made.model, case.model, case.plan)
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
        if name not in case.kept and (norm or (name in slots and not _is_bare(module))):
            yield from (f"{name}.{key}" for key in dict(module.named_buffers(recurse=False)))


def _is_bare(module: nn.Module) -> bool:
    return all(value is None for value in module._buffers.values())
