"""Branches with more inside than convolutions: gates, coarser grids, blocks within blocks, questions to the data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import assert_preserved, both, noise, prove, randomise
from readings import alphas, kinds, norms, plan_of
from torch import Tensor, nn


def conv_bn(cin: int, cout: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout))


class GateFromBelow(nn.Module):
    """The gate is computed on a coarser grid; what it multiplies never left the fine one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate, self.tail = conv_bn(4, 4), conv_bn(4, 4, stride=2), conv_bn(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.interpolate(torch.sigmoid(self.gate(x)), scale_factor=2.0)
        return x + self.tail(torch.relu(self.body(x)) * gate)


class CoarseMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.mix, self.up = conv_bn(4, 4, stride=2), conv_bn(4, 4), nn.Upsample(scale_factor=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.mix(torch.relu(self.down(x))))


class CoarseAttention(nn.Module):
    """One module steps down and up again: attention on a coarser grid, and no decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.drop = CoarseMixer(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.mixer(x))


class NonLocal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.out = nn.Conv2d(4, 2, 1), conv_bn(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.softmax(self.value(x), dim=1))


class AroundAttention(nn.Module):
    """A bottleneck with a residual attention in its middle: both sums are residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention, self.last = conv_bn(4, 4), NonLocal(), conv_bn(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.last(self.attention(torch.relu(self.first(x)))))


BRANCHES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "gate from below": (GateFromBelow, ["1.tail.0"]),
    "coarse attention": (CoarseAttention, ["1.drop"]),
    "around attention": (AroundAttention, ["1.attention.out.0", "1.last.0"]),
}


@both
@pytest.mark.parametrize("kind", BRANCHES)
def test_sum_is_residual_and_gets_its_alpha(kind: str, init: str) -> None:
    make, tails = BRANCHES[kind]
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), make()))
    converted = prove(model, noise(2, 3, 8, 8), init=init)
    assert set(kinds(converted)) == {"residual"}
    assert alphas(converted) == tails
    assert_preserved(model, noise(2, 3, 8, 8))


class Ghost(nn.Module):
    """The branch ends in a parallel sum: one branch with one alpha, and none on either of its operands."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fusion = conv_bn(4, 4), RepGhost()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fusion(torch.relu(self.body(x)))


class RepGhost(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cheap, self.norm = conv_bn(4, 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.cheap(x) + self.norm(x)


@both
def test_branch_that_ends_in_a_parallel_sum_is_one_branch(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), Ghost()))
    converted = prove(model, noise(2, 3, 8, 8), init=init)
    assert sorted(kinds(converted)) == ["parallel", "residual"]
    assert alphas(converted) == ["1.fusion"]
    assert_preserved(model, noise(2, 3, 8, 8))


class Branching(nn.Module):
    """Asks the data which way to go."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(conv_bn(4, 4), nn.ReLU(), conv_bn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else self.convs(x) * 2


class AroundBranching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Branching()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@both
def test_branch_that_asks_the_data_gets_its_alpha(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), AroundBranching()))
    converted = prove(model, noise(2, 3, 8, 8), init=init)
    assert norms(converted) == []
    assert plan_of(converted).opaque == ()
    assert alphas(converted) == ["1.inner.convs.2.0"]
    assert_preserved(model, noise(2, 3, 8, 8))


class TwoHeads(nn.Module):
    """Adds what two heads say of different tokens: they share an input, and neither is a skip path."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.auxiliary = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(6, 4)
        self.norm, self.drop = nn.BatchNorm1d(5), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        out, tokens = self.drop(x[:, 0]), self.drop(x)
        return self.head(out) + 0.5 * self.auxiliary(tokens[:, 1:]).max(1)[0]


@both
def test_heads_on_different_tokens_are_a_merge(init: str) -> None:
    model = randomise(TwoHeads())
    converted = prove(model, noise(2, 5, 3), init=init)
    assert kinds(converted) == ["merge"]
    assert alphas(converted) == []
    assert_preserved(model, noise(2, 5, 3))
