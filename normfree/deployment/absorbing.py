"""What stays in the slot of a norm moves onto the layer behind it, where that sees nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normfree.layers import ChannelAffine, is_carrier
from normfree.layers.linearity import takes_affine
from normfree.planning.hooks import hooks_on
from normfree.plans import Plan
from normfree.rewriting.changing import become

__all__ = ["absorb_"]


def absorb_(model: nn.Module, plan: Plan) -> Plan:
    """Move gain and bias of a slot forward: ``conv(g x + b; W) = conv(x; W g) + sum W b``, without zero padding.

    Args:
        model: A model whose carriers are plain again.
        plan: Its plan, which names the layers.

    Returns:
        The plan, with the layers that have taken something: whoever hooks a module sees what passes there.
    """
    edits, modules = [], dict(model.named_modules(remove_duplicate=False))
    for edit in plan.norms:
        if edit.into is not None:
            ends = edit.name, edit.into
            between = {path: modules.get(path) for path in edit.through}
            passing = all(
                type(module) is nn.Identity or any(end.startswith(f"{path}.") for end in ends)
                for path, module in between.items()
            )
            seen = any(module is not None and hooks_on(module) for module in between.values())
            if seen or not passing or not _absorb(*map(modules.get, ends)):
                edit = replace(edit, into=None)
        edits.append(edit)
    return replace(plan, norms=tuple(edits))


def _absorb(slot: nn.Module | None, layer: nn.Module | None) -> bool:
    if slot is None or layer is None or not (is_carrier(layer) and takes_affine(layer)):
        return False  # somebody has put another layer there
    if isinstance(slot, nn.Identity):
        return True
    more = [getattr(slot, name, None) for name in ("act", "drop", "raw_alpha")]
    hooked = hooks_on(slot) or hooks_on(layer) - {"_forward_hooks"}
    if type(slot) is not ChannelAffine or slot.copy or hooked or any(part is not None for part in more):
        return False
    wide = {len(value) for value in (slot.gain, slot.bias) if value is not None}
    if wide - {getattr(layer, "in_channels", None) or getattr(layer, "in_features", None)}:
        return False
    moved = _moved(layer, slot.gain, slot.bias)
    if moved is None:
        return False
    weight, bias = moved
    old: Any = layer._parameters
    learns = old["weight"] if old["bias"] is None else old["bias"]
    layer._parameters["weight"] = nn.Parameter(weight, old["weight"].requires_grad)
    layer._parameters["bias"] = None if bias is None else nn.Parameter(bias, learns.requires_grad)
    become(slot, nn.Identity().train(slot.training))
    return True


@torch.no_grad()
def _moved(layer: Any, gain: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of a layer that multiplies and adds to its input itself; ``None`` if they overflow."""
    weight, bias = layer.weight, layer.bias
    groups = getattr(layer, "groups", 1)
    rows = weight.reshape(groups, -1, *weight.shape[1:])  # (groups, C / groups, C_in / groups, *kernel)

    def met(values: Tensor) -> Tensor:
        return values.detach().to(weight).reshape(groups, 1, -1, *(1,) * (weight.dim() - 2))

    if shift is not None:
        added = (rows * met(shift)).flatten(2).sum(2).reshape(-1)
        bias = added if bias is None else bias + added
    weight = (rows if gain is None else rows * met(gain)).reshape(weight.shape).contiguous()
    finite = all(t is None or t.is_meta or bool(t.isfinite().all()) for t in (weight, bias))
    return (weight, bias) if finite else None
