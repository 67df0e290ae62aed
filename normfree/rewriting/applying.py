"""Plan -> model: applies a plan without making decisions.

All checks and all new tensors first, then all writes: the writes are plain assignments that cannot fail, so a failed
conversion leaves the model bit for bit as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from normfree.analysis.moments import Moments
from normfree.analysis.tails import Place
from normfree.errors import InternalError
from normfree.layers import is_carrier, scaled_weight_class
from normfree.norms import describe, is_norm
from normfree.plans import PLAN_ATTRIBUTE, Plan
from normfree.rewriting.hints import hint_
from normfree.rewriting.originals import ORIGINALS_ATTRIBUTE, Originals
from normfree.rewriting.preparing import prepare
from normfree.rewriting.units import Carrier
from normfree.training.initialization import draw_

__all__ = ["check_plan", "hand_on_hooks", "replace_everywhere", "rewrite"]


def rewrite(model: nn.Module, plan: Plan, met: Mapping[str, Moments] | None = None, *, scale: bool = True) -> None:
    """Apply ``plan`` to ``model`` in place.

    Args:
        model: The model.
        plan: The plan.
        met: What the carried layers meet, by path. ``None`` where weights and constants come from a file: then weights
            stay what they are.
        scale: Whether weights get their units; ``False`` where their values are not here.

    Raises:
        InternalError: The plan does not fit the model. The model is unchanged.
    """
    check_plan(model, plan)
    modules = dict(model.named_modules(remove_duplicate=False))
    writes = prepare(model, plan, met)
    originals = Originals.of(modules, plan) if plan.init == "preserve" else None
    out_of_place = [modules[path] for path in plan.out_of_place]
    drawn = [(modules[path], gain) for path, gain in plan.drawn]
    for path, carrier in writes.carriers.items():
        _write_carrier(modules[path], carrier, scale)
    for path, (alpha, cls) in writes.outputs.items():
        modules[path].__class__ = cls
        modules[path]._parameters["raw_alpha"] = alpha
        modules[path].__dict__["alpha_unit"] = plan.units.alpha
    for path, (held, cls) in writes.blocks.items():
        modules[path].__class__ = cls
        modules[path]._modules.update(held)
    for activation in out_of_place:
        activation.inplace = False  # type: ignore[assignment]  # a plain bool attribute
    for path, slot in writes.slots.items():
        _take_over(modules[path], slot)
    replace_everywhere(model, {id(modules[path]): slot for path, slot in writes.slots.items()})
    draw_(drawn)
    model.__dict__[PLAN_ATTRIBUTE] = plan
    hint_(model)
    if originals is not None:
        model.__dict__[ORIGINALS_ATTRIBUTE] = originals


def _find(modules: Mapping[str, nn.Module], model: str, path: str) -> nn.Module:
    if path not in modules:
        raise InternalError(f"the plan names {path!r}, which this {model} does not have")
    return modules[path]


_FITS: dict[Place, Callable[[nn.Module], bool]] = {
    "weight": is_carrier,
    "norm": is_norm,
    "slot": lambda module: type(module) is nn.Identity,
    "sum": lambda module: any(True for _ in module.children()),
    "output": lambda module: not isinstance(module, torch.jit.ScriptModule),
}


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Hold a plan to a model, before anything is done.

    Raises:
        InternalError: It names what the model does not have.
    """
    find = functools.partial(_find, dict(model.named_modules(remove_duplicate=False)), type(model).__name__)
    for path in (*plan.out_of_place, *(path for path, _ in plan.drawn)):
        find(path)
    for edit in plan.removed:
        if not is_norm(find(edit.name)):
            raise InternalError(f"the plan removes a norm at {edit.name!r}, where the model has none")
        if edit.producer is not None and not is_carrier(find(edit.producer)):
            raise InternalError(f"{edit.producer!r} cannot take a gain and a bias")
    for carried in plan.carried:
        if not is_carrier(find(carried.path)):
            raise InternalError(f"{carried.path!r} cannot learn in units of its own")
    for path in plan.biases:
        if not is_carrier(find(path)):
            raise InternalError(f"{path!r} cannot take a bias")
    for alpha in plan.alphas:
        module = find(alpha.path)
        if not _FITS[alpha.place](module):
            raise InternalError(f"alpha cannot live in the {alpha.place} of {alpha.path!r}")
        features = describe(module).features if is_norm(module) else getattr(module, "out_channels", None)
        features = features or getattr(module, "out_features", None)
        if alpha.channels is not None and isinstance(features, int) and alpha.channels[1] > features:
            raise InternalError(f"alpha scales channels {alpha.channels} of {alpha.path!r}, which has {features}")


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """Hand on hooks, and what others read of a norm or hang on it: its width, its eps, where its input comes from."""
    hand_on_hooks(old, new)
    for name, value in old.__dict__.items():
        if not (name.startswith("_") or isinstance(value, (Tensor, nn.Module)) or hasattr(new, name)):
            new.__dict__[name] = value


def hand_on_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the same dicts: a handle must still find what it removes."""
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]


def _write_carrier(layer: nn.Module, carrier: Carrier, scale: bool) -> None:
    if carrier.bias is not None:
        layer._parameters["bias"] = carrier.bias
    if not carrier.changes_class:
        return
    layer.__class__ = scaled_weight_class(type(layer))
    layer._parameters["raw_alpha"] = carrier.raw_alpha
    if isinstance(carrier.gain, nn.Parameter):
        layer._parameters["gain"] = carrier.gain
    else:
        layer.__dict__["gain"] = carrier.gain
    layer.__dict__.update(
        center=carrier.center,
        offset=carrier.offset,
        alpha_channels=carrier.channels,
        alpha_unit=carrier.alpha_unit,
        bias_unit=carrier.bias_unit,
    )
    weight = layer._parameters["weight"]
    if scale and carrier.times != 1.0 and weight is not None:
        weight.data = weight.data * carrier.times


def replace_everywhere(model: nn.Module, slots: dict[int, nn.Module]) -> None:
    """Replace modules in all their parents: a shared one is registered under several names."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in slots:
                parent._modules[name] = slots[id(child)]
        if type(parent).__module__.startswith("torch.nn"):
            continue  # torch's own layers keep no modules elsewhere
        for name, value in parent.__dict__.items():
            if name not in ("_modules", "_parameters", "_buffers") and isinstance(value, _REFERENCES):
                parent.__dict__[name] = _replaced(value, slots)


_REFERENCES = (list, tuple, dict, nn.Module, MethodType)


def _replaced(value: Any, slots: dict[int, nn.Module]) -> Any:
    """Replace modules that are also kept in plain lists, tuples and dicts, which torch does not know."""
    if isinstance(value, nn.Module):
        return slots.get(id(value), value)
    if isinstance(value, MethodType):
        slot = slots.get(id(value.__self__))
        return value if slot is None else getattr(slot, value.__name__)
    if isinstance(value, list):
        value[:] = [_replaced(item, slots) for item in value]
    elif isinstance(value, dict):
        for key, item in value.items():
            value[key] = _replaced(item, slots)
    elif type(value) is tuple and any(isinstance(item, (nn.Module, list, dict, tuple)) for item in value):
        return tuple(_replaced(item, slots) for item in value)
    return value
