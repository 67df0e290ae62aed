"""What no run comes to is preserved too: other paths, other callers, whoever else holds a layer, what hooks see."""

from __future__ import annotations

import copy
import functools
import sys
from collections import deque
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close, noise, randomise
from readings import actions, plan_of
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

import normfree


class Net(nn.Module):
    """A convolution and its norm; what ``forward`` does is given."""

    flag = False

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def plain(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(self.c(x)))


def handed_on(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False)


def handed_on_and_scaled(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False) * 2


def scaled(x: Tensor, by: bool) -> Tensor:
    return x * 2 if by else x


def apart(net: Any, x: Tensor) -> Tensor:
    return net.c(x)


def early_return(self: Any, x: Tensor) -> Tensor:
    x = self.c(x)
    if self.flag:
        return x
    return self.b(x)


def option_of_a_call(self: Any, x: Tensor) -> Tensor:
    x = self.c(x)
    return x if self.flag else self.b(x)


def decided_between(self: Any, x: Tensor) -> Tensor:
    x = self.c(x)
    if self.flag:
        x = x.tanh()
    return self.b(x)


def decided_by_a_helper(self: Any, x: Tensor) -> Tensor:
    return self.b(scaled(self.c(x), self.flag))


def decided_by_gradients(self: Any, x: Tensor) -> Tensor:
    x = self.c(x)
    if torch.is_grad_enabled() != self.flag:
        x = x + 1
    return self.b(x)


def other_layer(self: Any, x: Tensor) -> Tensor:
    x = x if self.flag else self.c(x)
    return self.b(x)


def read_later(self: Any, x: Tensor) -> Tensor:
    y = self.c(x)
    z = self.b(y)
    return z + y if self.flag else z


def kept_on_self(self: Any, x: Tensor) -> Tensor:
    self.last = self.c(x)
    z = self.b(self.last)
    return self.last if self.flag else z


def read_by_a_closure(self: Any, x: Tensor) -> Tensor:
    y = self.c(x)

    def late() -> Tensor:
        return y

    z = self.b(y)
    return z + late() if self.flag else z


def assigned_on_the_way(self: Any, x: Tensor) -> Tensor:
    z = self.b(y := self.c(x))
    return z + y if self.flag else z


def raised_between(self: Any, x: Tensor) -> Tensor:
    y = self.c(x)
    try:
        if self.flag:
            raise KeyError
        return self.b(y)
    except KeyError:
        return y * 2


def weight_taken(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.c(x))
    return F.conv2d(y, self.c.weight, self.c.bias, padding=1) if self.flag else y


def bias_asked_for(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.c(x))
    return y if self.c.bias is None else y * 0


def called_by_name(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.c(x))
    return getattr(self, "c")(y) if self.flag else y  # noqa: B009  # what is tested


def called_by_made_name(self: Any, x: Tensor) -> Tensor:
    return getattr(self, f"{'c'}")(x) if self.flag else self.b(self.c(x))


def called_through_modules(self: Any, x: Tensor) -> Tensor:
    return self._modules["c"](x) if self.flag else self.b(self.c(x))


def called_as_a_child(self: Any, x: Tensor) -> Tensor:
    return next(self.children())(x) if self.flag else self.b(self.c(x))


def called_as_a_submodule(self: Any, x: Tensor) -> Tensor:
    return self.get_submodule("c")(x) if self.flag else self.b(self.c(x))


def called_by_a_helper(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.c(x))
    return apart(self, y) if self.flag else y


def called_by_a_variable(self: Any, x: Tensor) -> Tensor:
    layer = self.c
    y = self.b(layer(x))
    return layer(y) if self.flag else y


def yielded(self: Any, x: Tensor) -> Tensor:
    def steps() -> Iterator[Tensor]:
        y = self.c(x)
        yield y
        yield self.b(y)

    found = steps()
    return next(found) if self.flag else list(found)[-1]


PATHS = (early_return, option_of_a_call, decided_between, decided_by_a_helper, decided_by_gradients, other_layer)
PATHS += (read_later, kept_on_self, read_by_a_closure, assigned_on_the_way, raised_between, weight_taken)
PATHS += (bias_asked_for, called_by_name, called_by_made_name, called_through_modules, called_as_a_child)
PATHS += (called_as_a_submodule, called_by_a_helper, called_by_a_variable, yielded)


def made(forward: Callable[..., Tensor]) -> Any:
    return randomise(type("Made", (Net,), {"forward": forward})()).double().eval()


class Within(nn.Module):
    """Holds a network, which may then call a layer and its slot together: a root keeps its class."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


def hold(model: Any, *paths: Callable[[Any, Tensor], Tensor]) -> Any:
    """Convert without the comparison, alone and within another, and hold each path to the original."""
    x = noise(2, 4, 6, 6, dtype=torch.float64)
    converted = normfree.convert(model, init="preserve", inputs=x, check=False)
    inside = normfree.convert(Within(model), init="preserve", inputs=x, check=False).net
    with torch.no_grad():
        for path in paths:
            expected = path(model, x)
            for net in (converted, inside):
                assert_close(path(net, x), expected)
    return converted


def flagged(model: Any, x: Tensor) -> Tensor:
    model.flag = True
    try:
        return model(x)
    finally:
        model.flag = False


@pytest.mark.parametrize("forward", PATHS, ids=lambda path: path.__name__)
def test_a_path_that_no_run_takes_is_preserved(forward: Callable[..., Tensor]) -> None:
    hold(made(forward), lambda m, x: m(x), flagged)


HOLDERS: dict[str, Callable[[nn.Module], Any]] = {
    "list": lambda c: [c],
    "deque": lambda c: deque([c]),
    "set": lambda c: {c},
    "closure": lambda c: lambda x: c(x),
    "partial": lambda c: functools.partial(nn.Module.__call__, c),
    "method": lambda c: c.forward,
    "weight": lambda c: [c.weight],
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_a_layer_that_something_else_holds_is_preserved(kind: str) -> None:
    model = made(Net.plain)
    model.held = HOLDERS[kind](model.c)

    def through(m: Any, x: Tensor) -> Tensor:
        if kind == "weight":
            return F.conv2d(x, m.held[0])
        held = m.held if callable(m.held) else next(iter(m.held))
        return held(x)

    hold(model, lambda m, x: m(x), through)


class Methods(Net):
    """Other methods: one comes to the layer alone, one to the layer and its norm."""

    forward = Net.plain

    def features(self, x: Tensor) -> Tensor:
        return self.c(x)


class Intermediates(Net):
    forward = Net.plain

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.c(x)
        x = self.b(x)
        return torch.relu(x)


def test_a_method_that_calls_a_layer_alone_is_preserved() -> None:
    hold(randomise(Methods()).double().eval(), lambda m, x: m(x), lambda m, x: m.features(x))


def test_a_method_that_calls_a_layer_with_its_norm_lets_them_fold() -> None:
    model = randomise(Intermediates()).double().eval()
    converted = hold(model, lambda m, x: m(x), lambda m, x: m.forward_features(x))
    assert actions(converted) == {"b": "fold"}


class Parts(Net):
    """Comes to the layer by a method, in two ways, which a class below makes different."""

    def part(self, x: Tensor) -> Tensor:
        return self.c(x)

    def other(self, x: Tensor) -> Tensor:
        def closure(*x: Tensor) -> Tensor:
            return self.part(*x)

        return handed_on(closure, x)

    def forward(self, x: Tensor) -> Tensor:
        if self.flag:
            x = x.clone()
            y = self.other(x)
        else:
            y = self.part(x)
        return self.b(y)


class ReturnsEarly(Parts):
    def part(self, x: Tensor) -> Tensor:
        if self.flag:
            return x
        return self.c(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.part(x))


class ScalesInside(Parts):
    def other(self, x: Tensor) -> Tensor:
        def closure(x: Tensor) -> Tensor:
            return self.part(x) * 2

        return handed_on(closure, x)


class ScalesAfter(Parts):
    def other(self, x: Tensor) -> Tensor:
        return self.part(x) * 2


class ScalesItsResult(Parts):
    def other(self, x: Tensor) -> Tensor:
        return self.part(x).mul(2)


class ScalesInForward(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if self.flag:
            x = x.clone()
            y = self.other(x) * 2
        else:
            y = self.part(x)
        return self.b(y)


class OtherClosure(Parts):
    def other(self, x: Tensor) -> Tensor:
        def closure(x: Tensor) -> Tensor:
            return self.part(x)

        if self.flag:
            closure = torch.tanh
        return handed_on(closure, x)


class OtherHelper(Parts):
    def other(self, x: Tensor) -> Tensor:
        def closure(x: Tensor) -> Tensor:
            return self.part(x)

        return handed_on_and_scaled(closure, x)


class PutBefore(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        if not self.flag:
            y = self.part(x)
        return self.b(y)


class Replaced(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.__dict__["other"] = torch.tanh


class OtherSelf(Parts):
    def forward(self, x: Tensor) -> Tensor:
        norm = self.b
        if self.flag:
            self = type("Twice", (), {"other": lambda _, x: x * 2})()
            y = self.other(x)
        else:
            y = self.part(x)
        return norm(y)


BRANCHES = (ReturnsEarly, ScalesInside, ScalesAfter, ScalesInForward, OtherClosure, OtherHelper, PutBefore, Replaced)
BRANCHES += (OtherSelf, ScalesItsResult)


@pytest.mark.parametrize("kind", BRANCHES)
def test_branches_that_do_not_do_the_same_are_preserved(kind: type[Net]) -> None:
    hold(randomise(kind()).double().eval(), lambda m, x: m(x), flagged)


class Whole(nn.Module):
    """Holds some parts, whose methods are then no longer those of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Parts()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_branches_that_both_call_a_layer_let_it_fold() -> None:
    kept = hold(randomise(Whole()).double().eval(), lambda m, x: m(x), lambda m, x: flagged(m.inner, x))
    assert actions(kept) == {"inner.b": "fold"}


def test_a_method_of_the_model_is_there_for_its_user() -> None:
    kept = hold(randomise(Parts()).double().eval(), lambda m, x: m(x), lambda m, x: m.part(x))
    assert actions(kept) == {"b": "fold"}


class Before(nn.Module):
    """A layer behind a norm."""

    flag = False

    def __init__(self) -> None:
        super().__init__()
        self.b, self.after = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)


class Optional(Net):
    """A part between convolution and norm that may be missing, and is."""

    def __init__(self) -> None:
        super().__init__()
        self.part: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        if self.part is not None:
            x = self.part(x)
        return self.b(x)


class Missing(Net):
    """The same; nothing here ever puts a part there."""

    def __init__(self) -> None:
        super().__init__()
        self.absent: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        if self.absent is not None:
            x = self.absent(x)
        return self.b(x)


class PutThereByAnother(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Optional()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def other(self, x: Tensor) -> Tensor:
        self.inner.part = nn.Tanh()
        try:
            return self(x)
        finally:
            self.inner.part = None


class PutThereLater(Optional):
    def other(self, x: Tensor) -> Tensor:
        self.part = nn.Tanh()
        try:
            return self(x)
        finally:
            self.part = None


class ElseDoubled(Optional):
    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        if self.part is not None:
            x = self.part(x)
        elif self.flag:
            x = x * 2
        return self.b(x)


class InAnotherVariable(Optional):
    def forward(self, x: Tensor) -> Tensor:
        norm = self.b
        x = self.c(x)
        if self.flag:
            self = PutThereLater().double()
            self.part = nn.Tanh()
        if self.part is not None:
            x = self.part(x)
        return norm(x)


class OfTheClass(Net):
    part: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        if self.part is not None:
            x = self.part(x)
        return self.b(x)

    def other(self, x: Tensor) -> Tensor:
        type(self).part = staticmethod(torch.tanh)
        try:
            return self(x)
        finally:
            type(self).part = None


class Through(Before):
    """An identity stands between."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(x)
        x = self.part(x)
        return self.after(x)


class TwiceThrough(Through):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(x)
        y = self.part(x)
        return self.after(y) + (x if self.flag else 0)


@pytest.mark.filterwarnings("ignore::normfree.deployment.fuse.FuseWarning")
@pytest.mark.parametrize("kind", [Through, TwiceThrough])
def test_an_identity_between_is_nothing(kind: type[Before]) -> None:
    model = hold(randomise(kind()).double().eval(), lambda m, x: m(x), flagged)
    fused = normfree.fuse(model)
    assert plan_of(fused).norms[0].into == "after"
    x = noise(2, 4, 6, 6, dtype=torch.float64)
    assert_close(fused(x), model(x))


def test_a_part_that_is_missing_decides_nothing() -> None:
    assert actions(hold(randomise(Missing()).double().eval(), lambda m, x: m(x))) == {"b": "fold"}


@pytest.mark.parametrize("kind", [PutThereLater, PutThereByAnother, ElseDoubled, InAnotherVariable, OfTheClass])
def test_a_part_that_may_come_is_preserved(kind: type[nn.Module]) -> None:
    other = getattr(kind, "other", flagged)
    hold(randomise(kind()).double().eval(), lambda m, x: m(x), other)


def called_by_another_name(self: Any, x: Tensor) -> Tensor:
    layer = self.c
    return layer(x)


def called_where_statistics_are_read(self: Any, x: Tensor) -> Tensor:
    if self.flag:
        self.c = fuse_conv_bn_eval(self.c, self.b)
    return self.c(x)


def called_by_another_name_where_statistics_are_read(self: Any, x: Tensor) -> Tensor:
    layer = fuse_conv_bn_eval(self.c, self.b) if self.flag else self.c
    return layer(x)


def called_where_a_method_fuses(self: Any, x: Tensor) -> Tensor:
    if self.flag:
        self.fuse()
    return torch.relu(self.c(x))


@pytest.mark.parametrize(
    "method",
    [
        called_by_another_name,
        called_where_statistics_are_read,
        called_by_another_name_where_statistics_are_read,
        called_where_a_method_fuses,
    ],
    ids=lambda method: method.__name__,
)
def test_another_method_that_comes_to_a_layer_is_preserved(method: Callable[..., Tensor]) -> None:
    model = randomise(type("Made", (Fusing,), {"features": method})()).double().eval()
    hold(model, lambda m, x: m(x), lambda m, x: m.features(x))


class Fusing(Net):
    """Puts a norm into the layer in front of it by itself, and asks whether it still has one."""

    forward = Net.plain

    def fuse(self) -> None:
        if isinstance(self.b, nn.BatchNorm2d):
            self.c, self.b = fuse_conv_bn_eval(self.c, self.b), nn.Identity()


def test_a_method_that_only_fuses_lets_a_norm_fold() -> None:
    assert actions(hold(randomise(Fusing()).double().eval(), lambda m, x: m(x))) == {"b": "fold"}


class Separable(nn.Module):
    """Ends in a layer whose norm stands behind it, in another module."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.pointwise = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class Behind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Tanh(), Separable(), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


PARTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "first": lambda self, x: self.seq[0](x),
    "layer": lambda self, x: self.seq[1](x),
    "norm": lambda self, x: self.seq[-1](x),
    "inside": lambda self, x: self.seq[1].pointwise(x),
    "slice": lambda self, x: self.seq[:2](x),
    "number": lambda self, x: self.seq[int(self.training)](x),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_sequence_alone_is_preserved(part: str) -> None:
    model = randomise(type("Made", (Behind,), {"features": PARTS[part]})()).double().eval()
    hold(model, lambda m, x: m(x), lambda m, x: m.features(x))


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = Separable(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.w(x))


WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "together": lambda self, x: torch.relu(self.b(self.w(x))),
    "alone": lambda self, x: self.w(x),
    "norm alone": lambda self, x: self.b(x),
    "between": lambda self, x: self.b(torch.relu(self.w(x))),
    "other layer": lambda self, x: self.b(self.w.depthwise(x)),
}


@pytest.mark.parametrize("way", WAYS)
def test_another_method_is_read_for_what_ends_in_a_layer_too(way: str) -> None:
    model = randomise(type("Made", (Split,), {"features": WAYS[way]})()).double().eval()
    hold(model, lambda m, x: m(x), lambda m, x: m.features(x))


class Written(Net):
    """Writes into its own weights."""

    forward = Net.plain

    def clip(self) -> None:
        with torch.no_grad():
            self.c.weight.clamp_(-0.05, 0.05)

    def swap(self) -> None:
        self.c.weight = nn.Parameter(self.c.weight.detach().flip(0))

    def draw(self) -> None:
        torch.manual_seed(0)
        nn.init.normal_(self.c.weight)


@pytest.mark.parametrize("method", ["clip", "swap", "draw"])
def test_a_method_that_writes_a_weight_writes_that_of_the_layer(method: str) -> None:
    def written(model: Any, x: Tensor) -> Tensor:
        getattr(model, method)()
        return model(x)

    hold(randomise(Written()).double().eval(), lambda m, x: m(x), written)


class Computing(Net):
    """Computes with its own weights."""

    forward = Net.plain

    def told(self, x: Tensor, statistics: bool = False) -> Tensor:
        if statistics:
            return self.b.running_var  # type: ignore[return-value]
        return F.conv2d(x, self.c.weight, self.c.bias, padding=1)

    def told_with_both(self, x: Tensor) -> Tensor:
        weight = self.c.weight / self.b.running_var.sqrt()[:, None, None, None]  # type: ignore[union-attr]
        return F.conv2d(x, weight, padding=1)

    def given_others(self, x: Tensor) -> Tensor:
        given = {name: value * (1 - name.startswith("c.")) for name, value in self.named_parameters()}
        return torch.func.functional_call(self, given, (x,))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["told", "given_others"])
def test_a_method_that_computes_with_a_weight_computes_with_that_of_the_layer(method: str) -> None:
    hold(randomise(Computing()).double().eval(), lambda m, x: m(x), lambda m, x: getattr(m, method)(x))


def test_a_method_that_wants_statistics_with_a_weight_changes_nothing_and_fails() -> None:
    class Failing(Net):
        forward = Net.plain
        told = Computing.told_with_both

    model = randomise(Failing()).eval()
    carried = normfree.plan(model, init="preserve").carried
    assert [layer.mean_unit for layer in carried] == [4.0], "its mean moves less, as that of any filter"
    with pytest.raises(AttributeError, match="running_var"):
        normfree.convert(model, init="preserve").told(noise(1, 4, 6, 6))


class Sequence(nn.Module):
    flag = False

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.seq[0](x) if self.flag else self.seq(x)


def test_the_first_of_a_sequence_alone_is_preserved() -> None:
    hold(randomise(Sequence()).double().eval(), lambda m, x: m(x), flagged)


class Around(nn.Module):
    """A convolution and its norm in containers of their own, on which hooks can hang."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), nn.Sequential(nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(self.c(x)))


KINDS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("place", ["c", "c.0", "b", "b.0", "everywhere"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_hook_sees_stays_what_it_is(kind: str, place: str) -> None:
    model = randomise(Around()).double().eval()
    x, seen = noise(2, 4, 6, 6, dtype=torch.float64), list[Tensor]()

    def look(module: nn.Module, *values: Any) -> None:
        if place != "everywhere" or isinstance(module, nn.Conv2d):
            seen.extend(t.detach().clone() for value in values for t in value if isinstance(t, Tensor))

    on = nn.modules.module if place == "everywhere" else model.get_submodule(place)
    register = f"register_module_{kind}" if place == "everywhere" else f"register_{kind}"
    handle = getattr(on, register)(look)
    try:
        model(x.clone().requires_grad_()).sum().backward()
        before = copy.copy(seen)
        seen.clear()
        normfree.convert_(model, init="preserve", inputs=x, check=False)
        seen.clear()
        model(x.clone().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert len(seen) == len(before) > 0
    for found, expected in zip(seen, before, strict=True):
        assert_close(found, expected)


# What is added in place, in a block whose branch ends in its own forward


def added_by_a_method(self: Any, x: Tensor) -> Tensor:
    y = torch.tanh(self.b(self.c(x)))
    y.add_(x)
    return y


def added_then_read(self: Any, x: Tensor) -> Tensor:
    y = torch.tanh(self.b(self.c(x)))
    y.add_(x)
    return torch.relu(y)


def add_to(y: Tensor, x: Tensor) -> None:
    y += x


def added_by_a_helper(self: Any, x: Tensor) -> Tensor:
    y = torch.tanh(self.b(self.c(x)))
    add_to(y, x)
    return y


def added_under_another_name(self: Any, x: Tensor) -> Tensor:
    y = torch.tanh(self.b(self.c(x)))
    z = y
    y += x
    return z


def added_into_a_view(self: Any, x: Tensor) -> Tensor:
    y = torch.tanh(self.b(self.c(x)))
    z = y.view(-1)
    z += x.reshape(-1)
    return y


def added_to_a_slice(self: Any, x: Tensor) -> Tensor:
    y = torch.tanh(self.b(self.c(x)))
    y[:, :2].add_(x[:, :2])
    return y


def added_to_data(self: Any, x: Tensor) -> Tensor:
    y = torch.tanh(self.b(self.c(x)))
    y.data.add_(x)
    return y


def added_out(self: Any, x: Tensor) -> Tensor:
    y = torch.tanh(self.b(self.c(x)))
    torch.add(y, x, out=y)
    return y


def added_in_a_list(self: Any, x: Tensor) -> Tensor:
    ys = [torch.tanh(self.b(self.c(x)))]
    ys[0].add_(x)
    return ys[0]


def added_to_the_skip_path(self: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x.add_(torch.tanh(self.b(self.c(x))))
    return x


ADDED = (added_by_a_method, added_then_read, added_by_a_helper, added_under_another_name, added_into_a_view)
ADDED += (added_to_a_slice, added_to_data, added_out, added_in_a_list, added_to_the_skip_path)


@pytest.mark.parametrize("forward", ADDED, ids=lambda path: path.__name__)
def test_what_is_added_in_place_is_not_lost(forward: Callable[..., Tensor]) -> None:
    hold(nn.Sequential(nn.Conv2d(4, 4, 1), made(forward)).double().eval(), lambda m, x: m(x))


class Gate(nn.Module):
    """Writes into what it is given, and returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Conv2d(4, 4, 1)

    def forward(self, h: Tensor) -> Tensor:
        return h.mul_(torch.sigmoid(self.f(h.mean((2, 3), keepdim=True))))


def test_a_module_that_returns_what_it_was_given_gets_no_alpha_of_which_others_see_nothing() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = torch.tanh(self.b(self.c(x)))
        y = self.gate(h)
        y += x
        return h

    model = made(forward)
    model.gate = Gate().double()
    hold(nn.Sequential(nn.Conv2d(4, 4, 1), model).double().eval(), lambda m, x: m(x))


NOTEBOOK = """
from torch import nn

class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.b, self.gate = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), None

    def forward(self, x):
        x = self.c(x)
        if self.gate is not None:
            x = self.gate(x)
        return self.b(x)
"""
LATER = """
class Opened(Gated):
    def open(self):
        self.gate = nn.Tanh()
"""


def test_a_class_that_a_notebook_defines_after_a_conversion_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook: Any = ModuleType("a_notebook")
    monkeypatch.setitem(sys.modules, "a_notebook", notebook)
    exec(NOTEBOOK, vars(notebook))  # noqa: S102
    assert actions(normfree.convert(randomise(notebook.Gated()).eval(), init="preserve", inputs=noise(2, 4, 6, 6)))
    exec(LATER, vars(notebook))  # noqa: S102

    def opened(model: Any, x: Tensor) -> Any:
        model.open()
        return model(x)

    hold(randomise(notebook.Opened()).double().eval(), lambda m, x: m(x), opened)


class Obliging:
    """Has whatever it is asked for, as stand-ins for things that are switched off do."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def __getattr__(self, name: str) -> Obliging:
        return self


OBLIGING = Obliging()


class Obliged(Net):
    def forward(self, x: Tensor) -> Tensor:
        return OBLIGING(self.plain(x))


def test_an_object_that_has_whatever_it_is_asked_for_does_not_keep_a_plan_waiting() -> None:
    assert actions(hold(randomise(Obliged()).double().eval(), lambda m, x: m(x))) == {"b": "fold"}
