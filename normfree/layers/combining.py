"""The weight and the bias that a carrier computes with, from what it learns and from its constants.

With learnt ``V`` (the layer's ``weight``) and ``b`` (its ``bias``), with alpha, and with the constants ``g``
(``gain``), ``mu`` (``center``), ``c`` (``offset``), ``m`` (``filter_mean``), ``r`` (``mean_unit``) and ``u``
(``bias_unit``):

    U = V - (1 - 1 / r) (mean V - m)        weight = alpha g U        bias = alpha (b / u + c) - weight mu

so that ``conv(x; weight, bias) = alpha (g U (x - mu) + b / u + c)`` wherever no padding stands in for ``x``. A layer
without a bias stays one: what it meets along ``mu`` it does what it did at the start, and it learns across:

    weight = alpha (g U - (g U mu - c) mu' / mu' mu)

``mean V`` is the mean of each filter over its positions, and ``m`` what it was at the start, where ``U = V``. The
constants are the coordinates in which the layer learns, and none changes with training. A step of ``V`` moves the
output by ``g^2``, as behind a batch norm (equalised learning rate: Karras et al., ICLR 2018, section 4.1), no longer
along the mean of the input, the steepest direction there is (centred inputs: LeCun, Bottou, Orr & Müller 1998,
section 4.3), and ``r^2`` less along the next steep one: neighbouring pixels are alike, so that a filter's mean meets
more than the rest of it (covariances equalised, same section).

It is one autograd function: a layer costs a few operations forward and backward, which touch only parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor
from torch.autograd import Function

from normfree.layers.slots import Channels, alpha_scale

__all__ = ["Constants", "combine", "mean_of", "shift"]


def shift(weight: Tensor, center: Tensor) -> Tensor:
    """Return ``weight mu`` for each output channel ``(C,)``: what a layer makes of a constant input.

    Args:
        weight: ``(C, C_in / groups, *kernel)``.
        center: ``(groups, C_in / groups * kernel)``: the mean of what each entry of a filter meets.
    """
    groups, fan_in = center.shape
    return torch.bmm(weight.reshape(groups, -1, fan_in), center[:, :, None]).reshape(-1)


def mean_of(weight: Tensor) -> Tensor:
    """Return the mean of each filter over its positions, ``(C, C_in / groups, 1, ...)``, in the type of ``weight``.

    It is added up in float64, so that every device finds the same.
    """
    return _mean(weight.double()).to(weight.dtype)


class Constants(NamedTuple):
    """The coordinates in which a layer learns.

    Attributes:
        gain: ``(C,)``, or ``None`` for ones. It learns only where a gamma was zero.
        center: ``(groups, C_in / groups * kernel)``, or ``None`` for zeros.
        offset: ``(C,)``, given with ``center``.
        filter_mean: ``(C, C_in / groups, 1, ...)``, or ``None`` for a weight whose mean is as free as the rest of it.
        bias_unit: ``bias`` is that many times what it stands for.
        mean_unit: Given with ``filter_mean``: how many times less than the rest of a filter its mean moves.
    """

    gain: Tensor | None
    center: Tensor | None
    offset: Tensor | None
    filter_mean: Tensor | None
    bias_unit: float = 1.0
    mean_unit: float = 1.0

    def steadied(self, weight: Tensor, exactly: bool = False) -> Tensor:
        """Return ``U``; ``exactly`` returns ``V`` bit for bit where nothing was trained, at twice the cost."""
        return _steadied(weight, self.filter_mean, self.mean_unit, mean_of if exactly else _mean)


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
    gain, center, fixed = constants.gain, constants.center, None if bias is not None else constants.offset
    if bias is not None and channels is None and groups is None and (gain, center, alpha) != (None, None, None):
        made: tuple[Tensor, Tensor] = _Combined.apply(weight, bias, alpha, *constants)
        return made
    bias = None if bias is None else _added(bias, constants.offset, constants.bias_unit)
    if alpha is not None:
        features = weight.shape[0] if groups is None else weight.shape[1] * groups
        alpha = alpha_scale(alpha, channels, features)
        gain = alpha if gain is None else gain * alpha
        bias, fixed = (None if value is None else value * alpha for value in (bias, fixed))
    if groups is not None:
        return _transposed(weight, gain, groups), bias
    scaled = _times(constants.steadied(weight), gain)
    if center is None:
        return scaled, bias
    with _exactly(weight):
        if bias is None:
            return scaled if fixed is None else _across(scaled, fixed, center), None
        return scaled, _subtracted(bias, scaled, center)


torch.fx.wrap("combine")


class _Combined(Function):
    """:func:`combine` of a layer with a bias, with its gradients written out: fewer operations."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor,
        bias: Tensor,
        alpha: Tensor | None,
        gain: Tensor | None,
        center: Tensor | None,
        offset: Tensor | None,
        filter_mean: Tensor | None,
        bias_unit: float,
        mean_unit: float,
    ) -> tuple[Tensor, Tensor]:
        factor = gain if alpha is None else alpha if gain is None else gain * alpha
        scaled = _times(_steadied(weight, filter_mean, mean_unit), factor)
        added = _added(bias, offset, bias_unit)
        added = added if alpha is None else added * alpha
        if center is not None:
            with _exactly(weight):
                added = _subtracted(added, scaled, center)
        # Autograd wants outputs that are none of the inputs.
        return scaled.clone() if scaled is weight else scaled, added.clone() if added is bias else added

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:7])
        ctx.bias_unit, ctx.mean_unit = inputs[7:]

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, bias, alpha, gain, center, offset, filter_mean = ctx.saved_tensors
        needs_weight, needs_bias, needs_alpha, needs_gain, *_ = ctx.needs_input_grad
        for_weight = for_bias = for_alpha = for_gain = None
        whole = grad_weight if center is None else _without_mean(grad_weight, grad_bias, center)
        scaled = _times(whole, gain)
        if needs_alpha or needs_gain:
            was = _steadied(weight, filter_mean, ctx.mean_unit)
        if needs_alpha:
            added = _added(bias, offset, ctx.bias_unit)
            for_alpha = (_inner(scaled, was) + _inner(grad_bias, added)).reshape(alpha.shape)
        if needs_gain:
            for_gain = (whole * was).flatten(1).sum(1)
            for_gain = for_gain if alpha is None else for_gain * alpha
        if needs_weight:
            for_weight = scaled if alpha is None else scaled * alpha
            if filter_mean is not None:
                for_weight = torch.sub(for_weight, _mean(for_weight), alpha=1 - 1 / ctx.mean_unit)
        if needs_bias:
            for_bias = grad_bias if alpha is None else grad_bias * alpha
            for_bias = for_bias if ctx.bias_unit == 1.0 else for_bias / ctx.bias_unit
        return for_weight, for_bias, for_alpha, for_gain, None, None, None, None, None


def _mean(weight: Tensor) -> Tensor:
    return weight.mean(tuple(range(2, weight.dim())), keepdim=True)


def _steadied(
    weight: Tensor, filter_mean: Tensor | None, unit: float, mean: Callable[[Tensor], Tensor] = _mean
) -> Tensor:
    return weight if filter_mean is None else torch.sub(weight, mean(weight) - filter_mean, alpha=1 - 1 / unit)


def _added(bias: Tensor, offset: Tensor | None, unit: float) -> Tensor:
    """Return what a layer adds, without alpha and before its input is centred."""
    if offset is not None:
        return torch.add(offset, bias, alpha=1 / unit)
    return bias if unit == 1.0 else bias / unit


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner product: in one operation where the sum is exact enough and nothing must be copied for it."""
    if one.dtype in (torch.float32, torch.float64) and one.is_contiguous() and other.is_contiguous():
        return torch.dot(one.reshape(-1), other.reshape(-1))
    return (one * other).sum()


def _times(weight: Tensor, factor: Tensor | None) -> Tensor:
    return weight if factor is None else weight * factor.reshape(-1, *(1,) * (weight.dim() - 1))


def _subtracted(bias: Tensor, weight: Tensor, center: Tensor) -> Tensor:
    """Return ``bias - weight mu``, in one operation that touches the weight, whatever its layout."""
    groups, fan_in = center.shape
    if groups > 1:
        by_group = weight.reshape(groups, -1, fan_in)
        return torch.baddbmm(bias.reshape(groups, -1, 1), by_group, center[:, :, None], alpha=-1).reshape(-1)
    filters, met = weight.flatten(1), center[0]
    if weight.dim() > 2 and not weight.is_contiguous():  # channels last: its rows are views in another order
        filters, met = weight.movedim(1, -1).flatten(1), met.reshape(weight.shape[1:]).movedim(0, -1).flatten()
    return torch.addmv(bias, filters, met, alpha=-1)


def _across(weight: Tensor, fixed: Tensor, center: Tensor) -> Tensor:
    """Return the weight that makes ``fixed`` of ``mu``, and does across ``mu`` what ``weight`` does."""
    groups, fan_in = center.shape
    moved = (shift(weight, center) - fixed).reshape(groups, -1, 1)
    along = center / center.square().sum(1, keepdim=True).clamp_min(torch.finfo(center.dtype).tiny)
    return torch.addcmul(weight.reshape(groups, -1, fan_in), moved, along[:, None], value=-1).reshape(weight.shape)


def _without_mean(grad_weight: Tensor, grad_bias: Tensor, center: Tensor) -> Tensor:
    """Return the gradient of ``g V``: what came for the weight, less what its bias takes along, in one operation."""
    groups = center.shape[0]
    met = center.reshape(groups, 1, *grad_weight.shape[1:])
    each = len(grad_bias) // groups
    met = met[0] if groups == 1 else met.expand(-1, each, *grad_weight.shape[1:]).flatten(0, 1)
    column = grad_bias.reshape(-1, *(1,) * (grad_weight.dim() - 1))
    return torch.addcmul(grad_weight, column, met, value=-1)


def _exactly(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast would round these products to half precision, although they are differences of near numbers."""
    return contextlib.nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def _transposed(weight: Tensor, factor: Tensor | None, groups: int) -> Tensor:
    """Scale output channel ``g * C / groups + j``, which lives in group ``g`` of a weight ``(C_in, C / groups, *)``."""
    if factor is None or factor.dim() == 0:
        return weight if factor is None else weight * factor
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return (grouped * factor.reshape(groups, 1, -1, *(1,) * (weight.dim() - 2))).reshape(weight.shape)
