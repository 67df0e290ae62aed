"""A small network with one residual branch, which ends in each of the places that alpha can live in."""

from __future__ import annotations

import pytest
import torch
from harness import randomise, set_alphas
from readings import alphas
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

import normfree


class Block(nn.Module):
    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.pre = nn.BatchNorm2d(4)
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return x + self.end(torch.relu(self.bn(self.conv(torch.relu(self.pre(x))))))


ENDS = {
    "weight": lambda: nn.Conv2d(4, 4, 1, bias=False),
    "output": lambda: SqueezeExcitation(4, 2),
    "gate": nn.Sigmoid,
    "norm": lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(4)),
}
ends = pytest.mark.parametrize("end", ENDS)
X = (2, 4, 6, 6)


def make(end: str) -> nn.Module:
    return randomise(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Block(ENDS[end]())))


def converted(end: str, init: str) -> nn.Module:
    """Convert with a scalar that is neither 0 nor 1."""
    model = normfree.convert(make(end), init=init)
    assert len(alphas(model)) == 1
    return set_alphas(model, 0.7).eval()
