"""Watching a model run: which operators see which tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normfree.tracing.inputs import tensors
from normfree.tracing.traces import memory_of

__all__ = ["NormSpy", "module_stack", "out_of_place"]


class NormSpy(TorchDispatchMode):
    """Records every batch-norm operator that normalises an activation over the batch.

    A tensor is an activation if it was computed from an input. Weight standardisation normalises what was computed
    from parameters alone, and instance norm runs as a batch norm over a batch of one: neither mixes samples.
    """

    def __init__(self, inputs: list[Tensor], stack: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.activations = {memory_of(x) for x in inputs}
        self.stack = stack
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        touched = any(memory_of(x) in self.activations for x in tensors((args, kwargs)))
        name = func._schema.name
        if touched and "batch_norm" in name and "backward" not in name and args[0].shape[0] != 1:
            self.seen.append(self.stack[-1])
        result = func(*args, **kwargs)
        for x in tensors(result):
            # Memory is used again: what a storage holds is decided anew by whoever writes it.
            (self.activations.add if touched else self.activations.discard)(memory_of(x))
        return result


@contextlib.contextmanager
def module_stack(model: nn.Module) -> Iterator[list[str]]:
    """Yield the names of the modules whose forward is running, innermost last."""
    stack = ["the root"]
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no such hooks, and holds no norm
            pre = module.register_forward_pre_hook(lambda *_, name=name: stack.append(name or "the root"))
            post = module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True)
            hooks.enter_context(pre)
            hooks.enter_context(post)
        yield stack


@contextlib.contextmanager
def out_of_place(model: nn.Module) -> Iterator[None]:
    """Switch every in-place module to out-of-place."""
    changed = [module for module in model.modules() if getattr(module, "inplace", False) is True]
    try:
        for module in changed:
            module.inplace = False  # type: ignore[assignment]  # a plain bool attribute
        yield
    finally:
        for module in changed:
            module.inplace = True  # type: ignore[assignment]  # as it was
