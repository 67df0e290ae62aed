"""A layer that comes by a descriptor, a class of its own making or a name from elsewhere; norms that are replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import randomise
from test_second_paths import hold
from torch import Tensor, nn


class Net(nn.Module):
    """A convolution with its norm; a subclass has another way to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(self.c(x)))


class _First:
    def __get__(self, module: Any, kind: Any = None) -> Any:
        return module._modules["c"]


class Descriptor(Net):
    first = _First()

    def features(self, x: Tensor) -> Tensor:
        return self.first(x)


class OwnGetattr(Net):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__("c" if name == "stem" else name)

    def features(self, x: Tensor) -> Tensor:
        return self.stem(x)


class OwnGetitem(Net):
    def __getitem__(self, i: int) -> nn.Module:
        return [self.c, self.b][i]

    def features(self, x: Tensor) -> Tensor:
        return self[0](x)


class ByClass(Net):
    @functools.singledispatchmethod
    def run(self, x: Tensor) -> Tensor:
        return self.c(x)

    def features(self, x: Tensor) -> Tensor:
        return self.run(x)


class PutAmongModules(Net):
    def features(self, x: Tensor) -> Tensor:
        self._modules["b"] = nn.Identity()
        return self(x)


class PutByAddModule(Net):
    def features(self, x: Tensor) -> Tensor:
        self.add_module("b", nn.Identity())
        return self(x)


class _Bare(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(x)


class OtherClass(Net):
    def features(self, x: Tensor) -> Tensor:
        self.__class__ = _Bare  # type: ignore[assignment]  # what is tested
        return self(x)


class Reduced(Net):
    def features(self, x: Tensor) -> Tensor:
        return functools.reduce(lambda h, layer: layer(h), list(self.children())[:1], x)


class ByVars(Net):
    def features(self, x: Tensor) -> Tensor:
        return vars(self)["_modules"]["c"](x)


_KEPT: Any = None


class PutAmongGlobals(Net):
    def features(self, x: Tensor) -> Tensor:
        global _KEPT
        _KEPT = self.c
        return _KEPT(x)


class ListTwice(Net):
    def features(self, x: Tensor) -> Tensor:
        layers = [self.c]
        layers *= 2
        return layers[-1](x)


class SortedNames(Net):
    def features(self, x: Tensor) -> Tensor:
        for name in sorted(("c",)):
            x = getattr(self, name)(x)
        return x


class NamesOfTheClass(Net):
    order = ("c", "b")

    def features(self, x: Tensor) -> Tensor:
        for name in self.order[:1]:
            x = getattr(self, name)(x)
        return x


class NamesAdded(Net):
    def features(self, x: Tensor) -> Tensor:
        names = ("b",)
        names = ("c",) + names  # noqa: RUF005  # what is tested
        for name in names[:1]:
            x = getattr(self, name)(x)
        return x


class NamesPutByAFunction(Net):
    def features(self, x: Tensor) -> Tensor:
        names = ("z",)

        def put() -> None:
            nonlocal names
            names = ("c",)

        put()
        for name in names:
            x = getattr(self, name)(x)
        return x


KINDS = (Descriptor, OwnGetattr, OwnGetitem, ByClass, PutAmongModules, PutByAddModule, OtherClass, Reduced, ByVars)
KINDS += (PutAmongGlobals, ListTwice, SortedNames, NamesOfTheClass, NamesAdded, NamesPutByAFunction)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_layer_that_is_come_to_by_an_object_or_a_name_is_preserved(kind: Callable[[], Any]) -> None:
    hold(randomise(kind()).double().eval(), lambda m, x: m(x), lambda m, x: m.features(x))
