"""What the original computed, in a few numbers: a converted file can be checked without the original's weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normfree.rewriting.comparing import error_between
from normfree.tracing.copying import deep_copy, in_float64
from normfree.tracing.inputs import tensors

__all__ = ["Reference"]

_VALUES = 64
_LARGEST = 2**23
"""Entries of an input: a file must not make us draw more."""
_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Reference:
    """Samples of the original's output on a white-noise input that can be drawn again.

    Attributes:
        shape: Shape of the input.
        dtype: The model's own dtype.
        first: The first entries of the input: another generator would draw others.
        values: Up to 64 evenly spaced entries of every floating output, eval mode, float64.
        scale: Largest absolute entry of all outputs.
        rounding: Relative error of the original in its own dtype against itself in float64.
    """

    shape: tuple[int, ...]
    dtype: str
    first: tuple[float, ...]
    values: tuple[float, ...]
    scale: float
    rounding: float

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES or not 0 < math.prod(self.shape) <= _LARGEST or min(self.shape) < 1:
            raise ValueError(f"reference: no input of {self.dtype} and shape {self.shape} is drawn")

    @classmethod
    @torch.no_grad()
    def of(cls, original: nn.Module, x: Tensor) -> Reference:
        """Record what ``original`` computes for an input of the shape and dtype of ``x``."""
        noise = _noise(tuple(x.shape), x.dtype)
        exact = _sample(in_float64(deep_copy(original)), noise.double())
        rounded = _sample(deep_copy(original), noise)
        return cls(
            shape=tuple(x.shape),
            dtype=str(x.dtype).removeprefix("torch."),
            first=tuple(noise.double().flatten()[:4].tolist()),
            values=tuple(exact.tolist()),
            scale=float(exact.abs().max()),
            rounding=error_between([exact], [rounded]),
        )

    @torch.no_grad()
    def error(self, model: nn.Module) -> float | None:
        """Return the relative error of ``model``, run in its own dtype; ``None`` if the input cannot be drawn again."""
        noise = _noise(self.shape, getattr(torch, self.dtype))
        if tuple(noise.double().flatten()[:4].tolist()) != self.first:
            return None
        return error_between([torch.tensor(self.values, dtype=torch.float64)], [_sample(deep_copy(model), noise)])


def _noise(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _sample(model: nn.Module, x: Tensor) -> Tensor:
    outputs = [y.double().flatten() for y in tensors(model.eval()(x)) if y.is_floating_point()]
    picked = [y[torch.linspace(0, y.numel() - 1, min(_VALUES, y.numel())).long()] for y in outputs]
    return torch.cat(picked).cpu()
