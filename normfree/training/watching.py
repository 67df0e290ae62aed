"""An early word about a learning rate that is too high: which layer's output left the size that it started with."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normfree.errors import UsageError
from normfree.plans import plan_on

__all__ = ["FACTOR", "SignalWarning", "Watch", "watch"]

FACTOR = 64.0
"""Growth of an output that is no training any more: runs that learnt went up to 26, with AdamW
(``examples/results/finetuning_forms.csv``), and what diverges is past all bounds within a few steps."""


class SignalWarning(UserWarning):
    """A signal left the range in which it started."""


def watch(model: nn.Module, *, steps: int = 100, factor: float = FACTOR) -> Watch:
    """Warn once, in the first steps of training, where a learning rate is too high for a converted model.

    Where a norm was, nothing holds a signal any more. Before a network diverges, the output of one of its layers is
    many times as large as at the first step; the warning names the first such layer, the step and the growth.

    Args:
        model: A converted model, before training and before ``torch.compile``. It gets forward hooks, which look at
            passes in train mode only and take themselves away at the end.
        steps: How many passes are looked at. Each costs a reduction a layer and one wait for the device.
        factor: How many times its first root mean square an output may be.

    Returns:
        A handle, which is a context manager too: ``remove()`` ends the watch, ``growth`` is the largest so far.

    Raises:
        UsageError: The model was not converted, or is fused.

    Warns:
        SignalWarning: A layer's output is not finite, or has grown by more than ``factor``.

    Example:
        >>> import timm, torch, normfree
        >>> model = normfree.convert(timm.create_model("test_resnet"))
        >>> with normfree.watch(model) as watched:
        ...     _ = model.train()(torch.randn(2, 3, 64, 64))
        >>> watched.growth
        1.0
    """
    plan = plan_on(model)
    if plan is None or plan.fused:
        raise UsageError(f"this {type(model).__name__} was not converted by normfree, or is fused: nothing to watch")
    paths = [edit.producer or edit.name for edit in plan.norms if edit.action != "keep"]
    return Watch(model, paths, steps, factor)


class Watch:
    """The hooks of :func:`watch`.

    Attributes:
        growth: The largest root mean square of an output over its first, in all passes so far.
        layer: Where that was.
    """

    def __init__(self, model: nn.Module, paths: list[str], steps: int, factor: float) -> None:
        self.growth, self.layer = 1.0, ""
        self._steps, self._factor, self._step = steps, factor, 0
        self._first: dict[str, float] = {}
        self._sizes: dict[str, Tensor] = {}
        layers = {path: model.get_submodule(path) for path in paths}
        self._handles = [layer.register_forward_hook(partial(self._look, path)) for path, layer in layers.items()]
        self._handles.append(model.register_forward_hook(self._judge))

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()

    def _look(self, path: str, layer: nn.Module, _: Any, output: Any) -> None:
        if layer.training and isinstance(output, Tensor):
            self._sizes[path] = output.detach().float().square().mean()

    def _judge(self, *_: Any) -> None:
        """Compare the sizes of one pass with those of the first, in the order in which the layers ran."""
        if not self._sizes:
            return
        values = list(self._sizes.values())  # which may live on several devices: one wait for all
        roots = torch.stack([value.to(values[0].device) for value in values]).sqrt().tolist()
        sizes = dict(zip(self._sizes, roots, strict=True))
        self._sizes.clear()
        self._step += 1
        for path, size in sizes.items():
            first = self._first.setdefault(path, size)
            growth = math.inf if not math.isfinite(size) else size / first if first > 0 else 1.0
            if growth > self.growth:
                self.growth, self.layer = growth, path
            if growth > self._factor:
                self.remove()
                warnings.warn(self._words(path, growth), SignalWarning, stacklevel=2)
                return
        if self._step >= self._steps:
            self.remove()

    def _words(self, path: str, growth: float) -> str:
        now = f"{growth:.3g} times what it was at the first" if math.isfinite(growth) else "not finite"
        return (
            f"{path}: at step {self._step} the root mean square of its output is {now}; the learning rate is too high: "
            "start again with a quarter of it, or with a warm-up"
        )
