"""A residual sum is one however the addition is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import assert_preserved, both, noise, prove, randomise
from readings import alphas
from torch import Tensor, nn

import normfree

ADDITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plus": lambda x, y: x + y,
    "swapped": lambda x, y: y + x,
    "torch.add": lambda x, y: torch.add(x, y),
    "torch.add_out": lambda x, y: torch.add(y, x, alpha=1),
    "method": lambda x, y: x.add(y),
    "in_place_method": lambda x, y: y.add_(x),
    "builtin_sum": lambda x, y: sum([x, y]),
    "constant_factor": lambda x, y: x + 0.5 * y,
    "divided": lambda x, y: x + y / 2,
}


class Adding(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        first = [nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*first, nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(ADDITIONS[self.how](x, self.body(x)))


@both
@pytest.mark.parametrize("how", ADDITIONS)
def test_residual_sum_is_found_however_it_is_written(how: str, init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), Adding(how)))
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert alphas(converted) == ["1.body.3"]
    assert_preserved(model, noise(2, 3, 6, 6))


class AddedTo(nn.Module):
    """One sum of two additions, the first of them in place: it writes over a branch that has been added already."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Adding("plus").body, Adding("plus").body

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y += x
        return self.two(x) + y


@both
def test_branch_is_proved_zero_where_it_is_added(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), AddedTo()))
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert alphas(converted) == ["1.one.3", "1.two.3"]
    report = normfree.verify(converted, model, noise(2, 3, 6, 6))
    assert report.proofs[3].detail.startswith("2 branches exactly zero")
    if init == "preserve":  # the second branch forgets its alpha
        converted[1].two[4].raw_alpha = None
    else:
        converted[1].two[3].__class__ = nn.Conv2d
    report = normfree.verify(converted, model, noise(2, 3, 6, 6))
    assert report.proofs[3].detail == "branch not zero at 1.add_1"
