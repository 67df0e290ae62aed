"""Carriers become plain layers again."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from normfree.layers import CONSTANTS, ScaledWeight, shift

__all__ = ["learnt", "plain_", "unscaled_", "without_norm_"]


def plain_(module: nn.Module) -> None:
    """Give a carrier its old class back, and take away what it held besides weight and bias."""
    module.__class__ = cast(ScaledWeight, module)._normfree_original
    del module._parameters["raw_alpha"]
    module._parameters.pop("gain", None)
    for name in (*CONSTANTS, "alpha_channels", "alpha_unit", "bias_unit", "mean_unit"):
        module.__dict__.pop(name, None)


def learnt(layer: ScaledWeight, unit: float) -> tuple[Tensor, Tensor]:
    """Return what a layer multiplies and adds, without alpha, for a weight that is ``unit`` times smaller."""
    gain, weight = cast(Tensor, layer.gain), layer.coordinates.steadied(layer.weight)
    shifted = torch.zeros_like(gain).double() if layer.bias is None else layer.bias.double() / layer.bias_unit
    if layer.center is not None and layer.at_center is not None:
        met = shift(weight, layer.center)
        shifted = shifted + gain.double() * (layer.at_center.double() - met.double())
    return gain * unit, shifted


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
        bias = learnt(layer, 1.0)[1].to(weight)
    weight.data = combined.contiguous()
    if bias is not None and (old is not None or bool(bias.any())):
        old = nn.Parameter(torch.empty_like(bias), weight.requires_grad) if old is None else old
        old.data = bias
    plain_(module)
    module._parameters["bias"] = old
