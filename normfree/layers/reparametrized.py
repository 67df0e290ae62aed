"""Layers whose weight somebody else computes: pruned ones, weight and spectral norm, any parametrization of torch's.

They may be put on a converted layer, which trains with them: their weight is then the weight, without a mean that moves
less than the rest of it, as what they prune must stay zero. What changes a weight for good (``fuse``, ``restore``), or
expects it under its own name (``load``), must not see them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normfree.errors import UsageError
from normfree.layers.combining import Constants, mean_of

__all__ = ["check_plain", "settled", "ways_out"]

_HOOKS = {
    "BasePruningMethod": ("_tensor_name", "pruned", "torch.nn.utils.prune.remove(layer, {!r})"),
    "WeightNorm": ("name", "under weight norm", "torch.nn.utils.remove_weight_norm(layer, {!r})"),
    "SpectralNorm": ("name", "under spectral norm", "torch.nn.utils.remove_spectral_norm(layer, {!r})"),
}


def check_plain(model: nn.Module, paths: Collection[str], what: str) -> None:
    """Refuse layers whose tensors are computed from others.

    Args:
        model: The model.
        paths: The layers in question.
        what: What cannot be done with them.

    Raises:
        UsageError: There are such; all are listed, each with what makes it plain again.
    """
    found = [
        f"  - {name or 'the model'} ({type(module).__name__}) is {how}"
        for name, module in model.named_modules()
        if name in paths
        for how in ways_out(module)
    ]
    if found:
        raise UsageError("\n".join([f"{what} takes plain weights only; make them plain first, with", *found]))


def ways_out(module: nn.Module) -> list[str]:
    """Return what is done to the tensors of a layer, and what undoes it."""
    found = []
    if parametrize.is_parametrized(module):
        names = list(module.parametrizations)  # type: ignore[arg-type]  # a ModuleDict
        undo = "torch.nn.utils.parametrize.remove_parametrizations(layer, {!r})"
        found += [f"parametrized: {undo.format(name)}" for name in names]
    for hook, (attribute, what, undo) in _hooks(module).items():
        found.append(f"{what}: {undo.format(getattr(hook, attribute))}")
    return found


def _hooks(module: nn.Module) -> dict[Any, tuple[str, str, str]]:
    """Return torch's own hooks that compute a tensor of a layer before it runs, each with its entry above."""
    return {
        hook: _HOOKS[cls.__name__]
        for hook in module._forward_pre_hooks.values()
        for cls in type(hook).__mro__
        if cls.__name__ in _HOOKS and cls.__module__.startswith("torch.nn.utils.")
    }


def settled(layer: nn.Module, coordinates: Constants) -> float:
    """Take over into plain coordinates what a layer had learnt before somebody else computes its weight; return 1.

    Raises:
        UsageError: It is computed from something else than a weight.
    """
    kept = getattr(layer, "weight_orig", None)
    if kept is None and parametrize.is_parametrized(layer, "weight"):
        kept = getattr(layer.parametrizations.weight, "original", None)  # type: ignore[union-attr]  # a ModuleDict
    if kept is not None:
        with torch.no_grad():
            kept.copy_(coordinates.steadied(kept))
        for hook in _hooks(layer):  # they have run already, on what it was
            hook(layer, ())
    elif not torch.allclose(mean_of(cast(Tensor, layer.weight)), cast(Tensor, coordinates.filter_mean)):
        undo = " and ".join(ways_out(layer))
        raise UsageError(
            f"{type(layer).__name__} was trained before, in coordinates of its own; fuse first. It is {undo}"
        )
    return 1.0
