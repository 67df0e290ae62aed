"""Weights for training from scratch, where a norm no longer repairs their scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

__all__ = ["Draw", "draw_", "draws", "fan_in", "he_normal_", "zero_biases_"]


def fan_in(module: Any) -> float:
    """Return how many inputs one output of a convolution or linear sums over.

    ``C_in / groups`` times the kernel; a transposed convolution spreads its kernel over stride many outputs.
    """
    weight = module.weight
    kernel = math.prod(weight.shape[2:])
    if getattr(module, "transposed", False):
        return max(1.0, float(weight.shape[0] / module.groups * kernel / math.prod(module.stride)))
    return float(weight.shape[1] * kernel)


def draw_(layers: Sequence[tuple[nn.Module, float]]) -> None:
    """Draw many layers anew, each with its gain; see :func:`he_normal_`.

    Every layer has a generator of its own, seeded from torch's global one: so the result depends on
    ``torch.manual_seed`` alone, while the layers are drawn in parallel (torch draws with one thread, without the GIL).
    A weight that several layers share is drawn once, for the first of them.
    """
    once = draws(layers).values()
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        list(pool.map(lambda draw: he_normal_(draw, cast(torch.Tensor, draw.layer.weight).detach()), once))
    zero_biases_(layers)


@dataclass(frozen=True)
class Draw:
    """One layer that is drawn anew, with the gain of what follows it and the seed of its own generator."""

    layer: nn.Module
    gain: float
    seed: int


def draws(layers: Sequence[tuple[nn.Module, float]]) -> dict[int, Draw]:
    """Seed every layer from torch's global generator; return what is to be drawn by the identity of the weight."""
    seeds = torch.randint(2**63 - 1, (len(layers),)).tolist()
    every = reversed([Draw(layer, gain, seed) for (layer, gain), seed in zip(layers, seeds, strict=True)])
    return {id(draw.layer.weight): draw for draw in every}


def zero_biases_(layers: Sequence[tuple[nn.Module, float]]) -> None:
    """Start the biases of layers that are drawn anew at zero."""
    for layer, _ in layers:
        bias = getattr(layer, "bias", None)
        if isinstance(bias, torch.Tensor):
            bias.detach().zero_()


def he_normal_(draw: Draw, weight: torch.Tensor) -> torch.Tensor:
    """Fill ``weight``, of the shape of the layer's, from ``N(0, gain^2 / fan_in)`` (He et al. 2015, equation 10).

    torchvision's own fan-out initialisation keeps the scale of gradients and relies on the norm behind it for the
    scale of activations: without that norm resnet50's signal would end hundreds of times larger than it starts.
    """
    if not weight.is_meta:
        generator = torch.Generator(weight.device).manual_seed(draw.seed)
        weight.normal_(0, draw.gain / math.sqrt(fan_in(draw.layer)), generator=generator)
    return weight
