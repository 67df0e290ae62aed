"""What stays in the slot of a norm moves onto the layer behind it, where that sees nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from normfree.edits import NormEdit
from normfree.layers import ChannelAffine, is_carrier
from normfree.layers.linearity import takes_affine
from normfree.layers.passing import passes, weakest
from normfree.planning.hooks import hooks_on
from normfree.plans import Plan
from normfree.rewriting.changing import become

__all__ = ["absorb_"]

Modules = Mapping[str, nn.Module]


def absorb_(model: nn.Module, plan: Plan, known: bool = False) -> Plan:
    """Move gain and bias of a slot forward: ``conv(g x + b; W) = conv(x; W g) + sum W b``, without zero padding.

    With it, and behind a ReLU, a gain above zero moves alone: ``relu(g x + b) = g relu(x + b / g)``.

    Args:
        model: A model whose carriers are plain again.
        plan: Its plan, which names the layers.
        known: Whether the plan says what was moved before, for a model whose weights come from a file.

    Returns:
        The plan, with the layers that have taken something: whoever hooks a module sees what passes there.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    edits = [
        edit if edit.into is None or _absorb(modules, edit, known) else replace(edit, into=None) for edit in plan.norms
    ]
    return replace(plan, norms=tuple(edits))


def _absorb(modules: Modules, edit: NormEdit, known: bool) -> bool:
    slot, layer = modules.get(edit.name), modules.get(str(edit.into))
    if slot is None or layer is None or not is_carrier(layer) or not _may_pass(modules, edit):
        return False  # somebody has put another layer there
    if isinstance(slot, nn.Identity):
        return True
    more = [getattr(slot, name, None) for name in ("drop", "raw_alpha", *(() if edit.moves == "gain" else ("act",)))]
    hooked = hooks_on(slot) or hooks_on(layer) - {"_forward_hooks"}
    if type(slot) is not ChannelAffine or slot.copy or hooked or any(part is not None for part in more):
        return False
    gain, shift = slot.gain, slot.bias
    width: int = getattr(layer, "in_channels", 0) or cast(Any, layer).in_features
    if any(width % len(value) for value in (gain, shift) if value is not None):
        return False
    if edit.moves != "affine" and not (gain is not None and (known or gain.is_meta or bool((gain > 0).all()))):
        return False
    kept = None
    if edit.moves == "gain":
        if shift is None or gain is None:
            return False  # nothing would be left, and what writes in place would meet the input of the slot
        kept, shift = nn.Parameter((shift / gain).detach(), shift.requires_grad), None
    moved = _moved(layer, gain, shift)
    if moved is None or not _finite(kept):
        return False
    weight, bias = moved
    old: Any = layer._parameters
    learns = old["weight"] if old["bias"] is None else old["bias"]
    layer._parameters["weight"] = nn.Parameter(weight, old["weight"].requires_grad)
    layer._parameters["bias"] = None if bias is None else nn.Parameter(bias, learns.requires_grad)
    left = nn.Identity() if kept is None else ChannelAffine(bias=kept, act=slot.act)
    become(slot, left.train(slot.training))
    return True


def _may_pass(modules: Modules, edit: NormEdit) -> bool:
    """Whether what stands between is still what it was, nobody watches it, and it writes into nothing."""
    ends = edit.name, str(edit.into)
    between = {path: modules.get(path, nn.Module()) for path in edit.through}
    around = {path for path in between if any(end.startswith(f"{path}.") for end in ends)}
    passed = [module for path, module in between.items() if path not in around]
    inner = [module for part in passed for module in part.modules()]
    writing = any(getattr(m, "inplace", False) for m in inner) and edit.moves != "gain"
    if writing or any(map(hooks_on, [*inner, *(between[path] for path in around)])):
        return False
    return weakest([takes_affine(modules[ends[1]]), *map(passes, passed), edit.moves]) == edit.moves


@torch.no_grad()
def _moved(layer: Any, gain: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of a layer that multiplies and adds to its input itself; ``None`` if they overflow."""
    weight, bias = layer.weight, layer.bias
    groups = getattr(layer, "groups", 1)
    rows = weight.reshape(groups, -1, *weight.shape[1:])  # (groups, C / groups, C_in / groups, *kernel)

    def met(values: Tensor) -> Tensor:
        many = values.detach().to(weight).repeat_interleave(groups * rows.shape[2] // len(values))  # of each, flattened
        return many.reshape(groups, 1, -1, *(1,) * (weight.dim() - 2))

    if shift is not None:
        added = (rows * met(shift)).flatten(2).sum(2).reshape(-1)
        bias = added if bias is None else bias + added
    made = (rows if gain is None else rows * met(gain)).reshape(weight.shape)
    made = torch.empty_like(weight).copy_(made)  # which keeps channels last
    return (made, bias) if _finite(made) and _finite(bias) else None


def _finite(value: Tensor | None) -> bool:
    return value is None or value.is_meta or bool(value.isfinite().all())
