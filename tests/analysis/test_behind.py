"""Norms behind the sum, ``norm(x + f(x))``: nothing else holds the signal, so their branches start at nothing too."""

from __future__ import annotations

import pytest
import torch
from harness import assert_preserved, both, noise, prove, randomise
from readings import actions, alphas, kinds, norms, plan_of
from torch import Tensor, nn

import normfree

DEPTH = 64


class PostNorm(nn.Module):
    """A layer of a transformer of time series: tokens are mixed, a batch norm follows the sum."""

    def __init__(self, width: int = 16, transposed: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm, self.transposed = nn.BatchNorm1d(width), transposed

    def forward(self, x: Tensor) -> Tensor:
        total = x + self.down(torch.relu(self.up(x)))
        return self.norm(total.transpose(1, 2)).transpose(1, 2) if self.transposed else self.norm(total)


def deep(depth: int = DEPTH) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 16), *(PostNorm() for _ in range(depth)), nn.Linear(16, 2))


X = noise(8, 5, 3)


@both
def test_every_branch_in_front_of_a_norm_gets_a_scalar(init: str) -> None:
    model = randomise(deep(3))
    converted = prove(model, X, init=init)
    assert kinds(converted) == ["residual"] * 3
    assert alphas(converted) == [f"{i}.down" for i in (1, 2, 3)]
    assert norms(converted) == []
    assert set(actions(converted).values()) == {"affine" if init == "preserve" else "bias"}
    assert_preserved(model, X)


def test_signal_stays_what_it_was_where_it_would_grow_with_every_layer() -> None:
    torch.manual_seed(0)
    model = deep()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    deleted = normfree.convert(model, init="skipinit", alpha=1.0, reset=False, inputs=X)
    converted = normfree.convert(model, init="skipinit", reset=False, inputs=X)
    grown, kept = (normfree.signals(m, X).rows for m in (deleted, converted))
    assert len(grown) == len(kept) == DEPTH
    assert grown[-1].total.second > 1e3 * grown[0].skip.second
    assert all(row.branch.second == 0 for row in kept)
    assert kept[-1].total.second == pytest.approx(kept[0].skip.second)


def test_norm_behind_is_not_inside() -> None:
    with pytest.raises(normfree.errors.NoNormError):
        normfree.plan(deep(2), init="skipinit", scope="residual", inputs=X)


@both
def test_norm_behind_that_stays_holds_the_signal(init: str) -> None:
    model = randomise(deep(2))
    plan = normfree.plan(model, init=init, exclude=["1.norm"], inputs=X)
    assert [len(total.alphas) for total in plan.sums] == [0, 1]
    assert "no norm was removed from its branch or behind it" in plan.sums[0].reason


@both
def test_sum_that_goes_elsewhere_too_has_no_norm_behind_it(init: str) -> None:
    class Tapped(PostNorm):
        def forward(self, x: Tensor) -> Tensor:
            total = x + self.down(torch.relu(self.up(x)))
            return self.norm(total) + total.mean()

    converted = prove(randomise(nn.Sequential(nn.Linear(3, 16), Tapped())), noise(8, 3), init=init)
    assert plan_of(converted).alphas == ()
