"""Forwards in the manner of other libraries that a trace must not misread: what Python does, the trace does too.

A proxy that answers otherwise than a tensor would makes a graph of something the model never computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import actions, alphas, assert_close, both, noise, plan_of, prove, randomise
from torch import Tensor, nn

import normfree
from normfree.errors import UnsupportedModelError


class Tapping(nn.Module):
    """Hands out its raw features if they are a tensor, which a proxy is not."""

    def __init__(self, is_tensor: Callable[[object], bool]) -> None:
        super().__init__()
        self.conv, self.bn, self.is_tensor = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), is_tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = self.conv(x)
        return self.bn(y), y if self.is_tensor(y) else None


@pytest.mark.parametrize("is_tensor", [lambda x: isinstance(x, Tensor), torch.is_tensor])
def test_forward_that_asks_whether_it_holds_a_tensor_holds_one(is_tensor: Callable[[object], bool]) -> None:
    model = randomise(Tapping(is_tensor)).eval()
    converted = normfree.convert(model, init="preserve")
    for found, expected in zip(converted(noise(2, 3, 6, 6)), model(noise(2, 3, 6, 6)), strict=True):
        assert_close(found, expected, 1e-5)


class AskingTheType(nn.Module):
    """Transposes tokens for whatever is a batch norm."""

    def __init__(self, asks: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.layers, self.asks = nn.ModuleList([nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU()]), asks

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x.transpose(1, 2)).transpose(1, 2) if self.asks(layer) else layer(x)
        return x


ASKS: dict[str, Callable[[nn.Module], bool]] = {
    "isinstance": lambda layer: isinstance(layer, nn.BatchNorm1d),
    "class name": lambda layer: "BatchNorm" in type(layer).__name__,
}


@pytest.mark.parametrize("length", [5, 7])
@pytest.mark.parametrize("how", ASKS)
def test_forward_that_asks_for_the_type_of_its_layers_is_kept_or_refused(how: str, length: int) -> None:
    model = randomise(AskingTheType(ASKS[how])).eval()
    try:
        converted = normfree.convert(model, init="preserve")
    except UnsupportedModelError as error:
        assert "layers.1" in str(error)  # noqa: PT017  # a refusal by name is right, too
    else:
        assert_close(converted(noise(2, length, 5)), model(noise(2, length, 5)), 1e-5)


def popping(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Take an option out of the keyword arguments before the forward sees them."""

    @functools.wraps(forward)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (forward(self, *args, **kwargs),) if kwargs.pop("as_tuple", False) else forward(self, *args, **kwargs)

    return wrapped


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.relu = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.conv, self.last = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)

    @popping
    def forward(self, x: Tensor, **options: Any) -> Any:
        x = self.relu(self.bn(self.stem(x)))
        return x + self.last(self.conv(self.relu(x)))


class Passing(nn.Module):
    """Hands its keyword arguments on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Decorated()

    def forward(self, x: Tensor, **options: Any) -> Any:
        return self.inner(x, **options)


@both
@pytest.mark.parametrize("make", [Decorated, Passing])
def test_keyword_arguments_that_nobody_gives_do_not_stop_a_trace(make: Callable[[], nn.Module], init: str) -> None:
    converted = prove(randomise(make()), noise(2, 3, 6, 6), init=init)
    assert plan_of(converted).opaque == ()
    assert set(actions(converted).values()) == {"fold"}
    assert len(alphas(converted)) == 1


class Trying(nn.Module):
    """Offers every layer an argument that most of them do not take."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), Special(False)])

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            try:
                x = layer(x, lengths=lengths)
            except TypeError:
                x = layer(x)
        return x


@both
def test_layer_refuses_an_argument_in_a_trace_as_it_does_in_a_call(init: str) -> None:
    converted = prove(randomise(Trying()), noise(2, 3, 6, 6), init=init)
    assert plan_of(converted).opaque == ()


class Chunks(nn.Module):
    """Splits its features into a list, and appends to the list what is computed from its end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.inner, self.bn2 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.last, self.bn3 = nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)

    def split(self, x: Tensor) -> list[Tensor]:
        return list(x.chunk(2, 1))

    def forward(self, x: Tensor) -> Any:
        parts = self.split(self.bn1(self.first(x)))
        parts.append(self.bn2(self.inner(parts[-1])))
        return x + self.bn3(self.last(torch.relu(torch.cat(parts, 1))))


class Enumerated(Chunks):
    def split(self, x: Tensor) -> list[Tensor]:
        return [torch.relu(part) if i else part for i, part in enumerate(torch.split(x, [2, 2], dim=1))]


@both
@pytest.mark.parametrize("make", [Chunks, Enumerated])
def test_as_many_chunks_as_the_call_says_can_be_iterated_over(make: Callable[[], nn.Module], init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), make()))
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert plan_of(converted).opaque == ()
    assert set(actions(converted).values()) == {"fold"}
    assert alphas(converted) == ["1.last"]


class Special(nn.Module):
    """Asks for the shape only where it was told to: its fellows can be traced."""

    def __init__(self, check: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.check = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), check

    def forward(self, x: Tensor) -> Any:
        if self.check and x.shape[1] != 4:
            raise ValueError("expected four channels")
        return self.bn(self.conv(x))


@both
def test_one_module_that_cannot_be_traced_does_not_hide_all_of_its_type(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), Special(True), Special(False), nn.ReLU(), Special(False)))
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert list(dict(plan_of(converted).opaque)) == ["1"]
    assert (actions(converted)["2.bn"], actions(converted)["4.bn"]) == ("fold", "fold")


class Plain(nn.Module):
    """Holds constants that are neither parameters nor buffers, which ``model.double()`` does not know of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.mix, self.mixes = torch.ones(2, 4, 1, 1), [torch.ones(3, 2, 1, 1)]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.conv2d(torch.relu(self.bn(self.conv(x))), self.mix)
        return torch.conv2d(x, self.mixes[0])


@both
def test_constants_that_are_plain_tensors_take_part_in_float64(init: str) -> None:
    prove(randomise(Plain()), noise(2, 3, 6, 6), init=init)
