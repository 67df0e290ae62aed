"""Forwards that ask what something is: whether it is a tensor, and of which class a layer is."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Block, assert_close, assert_preserved, both, noise, prove, randomise
from readings import actions, alphas, kinds, norms, plan_of
from torch import Tensor, is_tensor, nn

import normfree
from normfree.errors import UnsupportedModelError

X = noise(2, 3, 6, 6)


def _helper(x: Any) -> bool:
    return isinstance(x, Tensor)


ARE_TENSORS: dict[str, Callable[[Any], bool]] = {
    "isinstance": lambda x: isinstance(x, Tensor),
    "isinstance of several": lambda x: isinstance(x, (list, Tensor)) and not isinstance(x, (list, tuple, dict)),
    "isinstance of a union": lambda x: isinstance(x, Tensor | int),
    "torch.is_tensor": lambda x: torch.is_tensor(x),
    "is_tensor": lambda x: is_tensor(x),
    "type": lambda x: type(x) is Tensor,
    "name of the type": lambda x: type(x).__name__ == "Tensor",
    "a helper": _helper,
}


class Choosing(nn.Module):
    """Runs its block on tensors only."""

    def __init__(self, is_tensor: Callable[[Any], bool]) -> None:
        super().__init__()
        self.stem, self.bn, self.block, self.ask = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Block(), is_tensor

    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.stem(x))
        return self.block(y.relu()) if self.ask(y) and self.ask(x) else y * self.bn.eps


@both
@pytest.mark.parametrize("how", ARE_TENSORS)
def test_tensor_is_a_tensor_to_the_forward_that_asks(how: str, init: str) -> None:
    model = randomise(Choosing(ARE_TENSORS[how]))
    converted = prove(model, X, init=init)
    assert plan_of(converted).opaque == ()
    assert alphas(converted) == ["block.conv2"]
    assert_preserved(model, X)


class Sizes(nn.Module):
    """Asks what a size is, and what a split returns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.bn = nn.Conv2d(3, 4, 1), Block(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        parts = y.split(2, 1)
        if isinstance(y.shape[2], int) and isinstance(y.shape, tuple) and isinstance(parts, tuple):
            y = self.bn(y) if isinstance(parts[0], Tensor) and not isinstance(parts, Tensor) else y
        return self.block(y)


@both
def test_size_is_a_number_and_a_split_a_tuple(init: str) -> None:
    model = randomise(Sizes())
    converted = prove(model, X, init=init)
    assert alphas(converted) == ["block.conv2"]
    assert_preserved(model, X)


class Pair(nn.Module):
    """Returns two tensors from a module that holds nothing of interest."""

    def __init__(self, looped: bool) -> None:
        super().__init__()
        self.linear, self.looped = nn.Linear(6, 6), looped

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.looped and x.shape[0] > 100:
            return x, x
        return x + self.linear(x), x


class Unpacking(nn.Module):
    def __init__(self, looped: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.pair, self.block = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Pair(looped), Block()

    def forward(self, x: Tensor) -> Any:
        y: Any = self.pair(self.bn(self.conv(x)))
        if isinstance(y, tuple):
            y = y[0]
        return self.block(y)


@both
@pytest.mark.parametrize("looped", [False, True])
def test_what_another_module_returns_is_what_it_is(looped: bool, init: str) -> None:
    model = randomise(Unpacking(looped))
    converted = prove(model, X, init=init)
    assert plan_of(converted).opaque == ()
    assert alphas(converted) == ["block.conv2"]
    assert_preserved(model, X)


def _as_before() -> None:
    assert "isinstance" not in globals()
    assert "type" not in globals()
    assert "isinstance" not in vars(torch)
    assert builtins.isinstance is isinstance


def test_nothing_is_left_of_the_answers() -> None:
    normfree.plan(randomise(Choosing(ARE_TENSORS["type"])))
    _as_before()
    with pytest.raises(UnsupportedModelError):
        normfree.plan(randomise(AskingLayer(ASKED_NORMS["isinstance"])), init="preserve")
    _as_before()


class AskingLayer(nn.Module):
    """Goes another way for what it hears about one of its layers."""

    def __init__(self, ask: Callable[[Any], bool], traceable: bool = True) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.ask, self.block, self.traceable = ask, Block(), traceable

    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        return self.block(y if self.ask(self) else 2 * y)


ASKED_NORMS: dict[str, Callable[[Any], bool]] = {
    "isinstance": lambda m: isinstance(m.bn, nn.BatchNorm2d),
    "isinstance of another": lambda m: not isinstance(m.bn, nn.Identity),
    "type": lambda m: type(m.bn) is nn.BatchNorm2d,
    "types": lambda m: type(m.bn) in (nn.BatchNorm1d, nn.BatchNorm2d),
    "name": lambda m: type(m.bn).__name__.startswith("Batch"),
}
ASKED_LAYERS: dict[str, Callable[[Any], bool]] = {
    "type": lambda m: type(m.conv) is nn.Conv2d and type(m.block.conv2) is nn.Conv2d,
    "name": lambda m: {type(m.conv).__name__, type(m.block.conv2).__name__} == {"Conv2d"},
}
HARMLESS: dict[str, Callable[[Any], bool]] = {
    "isinstance of a layer": lambda m: isinstance(m.conv, nn.Conv2d),
    "isinstance of everything": lambda m: all(isinstance(child, nn.Module) for child in m.children()),
    "isinstance of something else": lambda m: not isinstance(m.bn, (nn.Linear, nn.LayerNorm)),
    "type of a block": lambda m: type(m.block) is Block,
}


@both
@pytest.mark.parametrize("how", ASKED_NORMS)
def test_norm_of_whose_class_a_forward_asks_is_refused_by_name_and_may_stay(how: str, init: Any) -> None:
    model = randomise(AskingLayer(ASKED_NORMS[how]))
    if (how, init) == ("isinstance of another", "preserve"):  # gain and bias stay in the slot: no Identity either
        prove(model, X, init=init)
        assert_preserved(model, X)
        return
    with pytest.raises(UnsupportedModelError, match="bn: a forward asks for its class.*exclude it"):
        normfree.plan(model, init=init)
    converted = normfree.convert(model, init=init, exclude=["bn"])
    assert norms(converted) == ["bn"]
    assert alphas(converted) == ["block.conv2"]
    if init == "preserve":
        assert_close(converted.eval()(X), model.eval()(X), 1e-5)


@both
@pytest.mark.parametrize("how", ASKED_LAYERS)
def test_layer_of_whose_class_a_forward_asks_keeps_it(how: str, init: str) -> None:
    model = randomise(AskingLayer(ASKED_LAYERS[how]))
    converted = prove(model, X, init=init)
    assert type(converted.conv) is type(converted.block.conv2) is nn.Conv2d
    assert actions(converted)["bn"] == ("fold" if init == "skipinit" else "affine"), "a bias alone changes no class"
    assert alphas(converted) == ["block.bn2"]
    assert_preserved(model, X)


@both
@pytest.mark.parametrize("how", HARMLESS)
def test_question_whose_answer_stays_costs_nothing(how: str, init: str) -> None:
    model = randomise(AskingLayer(HARMLESS[how]))
    converted = prove(model, X, init=init)
    assert actions(converted)["bn"] == "fold", "code that only asks a layer something does not use it"
    assert actions(converted)["block.bn2"] == "fold"
    assert alphas(converted) == ["block.conv2"]
    assert_preserved(model, X)


class ByAttribute(nn.Module):
    """Asks in ways that only its code shows."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.conv, self.bn, self.block, self.what = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Block(), what

    def _is_known(self, layer: nn.Module) -> bool:
        return layer.__class__.__name__ in ("Conv2d", "BatchNorm2d") and layer._get_name() in ("Conv2d", "BatchNorm2d")

    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        return self.block(y if self._is_known(self.get_submodule(self.what)) else 2 * y)


@both
def test_class_that_a_forward_reads_as_an_attribute(init: Any) -> None:
    converted = prove(randomise(ByAttribute("block.conv1")), X, init=init)
    assert type(converted.block.conv1) is nn.Conv2d
    assert_preserved(randomise(ByAttribute("block.conv1")), X)
    with pytest.raises(UnsupportedModelError, match="bn: a forward asks for its class"):
        normfree.plan(randomise(ByAttribute("bn")), init=init)


class Unseen(nn.Module):
    """Looks at values, and names the classes that it asks about."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()])

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            y = layer(x)
            x = 2 * y if isinstance(layer, nn.BatchNorm2d) and y.mean() < 1e6 else y
        return x


@both
def test_norm_that_a_forward_names_is_refused(init: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"0\.layers\.1: a forward asks for its class"):
        normfree.plan(randomise(nn.Sequential(Unseen(), Block())), init=init)
    converted = normfree.convert(randomise(nn.Sequential(Unseen(), Block())), init=init, exclude=["0.*"])
    assert norms(converted) == ["0.layers.1"]


class Dispatching(nn.Sequential):
    """Gives some layers more than one argument, as diffusion networks do."""

    def forward(self, x: Tensor, scale: float = 2.0) -> Any:
        for layer in self:
            x = layer(x, scale) if isinstance(layer, Scaled) else layer(x)
        return x


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: float) -> Tensor:
        return x * scale


@both
def test_container_that_asks_every_layer_is_converted_as_ever(init: str) -> None:
    model = randomise(Dispatching(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Scaled(), Block(), nn.BatchNorm2d(4)))
    converted = prove(model, X, init=init)
    assert (actions(converted)["1"], alphas(converted), kinds(converted)) == ("fold", ["3.conv2"], ["residual"])
    assert_preserved(model, X)


class Several(nn.Module):
    """Normalises one tensor, and leaves the members of a list as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Any:
        return self.bn(self.conv(x)) if isinstance(x, Tensor) else sum(self.conv(y) for y in x)


class CallingWithList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.many = nn.Conv2d(3, 4, 1), Several(), Several()

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        if y.mean() > 1e6:
            return y
        return self.many([self.one(y), y])


@both
def test_part_that_asks_what_it_is_given_goes_the_way_of_each_call(init: str) -> None:
    model = randomise(CallingWithList())
    converted = prove(model, X, init=init)
    assert actions(converted) == {"one.bn": "fold", "many.bn": "affine" if init == "preserve" else "bias"}
    assert plan_of(converted).unseen == ("many.bn",)
    assert_preserved(model, X)
