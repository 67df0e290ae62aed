"""Calibration of a ``preserve`` model: its coordinates from data, and its function as it was.

``convert`` knows what a layer meets from the norms alone: what the original was trained on, without borders. A batch of
the images that are to be learnt says it exactly. Only constants change, and the weights that they undo.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from normfree.edits import Carried
from normfree.errors import UsageError
from normfree.layers import ScaledWeight, mean_of, scaled_weight_class, shift
from normfree.layers.carriers import Seen
from normfree.layers.combining import combine
from normfree.plans import Plan

__all__ = ["centre_"]


def centre_(model: nn.Module, plan: Plan, run: Callable[[Any], object], batches: Iterable[Any]) -> str:
    """Set mean of inputs and units of heads from data; a head that was put on since the conversion is taken in.

    Returns what was set, in words.

    Args:
        model: The converted model.
        plan: Its plan.
        run: Runs the model on a batch.
        batches: Batches.

    Raises:
        UsageError: No layer was reached, or an input is not finite.
    """
    layers: dict[Carried, Any] = {it: model.get_submodule(it.path) for it in plan.carried if it.centred}
    seen = {carried: _Seen(layer) for carried, layer in layers.items()}
    handles = [layer.register_forward_pre_hook(seen[carried]) for carried, layer in layers.items()]
    try:
        for batch in batches:
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not any(found.count for found in seen.values()):
        raise UsageError("no layer was reached: there is no batch, or the model calls none of its converted layers")
    lost = [carried.path for carried, found in seen.items() if not bool(torch.isfinite(found.mean).all())]
    if lost:
        raise UsageError(f"{lost[0]}: its input is not finite")
    reached = {carried: found for carried, found in seen.items() if found.count}
    for carried, found in reached.items():
        _recentre(layers[carried], found, carried, plan)
    heads = [f", input of {it.path} over {1 / float(layers[it].gain[0]):g}" for it in reached if it.head]
    return f"{len(reached)} of {len(layers)} inputs centred{''.join(heads)}"


class _Seen:
    """A hook that averages what a layer's filters meet, and the square of it."""

    def __init__(self, layer: Any) -> None:
        self.count = 0
        self.mean = torch.zeros(getattr(layer, "groups", 1), layer.weight[0].numel(), dtype=torch.float64)
        self.square = 0.0

    def __call__(self, layer: Any, args: tuple[Tensor, ...]) -> None:
        """Take one more batch in."""
        x = args[0].detach()
        met = mean_patch(layer, x).double().cpu()
        channels = -1 if isinstance(layer, nn.Linear) or x.dim() == 2 else 1
        square = x.double().movedim(channels, 0).flatten(1).square().mean(1).sum() * layer.weight[0, 0].numel()
        self.count += 1
        self.mean += (met - self.mean) / self.count
        self.square += (float(square) - self.square) / self.count


def mean_patch(layer: Any, x: Tensor) -> Tensor:
    """Return the mean, over images and places, of what each entry of a filter meets, ``(groups, entries)``.

    It is the derivative of the layer's mean output by its weight, whatever its padding and stride.
    """
    groups = getattr(layer, "groups", 1)
    filters = layer.weight.new_zeros(groups, *layer.weight.shape[1:]).requires_grad_()
    original = layer._normfree_original if isinstance(layer, ScaledWeight) else type(layer)
    with torch.enable_grad():
        out = original.forward(Seen(layer, filters, None), x)
        total = out.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1).mean(1).sum()
        mean: Tensor = torch.autograd.grad(total, filters)[0]
    return mean.reshape(groups, -1)


@torch.no_grad()
def _recentre(layer: Any, found: _Seen, carried: Carried, plan: Plan) -> None:
    """Move a layer to other coordinates: ``at_center`` and ``gain`` undo what ``center`` and the weight do."""
    weight: Tensor = layer.weight
    center = found.mean.to(weight)
    if not isinstance(layer, ScaledWeight):  # a head that was put on since
        layer.__class__ = scaled_weight_class(type(layer))
        layer._parameters["raw_alpha"] = None
        ones = weight.new_ones(weight.shape[0])
        layer.__dict__.update(gain=ones, center=torch.zeros_like(center), at_center=torch.zeros_like(ones))
        layer.__dict__.update(filter_mean=None, alpha_channels=None, alpha_unit=1.0, bias_unit=1.0, mean_unit=1.0)
    rows = (-1, *(1,) * (weight.dim() - 1))
    if layer.bias is None and not layer.feeds_slot:
        # What it makes of the old mean and of the new one are both in its weight.
        steadied = layer.coordinates.steadied(weight)
        made, _ = combine(steadied, None, None, layer.coordinates._replace(filter_mean=None))
        weight.copy_(made / layer.gain.reshape(rows))
        layer.filter_mean = None if layer.filter_mean is None else mean_of(weight)
        layer.at_center = shift(weight, center)
    else:
        layer.at_center = layer.at_center + shift(layer.coordinates.steadied(weight), center - layer.center)
    layer.center = center
    if carried.head:
        unit = plan.units.of_head(math.sqrt(max(found.square - float(found.mean.square().sum()), 0.0)))
        layer.at_center.mul_(unit * layer.gain[0])
        weight.mul_(unit * layer.gain[0])
        layer.gain = torch.full_like(layer.gain, 1 / unit)
