"""What a model is run under: watches, and noise that is the same in every run."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normfree.tracing.inputs import tensors
from normfree.tracing.randomness import Still
from normfree.tracing.traces import memory_of

__all__ = ["NormSpy", "Steady", "module_stack"]

_NORMAL = ("aten::randn", "aten::randn_like", "aten::normal_")


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


class Steady(Still):  # type: ignore[no-untyped-call]  # torch's own
    """Noise of a normal distribution is drawn from a seed; every other draw stands still.

    Zeros would hide what they are multiplied with, and give "inf" where a model divides by them. The seed is the shape
    without its first dimension, along which all is alike: a sample gets the same alone as among others.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name
        if name not in _NORMAL:
            return result
        mean, std = (*args[1:3], 0.0, 1.0)[:2] if name == "aten::normal_" and len(args) > 2 else (0.0, 1.0)
        shape = tuple(result.shape[1:])
        generator = torch.Generator().manual_seed(zlib.crc32(str(shape).encode()))
        return result.copy_(torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean)
