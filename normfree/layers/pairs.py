"""A layer and the slot of its norm, which compute as one where one is called directly before the other.

``slot(layer(x)) == layer(x; alpha * gain * W) + alpha * bias``: on the weight gain and alpha cost nothing per image.
Apart, both compute what is theirs: the layer what it always did, the slot gain, bias and alpha. So whoever calls one of
them alone, by whatever way, gets what he always got; and a hook sees what it always saw, since nobody who watches one
of two is passed by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._device import DeviceContext

from normfree.layers.carriers import ScaledWeight
from normfree.layers.combining import Affine, Constants
from normfree.layers.copies import CopiedAffine
from normfree.layers.held import alpha_of
from normfree.layers.slots import ChannelAffine

__all__ = ["OneByOne", "held", "merged", "run", "taken"]


class OneByOne(nn.Module):
    """Mixin for a sequence that knows which of its parts compute as one."""

    def forward(self, input: Any) -> Any:
        """Return what the parts make of ``input``, one after the other."""
        return run([part for child in self._modules.values() for part in parts_of(cast(nn.Module, child))], input)


class Held:
    """What waits for what comes behind it, with what it is to be called on."""

    def __init__(self, first: nn.Module, second: nn.Module, x: Any) -> None:
        self.first = first
        self.second = second
        self.x = x


def held(first: nn.Module, second: nn.Module, x: Any) -> Any:
    """Return ``first(x)``, or let it wait if what ends it and what begins ``second`` may compute as one."""
    return Held(first, second, x) if _meet(parts_of(first)[-1], parts_of(second)[0]) else first(x)


def taken(second: nn.Module, x: Any) -> Any:
    """Return ``second(x)``, where ``x`` may be what has waited for it."""
    if not isinstance(x, Held):
        return second(x)
    if second is x.second and isinstance(x.first, ScaledWeight) and type(second) in _SLOTS and _is_batch(x.first, x.x):
        return _as_one(x.first, cast(ChannelAffine, second), x.x)  # as most are, and has been asked already
    return run([*parts_of(x.first), *parts_of(second)], x.x)


def run(parts: Sequence[nn.Module], x: Any) -> Any:
    """Return what modules make of ``x``, one after the other; a layer and its slot compute as one."""
    i, last = 0, len(parts) - 1
    while i <= last:
        layer = parts[i]
        if i < last and _meet(layer, parts[i + 1]) and _is_batch(layer, x):
            x = _as_one(cast(ScaledWeight, layer), cast(ChannelAffine, parts[i + 1]), x)
            i += 1
        else:
            x = layer(x)
        i += 1
    return x


def _as_one(layer: ScaledWeight, slot: ChannelAffine, x: Tensor) -> Tensor:
    return slot.rest(layer.computed(merged(layer, slot), x))


def merged(layer: ScaledWeight, slot: ChannelAffine) -> Affine:
    """Return what the slot behind a layer does to what its weight makes, with what the layer does itself."""
    constants, bias = layer.coordinates, cast(Tensor, slot.bias)
    gain = cast(Tensor, slot.gain).to(bias.device)  # a constant has memory on meta too
    own = layer.bias if layer.fixed_bias is None else layer.fixed_bias
    if own is not None:
        times = slot.bias_unit * slot.gain_unit / layer.bias_unit
        bias = torch.addcmul(bias, gain, own.to(bias.device), value=times)
    last = slot.drop is None and slot.act is None
    alpha = alpha_of(slot.raw_alpha, slot.alpha_unit) if last else None
    others = constants.center, constants.at_center, constants.filter_mean  # Dynamo of torch 2.8 knows no _replace
    return Affine(bias, alpha, Constants(gain, *others, slot.bias_unit, constants.mean_unit), slot.channels)


def parts_of(module: nn.Module) -> list[nn.Module]:
    """Return what a sequence runs one after the other, if nobody watches it as a whole; else the module itself."""
    if not isinstance(module, OneByOne) or type(module).forward is not OneByOne.forward or not len(module._modules):
        return [module]  # or whatever else can be called
    if _is_watched(module):
        return [module]
    return [part for child in module._modules.values() for part in parts_of(cast(nn.Module, child))]


def _meet(layer: nn.Module, slot: nn.Module) -> bool:
    if not (isinstance(layer, ScaledWeight) and type(layer) is layer._normfree_class and type(slot) in _SLOTS):
        return False
    slot = cast(ChannelAffine, slot)
    if not layer.feeds_slot or layer.unit != slot.gain_unit or layer.raw_alpha is not None:
        return False
    if slot.gain is None or slot.bias is None:
        return False
    return not (_is_watched(cast(nn.Module, layer)) or _is_watched(slot) or _all_is_watched())


def _is_batch(layer: nn.Module, x: Any) -> bool:
    """Whether the channels of what comes out will be where the slot expects them."""
    return isinstance(x, Tensor) and x.dim() == cast(ScaledWeight, layer).weight.dim()


def _is_watched(module: nn.Module) -> bool:
    """Whether anybody sees what a module is given or returns, or has put another call in place of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )


def _all_is_watched() -> bool:
    """Whether somebody sees all modules, or all functions of torch, while they run."""
    if torch.compiler.is_compiling():
        return False
    modes = (torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack()))
    return bool(
        nn.Module.__call__ is not _CALL  # torch.fx, and whoever else writes down calls
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or not all(isinstance(mode, DeviceContext) for mode in modes)
    )


_CALL = nn.Module.__call__
_SLOTS = (ChannelAffine, CopiedAffine)
