"""Carriers become plain layers again."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from normfree.layers import CONSTANTS, ScaledWeight, shift

__all__ = ["moved", "plain_", "unscaled_", "without_norm_"]


def plain_(module: nn.Module) -> None:
    """Give a carrier its old class back, and take away what it held besides weight and bias."""
    module.__class__ = cast(ScaledWeight, module)._normfree_original
    del module._parameters["raw_alpha"]
    for name in (*CONSTANTS, "alpha_channels", "alpha_unit", "bias_unit", "feeds_slot", "mean_unit", "unit"):
        module.__dict__.pop(name, None)


def moved(layer: ScaledWeight, unit: float) -> Tensor | float:
    """Return what a layer adds, besides its bias, to what a weight makes that is ``unit`` times smaller; in float64."""
    if layer.center is None or layer.at_center is None:
        return 0.0
    met = shift(layer.coordinates.steadied(layer.weight), layer.center)
    return (layer.at_center.double() - met.double()) / unit


def without_norm_(module: nn.Module, bias: nn.Parameter | None, unit: float) -> None:
    """Make a layer plain whose norm takes back gain, bias and alpha: with its old bias, and its weight in old units."""
    weight = cast(nn.Parameter, module._parameters["weight"])
    weight.data = cast(ScaledWeight, module).coordinates.steadied(weight.data) / unit
    module._parameters["bias"] = bias
    if bias is not None:
        bias.data = bias.to(weight)
    plain_(module)


def unscaled_(layer: ScaledWeight) -> None:
    """Make any other carrier plain. One that has moved may need a bias that it had not."""
    module, weight, old = cast(nn.Module, layer), layer.weight, layer.bias
    combined, bias = layer.combined(exactly=True)
    if bias is not None and layer.alpha in (None, 1.0):  # what was not trained comes back without a rounding
        plain = torch.zeros_like(bias).double() if old is None else old.double() / layer.bias_unit
        bias = (plain + (1.0 if layer.gain is None else layer.gain.double()) * moved(layer, 1.0)).to(weight)
    weight.data = combined.contiguous()
    if bias is not None and (old is not None or bool(bias.any())):
        old = nn.Parameter(torch.empty_like(bias), weight.requires_grad) if old is None else old
        old.data = bias
    plain_(module)
    module._parameters["bias"] = old
