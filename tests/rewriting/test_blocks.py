"""Blocks whose forward was rewritten behave like any other module."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Block, Gated, assert_close, assert_preserved, both, noise, prove, randomise
from readings import alphas, plan_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normfree
from normfree.errors import UsageError
from normfree.layers import ScaledSum


class Optional(Gated):
    def forward(self, x: Tensor, state: Tensor | None = None, scale: float = 1.0) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        y = y if state is None else y * state
        return x + y * torch.sigmoid(self.fc(y * scale))


class Keyword(Gated):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return x + y * torch.sigmoid(self.fc(y * scale))


class Listing(Gated):
    def forward(self, x: Tensor, scales: tuple[float, ...] = (1.0,)) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return x + y * torch.sigmoid(self.fc(y * scales[0]))


class Giving(nn.Module):
    """Gives the block more than its default, or the default itself."""

    def __init__(self, scale: float, looks: bool = False) -> None:
        super().__init__()
        self.stem, self.block, self.scale, self.looks = nn.Conv2d(3, 4, 1), Optional(), scale, looks

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and x.mean() > 1e6:
            return x
        return self.block(self.stem(x), None, scale=self.scale)


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


class Weighed(Block):
    """Adds twice in its own forward, and has an attribute `alpha` that is something else."""

    def __init__(self) -> None:
        super().__init__()
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
    converted.parts[1].skipinit_1.alpha = 0.0
    converted.parts[1].skipinit_0.alpha = 0.0
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


@pytest.mark.filterwarnings("ignore::normfree.checkpoint.saving.SaveWarning")
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
    assert type(pickled[1]).__bases__[1] is Gated
    pickled[1].skipinit_0.alpha = 0.0
    assert torch.equal(converted(X), expected), "a copy shares nothing"
    assert list(converted.state_dict()) == list(pickled.state_dict())


@pytest.mark.parametrize("init", ["skipinit", "preserve"])
@pytest.mark.parametrize(
    "make", [lambda: net(Optional), lambda: randomise(Giving(float("1")))], ids=["left out", "given"]
)
def test_optional_arguments_may_be_left_out_and_are_refused_where_they_are_not(make: Any, init: str) -> None:
    converted = prove(make(), X, init=init)
    assert len(alphas(converted)) == len([m for m in converted.modules() if isinstance(m, Optional)])
    assert_preserved(make(), X)
    for same in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):  # noqa: S301  # our own
        block = next(m for m in same.modules() if isinstance(m, Optional))
        x = noise(2, 4, 6, 6)
        assert torch.equal(block(x), block(x, None, scale=1.0))
        with pytest.raises(UsageError, match="state was given to a forward that was rewritten for its default"):
            block(x, state=torch.ones(2, 4, 6, 6))
        with pytest.raises(UsageError, match="scale was given"):
            block(x, None, 0.5)
    torch._dynamo.reset()  # it counts what other tests have compiled of the same code
    compiled = torch.compile(copy.deepcopy(converted), backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), converted(X))


class Asking(Gated):
    """Asks for what only a value tells: a symbol must not claim to be a tensor, or torch takes it for one."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return x + y * (torch.sigmoid(self.fc(y)) if isinstance(y, Tensor) and torch.is_tensor(y) else 2)


class AskingInput(Gated):
    """Takes a tensor, or several: the forward itself does not say which."""

    def forward(self, x: Any) -> Any:
        x = x if isinstance(x, Tensor) else sum(x)
        y = torch.relu(self.bn(self.conv(x)))
        return x + y * torch.sigmoid(self.fc(y))


class Dropping(Gated):
    """Stochastic depth by hand, with shapes for numbers."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        kept = torch.rand(y.shape[0], 1, 1, 1) < 2 if self.training else torch.ones(y.size()) > 0
        return x + y * kept


class Straight(torch.autograd.Function):
    """Rounds, and lets every gradient through."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return torch.round(x * 8) / 8

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient


def _rounded(_: Any, y: Tensor) -> Tensor:
    rounded: Tensor = Straight.apply(y)  # type: ignore[no-untyped-call]
    return rounded


def _frozen(self: Any, y: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(self.fc(y))
    return y * gate


def _single(self: Any, y: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=True):
        return y * torch.sigmoid(self.fc(y)).to(y.dtype)


def _again(self: Any, y: Tensor) -> Tensor:
    product: Tensor = checkpoint(lambda z: z * torch.sigmoid(self.fc(z)), y, use_reentrant=False)
    return product


class Around(Gated):
    """Does something to its branch that a graph of operations would not tell."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return x + self.how(self, torch.relu(self.bn(self.conv(x))))


@pytest.mark.parametrize("how", [_rounded, _frozen, _single, _again])
@both
def test_forward_whose_graph_would_lose_something_is_left_alone(how: Any, init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), Around(how)))
    assert "would be lost" in normfree.plan(model).declined[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is declined is said there too
        converted = normfree.convert(model, init=init)  # type: ignore[arg-type]  # one of two
    assert isinstance(converted[1], Around)
    assert not isinstance(converted[1], ScaledSum)
    gradient = torch.autograd.grad(converted(X).sum(), converted[1].conv.parameters())
    assert all(g.abs().sum() > 0 for g in gradient)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: net(Keyword), "forward of 1 cannot be rewritten: its forward takes arguments by keyword only"),
        (lambda: net(Asking), "forward of 1 cannot be rewritten: it looks at what it is given"),
        (lambda: net(Dropping), "forward of 1 cannot be rewritten: it cannot be followed without values"),
        (lambda: net(AskingInput), "forward of 1 cannot be rewritten: it cannot be followed without values"),
        (lambda: net(Listing), "optional arguments whose defaults cannot be written down"),
        (lambda: randomise(Giving(0.5)), "block is given more than the defaults of its optional arguments"),
        (lambda: randomise(Root()), "in the root's own forward, and the root keeps its class"),
    ],
)
def test_what_cannot_be_rewritten_is_declined_with_the_reason(model: object, why: str) -> None:
    made = model()  # type: ignore[operator]
    plan = normfree.plan(made, init="skipinit")
    assert plan.alphas == ()
    assert why in plan.declined[0]
    assert "declined: " in str(plan)
