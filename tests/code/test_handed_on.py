"""A module that a method hands on, to a function, an object or a list, by which its layers are called apart."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import noise, randomise
from test_second_paths import hold
from torch import Tensor, nn

import normfree


class Body(nn.Module):
    """A convolution and its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(self.c(x)))


class Net(nn.Module):
    """Two bodies, one of them in lists; ``way`` is given."""

    chosen: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.body, self.c2, self.b2 = Body(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.stages = nn.ModuleList([nn.ModuleList([Body()])])
        self.line = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    @property
    def inner(self) -> nn.Module:
        return self.body

    def found(self) -> nn.Module:
        return self.body

    def forward(self, x: Tensor) -> Tensor:
        x = self.b2(self.c2(self.body(x)))
        for stage in self.stages:
            for body in stage:  # type: ignore[union-attr]
                x = body(x)
        return self.line(x)


def _convolved(net: Any, x: Tensor) -> Tensor:
    for part in net.children():
        if isinstance(part, nn.Conv2d):
            x = part(x)
    return x


def _all_convolved(parts: Any, x: Tensor) -> Tensor:
    for part in parts:
        if isinstance(part, nn.Conv2d):
            x = part(x)
    return x


def _deep(net: nn.Module, x: Tensor) -> Tensor:
    if isinstance(net, nn.Conv2d):
        return net(x)  # type: ignore[no-any-return]
    for part in net.children():
        x = _deep(part, x)
    return x


def _named(net: nn.Module, name: str, x: Tensor) -> Tensor:
    return getattr(net, name)(x)  # type: ignore[no-any-return]


def _by(function: Callable[..., Tensor], net: Any, x: Tensor) -> Tensor:
    return function(net, x)


def _both(pair: tuple[Any, Tensor]) -> Tensor:
    return _convolved(*pair)


def _nested(stages: Any, x: Tensor) -> Tensor:
    for stage in stages:
        for body in stage:
            for part in body.children():
                x = part(x) if isinstance(part, nn.Conv2d) else x
    return x


def _table(net: nn.Module) -> dict[str, nn.Module]:
    return dict(net.named_children())


def _picked(net: nn.Module) -> nn.Module:
    return list(net.children())[0]  # noqa: RUF015  # what is tested


def _each(net: nn.Module) -> Iterator[nn.Module]:
    yield from net.children()


def _again(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def inner(*args: Any) -> Tensor:
        return function(*args)

    return inner


@_again
def _decorated(net: Any, x: Tensor) -> Tensor:
    for part in net.children():
        x = part(x) if isinstance(part, nn.Conv2d) else x
    return x


class _Base:
    def run(self, net: Any, x: Tensor) -> Tensor:
        return net.c2(x)  # type: ignore[no-any-return]

    @staticmethod
    def run_static(net: Any, x: Tensor) -> Tensor:
        return net.c2(x)  # type: ignore[no-any-return]

    @property
    def by_property(self) -> Callable[[Any, Tensor], Tensor]:
        return lambda net, x: net.c2(x)


class _Derived(_Base):
    """Has its methods from another class."""


class _Visitor:
    def visit(self, net: nn.Module, x: Tensor) -> Tensor:
        return getattr(self, f"visit_{type(net).__name__}")(net, x)  # type: ignore[no-any-return]

    def visit_Body(self, net: nn.Module, x: Tensor) -> Tensor:  # noqa: N802  # by the name of a class
        return [part for part in net.children()][0](x)  # type: ignore[no-any-return]  # noqa: C416, RUF015


class _Made:
    def __init__(self, net: Any, x: Tensor) -> None:
        for part in net.children():
            x = part(x) if isinstance(part, nn.Conv2d) else x
        self.result = x


class _Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return _convolved(self.net, x)


class _Box:
    net: Any


_BOX, _HELD, _FUNCTIONS = _Box(), _Derived(), {"children": _convolved}
_OTHER_NAME = _convolved


def _in_the_box(x: Tensor) -> Tensor:
    for part in _BOX.net.children():
        x = part(x) if isinstance(part, nn.Conv2d) else x
    return x


def in_a_box(self: Any, x: Tensor) -> Tensor:
    _BOX.net = self.body
    return _in_the_box(x)


def in_a_variable(self: Any, x: Tensor) -> Tensor:
    body = self.body
    for part in body.children():
        x = part(x) if isinstance(part, nn.Conv2d) else x
    return x


def in_a_closure(self: Any, x: Tensor) -> Tensor:
    body = self.body

    def inner(y: Tensor) -> Tensor:
        return [part for part in body.children()][0](y)  # type: ignore[no-any-return]  # noqa: C416, RUF015

    return inner(x)


def in_a_context(self: Any, x: Tensor) -> Tensor:
    with contextlib.nullcontext(self.body) as body:
        for part in body.children():
            x = part(x) if isinstance(part, nn.Conv2d) else x
    return x


def from_a_generator(self: Any, x: Tensor) -> Tensor:
    for part in _each(self.body):
        x = part(x) if isinstance(part, nn.Conv2d) else x
    return x


def unpacked(self: Any, x: Tensor) -> Tensor:
    first, *_ = self.body.children()
    return first(x)  # type: ignore[no-any-return]


def by_weights(self: Any, x: Tensor) -> Tensor:
    weight = bias = None
    for module in self.body.modules():
        if isinstance(module, nn.Conv2d):
            weight, bias = module.weight, module.bias
    return _weighted(x, weight, bias)


def by_weights_at_once(self: Any, x: Tensor) -> Tensor:
    for module in self.body.modules():
        if isinstance(module, nn.Conv2d):
            x = F.conv2d(x, module.weight, module.bias, padding=1)
    return x


def _weighted(x: Tensor, weight: Any, bias: Any) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def by_a_forward_in_an_attribute(self: Any, x: Tensor) -> Tensor:
    for module in self.modules():
        if isinstance(module, nn.Conv2d):
            self.__dict__["chosen"] = module.forward
    return self.chosen(x)  # type: ignore[no-any-return]


def by_an_applied_function(self: Any, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    self.body.apply(lambda module: found.append(module(x)) if isinstance(module, nn.Conv2d) else None)
    return found[0]


WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "part": lambda self, x: _convolved(self.body, x),
    "itself": lambda self, x: _convolved(self, x),
    "its parts": lambda self, x: _all_convolved(self.body.children(), x),
    "two calls": lambda self, x: _by(_deep, self.body, x),
    "by keyword": lambda self, x: _convolved(x=x, net=self.body),
    "in a tuple": lambda self, x: _both((self.body, x)),
    "by a star": lambda self, x: _convolved(*(self.body, x)),
    "by two stars": lambda self, x: _convolved(**{"net": self.body, "x": x}),
    "partial": lambda self, x: functools.partial(_convolved, self.body)(x),
    "by a text": lambda self, x: _named(self.body, "c", x),
    "by a text at once": lambda self, x: getattr(self.found(), "".join(("c",)))(x),
    "recursive": lambda self, x: _deep(self.stages, x),
    "nested lists": lambda self, x: _nested(self.stages, x),
    "a slice": lambda self, x: self.line[:1](x),
    "a number": lambda self, x: self.line[-2](x),
    "a table": lambda self, x: _table(self.body)["c"](x),
    "a function's result": lambda self, x: _picked(self.body)(x),
    "a property": lambda self, x: _convolved(self.inner, x),
    "a property's parts": lambda self, x: next(iter(self.inner.children()))(x),
    "a method's result": lambda self, x: _convolved(self.found(), x),
    "a choice": lambda self, x: _convolved(self.body if self.chosen is None else self, x),
    "another name": lambda self, x: _OTHER_NAME(self.body, x),
    "a table of functions": lambda self, x: _FUNCTIONS["children"](self.body, x),
    "decorated": lambda self, x: _decorated(self.body, x),
    "reduced": lambda self, x: functools.reduce(_step, self.body.children(), x),
    "modules": lambda self, x: vars(self.body)["_modules"]["c"](x),
    "attrgetter": lambda self, x: operator.attrgetter("body.c")(self)(x),
    "submodule": lambda self, x: self.get_submodule("body.c")(x),
    "visitor": lambda self, x: _Visitor().visit(self.body, x),
    "made": lambda self, x: _Made(self, x).result,
    "wrapped": lambda self, x: _Wrapped(self.body)(x),
    "wrapped itself": lambda self, x: _Wrapped(self)(x),
    "inherited": lambda self, x: _HELD.run(self, x),
    "static": lambda self, x: _HELD.run_static(self, x),
    "by a property": lambda self, x: _HELD.by_property(self, x),
}
WAYS |= {
    way.__name__: way
    for way in (in_a_box, in_a_variable, in_a_closure, in_a_context, from_a_generator, unpacked, by_weights)
}
WAYS |= {way.__name__: way for way in (by_weights_at_once, by_a_forward_in_an_attribute, by_an_applied_function)}


def _step(x: Tensor, part: nn.Module) -> Tensor:
    return part(x) if isinstance(part, nn.Conv2d) else x


def _features(model: Any, x: Tensor) -> Tensor:
    return model.way(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_layer_in_what_is_handed_on_is_preserved(way: Callable[[Any, Tensor], Tensor]) -> None:
    model = randomise(type("Made", (Net,), {"way": way})()).double().eval()
    hold(model, lambda m, x: m(x), _features)


class Runner:
    """Holds the whole model, and goes through it; of a class in between."""

    def __init__(self, net: Any) -> None:
        self.net = net

    def way(self, x: Tensor) -> Tensor:
        for part in self.net.children():
            x = part(x) if isinstance(part, nn.Conv2d) else x
        return x

    def deep(self, x: Tensor) -> Tensor:
        return [m for m in self.net.modules() if isinstance(m, nn.Conv2d)][0](x)  # type: ignore[no-any-return]  # noqa: RUF015

    def named(self, x: Tensor, name: str = "c2") -> Tensor:
        return getattr(self.net, name)(x)  # type: ignore[no-any-return]


class Looking(Runner):
    """Looks attributes up in what it holds."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("of_"):
            return getattr(object.__getattribute__(self, "net"), name[3:])
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    "use",
    [lambda r, x: r.way(x), lambda r, x: r.deep(x), lambda r, x: r.named(x), lambda r, x: r.of_c2(x)],
    ids=["way", "deep", "named", "looks"],
)
def test_a_layer_that_an_object_of_the_model_comes_to_is_preserved(use: Callable[[Any, Tensor], Tensor]) -> None:
    model: Any = randomise(Net()).double().eval()
    model.runner = Looking(model)
    hold(model, lambda m, x: m(x), lambda m, x: use(m.runner, x))


class ClassMethods(Net):
    @classmethod
    def of_class(cls, net: Any, x: Tensor) -> Tensor:
        return _convolved(net, x)

    @staticmethod
    def of_none(net: Any, x: Tensor) -> Tensor:
        return _convolved(net.body, x)

    def way(self, x: Tensor) -> Tensor:
        return self.of_class(self, x) + self.of_none(self, x)


def test_methods_without_a_module_of_their_own_may_be_given_one() -> None:
    hold(randomise(ClassMethods()).double().eval(), lambda m, x: m(x), _features)


class Measured(Net):
    """Calls a method while it is built, for a size."""

    def __init__(self) -> None:
        super().__init__()
        self.size = self.way(torch.zeros(1, 4, 8, 8)).numel()

    def way(self, x: Tensor) -> Tensor:
        return self.c2(x)  # type: ignore[no-any-return]


class Keeping(Net):
    """Returns nothing, but keeps what layers return."""

    kept: Any = None

    def collect(self, x: Tensor) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                self.kept = module(x)

    def way(self, x: Tensor) -> Tensor:
        self.collect(x)
        return self.kept  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Measured, Keeping])
def test_methods_that_also_build_or_only_keep_are_preserved(kind: type[Net]) -> None:
    hold(randomise(kind()).double().eval(), lambda m, x: m(x), _features)


def _apply(function: Callable[..., None], net: nn.Module, name: str = "") -> nn.Module:
    for key, part in net.named_children():
        _apply(function, part, f"{name}.{key}")
    function(module=net, name=name)
    return net


def _start(module: nn.Module, name: str) -> None:
    if isinstance(module, nn.Conv2d) and name:
        nn.init.normal_(module.weight)


def _run(layers: Any, x: Tensor) -> Tensor:
    if isinstance(layers, nn.Sequential):
        layers = layers.children()
    for layer in tuple(layers):
        x = layer(x)
    return x


class Harmless(nn.Module):
    """Goes through its modules in all the ways that call no layer without its norm."""

    thinking = False

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Body(), Body())

    def start(self) -> None:
        _apply(functools.partial(_start), self)

    def freeze(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.BatchNorm2d) or "blocks" in name:
                module.thinking = getattr(module, "thinking", False)
                setattr(module, "frozen" if name else "whole", True)

    def describe(self) -> str:
        kinds = [type(module).__name__ for module in self.modules() if hasattr(module, "weight")]
        print(self.blocks[0].c)  # noqa: T201
        count = len(list(self.modules())) + sum(i for i, m in enumerate(self.modules()) if m.training)
        return f"{kinds} {sum(p.numel() for p in self.parameters())} {any(m.training for m in self.modules())} {count}"

    def merge(self) -> None:
        def inside(net: nn.Module) -> None:
            for name, part in net.named_children():
                if hasattr(part, "merged"):
                    setattr(net, name, part.merged())
                inside(part)

        inside(self)

    def decayed(self) -> set[str]:
        return {name for name in self.state_dict().keys() if name.endswith("weight")}  # noqa: SIM118  # what is tested

    def forward(self, x: Tensor) -> Tensor:
        return _run(self.blocks, x) if self.thinking else self.blocks(x)  # type: ignore[no-any-return]


def test_what_only_asks_runs_whole_or_tells_nothing_lets_layers_fold() -> None:
    plan = normfree.plan(Harmless().eval(), init="preserve", inputs=noise(2, 4, 6, 6))
    assert {edit.name: edit.action for edit in plan.norms} == {"blocks.0.b": "fold", "blocks.1.b": "fold"}
