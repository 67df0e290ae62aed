"""The coordinates in which a layer is to learn: :class:`normfree.edits.Units`, :mod:`normfree.layers.combining`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normfree.analysis.moments import Moments
from normfree.edits import Carried, Units
from normfree.errors import InternalError
from normfree.layers import Channels, mean_of, shift

__all__ = ["Carrier", "carry", "features_of", "weight_of"]


@dataclass
class Carrier:
    """What one layer that stays where it is gets: see :class:`normfree.layers.ScaledWeight`.

    ``times`` is how many times the layer's weight its new one is.
    """

    gain: Tensor | None = None
    bias: nn.Parameter | None = None
    raw_alpha: nn.Parameter | None = None
    channels: Channels = None
    center: Tensor | None = None
    at_center: Tensor | None = None
    filter_mean: Tensor | None = None
    bias_unit: float = 1.0
    mean_unit: float = 1.0
    alpha_unit: float = 1.0
    times: float = 1.0
    unit: float = 1.0
    feeds_slot: bool = False
    fixed_bias: Tensor | None = None

    @property
    def changes_class(self) -> bool:
        """Whether the layer computes with another weight than its own; else it only gets a bias."""
        return self.feeds_slot or not (self.gain is None and self.raw_alpha is None and self.center is None)


@torch.no_grad()
def carry(layer: Any, carrier: Carrier, carried: Carried, units: Units, met: Mapping[str, Moments] | None) -> None:
    """Choose the coordinates of a layer: its weight grows by a power of two, and the constants undo it."""
    weight = weight_of(layer)
    moments = None if met is None else met.get(carried.path)
    if carried.centred:
        carrier.center = centred_at(layer, None if moments is None else moments.mean)
    unit = carried.unit
    if carried.head and moments is not None:
        places = weight[0].numel() // max(len(moments.mean), 1)
        unit = units.of_head(math.sqrt(float(moments.variance.sum()) * max(places, 1)))
    ones = weight.new_ones(features_of(layer))
    carrier.unit = unit if carrier.feeds_slot else 1.0  # of a head it is found anew
    carrier.gain = None if unit == 1.0 and carrier.feeds_slot else ones / unit
    carrier.times = 1.0 if met is None else unit
    if carried.mean_unit != 1.0:
        carrier.filter_mean, carrier.mean_unit = mean_of(weight * carrier.times), carried.mean_unit
    if carrier.center is not None:
        carrier.at_center = shift(weight * unit, carrier.center)


def centred_at(layer: Any, mean: Tensor | None) -> Tensor:
    """Return the mean of what each entry of a layer's filters meets, ``(groups, C_in / groups * kernel)``.

    Args:
        layer: A convolution or linear layer.
        mean: Of its input channels, or of the channels that were flattened into its input; zeros if it is not known.
    """
    weight, groups = weight_of(layer), getattr(layer, "groups", 1)
    wide = weight.shape[1] * groups
    if mean is None or len(mean) == 0 or wide % len(mean):
        return weight.new_zeros(groups, weight[0].numel())
    mean = mean.to(weight.device, weight.dtype).repeat_interleave(wide // len(mean))
    kernel = weight[0, 0].numel()
    return mean.reshape(groups, -1, 1).expand(-1, -1, kernel).reshape(groups, -1).contiguous()


def weight_of(layer: nn.Module) -> nn.Parameter:
    """Return the weight of a layer that holds it as a plain parameter."""
    weight = layer.weight
    if not isinstance(weight, nn.Parameter):
        raise InternalError(f"{type(layer).__qualname__} has no weight of its own")
    return weight


def features_of(layer: Any) -> int:
    """Return the number of output channels of a layer."""
    return int(layer.out_channels if hasattr(layer, "out_channels") else layer.out_features)
