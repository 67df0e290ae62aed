"""Deployment: alpha and all constants baked into plain layers, so that nothing is multiplied any more."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from normfree.deployment.absorbing import absorb_
from normfree.deployment.alone import in_torch_alone_
from normfree.deployment.merging import merge_
from normfree.deployment.plain import absorb_output_, plain_
from normfree.edits import NormEdit
from normfree.errors import UnsupportedModelError, UsageError, some
from normfree.layers import ChannelAffine, ScaledOutput, ScaledWeight, alpha_of, alpha_scale, is_normfree
from normfree.layers.pairs import merged as merged_affine
from normfree.layers.reparametrized import check_plain
from normfree.planning.hooks import any_global_hook, hooks_on
from normfree.plans import PLAN_ATTRIBUTE, Plan, plan_on
from normfree.rewriting.changing import become
from normfree.rewriting.hints import no_hint_
from normfree.rewriting.originals import ORIGINALS_ATTRIBUTE
from normfree.rewriting.pairing import unpaired_
from normfree.tracing.copying import deep_copy

__all__ = ["FuseWarning", "bake_", "fuse", "fuse_", "multiplying"]

M = TypeVar("M", bound=nn.Module)


class FuseWarning(UserWarning):
    """Something stays an operation on activations, because no weight could absorb it."""


def fuse(model: M) -> M:
    """Return a copy of a converted model, with gain and alpha baked into plain layers.

    ``alpha * (gain * conv(x; W) + b) == conv(x; alpha * gain * W) + alpha * b``: the same function, up to rounding.
    Blocks that bring a method to merge their parallel branches (RepVGG, MobileOne and others of timm) are merged by it.
    What is fused does what the run of the conversion has seen. A method that calls a layer without its norm, which a
    converted model keeps exact, gets gain and bias with its output from now on.
    For inference that is all. A fused model trains too, but in plain coordinates: at much smaller learning rates than
    before, since a step of a folded weight is 10 to 30 times as large (``examples/experiments/finetuning_forms.py``).

    Args:
        model: What :func:`normfree.convert` returned, trained or not; it is not changed.

    Raises:
        UsageError: The model is fused already, or was not converted.

    Warns:
        FuseWarning: A branch ends in something non-linear, so its alpha stays a multiplication; or gain and bias of a
            norm stay an operation, as no layer beside it takes them, or the bias alone. All are named.

    Example:
        >>> import torch, torchvision, normfree
        >>> model = normfree.convert(torchvision.models.resnet18(), init="preserve").eval()
        >>> fused = normfree.fuse(model)
        >>> type(fused.conv1), fused.conv1.bias.shape
        (<class 'torch.nn.modules.conv.Conv2d'>, torch.Size([64]))
    """
    with torch.inference_mode(False):
        return fuse_(deep_copy(model))


def fuse_(model: M) -> M:
    """Do in place what :func:`fuse` does on a copy."""
    plan = plan_on(model)
    if plan is not None and plan.fused:
        raise UsageError(f"this {type(model).__name__} is fused already")
    if plan is None and not any(map(is_normfree, model.modules())):
        raise UsageError(f"this {type(model).__name__} carries no gain and no alpha: convert it first")
    check_plain(model, {name for name, module in model.named_modules() if is_normfree(module)}, "fuse")
    bake_(model)
    said = {
        "alpha stays a multiplication at {}: no weight ends that branch": multiplying(model),
        "gain and bias stay an operation at {}: no layer beside it takes them": _slots_left(model, "gain"),
        "a bias stays an operation at {}: the layer behind it takes the gain alone": _slots_left(model, "bias"),
    }
    problems = [text.format(some(names)) for text, names in said.items() if names]
    if problems:
        warnings.warn("; ".join(problems), FuseWarning, stacklevel=3)
    return model


@torch.no_grad()
def bake_(model: nn.Module, merged: tuple[str, ...] | None = None) -> None:
    """Bake in what a weight can absorb; all or nothing.

    Args:
        model: The model.
        merged: The blocks whose branches are merged, where a file says it.

    Raises:
        UnsupportedModelError: A weight would not be finite.
    """
    plan = plan_on(model)
    pairs = {} if plan is None else _pairs(model, plan)
    combined = {
        name: m.combined(merged_affine(m, pairs[name][0]) if name in pairs else None)
        for name, m in model.named_modules()
        if isinstance(m, ScaledWeight)
    }
    problems = [
        f"{name} ({type(model.get_submodule(name)).__name__}): its weight and bias overflow {str(weight.dtype)[6:]} "
        "once gain and alpha are in them; fuse in float32"
        for name, (weight, bias) in combined.items()
        if not all(t is None or t.is_meta or bool(t.isfinite().all()) for t in (weight, bias))
    ]
    if problems:
        raise UnsupportedModelError(tuple(problems))
    for name, (weight, bias) in combined.items():
        slot, _ = pairs.get(name, (None, None))
        _bake(cast(ScaledWeight, model.get_submodule(name)), weight, bias, slot)
        if slot is not None:
            _empty(slot)
    unpaired_(model)
    for module in model.modules():
        if isinstance(module, ChannelAffine):
            _bake_affine(module)
        elif isinstance(module, ScaledOutput):
            absorb_output_(module)
    if plan is not None:
        taken = {edit for _, edit in pairs.values()}
        left = {e for e in plan.norms if e.producer is not None and e not in taken and plan.init == "preserve"}
        norms = (replace(e, action="affine", producer=None) if e in left else e for e in plan.norms)
        plan = replace(plan, norms=tuple(norms))
        plan = replace(absorb_(model, plan, merged is not None), fused=True)
        plan = replace(plan, merged=merge_(model, plan, merged))
        model.__dict__[PLAN_ATTRIBUTE] = plan.to_json()
    in_torch_alone_(model)
    model.__dict__.pop(ORIGINALS_ATTRIBUTE, None)
    no_hint_(model)


def _pairs(model: nn.Module, plan: Plan) -> dict[str, tuple[ChannelAffine, NormEdit]]:
    """Return by the name of each layer the slot that it takes in, unless a hook sees what passes between them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, tuple[ChannelAffine, NormEdit]] = {}
    for edit in plan.removed:
        layer, slot = modules.get(str(edit.producer)), modules.get(edit.name)
        if plan.init != "preserve" or not isinstance(layer, ScaledWeight) or not isinstance(slot, ChannelAffine):
            continue
        between = [modules[path] for path in edit.through if path in modules]
        watched = hooks_on(cast(nn.Module, layer)) - {"_forward_pre_hooks"} or any(map(hooks_on, (slot, *between)))
        if layer.feeds_slot and not (watched or any_global_hook()):
            found[str(edit.producer)] = slot, edit
    return found


def _empty(slot: ChannelAffine) -> None:
    """Take gain and bias out of a slot, and alpha where it has scaled nothing else."""
    if slot.drop is None and slot.act is None:
        become(slot, nn.Identity().train(slot.training))
        return
    slot.__dict__.pop("gain", None)
    slot._parameters["gain"] = slot._parameters["bias"] = None
    slot.copy = False


def _bake(layer: ScaledWeight, weight: Tensor, bias: Tensor | None, slot: ChannelAffine | None) -> None:
    """Give a carrier its combined weight and its old class back.

    The parameters are new ones: a weight that is tied to another layer's stays there what it was.
    """
    module, own = cast(nn.Module, layer), layer.bias if slot is None else slot.bias
    trains, learns = layer.weight.requires_grad, layer.weight if own is None else own
    plain_(module)
    module._parameters["weight"] = nn.Parameter(weight.clone(), trains)  # which keeps channels last
    module._parameters["bias"] = None if bias is None else nn.Parameter(bias, learns.requires_grad)


def _bake_affine(slot: ChannelAffine) -> None:
    """Take bias and gain out of their units, and alpha into gain and bias, where no activation stands between them."""
    raw = slot.raw_alpha
    if slot.bias is not None and slot.bias_unit != 1.0:
        slot.bias = nn.Parameter(slot.bias / slot.bias_unit, slot.bias.requires_grad)
    if slot.gain is not None:
        slot.gain.mul_(slot.gain_unit)
    slot.bias_unit = slot.gain_unit = 1.0
    if raw is None or slot.act is not None or slot.drop is not None or (slot.gain is None and slot.bias is None):
        return
    like = cast(Tensor, slot.gain if slot.gain is not None else slot.bias)
    alpha = alpha_of(raw, slot.alpha_unit)
    factor = alpha_scale(alpha, slot.channels, like.shape[0]).expand(like.shape[0])
    gain = factor.clone() if slot.gain is None else slot.gain * factor
    slot.__dict__.pop("gain", None)
    slot._parameters["gain"] = nn.Parameter(gain, like.requires_grad)
    slot.constant = False
    slot.bias = None if slot.bias is None else nn.Parameter(slot.bias * factor, like.requires_grad)
    slot.raw_alpha = None


def _slots_left(model: nn.Module, what: str) -> list[str]:
    """Name the slots that multiply, or those that only add since the layer behind them has taken the gain."""
    plan, modules = plan_on(model), dict(model.named_modules(remove_duplicate=False))
    removed = () if plan is None else plan.removed
    held = {e: modules[e.name]._parameters for e in removed if e.name in modules and (what == "gain" or e.into)}
    return [e.name for e, own in held.items() if own.get(what) is not None]


def multiplying(model: nn.Module) -> list[str]:
    """Name the modules that multiply an activation by alpha."""
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, ScaledWeight) and module._parameters.get("raw_alpha") is not None
    ]
