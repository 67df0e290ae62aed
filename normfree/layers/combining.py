"""The weight and the bias that a carrier computes with, from what it learns and from its constants.

With learnt ``V`` (the layer's ``weight``) and ``b`` (its ``bias``), with alpha, and with the constants ``g``
(``gain``), ``mu`` (``center``), ``c`` (``offset``) and ``u`` (``bias_unit``):

    weight = alpha g V        bias = alpha (b / u + c) - weight mu

so that ``conv(x; weight, bias) = alpha (g V (x - mu) + b / u + c)`` wherever no padding stands in for ``x``. The
constants are the coordinates in which the layer learns, and none changes with training. A step of ``V`` moves the
output by ``g^2``, as behind a batch norm (equalised learning rate: Karras et al., ICLR 2018, section 4.1), and no
longer along the mean of the input, the steepest direction there is (centred inputs: LeCun, Bottou, Orr & Müller 1998,
section 4.3).

It is one autograd function: a layer costs two operations forward and two backward, which touch only parameters.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.autograd import Function

from normfree.layers.slots import Channels, alpha_scale

__all__ = ["combine", "shift"]


def shift(weight: Tensor, center: Tensor) -> Tensor:
    """Return ``weight mu`` for each output channel ``(C,)``: what a layer makes of a constant input.

    Args:
        weight: ``(C, C_in / groups, *kernel)``.
        center: ``(groups, C_in / groups * kernel)``: the mean of what each entry of a filter meets.
    """
    groups, fan_in = center.shape
    return torch.bmm(weight.reshape(groups, -1, fan_in), center[:, :, None]).reshape(-1)


def combine(
    weight: Tensor,
    bias: Tensor | None,
    alpha: Tensor | None,
    gain: Tensor | None,
    center: Tensor | None,
    offset: Tensor | None,
    channels: Channels,
    groups: int | None,
    unit: float,
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias as the layer's own forward is to see them, differentiably.

    Args:
        weight: What the layer learns, ``(C, C_in / groups, *kernel)``.
        bias: What it learns of its bias ``(C,)``, or ``None``.
        alpha: The SkipInit scalar ``(1,)``, or ``None``.
        gain: Constant ``(C,)``, or ``None`` for ones.
        center: Constant ``(groups, C_in / groups * kernel)``, or ``None`` for zeros.
        offset: Constant ``(C,)``, given with ``center``.
        channels: Range of output channels that alpha scales, or all of them.
        groups: Given for a transposed convolution, whose weight is ``(C_in, C / groups, *kernel)``.
        unit: How many times the bias that is learnt is.
    """
    factor = gain
    if bias is None:
        bias = offset
    elif offset is not None:
        bias = torch.add(offset, bias, alpha=1 / unit)
    elif unit != 1.0:
        bias = bias / unit
    if alpha is not None:
        features = weight.shape[0] if groups is None else weight.shape[1] * groups
        alpha = alpha_scale(alpha, channels, features)
        factor = alpha if gain is None else gain * alpha
        bias = None if bias is None else bias * alpha
    if factor is None and center is None:
        return weight, bias
    if groups is not None:
        return _transposed(weight, factor, groups), bias
    if center is None or bias is None:
        return (weight if factor is None else weight * _column(factor, weight)), bias
    ones = factor is None
    made: tuple[Tensor, Tensor] = _Centred.apply(weight, bias, weight.new_ones(()) if ones else factor, center)
    return made


torch.fx.wrap("combine")


class _Centred(Function):
    """``(f V, b - f V mu)`` for a factor ``f`` of a layer or of each of its channels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, bias: Tensor, factor: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        with _exactly(weight):
            scaled = weight * _column(factor, weight)
            return scaled, _subtracted(bias, scaled, center)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[0], inputs[2], inputs[3])

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, factor, center = ctx.saved_tensors
        with _exactly(weight):
            whole = _without_mean(grad_weight, grad_bias, center)
            for_weight = whole * _column(factor, weight) if ctx.needs_input_grad[0] else None
            for_factor = None
            if ctx.needs_input_grad[2]:
                each = (whole * weight).flatten(1).sum(1)
                for_factor = each.sum() if factor.dim() == 0 else each
        return for_weight, grad_bias, for_factor, None


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


def _without_mean(grad_weight: Tensor, grad_bias: Tensor, center: Tensor) -> Tensor:
    """Return the gradient of ``g V``: what came for the weight, less what its bias takes along, in one operation."""
    groups = center.shape[0]
    met = center.reshape(groups, 1, *grad_weight.shape[1:])
    each = len(grad_bias) // groups
    met = met[0] if groups == 1 else met.expand(-1, each, *grad_weight.shape[1:]).flatten(0, 1)
    return torch.addcmul(grad_weight, _column(grad_bias, grad_weight), met, value=-1)


def _exactly(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast would round these products to half precision, although they are differences of near numbers."""
    return contextlib.nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def _column(factor: Tensor, weight: Tensor) -> Tensor:
    return factor if factor.dim() == 0 else factor.reshape(-1, *(1,) * (weight.dim() - 1))


def _transposed(weight: Tensor, factor: Tensor | None, groups: int) -> Tensor:
    """Scale output channel ``g * C / groups + j``, which lives in group ``g`` of a weight ``(C_in, C / groups, *)``."""
    if factor is None or factor.dim() == 0:
        return weight if factor is None else weight * factor
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return (grouped * factor.reshape(groups, 1, -1, *(1,) * (weight.dim() - 2))).reshape(weight.shape)
