"""What every proof works on, and what it returns."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from normfree.errors import UsageError
from normfree.norms import find_norms
from normfree.plans import Plan
from normfree.proofs.observing import Steady
from normfree.proofs.reference import Reference
from normfree.proofs.remaking import Made, remake
from normfree.rewriting.comparing import error_between
from normfree.tracing.copying import deep_copy, in_float64
from normfree.tracing.inputs import tensors
from normfree.tracing.randomness import random_halves

__all__ = ["ROUNDINGS", "TOLERANCE", "Case", "Found", "Proof"]

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
        missing: Whether it is claimed, but what it needs is not here; ``passed`` is ``None`` then.
    """

    number: int
    name: str
    passed: bool | None
    figure: float | None
    detail: str
    missing: bool = False


@dataclass(frozen=True)
class Found:
    """What a proof came to: see :class:`Proof`."""

    passed: bool | None
    figure: float | None
    detail: str
    missing: bool = False


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

    @functools.cached_property
    def made(self) -> Made | None:
        """What the plan makes of the original; ``None`` where no original is here, or the plan is of something else."""
        drawn = self.plan.fused and self.plan.init == "skipinit"  # alpha is in the weights that were drawn
        known = self.original is not None and not self.plan.calibrated and not drawn
        return None if self.structure is None else remake(self.structure, self.plan, (self.args, self.kwargs), known)

    def exact(self, model: nn.Module, training: bool) -> nn.Module:
        """Return a copy of ``model`` in :attr:`dtype`, with the user's hooks: they are part of what it computes."""
        copied = deep_copy(model).train(training)
        return in_float64(copied) if self.dtype == torch.float64 else copied

    def frozen(self, training: bool) -> nn.Module:
        """Return an exact copy of the original, which is here, whose norms use their statistics in either mode."""
        copied = self.exact(cast(nn.Module, self.structure), training)
        for name in find_norms(copied):
            copied.get_submodule(name).training = False
        return copied

    def at_alpha(self, training: bool, zero: bool = False) -> nn.Module:
        """Return an exact copy of the converted model with its scalars zero, or drawn: at zero nobody sees a branch."""
        model = self.exact(self.model, training)
        generator = torch.Generator().manual_seed(0)
        for raw in self.alphas_in(model).values():
            if raw is not None:
                drawn = (0.5 + torch.rand(1, generator=generator)) * self.plan.units.alpha
                raw.data.copy_(drawn * 0 if zero else drawn)
        return model

    def alphas_in(self, model: nn.Module) -> dict[str, nn.Parameter | None]:
        """Return what a model learns of each alpha, zero where alpha is; ``None`` where it is gone."""
        modules = dict(model.named_modules(remove_duplicate=False))
        holders = () if self.plan.fused else [alpha.holder for alpha in self.plan.alphas]
        return {path: modules[path]._parameters.get("raw_alpha") if path in modules else None for path in holders}

    def run(
        self,
        model: nn.Module,
        samples: slice | Tensor | None = None,
        dtype: torch.dtype | None = None,
        nudge: float = 0.0,
    ) -> list[Tensor]:
        """Run ``model`` with dropout off, on everything or on some samples, and return its output tensors."""
        args, kwargs = self.inputs(samples, dtype, nudge)
        with random_halves(), torch.random.fork_rng(devices=[]), Steady():
            torch.default_generator.manual_seed(0)
            outputs = tensors(model(*args, **kwargs))
        if not outputs:
            raise UsageError(f"the output of this {type(model).__name__} holds no tensors: nothing can be compared")
        return outputs

    def inputs(
        self, samples: slice | Tensor | None = None, dtype: torch.dtype | None = None, nudge: float = 0.0
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return fresh arguments: a model may write into its input. ``nudge`` moves each by that part of itself."""
        size = self.size

        def pick(x: Tensor) -> Tensor:
            x = x.detach().to(dtype or self.dtype) * (1 + nudge) if x.is_floating_point() else x.detach()
            return (x if samples is None or x.dim() == 0 or x.shape[0] != size else x[samples]).clone()

        args, kwargs = tree_map_only(Tensor, pick, (list(self.args), self.kwargs))
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
