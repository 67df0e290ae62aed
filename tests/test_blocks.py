"""Blocks whose forward was rewritten behave like any other module."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from harness import alphas, assert_close, assert_preserved, noise, plan_of, prove, randomise
from torch import Tensor, nn

import normfree


class Gated(nn.Module):
    """Ends in a product that nothing but its own forward computes; drops by hand, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        y = y * torch.sigmoid(self.fc(y.mean((2, 3), keepdim=True)))
        if self.training:
            y = nn.functional.dropout(y, 0.5)
        y += x
        return y

    def describe(self) -> str:
        return "gated"


class Optional(Gated):
    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return x + y * torch.sigmoid(self.fc(y))


class Root(Gated):
    """The addition stands in the root's own forward."""


X = noise(2, 3, 6, 6)


def net(block: type[nn.Module] = Gated) -> nn.Module:
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 1), block(), block()))


def test_both_modes_are_rewritten_and_the_class_is_kept() -> None:
    converted = prove(net(), X, init="preserve", alpha=0.3)
    assert alphas(converted) == ["1.skipinit_0", "2.skipinit_0"]
    assert [alpha.place for alpha in plan_of(converted).alphas] == ["sum", "sum"]
    assert isinstance(converted[1], Gated)
    assert converted[1].describe() == "gated"
    assert_preserved(net(), X)
    converted.train()
    assert not torch.equal(converted(X), converted(X))
    converted.eval()
    assert torch.equal(converted(X), converted(X))


class Weighed(nn.Module):
    """Adds twice in its own forward, and has an attribute `alpha` that is something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.alpha = nn.Parameter(torch.rand(2, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = torch.sigmoid(self.alpha).view(2, -1, 1, 1)
        x = x + first * (self.bn1(self.conv1(x)) - x)
        x = x + second * (self.bn2(self.conv2(x)) - x)
        return x, x.mean()


@pytest.mark.parametrize("init", ["skipinit", "preserve"])
def test_every_sum_of_one_block_gets_a_scalar_of_its_own(init: str) -> None:
    model = randomise(Chain(nn.Conv2d(3, 4, 1), Weighed(), Weighed()))
    converted = prove(model, X, init=init)
    ours = [name for name in alphas(converted) if "skipinit" in name]
    assert ours == [f"parts.{i}.skipinit_{k}" for i in (1, 2) for k in (0, 1)]
    assert_same(pickle.loads(pickle.dumps(converted)), converted)  # noqa: S301  # written on the same line
    assert_same(copy.deepcopy(converted), converted)
    converted.parts[1].skipinit_1.alpha.data.fill_(0)
    converted.parts[1].skipinit_0.alpha.data.fill_(0)
    x = noise(2, 4, 6, 6)
    assert torch.equal(converted.parts[1](x)[0], x)


class Chain(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts[0](x)
        x, _ = self.parts[1](x)
        x, _ = self.parts[2](x)
        return x


def assert_same(other: nn.Module, model: nn.Module) -> None:
    assert torch.equal(other.eval()(X), model.eval()(X))


def test_alpha_scales_the_branch() -> None:
    model = nn.Sequential(Gated()).eval()
    randomise(model)
    x = noise(2, 4, 6, 6)
    half = normfree.convert(model, init="preserve", alpha=0.5)(x)
    assert_close(half - x, (model(x) - x) / 2, 1e-5)


def test_rewritten_blocks_survive_copies_compile_and_files(tmp_path: Path) -> None:
    converted = normfree.convert(net(), init="preserve", alpha=0.3).eval()
    expected = converted(X)
    pickled = pickle.loads(pickle.dumps(converted))  # noqa: S301  # written on the same line
    buffer = io.BytesIO()
    torch.save(converted, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    normfree.save(converted, tmp_path / "net.safetensors")
    loaded = normfree.load(tmp_path / "net.safetensors", model=net()).eval()
    compiled = torch.compile(copy.deepcopy(converted), backend="eager", fullgraph=True)
    for other in (copy.deepcopy(converted), pickled, saved, loaded, compiled):
        assert torch.equal(other(X), expected)
    assert type(pickled[1]).__mro__[2] is Gated
    pickled[1].skipinit_0.alpha.data.zero_()
    assert torch.equal(converted(X), expected), "a copy shares nothing"
    assert list(converted.state_dict()) == list(pickled.state_dict())


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: net(Optional), "forward of 1 cannot be rewritten: its forward takes optional arguments"),
        (lambda: randomise(Root()), "in the root's own forward, and the root keeps its class"),
    ],
)
def test_what_cannot_be_rewritten_is_declined_with_the_reason(model: object, why: str) -> None:
    made = model()  # type: ignore[operator]
    plan = normfree.plan(made, init="skipinit")
    assert plan.alphas == ()
    assert why in plan.declined[0]
    assert "declined: " in str(plan)
