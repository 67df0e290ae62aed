"""Layers whose weight somebody else computes: pruned ones, weight and spectral norm, any parametrization of torch's.

They may be put on a converted layer, which trains with them. What changes a weight for good (``fuse``, ``restore``), or
expects it under its own name (``load``), must not see them.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.utils import parametrize

from normfree.errors import UsageError

__all__ = ["check_plain", "ways_out"]

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
    for hook in module._forward_pre_hooks.values():
        for cls in type(hook).__mro__:
            if cls.__name__ in _HOOKS and cls.__module__.startswith("torch.nn.utils."):
                attribute, what, undo = _HOOKS[cls.__name__]
                found.append(f"{what}: {undo.format(getattr(hook, attribute))}")
    return found
