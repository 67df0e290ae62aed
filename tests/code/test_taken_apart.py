"""Sequences in sequences, sequences that are themselves, methods of layers, and methods by names that nobody calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.nn.functional as F
from harness import noise, randomise
from test_handed_on import Body
from test_second_paths import hold
from torch import Tensor, nn

import normfree


def _pair() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))


class Lists(nn.Module):
    """Sequences in a list, in a dictionary and beside each other; ``way`` is given."""

    deep = False

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.table = nn.ModuleList([_pair(), _pair()]), nn.ModuleDict({"a": _pair()})
        self.first, self.second = _pair(), _pair()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.second(self.first(self.table["a"](x)))  # type: ignore[no-any-return]


def loop_and_number(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers:
        x = layer[0](x)
    return x


def loop_in_a_loop(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers:
        for part in layer:
            x = part(x) if isinstance(part, nn.Conv2d) else x
    return x


def unpacked_in_a_loop(self: Any, x: Tensor) -> Tensor:
    for conv, _ in self.layers:
        x = conv(x)
    return x


def unpacked_variable(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers:
        conv, _ = layer
        x = conv(x)
    return x


def counted(self: Any, x: Tensor) -> Tensor:
    for _, layer in enumerate(self.layers):
        x = layer[0](x)
    return x


def of_a_variable(self: Any, x: Tensor) -> Tensor:
    layer = self.layers[1]
    return layer[0](x)  # type: ignore[no-any-return]


def of_both(self: Any, x: Tensor) -> Tensor:
    for layers in (self.first, self.second):
        for part in layers:
            x = part(x) if isinstance(part, nn.Conv2d) else x
    return x


def by_a_walrus(self: Any, x: Tensor) -> Tensor:
    if layers := self.first:
        return layers[0](x)  # type: ignore[no-any-return]
    return x


def handed_on(layers: Any, x: Tensor) -> Tensor:
    return layers[0](x)  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "two numbers": lambda self, x: self.layers[0][0](x),
    "a name and a number": lambda self, x: self.table["a"][0](x),
    "a slice": lambda self, x: self.layers[-1][:1](x),
    "of a list of both": lambda self, x: [self.first, self.second][0][0](x),
    "of all of it": lambda self, x: (*self.first,)[0](x),
    "of a sum": lambda self, x: (self.first + self.second)[0](x),
    "of either": lambda self, x: (self.first or self.second)[0](x),
    "of a call": lambda self, x: nn.Sequential(nn.Identity(), *self.first)[1](x),
    "handed on": lambda self, x: handed_on(self.layers[1], x),
    "turned": lambda self, x: self.layers[::-1][0][0](x),
}
WAYS |= {way.__name__: way for way in (loop_and_number, loop_in_a_loop, unpacked_in_a_loop, unpacked_variable)}
WAYS |= {way.__name__: way for way in (counted, of_a_variable, of_both, by_a_walrus)}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_layer_in_a_sequence_in_another_is_preserved(way: Callable[[Any, Tensor], Tensor]) -> None:
    model = randomise(type("Made", (Lists,), {"way": way})()).double().eval()
    hold(model, lambda m, x: m(x), lambda m, x: m.way(x))


class Wholes(Lists):
    """Calls what is in its sequences as wholes."""

    def way(self, x: Tensor) -> list[Tensor]:
        layers = self.layers[:2]
        found = list[Tensor]()
        for i, layer in enumerate(layers):
            x = layer(x)
            if i in (0, len(layers) - 1):
                found.append(x)
        return found

    def last(self, x: Tensor) -> Tensor:
        return self.layers[-1](x)  # type: ignore[no-any-return]


def test_sequences_that_are_called_as_wholes_fold() -> None:
    plan = normfree.plan(Wholes().eval(), init="preserve", inputs=noise(2, 4, 6, 6))
    assert {edit.action for edit in plan.norms} == {"fold"}


class Line(nn.Sequential):
    """A sequence with methods; ``way`` is given."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def through_itself(self: Any, x: Tensor) -> Tensor:
    for part in self:
        x = part(x) if isinstance(part, nn.Conv2d) else x
    return x


def of_its_base(self: Any, x: Tensor) -> Tensor:
    return next(iter(nn.Sequential.children(self)))(x)  # type: ignore[no-any-return]


OWN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "number": lambda self, x: self[0](x),
    "through itself": through_itself,
    "of its base": of_its_base,
}


@pytest.mark.parametrize("way", OWN.values(), ids=OWN)
def test_a_layer_of_a_sequence_with_methods_is_preserved(way: Callable[[Any, Tensor], Tensor]) -> None:
    model = randomise(type("Made", (Line,), {"way": way})()).double().eval()
    hold(model, lambda m, x: m(x), lambda m, x: m.way(x))


class Flagged(Line):
    def forward(self, x: Tensor, bare: bool = False) -> Tensor:
        return self[0](x) if bare else super().forward(x)  # type: ignore[no-any-return]


def test_a_flag_of_a_sequence_is_preserved() -> None:
    hold(randomise(Flagged()).double().eval(), lambda m, x: m(x), lambda m, x: m(x, bare=True))


class Layer(nn.Conv2d):
    """A convolution with methods of its own."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3, padding=1)

    def itself(self, x: Tensor) -> Tensor:
        return self(x)  # type: ignore[no-any-return]

    def its_base(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def its_weight(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


class OwnLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = Layer(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.c(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["itself", "its_base", "its_weight"])
def test_methods_of_a_layer_are_preserved(method: str) -> None:
    hold(randomise(OwnLayer()).double().eval(), lambda m, x: m(x), lambda m, x: getattr(m.c, method)(x))


def _guarded(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def inner(self: Any, x: Tensor) -> Tensor:
        return self.c(x) if self.bare else forward(self, x)  # type: ignore[no-any-return]

    return inner


@functools.singledispatch
def _dispatched(net: Any, x: Tensor) -> Tensor:
    return x


@_dispatched.register
def _(net: Body, x: Tensor) -> Tensor:
    return net.c(x)  # type: ignore[no-any-return]


class Named(Body):
    """Comes to its layer by methods that nobody names as they are called."""

    bare = False
    kept: Any = None
    head = property(lambda self: self.c)

    def __init__(self) -> None:
        Body.__init__(self)
        self.size = self._sized(noise(1, 4, 6, 6)).numel()

    def _sized(self, x: Tensor) -> Tensor:
        return self.c(x)  # type: ignore[no-any-return]

    def _stem(self, x: Tensor) -> Tensor:
        return self.c(x)  # type: ignore[no-any-return]

    stem = _stem

    def by_head(self, x: Tensor) -> Tensor:
        return self.head(x)  # type: ignore[no-any-return]

    def by_text(self, x: Tensor) -> Tensor:
        return getattr(self, "_stem")(x)  # type: ignore[no-any-return]  # noqa: B009  # what is tested

    def by_kind(self, x: Tensor) -> Tensor:
        return _dispatched(self, x)

    @_guarded
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(self._stem(x)))

    def __iter__(self) -> Iterator[nn.Module]:
        yield self.c
        yield self.b

    def train(self, mode: bool = True) -> Any:
        if not mode:
            self.kept = self.c(noise(1, 4, 6, 6, dtype=self.c.weight.dtype))
        return nn.Module.train(self, mode)

    def _statistics(self) -> Tensor:
        return self.b.running_var  # type: ignore[return-value]

    def through(self, x: Tensor) -> Tensor:
        for layer in self:
            return layer(x)  # type: ignore[no-any-return]
        return x

    def told(self, x: Tensor, statistics: bool = False) -> Tensor:
        return self._statistics() if statistics else handed_on([*self.children()], x)

    def guarded(self, x: Tensor) -> Tensor:
        self.bare = True
        return self(x)  # type: ignore[no-any-return]

    def shifted(self, x: Tensor) -> Tensor:
        bias = self.c.bias
        return x + bias[None, :, None, None]  # type: ignore[index]


def cached(model: Any, x: Tensor) -> Tensor:
    return model.train().eval().kept  # type: ignore[no-any-return]


def _one(name: str) -> type[Body]:
    """Return a class with one of these methods, so that no other keeps its layer from folding."""
    kept = {"head": ("head", "by_head"), "stem": ("_stem", "stem"), "through": ("__iter__", "through")}
    kept |= {"kept": ("kept", "train"), "told": ("told", "_statistics"), "shifted": ("shifted",)}
    kept |= {"guarded": ("bare", "guarded"), "text": ("_stem", "by_text"), "kind": ("by_kind",)}
    kept |= {"building": ("__init__", "_sized")}
    members = {member: vars(Named)[member] for member in kept[name] if member in vars(Named)}
    if name in ("stem", "text"):
        members["forward"] = lambda self, x: F.relu(self.b(self._stem(x)))
    if name == "guarded":
        members["forward"] = _guarded(Body.forward)
    return type("One", (Body,), members)


ONE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "head": lambda m, x: m.by_head(x),
    "stem": lambda m, x: m.stem(x),
    "through": lambda m, x: m.through(x),
    "kept": cached,
    "told": lambda m, x: m.told(x),
    "shifted": lambda m, x: m.shifted(x),
    "guarded": lambda m, x: m.guarded(x),
    "text": lambda m, x: m.by_text(x),
    "kind": lambda m, x: m.by_kind(x),
    "building": lambda m, x: m._sized(x),
}


@pytest.mark.parametrize("name", ONE)
def test_one_such_method_is_preserved(name: str) -> None:
    hold(randomise(_one(name)()).double().eval(), lambda m, x: m(x), ONE[name])
