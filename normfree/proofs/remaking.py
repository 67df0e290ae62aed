"""The conversion made again: what every other one of the same original by the same plan is held to.

Nobody can list what may be wrong in a converted model. So the plan is applied once more, to the original as it is here,
and the two are compared, entry by entry (:mod:`.state`) and by what they compute and learn (:func:`plain_form`).
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from normfree.deployment.fuse import bake_
from normfree.errors import NormfreeError
from normfree.layers import CONSTANTS, ScaledWeight, alpha_of, alpha_scale
from normfree.planning.plan import look_again
from normfree.plans import Plan
from normfree.rewriting.applying import rewrite
from normfree.tracing.copying import deep_copy
from normfree.training.initialization import zero_biases_

__all__ = ["Made", "plain_form", "remake"]


@dataclass(frozen=True)
class Made:
    """A conversion made again.

    Attributes:
        model: What came of it; layers that a plan draws keep the original's weights.
        known: Whether its values are those that the converted model must have. They are not where only the
            architecture is here, the model was calibrated since, or scalars are part of weights that were drawn.
        why_not: Why there is none.
    """

    model: nn.Module | None
    known: bool
    why_not: str = ""


def remake(structure: nn.Module, plan: Plan, call: tuple[tuple[Any, ...], dict[str, Any]], known: bool) -> Made:
    """Apply ``plan`` to a copy of the original; what its layers meet is read from the same run as it was then."""
    args, kwargs = call
    again = replace(plan, reset=False, fused=False, merged=())
    model = deep_copy(structure)
    try:
        given = plan.looked.endswith("as given")
        met = look_again(structure, again, (kwargs or tuple(args)) if given else None)() if known else {}
        rewrite(model, again, met)
        zero_biases_([(model.get_submodule(path), gain) for path, gain in plan.drawn])
        if plan.fused:
            bake_(model, plan.merged)
    except NormfreeError as error:
        return Made(None, False, f"the plan does not fit the original: {str(error).splitlines()[0]}")
    return Made(model, known)


def plain_form(made: nn.Module, model: nn.Module) -> nn.Module | None:
    """Return what was ``made`` again, with the values of ``model``; every layer computes by the formula in plain torch.

    ``made`` is changed, and must be in the type of ``model``. ``None`` where ``model`` holds other tensors.
    """
    theirs = dict(model.named_modules(remove_duplicate=False))
    with torch.no_grad():
        for name, module in made.named_modules():
            if name not in theirs or not _take(_tensors(module), _tensors(theirs[name])):
                return None
    for module in made.modules():
        if isinstance(module, ScaledWeight):
            module.__dict__["combined"] = functools.partial(_combined, weakref.ref(module))  # no circle: it is large
            cast(nn.Module, module).register_forward_hook(_look)  # whoever is watched does not wait for a slot
    return made


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what a module computes with: its parameters and buffers, and the constants of ours."""
    constants = ((key, module.__dict__.get(key)) for key in CONSTANTS)
    held = (*module._parameters.items(), *module._buffers.items(), *constants)
    return {key: tensor for key, tensor in held if isinstance(tensor, Tensor)}


def _take(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Copy the tensors of another module, if it has the same."""
    if {key: t.shape for key, t in ours.items()} != {key: t.shape for key, t in theirs.items()}:
        return False
    for key, tensor in ours.items():
        tensor.copy_(theirs[key])
    return True


def _look(*_: Any) -> None: ...


def _combined(held: weakref.ref[Any], _: Any = None) -> tuple[Tensor, Tensor | None]:
    """Return ``alpha g U`` and ``alpha (b / u + g (s - U mu))``: the formulas of :mod:`normfree.layers.combining`."""
    layer: Any = held()
    weight, bias = layer.weight, layer.bias if layer.fixed_bias is None else layer.fixed_bias
    if bias is None and layer.feeds_slot and layer.center is not None:
        bias = layer.at_center * 0
    if layer.filter_mean is not None:
        mean = weight.sum(tuple(range(2, weight.dim())), keepdim=True) / weight[0, 0].numel()
        weight = weight - (1 - 1 / layer.mean_unit) * (mean - layer.filter_mean)
    transposed = getattr(layer, "transposed", False)
    width = weight.shape[1] * layer.groups if transposed else weight.shape[0]
    factor = torch.ones(width, dtype=weight.dtype, device=weight.device)
    bias = None if bias is None else bias / layer.bias_unit
    if layer.raw_alpha is not None:
        factor = factor * alpha_scale(alpha_of(layer.raw_alpha, layer.alpha_unit), layer.alpha_channels, width)
        bias = None if bias is None else bias * factor
    factor = factor if layer.gain is None else factor * layer.gain
    rest = (1,) * (weight.dim() - 2)
    if transposed:  # (C_in, C / groups, *kernel): output channel g * C / groups + j is in the rows of group g
        rows = factor.reshape(layer.groups, -1).repeat_interleave(weight.shape[0] // layer.groups, 0)
        return weight * rows.reshape(*weight.shape[:2], *rest), bias
    if layer.center is not None:
        met = layer.center.repeat_interleave(width // len(layer.center), 0)
        moved = (weight.flatten(1) * met).sum(1) - layer.at_center
        if bias is not None:
            bias = bias - factor * moved
        else:
            length = (met * met).sum(1).clamp_min(torch.finfo(met.dtype).tiny)
            weight = weight - ((moved / length)[:, None] * met).reshape(weight.shape)
    return weight * factor.reshape(-1, 1, *rest), bias
