"""Noise that is the same in every run, and nothing that a model may not divide by."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from normfree.tracing.randomness import Still

__all__ = ["Steady"]

_NORMAL = ("aten::randn", "aten::randn_like", "aten::normal_")


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
        return result.copy_(_noise(tuple(result.shape[1:])) * std + mean)


def _noise(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(str(shape).encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)
