"""Copies of models: real ones for a conversion, and ones without memory for tracing."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["deep_copy", "meta_copy"]

M = TypeVar("M", bound=nn.Module)


def deep_copy(model: M, drawn: Iterable[str] = ()) -> M:
    """Return a deep copy; an activation that the model kept from its last forward pass comes without its history.

    Args:
        model: The model.
        drawn: Layers whose weight is about to be drawn anew: its values are not copied.
    """
    memo = _empty_containers(model)
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    for path in drawn:
        weight = model.get_submodule(path)._parameters["weight"]
        if weight is not None and type(weight) is nn.Parameter:
            memo[id(weight)] = nn.Parameter(torch.empty_like(weight), weight.requires_grad)
    return copy.deepcopy(model, memo)


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy with every tensor replaced by one on the meta device, and without hooks.

    Hooks are the user's own code: they must not run on proxies, nor be copied with what they hold.
    """
    memo = _empty_containers(model)
    for module in model.modules():
        for name, value in (*module._parameters.items(), *module._buffers.items(), *module.__dict__.items()):
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = _to_meta(value)
            elif name.endswith("_hooks"):
                memo[id(value)] = OrderedDict()
    return copy.deepcopy(model, memo)


def _empty_containers(model: nn.Module) -> dict[int, Any]:
    """Return the copies of all empty containers: every module holds a dozen, and deepcopy takes its time over each."""
    return {
        id(value): type(value)()
        for module in model.modules()
        for value in module.__dict__.values()
        if not isinstance(value, Tensor) and type(value) in (OrderedDict, set) and not value
    }


def _to_meta(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty
