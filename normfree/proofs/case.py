"""What every proof works on, and what it returns."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from normfree.errors import UsageError
from normfree.plans import Plan
from normfree.proofs.reference import Reference
from normfree.tracing.copying import deep_copy, in_float64, is_own_hook
from normfree.tracing.inputs import tensors
from normfree.tracing.still import Still

__all__ = ["ROUNDINGS", "TOLERANCE", "Case", "Proof", "alpha_of", "error_between"]

TOLERANCE = 1e-9
"""Relative to the largest output, in float64."""
ROUNDINGS = 8
"""Of the error that rounding makes, how much more the same function in another order of operations may show."""


@dataclass(frozen=True)
class Proof:
    """One proof.

    Attributes:
        number: 1 to 6, as in the documentation.
        name: What is claimed.
        passed: The verdict, or ``None`` where nothing is claimed.
        figure: The measured value behind it: an error, or a count.
        detail: The figure in words, and the places where it fails.
    """

    number: int
    name: str
    passed: bool | None
    figure: float | None
    detail: str


@dataclass(frozen=True)
class Case:
    """A converted model, what it came from, and something to run them on.

    Attributes:
        model: The converted model.
        original: The model before conversion, if it is here.
        structure: The same architecture with any weights, if it is here.
        reference: Samples of what the original computed, if they are here.
        plan: The plan that was applied.
        args: Arguments of a forward pass.
        kwargs: Keyword arguments of it.
        dtype: What the models are run in: float64, or their own type where they cannot run in that.
    """

    model: nn.Module
    original: nn.Module | None
    structure: nn.Module | None
    reference: Reference | None
    plan: Plan
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype = torch.float64

    @functools.cached_property
    def kept(self) -> frozenset[str]:
        """Norms that the plan leaves in place."""
        return frozenset(edit.name for edit in self.plan.norms if edit.action == "keep")

    @functools.cached_property
    def own_dtype(self) -> torch.dtype:
        """The type of the model's own parameters."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float64)

    @property
    def size(self) -> int:
        """The number of samples."""
        return next(x.shape[0] for x in tensors((self.args, self.kwargs)) if x.dim() > 0)

    def exact(self, model: nn.Module, training: bool) -> nn.Module:
        """Return a copy of ``model`` in :attr:`dtype`, without the user's hooks."""
        copied = self.copy(model, training)
        return in_float64(copied) if self.dtype == torch.float64 else copied

    def copy(self, model: nn.Module, training: bool) -> nn.Module:
        """Return a copy of ``model`` as it is, without the user's hooks."""
        copied = deep_copy(model)
        _strip_hooks(copied)
        return copied.train(training)

    def run(
        self, model: nn.Module, samples: slice | Tensor | None = None, dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """Run ``model`` with dropout off, on everything or on some samples, and return its output tensors."""
        args, kwargs = self.inputs(samples, dtype)
        with Still():
            outputs = tensors(model(*args, **kwargs))
        if not outputs:
            raise UsageError(f"the output of this {type(model).__name__} holds no tensors: nothing can be compared")
        return outputs

    def inputs(
        self, samples: slice | Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return fresh arguments: a model may write into its input."""
        size = self.size

        def pick(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            x = x.detach().to(dtype or self.dtype) if x.is_floating_point() else x.detach()
            return (x if samples is None or x.dim() == 0 or x.shape[0] != size else x[samples]).clone()

        args, kwargs = tree_map(pick, (list(self.args), self.kwargs))
        return args, kwargs

    @torch.no_grad()
    def tolerance(self, model: nn.Module) -> float:
        """Return the relative error that a right answer of ``model``, as :meth:`exact` made it, may have.

        Outside of float64 that is :data:`ROUNDINGS` times what its output moves by when every weight is rounded once
        more, to a neighbouring number: so it follows the depth and the condition of the model.
        """
        if self.dtype == torch.float64:
            return TOLERANCE
        generator, step = torch.Generator().manual_seed(0), torch.finfo(self.dtype).eps
        rounded = deep_copy(model)
        for parameter in rounded.parameters():
            if parameter.is_floating_point():
                sign = torch.randint(2, parameter.shape, generator=generator).to(parameter) * 2 - 1
                parameter.mul_(1 + step * sign)
        return ROUNDINGS * max(error_between(self.run(deep_copy(model)), self.run(rounded)), step)


def _strip_hooks(model: nn.Module) -> None:
    """The user's hooks must not see the runs of a proof; those of the model itself and of torch's own stay."""
    held = {id(value) for module in model.modules() for value in (module, *module.__dict__.values())} - {id(None)}
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if not is_own_hook(hook, held)]:
                del hooks[key]


def error_between(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference over the largest value, over all outputs."""
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.is_floating_point() and x.numel():
            difference = (x.double() - y.double()).abs().max() / x.double().abs().max().clamp_min(1e-300)
            worst = max(worst, float(difference)) if bool(torch.isfinite(difference)) else float("inf")
    return worst


def alpha_of(model: nn.Module, path: str) -> nn.Parameter:
    """Return what the module at ``path`` learns of its alpha; zero where alpha is."""
    raw = model.get_submodule(path)._parameters.get("raw_alpha")
    if raw is None:
        raise TypeError(f"{path} carries no alpha")
    return raw
