"""The weight and the bias that a carrier computes with, from what it learns and from its constants.

With learnt ``V`` (the layer's ``weight``) and ``b`` (its ``bias``), with alpha, and with the constants ``g``
(``gain``), ``mu`` (``center``), ``s`` (``at_center``), ``m`` (``filter_mean``), ``r`` (``mean_unit``) and ``u``
(``bias_unit``):

    U = V - (1 - 1 / r) (mean V - m)        weight = alpha g U        bias = alpha (b / u + g (s - U mu))

so that ``conv(x; weight, bias) = alpha (g (U (x - mu) + s) + b / u)`` wherever no padding stands in for ``x``; ``s`` is
what ``U mu`` was at the start. A layer without a bias stays one: it makes ``s`` of ``mu`` for ever, and learns across:

    weight = alpha g (U - (U mu - s) mu' / mu' mu)

``mean V`` is the mean of each filter over its positions, and ``m`` what it was at the start, where ``U = V``. The
constants are the coordinates in which the layer learns, and none changes with training. A step of ``V`` moves the
output by ``g^2``, as behind a batch norm (equalised learning rate: Karras et al., ICLR 2018, section 4.1), no longer
along the mean of the input, the steepest direction there is (centred inputs: LeCun, Bottou, Orr & Müller 1998,
section 4.3), and ``r^2`` less along the next steep one: neighbouring pixels are alike, so that a filter's mean meets
more than the rest of it (covariances equalised, same section).

``alpha`` and ``g`` may wait until the layer has run: ``alpha g layer(x; U) = layer(x; alpha g U)``.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.fx
from torch import Tensor

from normfree.layers.derivatives import combined, rows, shift
from normfree.layers.slots import Channels, alpha_scale

__all__ = ["Affine", "Constants", "apart", "combine", "mean_of", "shift"]


def mean_of(weight: Tensor) -> Tensor:
    """Return the mean of each filter over its positions, ``(C, C_in / groups, 1, ...)``, in the type of ``weight``.

    It is added up in float64, so that every device finds the same.
    """
    return weight.double().mean(tuple(range(2, weight.dim())), keepdim=True).to(weight.dtype)


class Constants(NamedTuple):
    """The coordinates in which a layer learns.

    Attributes:
        gain: ``(C,)``, or ``None`` for ones. It learns only where a gamma was zero.
        center: ``(groups, C_in / groups * kernel)``, or ``None`` for zeros.
        at_center: ``(C,)``, given with ``center``: what the weight made of it at the start.
        filter_mean: ``(C, C_in / groups, 1, ...)``, or ``None`` for a weight whose mean is as free as the rest of it.
        bias_unit: ``bias`` is that many times what it stands for.
        mean_unit: Given with ``filter_mean``: how many times less than the rest of a filter its mean moves.
    """

    gain: Tensor | None
    center: Tensor | None
    at_center: Tensor | None
    filter_mean: Tensor | None
    bias_unit: float = 1.0
    mean_unit: float = 1.0

    def steadied(self, weight: Tensor) -> Tensor:
        """Return ``U``: ``V`` bit for bit where nothing was trained, which costs more than what a layer does."""
        if self.filter_mean is None:
            return weight
        return torch.sub(weight, mean_of(weight) - self.filter_mean, alpha=1 - 1 / self.mean_unit)


class Affine(NamedTuple):
    """What is done to what a weight makes: ``alpha * (gain * y + bias / bias_unit)``.

    Attributes:
        bias: ``(C,)``, or ``None``.
        alpha: The SkipInit scalar ``(1,)``, or ``None``.
        constants: The coordinates in which the weight learns; gain and unit of the bias are theirs.
        channels: Range of output channels that alpha scales, or all of them.
    """

    bias: Tensor | None
    alpha: Tensor | None
    constants: Constants
    channels: Channels


def combine(
    weight: Tensor,
    bias: Tensor | None,
    alpha: Tensor | None,
    constants: Constants,
    channels: Channels = None,
    groups: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias as the layer's own forward is to see them, differentiably.

    Args:
        weight: What the layer learns, ``(C, C_in / groups, *kernel)``.
        bias: What it learns of its bias ``(C,)``, or ``None``.
        alpha: The SkipInit scalar ``(1,)``, or ``None``.
        constants: The coordinates in which it learns.
        channels: Range of output channels that alpha scales, or all of them.
        groups: Given for a transposed convolution, whose weight is ``(C_in, C / groups, *kernel)``.
    """
    gain = constants.gain
    if channels is None and groups is None and not _learns(gain):
        return combined(weight, bias, alpha, constants) if alpha is not None or _change(constants) else (weight, bias)
    weight, bias = apart(weight, bias, constants)
    if alpha is not None:
        factor = alpha_scale(alpha, channels, weight.shape[0] if groups is None else weight.shape[1] * groups)
        gain = factor if gain is None else gain * factor
        bias = None if bias is None else bias * factor
    if groups is not None:
        return _transposed(weight, gain, groups), bias
    return weight if gain is None else weight * rows(gain, weight), bias


torch.fx.wrap("combine")


def apart(weight: Tensor, bias: Tensor | None, constants: Constants) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias so that ``alpha * (gain * layer(x; weight) + bias)`` is what the layer computes.

    That is the same as with what :func:`combine` returns, and cheaper where the layer returns fewer numbers than its
    weight has.
    """
    gain, center = constants.gain, constants.center
    if bias is not None and center is not None and _learns(gain):
        alone = Constants(None, center, constants.at_center, constants.filter_mean, 1.0, constants.mean_unit)
        weight, centred = combined(weight, torch.zeros_like(bias), None, alone, apart=True)
        return weight, torch.addcmul(bias / constants.bias_unit, cast(Tensor, gain), cast(Tensor, centred))
    return combined(weight, bias, None, constants, apart=True) if _change(constants) else (weight, bias)


def _change(constants: Constants) -> bool:
    # No property and no slice: Dynamo of torch 2.8 knows neither of named tuples.
    held = (constants.gain, constants.center, constants.at_center, constants.filter_mean)
    return constants.bias_unit != 1.0 or any(value is not None for value in held)


def _learns(gain: Tensor | None) -> bool:
    return gain is not None and gain.requires_grad


def _transposed(weight: Tensor, factor: Tensor | None, groups: int) -> Tensor:
    """Scale output channel ``g * C / groups + j``, which lives in group ``g`` of a weight ``(C_in, C / groups, *)``."""
    if factor is None or factor.dim() == 0:
        return weight if factor is None else weight * factor
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return (grouped * factor.reshape(groups, 1, -1, *(1,) * (weight.dim() - 2))).reshape(weight.shape)
