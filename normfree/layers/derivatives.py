"""What :mod:`normfree.layers.combining` computes, as one autograd function whose gradients are written out.

At small batches a training step passes over the weights as often as over the images, and starts as many operations for
them: here both are few.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

if TYPE_CHECKING:
    from normfree.layers.combining import Constants

__all__ = ["combined", "rows", "shift"]


def combined(
    weight: Tensor, bias: Tensor | None, alpha: Tensor | None, constants: Constants, apart: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias; see :func:`normfree.layers.combining.combine`.

    Args:
        weight: ``V``.
        bias: ``b``, or ``None``.
        alpha: ``(1,)``, or ``None``.
        constants: The coordinates, none of which learns.
        apart: Without alpha: return ``U``, and the bias that goes with ``g`` times what the layer makes with it.
    """
    made, *rest = _Combined.apply(weight, bias, alpha, *constants, apart)
    return made, rest[0] if rest else None


class _Combined(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor,
        bias: Tensor | None,
        alpha: Tensor | None,
        gain: Tensor | None,
        center: Tensor | None,
        at_center: Tensor | None,
        filter_mean: Tensor | None,
        bias_unit: float,
        mean_unit: float,
        apart: bool,
    ) -> tuple[Tensor, ...]:
        made = weight
        if filter_mean is not None:
            made = torch.sub(weight, _mean(weight) - filter_mean, alpha=1 - 1 / mean_unit)
        if center is not None and bias is None:
            made = _less(made, shift(made, center) - cast(Tensor, at_center), _along(center))
        factor = alpha if gain is None else gain if alpha is None else gain * alpha
        centred = None if center is None or bias is None else shift(made, center, at_center)  # at the start 0, exactly
        weights = made if apart or factor is None else _times(made, rows(factor, made), made is not weight)
        # Autograd wants outputs that are none of the inputs.
        weights = weights.view_as(weights) if weights is weight else weights
        if bias is None:
            return (weights,)
        added = bias if bias_unit == 1.0 else bias / bias_unit
        added = added if alpha is None else added * alpha
        if centred is not None:
            added = added + centred if factor is None else torch.addcmul(added, factor, centred)
        return weights, added.view_as(added) if added is bias else added

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:7])
        ctx.bias_unit, ctx.mean_unit, ctx.apart = inputs[7:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors  # asked for once: checkpoints compute them anew
        _, bias, alpha, gain, center, _, filter_mean = saved
        for_bias = for_alpha = column = None
        given = grad
        if center is not None and bias is not None and not ctx.apart:
            grad = _less(grad, grads[0], center)
        if gain is not None and not ctx.apart:
            grad = _times(grad, rows(gain, grad), grad is not given)
        if center is not None and bias is None:
            column = shift(grad, _along(center))
        elif center is not None and ctx.apart:
            column = grads[0] if gain is None else grads[0] * gain
        if filter_mean is not None:
            grad = _steadied(grad, ctx.mean_unit)
        if column is not None:
            met = center.reshape(-1, *grad.shape[1:])
            met = met if filter_mean is None else _steadied(met, ctx.mean_unit)
            grad = _less(grad, column, met, grad is not given)
        if alpha is not None:  # of what it multiplies, so before it does
            for_alpha = _of_alpha(ctx, saved, grad, grads, column).reshape(alpha.shape)
            grad = _times(grad, alpha.reshape(()), grad is not given)
        if bias is not None:
            for_bias = grads[0] if alpha is None else grads[0] * alpha
            for_bias = for_bias if ctx.bias_unit == 1.0 else for_bias / ctx.bias_unit
        return grad, for_bias, for_alpha, *(None,) * 7


def _of_alpha(ctx: Any, saved: Any, grad: Tensor, grads: tuple[Tensor, ...], column: Tensor | None) -> Tensor:
    """Return the gradient of alpha, from that of ``V`` before alpha multiplies it."""
    weight, bias, _, gain, _, at_center, filter_mean = saved
    found = _inner(grad, weight)
    if filter_mean is not None:
        unit = (ctx.mean_unit - 1) * weight[0, 0].numel()
        found = torch.add(found, _inner(_mean(grad), filter_mean), alpha=unit)
    if bias is None:
        return found if column is None else found + _inner(column, at_center)
    if at_center is not None and gain is not None:
        bias = torch.addcmul(bias, gain, at_center, value=ctx.bias_unit)
    elif at_center is not None:
        bias = torch.add(bias, at_center, alpha=ctx.bias_unit)
    return torch.add(found, _inner(grads[0], bias), alpha=1 / ctx.bias_unit)


# torch binds the arguments of each call to the signature, and would read that anew each time.
_Combined.forward.__signature__ = inspect.signature(_Combined.forward)  # type: ignore[attr-defined]


def rows(values: Tensor, weight: Tensor) -> Tensor:
    """Return a value for each output channel so that it meets the rows of a weight."""
    return values.reshape(-1, *(1,) * (weight.dim() - 1))


def shift(weight: Tensor, center: Tensor, added: Tensor | None = None) -> Tensor:
    """Return ``weight mu`` for each output channel ``(C,)``, what a layer makes of a constant input; or added less it.

    Args:
        weight: ``(C, C_in / groups, *kernel)``.
        center: ``(groups, C_in / groups * kernel)``: the mean of what each entry of a filter meets.
        added: ``(C,)``: return ``added - weight mu``.
    """
    groups, fan_in = center.shape
    if torch.compiler.is_compiling():  # which fuses it, and could not be kept from autocast within a function
        product = weight.reshape(groups, -1, fan_in) * center[:, None]
        return product.sum(2).reshape(-1) if added is None else added - product.sum(2).reshape(-1)
    with _exactly(weight):
        if groups > 1:
            by_group, met = weight.reshape(groups, -1, fan_in), center[:, :, None]
            if added is None:
                return torch.bmm(by_group, met).reshape(-1)
            return torch.baddbmm(added.reshape(groups, -1, 1), by_group, met, alpha=-1).reshape(-1)
        filters, met = weight.flatten(1), center[0]
        if weight.dim() > 2 and not weight.is_contiguous():  # channels last: its rows are views in another order
            filters, met = weight.movedim(1, -1).flatten(1), met.reshape(weight.shape[1:]).movedim(0, -1).flatten()
        return torch.mv(filters, met) if added is None else torch.addmv(added, filters, met, alpha=-1)


def _along(center: Tensor) -> Tensor:
    """Return what meets ``mu`` with one, and whatever is across ``mu`` with zero."""
    return center / center.square().sum(1, keepdim=True).clamp_min(torch.finfo(center.dtype).tiny)


def _less(weight: Tensor, column: Tensor, met: Tensor, own: bool = False) -> Tensor:
    """Return ``weight - column met``, where ``met`` has a row a group; in a weight of one's ``own``, in place."""
    groups = met.shape[0]
    met = met.reshape(groups, 1, *weight.shape[1:])
    met = met[0] if groups == 1 else met.expand(-1, len(weight) // groups, *weight.shape[1:]).flatten(0, 1)
    return (weight.addcmul_ if own and _in_place() else weight.addcmul)(rows(column, weight), met, value=-1)


def _times(weight: Tensor, factor: Tensor, own: bool) -> Tensor:
    """Return ``weight * factor``, in a weight of one's ``own`` in place: new memory costs as much as the product."""
    return weight.mul_(factor) if own and _in_place() else weight * factor


def _in_place() -> bool:
    """Whether nobody needs what is written over: a second derivative may; under ``vmap`` a factor has a batch more."""
    return not torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None


def _mean(weight: Tensor) -> Tensor:
    """Return the mean of each filter over its positions, ``(C, C_in / groups, 1, ...)``."""
    if not _multiplied(weight):
        return weight.mean(tuple(range(2, weight.dim())), keepdim=True)
    places = weight[0, 0].numel()
    with _exactly(weight):
        mean = torch.mv(weight.reshape(-1, places), weight.new_full((places,), 1 / places))
    return mean.reshape(*weight.shape[:2], *(1,) * (weight.dim() - 2))


def _steadied(weight: Tensor, unit: float) -> Tensor:
    """Return a weight, or rows as long as its, with its means over positions divided by ``unit``; always a new one."""
    if not _multiplied(weight):
        return torch.sub(weight, _mean(weight), alpha=1 - 1 / unit)
    places = weight[0, 0].numel()
    matrix = torch.eye(places, dtype=weight.dtype, device=weight.device) - (1 - 1 / unit) / places
    with _exactly(weight):
        return torch.mm(weight.reshape(-1, places), matrix).reshape(weight.shape)


def _multiplied(weight: Tensor) -> bool:
    """Whether a product with a small matrix is faster than a sum over such short rows: twice, if there are many.

    In float64, in which proofs are made, means are those of :func:`normfree.layers.mean_of` to the last bit.
    """
    if weight.device.type != "cpu" or weight.numel() <= 1 << 14 or torch.compiler.is_compiling():
        return False
    return weight.is_contiguous() and weight.dtype is torch.float32


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner product: in one operation where the sum is exact enough and nothing must be copied for it."""
    if one.dtype in (torch.float32, torch.float64) and one.is_contiguous() and other.is_contiguous():
        return torch.dot(one.reshape(-1), other.reshape(-1))
    return (one * other).sum()


def _exactly(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast would round these products to half precision, although they are differences of near numbers."""
    kind = like.device.type
    if like.is_meta or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)
