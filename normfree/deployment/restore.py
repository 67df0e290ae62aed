"""The way back: a converted model becomes one with batch norms again, for tools that expect them."""

from __future__ import annotations

import copy
import warnings
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from normfree.deployment.fuse import FuseWarning, multiplying
from normfree.deployment.plain import moved, scaled_like, unscaled_, unscaled_output_, without_norm_
from normfree.edits import NormEdit
from normfree.errors import UnsupportedModelError, UsageError, some
from normfree.layers import (
    ChannelAffine,
    HasAlpha,
    ScaledOutput,
    ScaledSum,
    ScaledWeight,
    SkipInit,
    alpha_of,
    alpha_scale,
    is_normfree,
)
from normfree.layers.reparametrized import check_plain
from normfree.norms import describe
from normfree.plans import PLAN_ATTRIBUTE, Plan
from normfree.rewriting.changing import become
from normfree.rewriting.hints import no_hint_
from normfree.rewriting.originals import ORIGINALS_ATTRIBUTE, Originals
from normfree.rewriting.pairing import unpaired_
from normfree.tracing.copying import deep_copy

__all__ = ["restore", "restore_"]

M = TypeVar("M", bound=nn.Module)


def restore(model: M) -> M:
    """Return a copy of a converted model with its batch norms back: the same output in eval mode, and no scalars.

    What was not trained since the conversion is bit for bit what it was. After training the norms keep the statistics
    they had, and their weight and bias are those that gain, bias and alpha amount to:
    ``weight = alpha * gain * sqrt(var + eps)`` (the inverse of Ioffe & Szegedy 2015, algorithm 2). A norm that had no
    affine gets one if it needs it.

    Args:
        model: What :func:`normfree.convert` made with ``init="preserve"``, or :func:`normfree.load` read; unchanged.

    Raises:
        UsageError: The model was not converted, not with ``"preserve"``, or is fused.
        UnsupportedModelError: A norm type of your own cannot express what was learnt.

    Warns:
        FuseWarning: A scalar that is not 1 stays, because a branch ends in something non-linear; all are named.

    Example:
        >>> import torch, torchvision, normfree
        >>> original = torchvision.models.resnet18()
        >>> restored = normfree.restore(normfree.convert(original, init="preserve"))
        >>> all(torch.equal(a, b) for a, b in zip(restored.state_dict().values(), original.state_dict().values()))
        True
    """
    with torch.inference_mode(False):
        return restore_(deep_copy(model))


@torch.no_grad()
def restore_(model: M) -> M:
    """Do in place what :func:`restore` does on a copy; all or nothing."""
    plan, originals = _asked(model)
    check_plain(model, {name for name, module in model.named_modules() if is_normfree(module)}, "restore")
    modules = dict(model.named_modules(remove_duplicate=False))
    slots: dict[int, nn.Module] = {}
    problems: list[str] = []
    units = {carried.path: carried.unit for carried in plan.carried}
    for edit in plan.removed:
        slot, layer = modules.get(edit.name), None if edit.producer is None else modules.get(edit.producer)
        try:
            slots[id(slot)] = _norm(edit, slot, layer, originals, units.get(edit.producer or "", 1.0))
        except ValueError as error:
            problems.append(f"{edit.name} ({edit.type}): {error}")
    if problems:
        raise UnsupportedModelError(tuple(problems))
    for alpha in plan.alphas:
        holder = modules[alpha.holder]
        if alpha.place in ("slot", "output", "sum") and isinstance(holder, HasAlpha) and holder.alpha == 1:
            slots |= _without_alpha(holder)
    for path, bias in originals.biases.items():
        if isinstance(modules[path], ScaledWeight):
            own = cast(ScaledWeight, modules[path]).bias if path in plan.keeping_bias else bias
            without_norm_(modules[path], own, units.get(path, 1.0))
    for module in list(model.modules()):
        if isinstance(module, ScaledWeight):
            unscaled_(module)
        elif isinstance(module, ScaledSum):
            _own_forward(module, slots)
    for module in {id(module): module for module in modules.values() if id(module) in slots}.values():
        become(module, slots[id(module)])
    unpaired_(model)
    no_hint_(model)
    for attribute in (PLAN_ATTRIBUTE, ORIGINALS_ATTRIBUTE):
        del model.__dict__[attribute]
    left = multiplying(model)
    if left:
        text = f"alpha is not 1 and stays a multiplication at {some(left)}: no weight ends that branch"
        warnings.warn(text, FuseWarning, stacklevel=3)
    return model


def _asked(model: nn.Module) -> tuple[Plan, Originals]:
    """Return what a model carries that can be restored."""
    plan, originals = Plan.of(model), model.__dict__.get(ORIGINALS_ATTRIBUTE)
    name = type(model).__name__
    if plan.fused:
        raise UsageError(f"this {name} is fused: its gains are gone; restore the converted one")
    if plan.init != "preserve" or originals is None:
        raise UsageError(f"this {name} was converted with init={plan.init!r}, which keeps nothing of the norms")
    return plan, originals


def _norm(
    edit: NormEdit, slot: nn.Module | None, layer: nn.Module | None, originals: Originals, unit: float
) -> nn.Module:
    """Return the norm that does what has taken its place; raise a ``ValueError`` if there is none."""
    norm = originals.norms[edit.name]
    for path, held, cls in ((edit.name, slot, ChannelAffine), (edit.producer, layer, ScaledWeight)):
        if path is not None and not isinstance(held, cls):
            raise ValueError(f"what has taken its place is gone from {path}")
    slot = cast(ChannelAffine, slot)
    gain, shifted = cast(Tensor, slot.gain) * slot.gain_unit, cast(Tensor, slot.bias).double() / slot.bias_unit
    if layer is not None:  # what its weight makes of a mean now, over what it made at the start
        shifted = shifted + gain.double() * moved(cast(ScaledWeight, layer), unit)
    norm.to(gain.device, gain.dtype)
    absorbs = slot.act is None or slot.alpha in (None, 1.0)
    wanted = torch.stack([gain.double(), shifted])
    if slot.raw_alpha is not None and absorbs:
        wanted = wanted * alpha_scale(alpha_of(slot.raw_alpha, slot.alpha_unit), slot.channels, len(gain)).double()
    if not torch.equal(torch.stack(describe(norm).affine()).to(gain), wanted.to(gain)):
        _solve(norm, *wanted)
    norm.training = slot.training
    if absorbs:
        return norm
    if slot.channels is not None:
        raise ValueError("its alpha scales some channels behind an activation, which no norm can")
    return scaled_like(norm, slot)


def _solve(norm: nn.Module, gain: Tensor, shift: Tensor) -> None:
    """Choose the weight and bias with which ``norm`` computes ``gain * x + shift``.

    Both enter linearly, whatever a type of your own does with them; its statistics stay.
    """
    probe = copy.deepcopy(norm).double()
    for name, start in (("weight", 1.0), ("bias", 0.0)):
        value = getattr(probe, name, None)
        if value is None:
            setattr(probe, name, nn.Parameter(torch.full_like(gain, start)))
        else:
            value.fill_(start)
    weight, bias = cast(Tensor, probe.weight), cast(Tensor, probe.bias)
    weight.copy_(gain / describe(probe).affine()[0])
    without = describe(probe).affine()[1]
    bias.fill_(1)
    bias.copy_((shift - without) / (describe(probe).affine()[1] - without))
    found = describe(probe).affine()
    if not all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, (gain, shift), strict=True)):
        raise ValueError("no weight and bias of this type express what was learnt")
    for name, value in (("weight", weight), ("bias", bias)):
        held = getattr(norm, name, None)
        if held is None:
            setattr(norm, name, nn.Parameter(value.to(next(norm.buffers()).dtype)))
            norm.__dict__["affine"] = True
        else:
            held.copy_(value)


def _without_alpha(module: nn.Module) -> dict[int, nn.Module]:
    """Take a scalar of 1 off an output; return what must be replaced by what."""
    if isinstance(module, ScaledOutput):
        unscaled_output_(module)
        return {}
    kept = module.act if isinstance(module, ChannelAffine) and module.act is not None else nn.Identity()
    if isinstance(module, SkipInit):
        kept.training = module.training
    return {id(module): kept}


def _own_forward(block: ScaledSum, slots: dict[int, nn.Module]) -> None:
    """Give a block its own forward back, if none of the scalars in the rewritten one is left."""
    module = cast(nn.Module, block)
    held = {name: child for name, child in module._modules.items() if isinstance(child, SkipInit)}
    if all(id(child) in slots for child in held.values()):
        module.__class__ = type(block).__bases__[1]
        for name in held:
            del module._modules[name]
