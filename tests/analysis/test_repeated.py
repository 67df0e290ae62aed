"""Blocks that are called several times: one scalar for all of their branches, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Block, Gated, assert_preserved, both, noise, prove, randomise, set_alphas
from readings import alphas, kinds, plan_of
from torch import Tensor, nn

import normfree

X = noise(2, 3, 6, 6)


class Recurrent(nn.Module):
    """Calls its block a few times, and perhaps once more as something else than a residual block."""

    def __init__(self, block: nn.Module, times: int = 3) -> None:
        super().__init__()
        self.stem, self.block, self.times = nn.Conv2d(3, 4, 1), block, times

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for _ in range(self.times):
            x = self.block(x)
        return x


class Shared(nn.Module):
    """Two residual blocks of one module: the same layers, each time with an activation of its own."""

    def __init__(self, odd: bool = False) -> None:
        super().__init__()
        self.stem, self.odd = nn.Conv2d(3, 4, 1), odd
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), Norm())

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        x = torch.tanh(x + self.branch(x))
        x = x + torch.dropout(self.branch(x), 0.1, self.training)
        return torch.tanh(self.branch(x)) if self.odd else x


class Norm(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))


REPEATED: dict[str, tuple[Callable[[], nn.Module], int, dict[str, str]]] = {
    "block": (lambda: Recurrent(Block()), 3, {"skipinit": "block.conv2", "preserve": "block.bn2"}),
    "branch": (Shared, 2, {"skipinit": "branch.3.0", "preserve": "branch.3.1"}),
    "rewritten block": (lambda: Recurrent(Gated(), 2), 2, dict.fromkeys(("skipinit", "preserve"), "block.skipinit_0")),
}


@both
@pytest.mark.parametrize("how", REPEATED)
def test_module_that_only_ends_branches_has_one_scalar_for_all_of_them(how: str, init: str) -> None:
    make, branches, where = REPEATED[how]
    converted = prove(randomise(make()), X, init=init)
    plan = plan_of(converted)
    assert kinds(converted) == ["residual"] * branches
    assert alphas(converted) == [where[init]]
    assert [len(total.alphas) for total in plan.sums] == [1] * branches
    assert (len(plan.alphas), plan.declined) == (1, ())
    assert normfree.Plan.from_json(plan.to_json()) == plan
    assert_preserved(randomise(make()), X)


def test_scalar_of_a_repeated_block_scales_every_branch() -> None:
    model = randomise(Recurrent(Block())).double().eval()
    x = noise(2, 3, 6, 6, dtype=torch.float64)
    converted = set_alphas(normfree.convert(model, init="preserve"), 0.0)
    stem = model.stem(x)
    assert torch.allclose(converted(x), torch.relu(stem), atol=1e-12)


@both
def test_module_that_ends_something_else_too_has_none(init: str) -> None:
    model = randomise(Shared(odd=True))
    converted = prove(model, X, init=init)
    assert alphas(converted) == []
    assert len(plan_of(converted).declined) == 2
    assert "serves something else too" in plan_of(converted).declined[0]


@both
def test_block_around_it_is_rewritten_then(init: str) -> None:
    converted = prove(randomise(nn.Sequential(Shared(odd=True))), X, init=init)
    assert alphas(converted) == ["0.skipinit_0", "0.skipinit_1"]
    assert_preserved(randomise(nn.Sequential(Shared(odd=True))), X)


@both
def test_sum_that_is_excluded_takes_the_scalar_of_the_others_with_it(init: Any) -> None:
    plan = normfree.plan(randomise(Recurrent(Block())), init=init, exclude=["block.add_1"])
    assert plan.alphas == ()
    assert [total.name for total in plan.sums if total.declined] == ["block.add", "block.add_2"]
