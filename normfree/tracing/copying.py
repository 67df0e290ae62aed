"""Copies of models: real ones for a conversion, and ones without memory for tracing."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["deep_copy", "in_float64", "meta_copy"]

M = TypeVar("M", bound=nn.Module)


def deep_copy(model: M, drawn: Iterable[str] = (), removed: Iterable[str] = ()) -> M:
    """Return a deep copy; an activation that the model kept from its last forward pass comes without its history.

    Args:
        model: The model.
        drawn: Layers whose weight is about to be drawn anew: its values are not copied.
        removed: Modules that are about to be replaced: the copy shares their tensors with the model.
    """
    memo: dict[int, Any] = _own_tensors(model, removed)
    for path in drawn:
        weight = model.get_submodule(path)._parameters["weight"]
        if weight is not None and type(weight) is nn.Parameter:
            memo[id(weight)] = nn.Parameter(torch.empty_like(weight), weight.requires_grad)
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    _copy_layers(model, memo, lambda tensor: copy.deepcopy(tensor, memo))
    return copy.deepcopy(model, memo)


@torch.no_grad()
def meta_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy with every tensor replaced by one on the meta device, and without hooks.

    Hooks are the user's own code: they must not run on proxies, nor be copied with what they hold.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in (*module._parameters.items(), *module._buffers.items(), *module.__dict__.items()):
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = _to_meta(value)
            elif name in _HOOKS:
                memo[id(value)] = OrderedDict()
    _copy_layers(model, memo, _to_meta)
    return copy.deepcopy(model, memo)


_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("_hooks"))


def in_float64(model: M) -> M:
    """Turn a model into float64 in place: its plain tensors too, which ``model.double()`` passes by."""
    model.double()
    for module in model.modules():
        for name, value in module.__dict__.items():
            if isinstance(value, (Tensor, list, tuple, dict)) and name not in ("_parameters", "_buffers", "_modules"):
                module.__dict__[name] = _double(value)
    return model


def _double(value: Any) -> Any:
    """Turn tensors into float64; lists and dicts stay the same objects, which several modules may share."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list):
        value[:] = map(_double, value)
    elif isinstance(value, dict):
        value.update({key: _double(item) for key, item in value.items()})
    return tuple(map(_double, value)) if type(value) is tuple else value


def _own_tensors(model: nn.Module, paths: Iterable[str]) -> dict[int, Any]:
    """Return the tensors that some modules hold and no other module does, each as its own copy."""
    modules = {id(module): module for module in map(model.get_submodule, paths)}
    own = {id(t): t for m in modules.values() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
    for module in model.modules() if own else ():
        if id(module) not in modules:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                own.pop(id(tensor), None)
    return own


def _copy_layers(model: nn.Module, memo: dict[int, Any], copied: Callable[[Tensor], Tensor]) -> None:
    """Put copies of torch's own layers and of empty containers into ``memo``.

    A model is mostly that, and deepcopy takes ten times as long over each: it goes through the pickle protocol.
    """

    def copy_tensor(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            memo[id(tensor)] = copied(tensor)
        result: Tensor = memo[id(tensor)]
        return result

    for module in reversed(list(model.modules())):  # what a container holds comes before the container
        layer = _copy_layer(module, copy_tensor, memo)
        if id(module) in memo:
            continue  # something inside refers back to it
        if layer is not None:
            memo[id(module)] = layer
            continue
        for value in module.__dict__.values():
            if not isinstance(value, Tensor) and type(value) in (OrderedDict, set) and not value:
                memo.setdefault(id(value), type(value)())  # a handle of a hook refers to it


def _copy_layer(module: nn.Module, copy_tensor: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> nn.Module | None:
    """Copy one of torch's own layers, or return ``None`` for anything that holds more than tensors and numbers."""
    cls = type(module)
    if not cls.__module__.startswith("torch.nn.modules") or hasattr(cls, "__deepcopy__"):
        return None
    state: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        kind = type(value)
        if kind in _ATOMS:
            state[name] = value
        elif name in ("_parameters", "_buffers"):
            state[name] = kind((key, None if tensor is None else copy_tensor(tensor)) for key, tensor in value.items())
        elif kind in (OrderedDict, dict, set) and not value:
            state[name] = memo.setdefault(id(value), kind())
        elif name == "_modules":
            state[name] = kind((key, copy.deepcopy(child, memo)) for key, child in value.items())
        elif kind in (list, tuple) and all(type(item) in _ATOMS for item in value):
            state[name] = kind(value)
        else:
            return None
    layer = cls.__new__(cls)
    layer.__dict__.update(state)
    return layer


_ATOMS = {int, float, bool, str, type(None)}


def _to_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty
