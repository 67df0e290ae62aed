"""How other libraries call a forward: decorators, options handed on, parts in a loop, a block with a state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from harness import Block, assert_close, assert_preserved, both, noise, prove, randomise
from readings import actions, alphas, kinds, norms, plan_of
from torch import Tensor, nn

import normfree

X = noise(2, 3, 6, 6)


def popping(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Take an option off the keywords and change what is returned, as decorators of forwards do."""

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        as_tuple = kwargs.pop("as_tuple", None)
        if "scale" in kwargs:
            raise ValueError("nobody gives a scale")
        out = forward(self, *args, **kwargs)
        return tuple(out.values()) if as_tuple else out

    return wrapper


def hiding(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Do not say what is decorated."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return wrapper


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.block = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Block()

    def run(self, x: Any) -> dict[str, Tensor]:
        return {"last": self.block(torch.relu(self.bn(self.stem(x))))}


class Popping(Base):
    @popping
    def forward(self, pixels: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Any:
        return self.run(pixels) if mask is None else {"masked": pixels * mask}


class PoppingOptional(Base):
    @popping
    def forward(self, pixels: Tensor | None = None, hidden: Tensor | None = None, **options: Any) -> Any:
        if pixels is None:
            raise ValueError("pixels must be given")
        return self.run(pixels)


class Hiding(Base):
    @hiding
    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Any:
        return self.run(pixels)


class KeywordOnly(Base):
    def forward(self, *, pixels: Tensor, scale: float = 1.0) -> Any:
        return self.run(pixels * scale)


class More(Base):
    """Takes any number of further arguments and hands them on."""

    def forward(self, pixels: Any, *more: Any, **options: Any) -> Any:
        return self.compute(pixels, *more, **options) if not isinstance(pixels, dict) else pixels

    def compute(self, pixels: Tensor, scale: float = 1.0) -> Any:
        return self.run(pixels * scale)


class HandingOn(nn.Module):
    """Hands every option on, and returns an object of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = PoppingOptional(), Block()

    def forward(self, pixels: Tensor | None = None, labels: Tensor | None = None, **options: Any) -> Any:
        out = self.inner(pixels, **options)
        return SimpleNamespace(logits=self.head(out["last"]), loss=None if labels is None else labels.sum())


CALLS: dict[str, Callable[[], nn.Module]] = {
    "a decorator pops keywords": Popping,
    "and all inputs are optional": PoppingOptional,
    "options are handed on": HandingOn,
    "the input goes by keyword only": KeywordOnly,
    "any number of further arguments": More,
}


@both
@pytest.mark.parametrize("how", CALLS)
def test_root_is_traced_the_way_a_user_calls_it(how: str, init: str) -> None:
    model = randomise(CALLS[how]())
    converted = prove(model, {"pixels": X}, init=init)
    assert plan_of(converted).opaque == ()
    assert set(actions(converted).values()) == {"fold"}
    assert (
        len(alphas(converted)) == kinds(converted).count("residual") == sum(type(m) is Block for m in model.modules())
    )
    out, expected = (m.double().eval()(pixels=X.double()) for m in (converted, model))
    if init == "preserve":
        out, expected = ((o if isinstance(o, dict) else vars(o)) for o in (out, expected))
        assert out.keys() == expected.keys()
        assert_close(next(iter(out.values())), next(iter(expected.values())), 1e-6)


@both
def test_decorator_that_hides_the_parameters_is_called_with_one_input(init: str) -> None:
    model = randomise(nn.Sequential(Hiding()))
    for root in (model[0], model):
        converted = prove_without_gradients(root, init)
        assert plan_of(converted).opaque == ()
        assert set(actions(converted).values()) == {"fold"}
        assert [path.rpartition("block.")[2] for path in alphas(converted)] == ["conv2"]


def prove_without_gradients(model: nn.Module, init: str) -> nn.Module:
    """Hold every proof but the fifth: nothing learns below ``no_grad``."""
    converted = normfree.convert(model, init=cast(Any, init))
    for proof in normfree.verify(converted, model, X).proofs:
        assert proof.passed is not False or proof.number == 5, proof
    return converted


class Conv(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.SiLU()

    def forward(self, x: Tensor) -> Any:
        return self.act(self.bn(self.conv(x)))


class Inner(nn.Module):
    """A residual block whose branch ends in an activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = Conv(width, width), Conv(width, width)

    def forward(self, x: Tensor) -> Any:
        return x + self.two(self.one(x))


def _listed(x: Tensor) -> list[Tensor]:
    return list(x.chunk(2, 1))


def _enumerated(x: Tensor) -> list[Tensor]:
    return [part if i else part.clone() for i, part in enumerate(torch.split(x, [4, 4], dim=1))]


def _looped(x: Tensor) -> list[Tensor]:
    kept = []
    for part in torch.chunk(x, chunks=2, dim=1):
        kept.append(part)
    if not len(x.tensor_split((4,), dim=1)) == len(x.tensor_split(2, dim=1)) == len(kept):
        raise ValueError("no assert: pytest writes those anew, with calls that may reach any layer")
    return kept


PARTS = {"list": _listed, "enumerate": _enumerated, "for": _looped}


class Partial(nn.Module):
    """Cuts its input in two, runs a chain of blocks on the last part, and puts everything together again."""

    def __init__(self, cut: Callable[[Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.first, self.last, self.cut = Conv(4, 8), Conv(16, 4), cut
        self.blocks = nn.ModuleList(Inner(4) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        parts = self.cut(self.first(x))
        parts.extend(block(parts[-1]) for block in self.blocks)
        return self.last(torch.cat(parts, 1))


@both
@pytest.mark.parametrize("how", PARTS)
def test_parts_whose_number_the_call_tells_may_be_iterated(how: str, init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), Partial(PARTS[how]), Partial(PARTS[how])))
    converted = prove(model, X, init=init)
    assert plan_of(converted).opaque == ()
    assert set(actions(converted).values()) == {"fold"}
    assert alphas(converted) == [f"{i}.blocks.{k}.two.act" for i in (1, 2) for k in (0, 1)]
    assert_preserved(model, X)


class Flexible(Block):
    """One of several looks at its input."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.looks = looks

    def forward(self, x: Tensor) -> Any:
        return x if self.looks and x.mean() > 1e6 else super().forward(x)


@both
def test_instance_that_looks_at_values_is_as_good_as_the_others(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), Flexible(False), Flexible(True), Flexible(False)))
    converted = prove(model, X, init=init)
    assert plan_of(converted).opaque == ()
    assert set(actions(converted).values()) == {"fold"}
    assert alphas(converted) == ["1.conv2", "2.conv2", "3.conv2"]
    assert_preserved(model, X)


class Twice(nn.Module):
    """Calls its block in two ways, in one of which it looks at values."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.stem, self.block, self.first = nn.Conv2d(3, 4, 1), Sometimes(), first

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.block(self.block(x, self.first), not self.first)


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, looks: bool = False) -> Any:
        y = self.conv(x)
        if looks and y.mean() > 1e6:
            return x
        return torch.relu(self.bn(y))


@both
@pytest.mark.parametrize("first", [False, True])
def test_module_that_is_called_in_two_ways_is_not_folded(first: bool, init: str) -> None:
    model = randomise(Twice(first))
    converted = prove(model, X, init=init)
    assert plan_of(converted).opaque == ()
    assert actions(converted)["block.bn"] != "fold"
    assert_preserved(model, X)


class Remembering(nn.Module):
    """Keeps what it computed in a list of its caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        kept.append(self.bn(self.conv(x)))
        return kept[-1] if x.mean() > 1e6 else x


class Collecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.block = nn.Conv2d(3, 4, 1), Remembering(), Block()

    def forward(self, x: Tensor) -> Any:
        kept: list[Tensor] = []
        x = self.inner(self.stem(x), kept)
        return self.block(x) + sum(kept)


@both
def test_what_a_forward_left_in_a_list_is_an_edge(init: str) -> None:
    model = randomise(Collecting())
    converted = prove(model, X, init=init)
    assert plan_of(converted).opaque == ()
    assert norms(converted) == []
    assert_preserved(model, X)
