"""Plan -> model: applies a plan without making decisions.

All checks and all new tensors first, then all writes, which are taken back if one fails: a failed conversion leaves the
model bit for bit as it was. What changes, changes where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from normfree.analysis.moments import Moments
from normfree.analysis.tails import Place
from normfree.errors import InternalError
from normfree.layers import CONSTANTS, is_carrier
from normfree.norms import describe, is_norm
from normfree.plans import PLAN_ATTRIBUTE, Plan
from normfree.rewriting.changing import Changes, all_or_nothing, become, set_class
from normfree.rewriting.hints import hint_
from normfree.rewriting.originals import ORIGINALS_ATTRIBUTE, Originals
from normfree.rewriting.preparing import prepare
from normfree.rewriting.units import Carrier
from normfree.training.initialization import draw_

__all__ = ["check_plan", "rewrite"]


def rewrite(
    model: nn.Module,
    plan: Plan,
    met: Mapping[str, Moments] | None = None,
    *,
    scale: bool = True,
    last: Callable[[], None] | None = None,
) -> None:
    """Apply ``plan`` to ``model`` in place.

    Args:
        model: The model.
        plan: The plan.
        met: What the carried layers meet, by path. ``None`` where weights and constants come from a file: then weights
            stay what they are.
        scale: Whether weights get their units; ``False`` where their values are not here.
        last: Called when all is written; if it raises, all is taken back.

    Raises:
        InternalError: The plan does not fit the model. The model is unchanged.
    """
    check_plan(model, plan)
    modules = dict(model.named_modules(remove_duplicate=False))
    writes = prepare(model, plan, met)
    originals = Originals.of(modules, plan) if plan.init == "preserve" else None
    out_of_place = [modules[path] for path in plan.out_of_place]
    drawn = [(modules[path], gain) for path, gain in plan.drawn]
    with all_or_nothing() as changes:
        written = (*writes.carriers, *writes.slots, *writes.classes)
        changes.keep(model, *out_of_place, *(modules[path] for path in written))
        for path, cls in writes.classes.items():
            set_class(modules[path], cls)
        for path, carrier in writes.carriers.items():
            _write_carrier(modules[path], carrier, scale, changes)
        for path, alpha in writes.outputs.items():
            modules[path]._parameters["raw_alpha"] = alpha
            modules[path].__dict__["alpha_unit"] = plan.units.alpha
        for path, held in writes.blocks.items():
            modules[path]._modules.update(held)
        for activation in out_of_place:
            activation.__dict__["inplace"] = False
        for path, slot in writes.slots.items():
            _take_over(modules[path], slot)
        for tensor in {id(t): t for layer, _ in drawn for t in layer._parameters.values() if t is not None}.values():
            changes.set_values(tensor, tensor.data.clone())
        draw_(drawn)
        model.__dict__[PLAN_ATTRIBUTE] = plan
        if originals is not None:
            model.__dict__[ORIGINALS_ATTRIBUTE] = originals
        if last is not None:
            last()
    hint_(model)


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
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))

    def find(path: str) -> nn.Module:
        if path not in modules:
            raise InternalError(f"the plan names {path!r}, which this {type(model).__name__} does not have")
        return modules[path]

    for path in (*plan.out_of_place, *(path for path, _ in plan.drawn)):
        find(path)
    for edit in plan.removed:
        if not is_norm(find(edit.name)):
            raise InternalError(f"the plan removes a norm at {edit.name!r}, where the model has none")
    carriers = {
        "take a gain and a bias": [edit.producer for edit in plan.removed if edit.producer is not None],
        "learn in units of its own": [carried.path for carried in plan.carried],
        "take a bias": plan.biases,
    }
    for what, paths in carriers.items():
        for path in paths:
            if not is_carrier(find(path)):
                raise InternalError(f"{path!r} cannot {what}")
    for alpha in plan.alphas:
        module = find(alpha.path)
        if not _FITS[alpha.place](module):
            raise InternalError(f"alpha cannot live in the {alpha.place} of {alpha.path!r}")
        features = describe(module).features if is_norm(module) else getattr(module, "out_channels", None)
        features = features or getattr(module, "out_features", None)
        if alpha.channels is not None and isinstance(features, int) and alpha.channels[1] > features:
            raise InternalError(f"alpha scales channels {alpha.channels} of {alpha.path!r}, which has {features}")


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """Turn a norm into what stays of it, and keep what others read of it or hang on it: its width, its eps."""
    for name, value in list(old.__dict__.items()):
        if not (name.startswith("_") or isinstance(value, (Tensor, nn.Module)) or hasattr(new, name)):
            new.__dict__[name] = value
    become(old, new)


_CONSTANTS = (*CONSTANTS, "feeds_slot", "unit", "alpha_unit", "bias_unit", "mean_unit")
"""What a layer is given besides parameters, tensors first."""


def _write_carrier(layer: nn.Module, carrier: Carrier, scale: bool, changes: Changes) -> None:
    if carrier.bias is not None or carrier.feeds_slot:
        layer._parameters["bias"] = carrier.bias
    if not carrier.changes_class:
        return
    layer._parameters["raw_alpha"] = carrier.raw_alpha
    layer.__dict__.update({name: getattr(carrier, name) for name in _CONSTANTS}, alpha_channels=carrier.channels)
    weight = layer._parameters["weight"]
    if scale and carrier.times != 1.0 and weight is not None:
        changes.set_values(weight, weight.data * carrier.times)
