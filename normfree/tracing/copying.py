"""Copies of models: real ones for a conversion, and ones to be looked at, mostly without memory."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from types import CellType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from normfree.errors import UsageError

__all__ = ["deep_copy", "held_by", "in_float64", "meta_copy", "real_copy", "sharing_copy"]

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()  # with gradients on, what torch copies of a ScriptModule would go on teaching the original
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
    memo.update((id(tensor), tensor.detach().clone()) for tensor in held_by(model) if not tensor.is_leaf)
    result = _copied(model, memo)
    for module, copied in zip(model.modules(), result.modules(), strict=True):
        if isinstance(module, torch.jit.ScriptModule):  # of which such copies do not learn
            for mine, theirs in zip(copied.parameters(), module.parameters(), strict=True):
                mine.requires_grad_(theirs.requires_grad)
    return result


def _copied(model: M, memo: dict[int, Any]) -> M:
    """Return a deep copy.

    Raises:
        UsageError: The model holds what cannot be copied; it is named.
    """
    try:
        copied = copy.deepcopy(model, memo)
    except TypeError as error:
        for path, module in model.named_modules():
            for name, value in module.__dict__.items():
                try:
                    copy.deepcopy(value, {id(m): m for m in model.modules()})
                except TypeError:
                    place = f"{path}.{name}" if path else name
                    what = f"{place} ({type(value).__name__}) cannot be copied ({error})"
                    raise UsageError(f"{what}: set it aside, convert, and put it back") from error
        raise
    _bind_anew(copied, memo)
    return copied


def _bind_anew(copied: nn.Module, memo: dict[int, Any]) -> None:
    """Let the functions that a copy holds refer to the copy; ``memo`` tells what became of each object.

    ``copy.deepcopy`` takes a function for an atom, so that the copy of a model that holds ``lambda x: self.f(x)`` would
    go on calling the original's layers.
    """
    for module in copied.modules():
        for name, value in module.__dict__.items():
            if type(value) in _HOLDING and value and name not in _OWN:
                module.__dict__[name] = _rebound(value, memo)


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """Return what a value is in a copy: itself, if it comes to nothing that was copied."""
    if id(value) in memo:
        return memo[id(value)]
    kind = type(value)
    if kind is FunctionType:
        return _function(value, memo)
    if kind not in _HOLDING:
        return value
    parts = value.values() if kind in _MAPPINGS else value
    parts = (value.func, value.args, value.keywords) if kind is functools.partial else parts
    found = [_rebound(part, memo) for part in parts]
    if all(part is old for part, old in zip(found, parts, strict=True)):
        return value
    if kind is functools.partial:
        return functools.partial(found[0], *found[1], **found[2])
    return kind(zip(value, found, strict=True) if kind in _MAPPINGS else found)


def _function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    if not (function.__closure__ or function.__defaults__ or function.__kwdefaults__):
        return function
    cells = tuple(CellType() for _ in function.__closure__ or ())
    memo[id(function)] = made = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    for cell, before in zip(cells, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # an empty cell: a name that has no value yet
            cell.cell_contents = _rebound(before.cell_contents, memo)
    made.__defaults__ = _rebound(function.__defaults__, memo)
    made.__kwdefaults__ = _rebound(function.__kwdefaults__, memo)
    made.__dict__.update(function.__dict__)
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    return made


def meta_copy(model: M) -> M:
    """Return a deep copy with every tensor replaced by one on the meta device."""
    return _copy_to_look_at(model, lambda t: _like(t, torch.empty_like(t, device="meta")))


def real_copy(model: M) -> M:
    """Return a deep copy in which tensors without memory have got some, with made-up values."""
    return _copy_to_look_at(model, lambda t: _like(t, _made_up(t) if t.is_meta else t.detach().clone()))


def sharing_copy(model: M) -> M:
    """Return a deep copy that shares the parameters: for a forward pass that must leave no trace."""
    return _copy_to_look_at(model, lambda t: t if isinstance(t, nn.Parameter) else t.detach().clone())


@torch.no_grad()
def _copy_to_look_at(model: M, copied: Callable[[Tensor], Tensor]) -> M:
    """Copy a model with its own forward hooks; anybody else's must not run, nor be copied with what they hold."""
    memo: dict[int, Any] = {}
    for tensor in held_by(model):
        if id(tensor) not in memo:
            memo[id(tensor)] = copied(tensor)
    hooks: list[tuple[Any, Any]] = []
    kept: OrderedDict[int, Any]
    for module in model.modules():
        for name in _HOOKS & module.__dict__.keys():
            memo[id(module.__dict__[name])] = kept = OrderedDict()
            if name in ("_forward_hooks", "_forward_pre_hooks"):
                hooks.append((module.__dict__[name], kept))
    held = {id(value) for module in model.modules() for value in (module, *module.__dict__.values())} - {id(None)}
    result = _copied(model, memo)
    for before, kept in hooks:
        kept.update(
            (key, _rebound(copy.deepcopy(hook, memo), memo)) for key, hook in before.items() if _is_own_hook(hook, held)
        )
    return result


def _is_own_hook(hook: Any, held: set[int]) -> bool:
    """Whether a hook belongs to a model: a method of, or a function around, something that it holds, or torch's own.

    timm's feature extractors collect their outputs that way, torch's old weight reparametrisations work so.
    """
    while isinstance(hook, functools.partial):
        hook = hook.func
    cells = getattr(hook, "__closure__", None) or ()
    owners = [getattr(hook, "__self__", None), *(cell.cell_contents for cell in cells)]
    return any(id(owner) in held for owner in owners) or type(hook).__module__.startswith("torch.nn.utils")


def held_by(model: nn.Module) -> Iterator[Tensor]:
    """Yield every tensor that a model holds, in whatever nesting of containers."""
    waiting: list[Any] = [module.__dict__ for module in model.modules()]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if kind in _CONTAINERS and value and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if kind in (dict, OrderedDict) else value
        elif kind not in _ATOMS and isinstance(value, Tensor):
            yield value


_OWN = ("_parameters", "_buffers", "_modules")
_MAPPINGS = (dict, OrderedDict)
_HOLDING = {FunctionType, functools.partial, list, tuple, *_MAPPINGS}
_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("_hooks"))


def in_float64(model: M) -> M:
    """Turn a model into float64 in place: its plain tensors too, which ``model.double()`` passes by."""
    model.double()
    for module in model.modules():
        module.__dict__.update({n: _double(value) for n, value in module.__dict__.items() if n not in _OWN})
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


_ATOMS = {int, float, bool, str, type(None)}
_CONTAINERS = {dict, OrderedDict, list, tuple, set, frozenset}


def _like(tensor: Tensor, made: Tensor) -> Tensor:
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _made_up(tensor: Tensor) -> Tensor:
    """Return weights that keep a signal about as large as it is, norms that do nothing, and zeros for counts.

    Of the weights many repeat: to draw each would take longer than the run.
    """
    shape, count = tensor.shape, tensor.numel()
    if not tensor.is_floating_point() or tensor.dim() < 2 or not count:
        return torch.full(shape, 1 if tensor.is_floating_point() else 0, dtype=tensor.dtype)
    drawn = torch.randn(min(count, _DRAWN), dtype=tensor.dtype) / math.sqrt(tensor[0].numel())
    return drawn.repeat(count // len(drawn) + 1)[:count].reshape(shape)


_DRAWN = 65521
"""A prime, so that no two filters of a layer are alike."""
