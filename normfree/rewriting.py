"""Plan -> model: applies a plan without making decisions.

All checks and all new tensors first, then all writes: the writes are plain assignments that cannot fail, so a failed
conversion leaves the model bit for bit as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normfree.errors import InternalError
from normfree.guards import PLAN_ATTRIBUTE
from normfree.initialization import he_normal_
from normfree.layers import ChannelAffine, Channels, Copy, SkipInit, is_carrier, scaled_class
from normfree.norms import describe, is_norm
from normfree.plans import Alpha, NormEdit, Plan

__all__ = ["rewrite"]


@dataclass
class _Carrier:
    """New parameters of one layer that stays where it is."""

    gain: nn.Parameter | None = None
    bias: nn.Parameter | None = None
    alpha: nn.Parameter | None = None
    channels: Channels = None


@dataclass
class _Writes:
    """Everything to be written, complete before the first write."""

    slots: dict[str, nn.Module] = field(default_factory=dict)
    carriers: dict[str, _Carrier] = field(default_factory=dict)
    outputs: dict[str, nn.Parameter] = field(default_factory=dict)


def rewrite(model: nn.Module, plan: Plan) -> None:
    """Apply ``plan`` to ``model`` in place.

    Raises:
        InternalError: The plan does not fit the model. The model is unchanged.
    """
    _check(model, plan)
    writes = _prepare(model, plan)
    out_of_place = [_submodule(model, path) for path in plan.out_of_place]
    drawn = [(_submodule(model, path), gain) for path, gain in plan.weights]
    for path, carrier in writes.carriers.items():
        _write_carrier(model.get_submodule(path), carrier)
    for path, alpha in writes.outputs.items():
        module = model.get_submodule(path)
        module.__class__ = scaled_class(type(module))
        module.register_parameter("alpha", alpha)
    for activation in out_of_place:
        activation.inplace = False  # type: ignore[assignment]  # a plain bool attribute
    _replace_everywhere(model, {id(model.get_submodule(path)): slot for path, slot in writes.slots.items()})
    for layer, gain in drawn:
        he_normal_(layer, gain)
    model.__dict__[PLAN_ATTRIBUTE] = plan


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise InternalError(f"the plan names {path!r}, which this {type(model).__name__} does not have") from error


def _check(model: nn.Module, plan: Plan) -> None:
    for edit in plan.removed:
        if not is_norm(_submodule(model, edit.name)):
            raise InternalError(f"the plan removes a norm at {edit.name!r}, where the model has none")
        if edit.producer is not None and not is_carrier(_submodule(model, edit.producer)):
            raise InternalError(f"{edit.producer!r} cannot take a gain and a bias")
    for path in plan.biases:
        if not is_carrier(_submodule(model, path)):
            raise InternalError(f"{path!r} cannot take a bias")
    for alpha in plan.alphas:
        module = _submodule(model, alpha.path)
        fits = {"weight": is_carrier, "norm": is_norm, "slot": lambda m: type(m) is nn.Identity}.get(alpha.place)
        if fits is not None and not fits(module):
            raise InternalError(f"alpha cannot live in the {alpha.place} of {alpha.path!r}")


def _prepare(model: nn.Module, plan: Plan) -> _Writes:
    writes = _Writes()
    preserve = plan.init == "preserve"
    in_slot = {alpha.path: alpha for alpha in plan.alphas if alpha.place == "norm"}
    for edit in plan.removed:
        writes.slots[edit.name] = _slot(model, edit, plan, in_slot.get(edit.name))
        if edit.producer is not None and preserve:
            writes.carriers[edit.producer] = _fold(model, edit)
    for path in plan.biases:
        layer = model.get_submodule(path)
        bias = torch.zeros(_features(layer), dtype=_weight(layer).dtype, device=_weight(layer).device)
        writes.carriers[path] = _Carrier(bias=nn.Parameter(bias, _weight(layer).requires_grad))
    for alpha in plan.alphas:
        module = model.get_submodule(alpha.path)
        if alpha.place == "weight":
            carrier = writes.carriers.setdefault(alpha.path, _Carrier())
            carrier.alpha = _alpha(plan, _weight(module), _weight(module).requires_grad)
            carrier.channels = alpha.channels
        elif alpha.place == "slot":
            writes.slots[alpha.path] = _skipinit(_alpha_beside(plan, module, model), alpha.channels)
        elif alpha.place == "output":
            scalar = _alpha_beside(plan, module, model)
            if hasattr(module, "alpha"):  # an attribute of its own, as nn.ELU has; it carries no state
                writes.slots[alpha.path] = ChannelAffine(alpha=scalar, act=module)
            else:
                writes.outputs[alpha.path] = scalar
    for path, slot in writes.slots.items():
        _take_over(model.get_submodule(path), slot)
    return writes


def _slot(model: nn.Module, edit: NormEdit, plan: Plan, alpha: Alpha | None) -> nn.Module:
    """Build what takes the norm's place."""
    module = model.get_submodule(edit.name)
    norm = describe(module)
    gain = bias = scalar = None
    if edit.action in ("affine", "bias"):
        like = next(_floats(module), _like(model))
        affine = norm.affine() if edit.action == "affine" else (None, torch.zeros(norm.features, device=like.device))
        train = norm.weight.requires_grad if isinstance(norm.weight, nn.Parameter) else _trains(model)
        shift = norm.bias.requires_grad if isinstance(norm.bias, nn.Parameter) else train
        gain = None if affine[0] is None else nn.Parameter(affine[0].to(like.dtype), train)
        bias = nn.Parameter(affine[1].to(like.dtype), shift)
    if alpha is not None:
        scalar = _alpha_beside(plan, module, model)
    if edit.copy and norm.drop is not None and norm.act is None and scalar is None:
        return nn.Sequential(Copy(), norm.drop)  # a dropout that is off returns its input itself
    rest = norm.drop is not None or norm.act is not None
    if not rest and gain is None and bias is None:
        if alpha is not None and scalar is not None:
            return _skipinit(scalar, alpha.channels)
        return Copy() if edit.copy else nn.Identity()
    return ChannelAffine(gain, bias, scalar, alpha.channels if alpha else None, norm.drop, norm.act)


def _trains(model: nn.Module) -> bool:
    return any(p.requires_grad for p in model.parameters()) or not any(True for _ in model.parameters())


def _skipinit(alpha: nn.Parameter, channels: Channels) -> SkipInit:
    slot = SkipInit(channels=channels)
    slot.alpha = alpha
    return slot


def _fold(model: nn.Module, edit: NormEdit) -> _Carrier:
    """``gain = weight / sqrt(var + eps)`` and ``bias = beta + gain * (b - mean)`` (design of arXiv 2305.11624)."""
    layer = model.get_submodule(str(edit.producer))
    norm = describe(model.get_submodule(edit.name))
    weight, old = _weight(layer), layer.bias
    gain, bias = norm.affine()
    trained = [weight.requires_grad if not isinstance(p, nn.Parameter) else p.requires_grad for p in (norm.weight,)]
    if isinstance(old, Tensor):
        bias = bias + gain * old.detach().double()
    learns = [p.requires_grad for p in (norm.bias, old) if isinstance(p, nn.Parameter)] or trained
    return _Carrier(
        gain=nn.Parameter(gain.to(weight.dtype), trained[0]),
        bias=nn.Parameter(bias.to(weight.dtype), any(learns)),
    )


def _alpha(plan: Plan, like: Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.full((1,), plan.alpha, device=like.device, dtype=like.dtype), requires_grad)


def _alpha_beside(plan: Plan, module: nn.Module, model: nn.Module) -> nn.Parameter:
    """Build an alpha that is like the module's own parameters: a frozen part of a model stays frozen."""
    parameters = list(module.parameters()) or list(model.parameters())
    like = next(_floats(module), _like(model))
    return _alpha(plan, like, any(p.requires_grad for p in parameters) or not parameters)


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    if not isinstance(weight, nn.Parameter):
        raise InternalError(f"{type(layer).__qualname__} has no weight of its own")
    return weight


def _features(layer: Any) -> int:
    return int(layer.out_channels if hasattr(layer, "out_channels") else layer.out_features)


def _floats(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            yield tensor


def _like(model: nn.Module) -> Tensor:
    return next(_floats(model), torch.empty(0))


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """The slot keeps the norm's mode and its hooks."""
    new.training = old.training
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]  # the same dict: a handle must still find what it removes


_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_HOOKS += ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")


def _write_carrier(layer: nn.Module, carrier: _Carrier) -> None:
    if carrier.bias is not None:
        layer._parameters["bias"] = carrier.bias
    if carrier.gain is None and carrier.alpha is None:
        return
    layer.__class__ = scaled_class(type(layer))
    layer._parameters["gain"] = carrier.gain
    layer._parameters["alpha"] = carrier.alpha
    layer.__dict__["alpha_channels"] = carrier.channels


def _replace_everywhere(model: nn.Module, slots: dict[int, nn.Module]) -> None:
    """Replace modules in all their parents: a shared one is registered under several names."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in slots:
                parent._modules[name] = slots[id(child)]
        for name, value in parent.__dict__.items():
            if name not in ("_modules", "_parameters", "_buffers") and isinstance(value, (list, tuple, dict)):
                parent.__dict__[name] = _replaced(value, slots)


def _replaced(value: Any, slots: dict[int, nn.Module]) -> Any:
    """Replace modules that are also kept in plain lists, tuples and dicts, which torch does not know."""
    if isinstance(value, nn.Module):
        return slots.get(id(value), value)
    if isinstance(value, list):
        value[:] = [_replaced(item, slots) for item in value]
    elif isinstance(value, dict):
        for key, item in value.items():
            value[key] = _replaced(item, slots)
    elif type(value) is tuple and any(isinstance(item, (nn.Module, list, dict, tuple)) for item in value):
        return tuple(_replaced(item, slots) for item in value)
    return value
