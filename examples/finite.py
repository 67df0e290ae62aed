"""Where a forward pass first stops being finite."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from normfree.tracing.inputs import tensors


def blame(model: nn.Module, bare: nn.Module, x: Tensor) -> str:
    """Say where a forward pass on `x` first stops being finite."""
    name = first_not_finite(model, bare, x)
    if name is None:
        return "the loss is not finite, though every layer's output is; take a smaller learning rate"
    kind = "" if name == "the images" else f" ({type(bare.get_submodule(name)).__name__})"
    return f"the loss is not finite, and the first that is not is the output of {name or 'the model'}{kind}"


@torch.no_grad()
def first_not_finite(model: nn.Module, bare: nn.Module, x: Tensor) -> str | None:
    """Name the first layer of `bare` whose output is not finite when `model`, which wraps it or is it, sees `x`.

    A layer is done before the block that holds it, so it is a block that is named only where its own code is the cause.
    """
    found: list[str] = [] if x.isfinite().all() else ["the images"]

    def look(_module: nn.Module, _inputs: Any, output: Any, *, name: str) -> None:
        if not all(y.isfinite().all() for y in tensors(output)):
            found.append(name)

    named = bare.named_modules()
    hooks = [module.register_forward_hook(functools.partial(look, name=name)) for name, module in named]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
