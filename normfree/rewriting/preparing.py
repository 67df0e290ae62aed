"""Every new tensor and module of a conversion, complete before the first write."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normfree.errors import InternalError
from normfree.layers import (
    ChannelAffine,
    Channels,
    CopiedAffine,
    CopiedOutput,
    CopiedSkipInit,
    Copy,
    ScaledOutput,
    SkipInit,
    scaled_output_class,
    skipinit_name,
)
from normfree.norms import Norm, describe
from normfree.plans import Alpha, NormEdit, Plan
from normfree.rewriting.blocks import scaled_block_class
from normfree.rewriting.originals import folded

__all__ = ["Carrier", "Writes", "prepare"]


@dataclass
class Carrier:
    """New parameters of one layer that stays where it is."""

    gain: nn.Parameter | None = None
    bias: nn.Parameter | None = None
    alpha: nn.Parameter | None = None
    channels: Channels = None


@dataclass
class Writes:
    """Everything to be written, complete before the first write."""

    slots: dict[str, nn.Module] = field(default_factory=dict)
    carriers: dict[str, Carrier] = field(default_factory=dict)
    outputs: dict[str, tuple[nn.Parameter, type[nn.Module]]] = field(default_factory=dict)
    blocks: dict[str, tuple[dict[str, nn.Module], type[nn.Module]]] = field(default_factory=dict)


def prepare(model: nn.Module, plan: Plan) -> Writes:
    """Compute what ``plan`` writes into ``model``, without touching it."""
    writes = Writes()
    modules = dict(model.named_modules(remove_duplicate=False))
    preserve = plan.init == "preserve"
    in_slot = {alpha.path: alpha for alpha in plan.alphas if alpha.place == "norm"}
    for edit in plan.removed:
        writes.slots[edit.name] = _slot(modules[edit.name], edit, plan, in_slot.get(edit.name), model)
        if edit.producer is not None and preserve:
            writes.carriers[edit.producer] = _fold(modules[edit.producer], modules[edit.name])
    for path in plan.biases:
        layer = modules[path]
        bias = torch.zeros(_features(layer), dtype=_weight(layer).dtype, device=_weight(layer).device)
        writes.carriers[path] = Carrier(bias=nn.Parameter(bias, _weight(layer).requires_grad))
    for alpha in plan.alphas:
        module = modules[alpha.path]
        if alpha.place == "weight":
            carrier = writes.carriers.setdefault(alpha.path, Carrier())
            carrier.alpha = _alpha(plan, _weight(module), _weight(module).requires_grad)
            carrier.channels = alpha.channels
        elif alpha.place == "slot":
            writes.slots[alpha.path] = _skipinit(plan, _alpha_beside(plan, module, model), alpha.channels)
        elif alpha.place == "output":
            scalar = _alpha_beside(plan, module, model)
            if hasattr(module, "alpha"):  # an attribute of its own, as nn.ELU has; it carries no state
                cls = ChannelAffine if plan.inplace_activations else CopiedAffine
                writes.slots[alpha.path] = cls(alpha=scalar, act=module)
            else:
                mixin = ScaledOutput if plan.inplace_activations else CopiedOutput
                writes.outputs[alpha.path] = scalar, scaled_output_class(type(module), mixin)
    writes.blocks.update(_blocks(model, plan, modules))
    for path, slot in writes.slots.items():
        slot.training = modules[path].training
    return writes


def _blocks(
    model: nn.Module, plan: Plan, modules: Mapping[str, nn.Module]
) -> Iterator[tuple[str, tuple[dict[str, nn.Module], type[nn.Module]]]]:
    """Yield every block whose forward is rewritten, with what it is to hold and its new class."""
    places: dict[str, list[Alpha]] = {}
    for alpha in plan.alphas:
        if alpha.place == "sum":
            places.setdefault(alpha.path, []).append(alpha)
    for path, alphas in places.items():
        block = modules[path]
        held: dict[str, nn.Module] = {}
        for alpha in alphas:
            slot = _skipinit(plan, _alpha_beside(plan, block, model), None)
            held[skipinit_name(alpha.addition)] = slot.train(block.training)
        yield path, (held, scaled_block_class(block, tuple((a.addition, a.operand) for a in alphas)))


def _slot(module: nn.Module, edit: NormEdit, plan: Plan, alpha: Alpha | None, model: nn.Module) -> nn.Module:
    """Build what takes the norm's place."""
    norm = describe(module)
    gain = bias = scalar = None
    if edit.action in ("affine", "bias"):
        like = _like(module, model)
        fresh = torch.zeros(norm.features, device=like.device)
        affine = norm.affine() if plan.init == "preserve" else (fresh + 1 if edit.action == "affine" else None, fresh)
        train = _learns(norm.weight, norm, _trains(model))
        gain = None if affine[0] is None else nn.Parameter(affine[0].to(like.dtype), train)
        bias = nn.Parameter(affine[1].to(like.dtype), _learns(norm.bias, norm, train))
    if alpha is not None:
        scalar = _alpha_beside(plan, module, model)
    rest = norm.drop is not None or norm.act is not None
    if not rest and gain is None and bias is None:
        if alpha is not None and scalar is not None:
            return _skipinit(plan, scalar, alpha.channels)
        return Copy() if edit.copy else nn.Identity()
    hooked = gain is not None or bias is not None or scalar is not None
    cls = CopiedAffine if edit.copy and hooked and not plan.inplace_activations else ChannelAffine
    copy = edit.copy and edit.action in ("fold", "delete")
    return cls(gain, bias, scalar, alpha.channels if alpha else None, norm.drop, norm.act, copy)


def _learns(value: Tensor | None, norm: Norm, otherwise: bool) -> bool:
    """Whether what comes of a norm's scale or shift learns: as that did, and not at all where it was made of buffers.

    Else an activation that is written over twice would fail in a backward pass that used to stop before it.
    """
    return value.requires_grad if isinstance(value, nn.Parameter) else otherwise and not norm.frozen


def _trains(model: nn.Module) -> bool:
    """Whether anything in the model learns; one without parameters has nothing that says otherwise."""
    return any(p.requires_grad for p in model.parameters()) or not any(True for _ in model.parameters())


def _skipinit(plan: Plan, alpha: nn.Parameter, channels: Channels) -> SkipInit:
    slot = SkipInit(channels=channels) if plan.inplace_activations else CopiedSkipInit(channels=channels)
    slot.alpha = alpha
    return slot


def _fold(layer: nn.Module, module: nn.Module) -> Carrier:
    norm = describe(module)
    weight, old = _weight(layer), layer._parameters["bias"]
    gain, bias = folded(norm, old)
    trained = _learns(norm.weight, norm, weight.requires_grad)
    learns = [p.requires_grad for p in (norm.bias, old) if isinstance(p, nn.Parameter)] or [trained]
    return Carrier(
        gain=nn.Parameter(gain.to(weight.dtype), trained), bias=nn.Parameter(bias.to(weight.dtype), any(learns))
    )


def _alpha(plan: Plan, like: Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.full((1,), plan.alpha, device=like.device, dtype=like.dtype), requires_grad)


def _alpha_beside(plan: Plan, module: nn.Module, model: nn.Module) -> nn.Parameter:
    """Build an alpha that is like the module's own parameters: a frozen part of a model stays frozen."""
    return _alpha(plan, _like(module, model), _trains(module if any(True for _ in module.parameters()) else model))


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    if not isinstance(weight, nn.Parameter):
        raise InternalError(f"{type(layer).__qualname__} has no weight of its own")
    return weight


def _features(layer: Any) -> int:
    return int(layer.out_channels if hasattr(layer, "out_channels") else layer.out_features)


def _like(*modules: nn.Module) -> Tensor:
    """Return a floating tensor of the first of these modules that holds one, for its device and dtype."""
    for module in modules:
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            if tensor.is_floating_point():
                return tensor
    return torch.empty(0)
