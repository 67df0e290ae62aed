"""Optimizers that were built too early: they hold parameters that a conversion in place takes out of the model.

Such an optimizer steps on, moves what is no longer in the model and never sees what came instead, without any error.
``convert_`` is not given it, so it is looked for: among all objects, but only if somebody besides the model holds one
of these parameters, which its reference count tells at once.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from normfree.errors import some
from normfree.plans import Plan

__all__ = ["OptimizerWarning", "warn_of_optimizers"]


class OptimizerWarning(UserWarning):
    """An optimizer holds parameters that the model no longer has."""


def warn_of_optimizers(model: nn.Module, plan: Plan) -> None:
    """Name every optimizer that holds parameters which ``plan`` takes out of ``model``.

    Warns:
        OptimizerWarning: There is one.
    """
    gone = list(_gone(model, plan))
    alone = _references({"only here": nn.Parameter(torch.empty(0))}, "only here")
    if all(_references(owner, key) <= alone for _, owner, key in gone):
        return
    names = {id(owner[key]): name for name, owner, key in gone}
    for optimizer in [found for found in gc.get_objects() if issubclass(type(found), torch.optim.Optimizer)]:
        groups = getattr(optimizer, "param_groups", ())
        held = [names[id(p)] for group in groups for p in group["params"] if id(p) in names]
        if held:
            warnings.warn(
                f"{type(optimizer).__name__} holds parameters that the conversion takes out of the model ("
                f"{some(held)}) and none that come instead: build it after the conversion",
                OptimizerWarning,
                stacklevel=3,
            )


def _gone(model: nn.Module, plan: Plan) -> Iterator[tuple[str, Mapping[str, nn.Parameter | None], str]]:
    """Yield every parameter that goes: its name, what holds it, and the key."""
    for edit in plan.removed:
        norm = model.get_submodule(edit.name)._parameters
        yield from ((f"{edit.name}.{key}", norm, key) for key, value in norm.items() if value is not None)
        if edit.producer is not None and plan.init == "preserve" and edit.producer not in plan.keeping_bias:
            layer = model.get_submodule(edit.producer)._parameters
            if layer["bias"] is not None:
                yield f"{edit.producer}.bias", layer, "bias"


def _references(owner: Mapping[str, nn.Parameter | None], key: str) -> int:
    return sys.getrefcount(owner[key])
