"""What the plan makes of every value, and what it draws: held to a model that has not been trained since."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from normfree.plans import Plan
from normfree.training.initialization import fan_in

__all__ = ["moved"]

_ROUNDINGS = 16
"""How many roundings of a tensor's type its values may be off, of its largest: another device computes another way."""
_UNLIKELY = 7.0
"""Standard deviations: one draw in 10^11 is as far out."""


@torch.no_grad()
def moved(made: nn.Module, model: nn.Module, plan: Plan) -> list[str]:
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
    made, tensor = made.double(), tensor.double()
    bound = _ROUNDINGS * eps * made.abs().max() if made.numel() else torch.zeros(())
    return bool(((made - tensor).abs() <= bound).all()) or torch.equal(made, tensor)


def _may_be_drawn(weight: Tensor, layer: nn.Module, gain: float) -> bool:
    """Whether a weight may come from ``N(0, gain^2 / fan_in)``: its mean, and the squares of each filter."""
    z = weight.detach().double().flatten(1) * math.sqrt(fan_in(layer)) / gain
    count = z.shape[1]
    # Of a chi-squared variable of n degrees the cube root over n is about normal (Wilson & Hilferty 1931).
    spread = 2 / (9 * count)
    root = (z.square().mean(1) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return bool((root.abs() <= _UNLIKELY).all()) and abs(float(z.sum())) <= _UNLIKELY * math.sqrt(z.numel())
