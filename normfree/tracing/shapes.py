"""What a look needs of an operation, where the operation itself takes long: mostly the shape of what it returns.

On the meta device torch finds the shapes of many layers by running Python of its own, which takes longer than all else
that a look does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["meta_function", "on_meta", "shortened"]

_ACTIVATIONS = {nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU}
_LAYERS = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5, nn.ConvTranspose2d: 4}
"""Layers that work sample by sample, each with the dimensions of a batch."""


def shortened(
    module: nn.Module, kind: type[nn.Module], forward: Callable[..., Any], norm: bool, meta: bool
) -> Callable[..., Any]:
    """Return what to run instead of the forward of a leaf that is called with a tensor and nothing else.

    The leaf really is of a ``kind``, and may be a ``norm``, or stand where one was; ``meta`` tensors have no memory.
    """
    in_place = getattr(module, "inplace", False) is True and not norm
    if not meta:
        # A norm goes by its statistics: one image of one place has none.
        return functools.partial(_evaluating if norm else _of_first, module, forward, _LAYERS.get(kind, 0))
    # A dropout in place writes in one mode only, which alone would make two graphs of one.
    alike = norm or kind in _ACTIVATIONS or (in_place and issubclass(kind, _DropoutNd))
    return functools.partial(_like, in_place=in_place) if alike else forward


def _like(x: Tensor, *, in_place: bool = False) -> Tensor:
    """Return what a norm or an activation returns, as far as shapes go."""
    with torch._C.DisableTorchFunction():
        if in_place:
            torch.autograd.graph.increment_version(x)
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _evaluating(module: nn.Module, forward: Callable[..., Any], _: int, x: Any) -> Any:
    training, module.__dict__["training"] = module.training, False
    try:
        return forward(x)
    finally:
        module.__dict__["training"] = training


def _of_first(_: nn.Module, forward: Callable[..., Any], dims: int, x: Any) -> Any:
    """Return for every sample what a layer computes of the first two: a detector has a thousand boxes."""
    if not dims or x.dim() != dims or len(x) <= 2:
        return forward(x)
    with torch._C.DisableTorchFunction():
        return forward(x[:2])[:1].repeat(len(x), *[1] * (x.dim() - 1))


def meta_function(func: Any) -> Any:
    """Return what to call instead of a function on the meta device, where torch would run hundreds of operations."""
    return _sampled if func is nn.functional.grid_sample else func


def _sampled(input: Tensor, grid: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty((*input.shape[:2], *grid.shape[1:-1]), dtype=input.dtype, device="meta")


def on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call that asks for another device than the one without memory."""
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": "meta"}
    name = getattr(func, "__name__", "")
    if name == "to":
        args = (args[0], *("meta" if isinstance(a, (str, torch.device)) else a for a in args[1:]))
    elif name in ("cpu", "cuda"):
        args, kwargs = args[:1], {}
    return args, kwargs
