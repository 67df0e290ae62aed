"""Proof 6: nothing of the norms is left in the state, and nothing else has changed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from normfree.errors import some
from normfree.layers import CONSTANTS
from normfree.norms import is_norm, looks_like_norm
from normfree.proofs.case import Case, Proof

__all__ = ["clean_state"]


def clean_state(case: Case) -> Proof:
    """6: no statistics are left, and keys outside the plan are the original's."""
    state = case.model.state_dict()
    statistics = [
        f"{name}.{key}"
        for name, module in case.model.named_modules()
        if name not in case.kept and (is_norm(module) or looks_like_norm(module) is not None)
        for key in dict(module.named_buffers(recurse=False))
    ]
    problems = [f"statistics left: {some(statistics)}"] if statistics else []
    if case.structure is not None:
        problems += _key_changes(case, case.structure.state_dict(), state)
    detail = "; ".join(problems) or f"{len(state)} keys, none of them statistics"
    return Proof(6, "no statistics are left in the state", not problems, float(len(problems)), detail)


def _key_changes(case: Case, before: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """Compare with the original: only what the plan names may differ, in keys and (``preserve``) in values."""
    names = [n for edit in case.plan.removed for n in (edit.name, *edit.aliases)]
    slots = tuple(f"{name}." for name in (*names, *case.plan.merged))
    touched = {f"{edit.producer}.bias" for edit in case.plan.removed} | {f"{path}.bias" for path in case.plan.biases}
    touched |= {f"{layer.path}.{leaf}" for layer in case.plan.carried for leaf in CONSTANTS}
    touched |= {f"{alpha.holder}.raw_alpha" for alpha in case.plan.alphas}
    scaled = _aliases(case.model, {f"{layer.path}.weight" for layer in case.plan.carried})
    shared = _aliases(case.model, touched)
    lost = [k for k in before if k not in state and not k.startswith(slots)]
    new = [k for k in state if k not in before and k not in shared and not k.startswith(slots)]
    drawn = {f"{path}.{leaf}" for path, _ in case.plan.drawn for leaf in ("weight", "bias")}
    moved = [
        k
        for k in state
        if k in before
        and k not in shared | _aliases(case.model, drawn)
        and not k.startswith(slots)
        and not torch.equal(state[k].cpu(), before[k].cpu())
        and not (k in scaled and _times_power_of_two(state[k].cpu(), before[k].cpu()))
    ]
    compare = case.original is not None and case.plan.init == "preserve" and not case.plan.fused
    named = {"keys lost": lost, "keys unplanned": new, "values changed": moved if compare else []}
    return [f"{what}: {some(keys)}" for what, keys in named.items() if keys]


def _times_power_of_two(after: Tensor, before: Tensor) -> bool:
    """Whether every entry was multiplied by one and the same power of two, as the plan does to a weight."""
    largest = before.abs().argmax()
    factor = after.flatten()[largest] / before.flatten()[largest]
    return math.frexp(float(factor))[0] == 0.5 and torch.equal(after, before * factor)


def _aliases(model: nn.Module, names: set[str]) -> set[str]:
    """Add the further names of tensors that are registered more than once."""
    every: dict[str, Tensor] = model.state_dict(keep_vars=True)
    chosen = {id(every[name]) for name in names if name in every}
    return names | {name for name, parameter in every.items() if id(parameter) in chosen}
