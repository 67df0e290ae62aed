"""What a model is run on: the forms in which a caller hands it over, and white noise where he does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from normfree.errors import UsageError
from normfree.tracing.copying import deep_copy

__all__ = ["Inputs", "arguments", "example_input", "fresh"]

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def fresh(x: Any) -> Any:
    """Return a copy of every tensor in any nesting: a model may write into its input."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, x)


def example_input(model: nn.Module, batch: int = 2, size: int | None = None) -> Tensor:
    """Return white noise ``(N, C, *)`` of the smallest of a few shapes that the model takes.

    The number of channels and the largest size come from its timm configuration or its first layer; ``size`` is the
    length of every other dimension where the caller knows better.

    Raises:
        UsageError: Neither says anything, or the model takes none of the shapes.
    """
    generator = torch.Generator().manual_seed(0)
    like = next(model.parameters())
    probe = deep_copy(model)
    errors = []
    shapes = _shapes(model)
    for shape in shapes if size is None else {(shape[0], *(size for _ in shape[1:])): None for shape in shapes}:
        x = torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype)
        try:
            with torch.no_grad():
                probe.train()(x.clone())
                probe.eval()(x.clone())
        except Exception as error:  # whatever the model raises for a shape it does not take
            errors.append(f"{tuple(x.shape)}: {type(error).__name__}: {error}"[:200])
        else:
            return x
    tried = "; ".join(errors) or "no layer tells the shape"
    raise UsageError(f"no input shape is known for {type(model).__name__}: pass inputs= ({tried})")


def _shapes(model: nn.Module) -> list[tuple[int, ...]]:
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, Mapping) and config.get("input_size"):
        channels, *native = config["input_size"]
        return [(channels, *size) for size in ((64, 64), (128, 128), tuple(native))]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            return [(module.in_features,)]
        if isinstance(module, nn.Conv1d):
            return [(module.in_channels, 256)]
        if isinstance(module, nn.Conv2d):
            return [(module.in_channels, size, size) for size in (64, 128, 224, 299)]
        if isinstance(module, nn.Conv3d):
            return [(module.in_channels, 8, size, size) for size in (64, 112)]
    return []
