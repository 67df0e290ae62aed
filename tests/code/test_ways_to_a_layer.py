"""Ways to come to a convolution without its norm that name it in no plain way: each must give what it gave."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from harness import noise, randomise
from readings import actions, plan_of
from test_second_paths import Net, flagged, hold, made
from torch import Tensor, nn

import normfree
from normfree.errors import UnsupportedModelError, UsageError


class Sequence(nn.Module):
    """A convolution and its norm in a sequence in a part; what ``forward`` and ``features`` do is given."""

    flag = False

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.seq = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body.seq(x)


class Stemmed(Sequence):
    """Hands its convolution out."""

    def stem(self) -> nn.Module:
        return self.body.seq[0]

    @property
    def first(self) -> nn.Module:
        return self.body.seq[0]


# Another branch of the forward, of a network whose convolution is ``self.c``


def by_attrgetter(self: Any, x: Tensor) -> Tensor:
    return operator.attrgetter("c")(self)(x) if self.flag else self.b(self.c(x))


def by_reduced_names(self: Any, x: Tensor) -> Tensor:
    return functools.reduce(getattr, ["c"], self)(x) if self.flag else self.b(self.c(x))


def by_text(self: Any, x: Tensor) -> Tensor:
    return eval("self.c(x)") if self.flag else self.b(self.c(x))  # noqa: S307  # what is tested


def by_the_class(self: Any, x: Tensor) -> Tensor:
    return nn.Module.__getattr__(self, "c")(x) if self.flag else self.b(self.c(x))


def by_its_parameters(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.c(x))
    return F.conv2d(y, *self.c.parameters(), padding=1) if self.flag else y


def by_its_state(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.c(x))
    return F.conv2d(y, self.c.state_dict()["weight"], padding=1) if self.flag else y


def by_all_parameters(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.c(x))
    return F.conv2d(y, dict(self.named_parameters())["c.weight"], padding=1) if self.flag else y


def by_a_name_of_a_parameter(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.c(x))
    return F.conv2d(y, self.get_parameter("c.weight"), padding=1) if self.flag else y


def by_a_hook(self: Any, x: Tensor) -> Tensor:
    if not self.flag:
        return self.b(self.c(x))
    seen: list[Tensor] = []
    handle = self.c.register_forward_hook(lambda *given: seen.append(given[2]))
    self.flag = False
    self(x)
    handle.remove()
    return seen[0]


def by_local_variables(self: Any, x: Tensor) -> Tensor:
    y = self.c(x)
    z = self.b(y)
    return locals()["y"] if self.flag else z


def by_the_frame(self: Any, x: Tensor) -> Tensor:
    y = self.c(x)
    z = self.b(y)
    return sys._getframe().f_locals["y"] if self.flag else z


def by_a_function_of_a_module(self: Any, x: Tensor) -> Tensor:
    return helpers.lone(self, x) if self.flag else self.b(self.c(x))


def by_a_function_imported_inside(self: Any, x: Tensor) -> Tensor:
    from helpers_of_ways import lone

    return lone(self, x) if self.flag else self.b(self.c(x))


def by_a_method_of_a_stranger(self: Any, x: Tensor) -> Tensor:
    return Stranger.solitary(self, x) if self.flag else self.b(self.c(x))


def by_a_stranger_and_a_name(self: Any, x: Tensor) -> Tensor:
    return Stranger.named(self, "c", x) if self.flag else self.b(self.c(x))


def by_a_stranger_who_takes_the_first(self: Any, x: Tensor) -> Tensor:
    return Stranger.first(self, x) if self.flag else self.b(self.c(x))


def by_one_of_two_calls_of_a_closure(self: Any, x: Tensor) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        return self.c(x)

    return inner(x) if self.flag else self.b(inner(x))


def by_an_object_that_is_called(self: Any, x: Tensor) -> Tensor:
    return stranger(self, x) if self.flag else self.b(self.c(x))


def by_a_partial(self: Any, x: Tensor) -> Tensor:
    return in_part(self, x) if self.flag else self.b(self.c(x))


def by_a_table(self: Any, x: Tensor) -> Tensor:
    return TABLE["apart"](self, x) if self.flag else self.b(self.c(x))


def by_a_list_that_is_global(self: Any, x: Tensor) -> Tensor:
    return HELD[0](x) if self.flag else self.b(self.c(x))


def by_a_list_of_the_class(self: Any, x: Tensor) -> Tensor:
    return self.kept[0](x) if self.flag else self.b(self.c(x))


def without_the_norm(self: Any, x: Tensor) -> Tensor:
    if self.flag:
        self.b = nn.Identity()
    return self.b(self.c(x))


def without_the_norm_by_its_name(self: Any, x: Tensor) -> Tensor:
    if self.flag:
        setattr(self, "b", nn.Identity())  # noqa: B010  # what is tested
    return self.b(self.c(x))


def with_another_layer(self: Any, x: Tensor) -> Tensor:
    if self.flag:
        self.c = nn.Identity()
    return self.b(self.c(x))


def by_a_call_of_a_function(self: Any, x: Tensor) -> Tensor:
    if not self.flag:
        return self.b(self.c(x))
    return torch.func.functional_call(self, {"b.weight": torch.ones(4, dtype=x.dtype)}, (x,))


helpers = types.ModuleType("helpers_of_ways")
exec("def lone(net, x):\n    return net.c(x)", helpers.__dict__)  # noqa: S102  # a module of its own
sys.modules["helpers_of_ways"] = helpers


class Stranger:
    @staticmethod
    def solitary(net: Any, x: Tensor) -> Tensor:
        return net.c(x)

    def __call__(self, net: Any, x: Tensor) -> Tensor:
        return net.c(x)

    @staticmethod
    def named(net: Any, name: str, x: Tensor) -> Tensor:
        return getattr(net, name)(x)  # type: ignore[no-any-return]

    @staticmethod
    def first(net: Any, x: Tensor) -> Tensor:
        return next(net.children())(x)  # type: ignore[no-any-return]


stranger, in_part, TABLE = Stranger(), functools.partial(Stranger.solitary), {"apart": lambda net, x: net.c(x)}
HELD: list[nn.Module] = []


class Keeping(Net):
    kept: ClassVar[list[nn.Module]] = []


FORWARDS = (by_attrgetter, by_reduced_names, by_text, by_the_class, by_its_parameters, by_its_state)
FORWARDS += (by_all_parameters, by_a_name_of_a_parameter, by_a_hook, by_local_variables, by_the_frame)
FORWARDS += (by_a_function_of_a_module, by_a_function_imported_inside, by_a_method_of_a_stranger)
FORWARDS += (by_an_object_that_is_called, by_a_partial, by_a_table, without_the_norm, without_the_norm_by_its_name)
FORWARDS += (with_another_layer, by_a_stranger_and_a_name, by_a_stranger_who_takes_the_first)
FORWARDS += (by_one_of_two_calls_of_a_closure,)


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda way: way.__name__)
def test_another_branch_is_preserved(forward: Callable[..., Tensor]) -> None:
    hold(made(forward), lambda m, x: m(x), flagged)


@pytest.mark.parametrize("forward", [by_a_list_that_is_global, by_a_list_of_the_class])
def test_a_layer_that_is_held_outside_is_preserved_in_place(forward: Callable[..., Tensor]) -> None:
    model = randomise(type("Made", (Keeping,), {"forward": forward})()).double().eval()
    Keeping.kept[:] = HELD[:] = [model.c]
    x = noise(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = flagged(model, x)
        normfree.convert_(model, init="preserve", inputs=x, check=False)
        torch.testing.assert_close(flagged(model, x), expected)


# Another method, of a network whose convolution is ``self.body.seq[0]``


def loops_and_asks_for_the_class(self: Any, x: Tensor) -> Tensor:
    for layer in self.body.seq:
        if not isinstance(layer, nn.BatchNorm2d):
            x = layer(x)
    return x


def loops_and_asks_for_the_name_of_the_class(self: Any, x: Tensor) -> Tensor:
    for layer in self.body.seq:
        x = x if type(layer).__name__ == "BatchNorm2d" else layer(x)
    return x


def loops_over_some(self: Any, x: Tensor) -> Tensor:
    for layer in itertools.islice(self.body.seq, 1):
        x = layer(x)
    return x


def takes_it_from_an_alias(self: Any, x: Tensor) -> Tensor:
    seq = self.body.seq
    return seq[0](x)


def unpacks(self: Any, x: Tensor) -> Tensor:
    layer, *_ = self.body.seq
    return layer(x)


def asks_a_method(self: Any, x: Tensor) -> Tensor:
    return self.stem()(x)


def asks_a_property(self: Any, x: Tensor) -> Tensor:
    return self.first(x)


def takes_a_submodule_by_its_path(self: Any, x: Tensor) -> Tensor:
    return self.get_submodule("body.seq.0")(x)


def takes_the_first_of_a_class(self: Any, x: Tensor) -> Tensor:
    return next(m for m in self.modules() if isinstance(m, nn.Conv2d))(x)


def takes_it_from_a_dictionary_of_all(self: Any, x: Tensor) -> Tensor:
    return dict(self.named_modules())["body.seq.0"](x)


def takes_the_norm_out(self: Any, x: Tensor) -> Tensor:
    del self.body.seq[1]
    return self(x)


def pops_the_norm(self: Any, x: Tensor) -> Tensor:
    self.body.seq.pop(1)
    return self(x)


def puts_another_in(self: Any, x: Tensor) -> Tensor:
    self.body.seq[1] = nn.Identity()
    return self(x)


def shows_it_by_a_hook(self: Any, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = self.body.seq[0].register_forward_hook(lambda *given: seen.append(given[2]))
    self(x)
    handle.remove()
    return seen[0]


ASK_FOR_THE_CLASS = (loops_and_asks_for_the_class, loops_and_asks_for_the_name_of_the_class)
METHODS = (
    loops_over_some,
    takes_it_from_an_alias,
    unpacks,
    asks_a_method,
    asks_a_property,
    takes_a_submodule_by_its_path,
)
METHODS += (takes_the_first_of_a_class, takes_it_from_a_dictionary_of_all, takes_the_norm_out, pops_the_norm)
METHODS += (puts_another_in, shows_it_by_a_hook)


def of_a_sequence(method: Callable[..., Tensor]) -> Any:
    kind = Stemmed if method in (asks_a_method, asks_a_property) else Sequence
    return randomise(type("Made", (kind,), {"features": method})()).double().eval()


@pytest.mark.parametrize("method", METHODS, ids=lambda way: way.__name__)
def test_another_method_is_preserved(method: Callable[..., Tensor]) -> None:
    hold(of_a_sequence(method), lambda m, x: m(x), lambda m, x: m.features(x))


@pytest.mark.parametrize("method", METHODS, ids=lambda way: way.__name__)
def test_another_branch_that_comes_to_a_method_is_preserved(method: Callable[..., Tensor]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.flag:
            self.flag = False
            return self.features(x)
        return self.body.seq(x)

    model = of_a_sequence(method)
    type(model).forward = forward
    hold(model, lambda m, x: m(x), flagged)


@pytest.mark.parametrize("method", ASK_FOR_THE_CLASS, ids=lambda way: way.__name__)
def test_code_that_no_run_took_and_that_asks_for_the_class_of_a_norm_is_refused(method: Callable[..., Tensor]) -> None:
    with pytest.raises(UnsupportedModelError, match="body.seq.1: a forward asks for its class"):
        normfree.convert(of_a_sequence(method), init="preserve", inputs=noise(2, 4, 6, 6, dtype=torch.float64))


def freezes(self: Any) -> None:
    for module in self.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def test_who_asks_for_the_class_of_a_norm_and_calls_nothing_lets_it_fold() -> None:
    assert actions(hold(of_a_sequence(freezes), lambda m, x: m(x))) == {"body.seq.1": "fold"}


class Handing(Net):
    """Hands its convolution out in several ways."""

    forward = Net.plain

    def layer(self) -> nn.Module:
        return self.c

    @property
    def first(self) -> nn.Module:
        return self.c

    def layers(self) -> list[nn.Module]:
        return [self.c, self.b]


ASKING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a method": lambda self, x: self.layer()(x),
    "a property": lambda self, x: self.first(x),
    "a list": lambda self, x: self.layers()[0](x),
}


@pytest.mark.parametrize("way", ASKING)
def test_who_asks_a_method_for_a_layer_is_preserved(way: str) -> None:
    model = randomise(type("Made", (Handing,), {"features": ASKING[way]})()).double().eval()
    hold(model, lambda m, x: m(x), lambda m, x: m.features(x))


def test_a_module_named_as_one_of_pythons_own_is_read() -> None:
    """Anybody may have a file that is called ``code.py``."""
    space: dict[str, Any] = {"__name__": "code"}
    exec("def apart(net, x):\n    return net.c(x)", space)  # noqa: S102  # a module of its own
    forward = types.FunctionType(by_a_table.__code__, {"TABLE": {"apart": space["apart"]}})
    hold(made(forward), lambda m, x: m(x), flagged)


@pytest.mark.parametrize("method", [lambda self: self.c.weight.shape, lambda self: self.c.kernel_size])
def test_who_asks_only_for_sizes_lets_a_norm_fold(method: Callable[..., Any]) -> None:
    model = randomise(type("Made", (Net,), {"forward": Net.plain, "size": method})()).double().eval()
    assert actions(hold(model, lambda m, x: m(x))) == {"b": "fold"}


class Summing(nn.Module):
    """Ends in a product that no module owns, so that its forward is rewritten where it gets a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.mode, self.drop = 0, nn.Dropout(0.5)
        self.c, self.b = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.b(self.c(x)))
        if self.mode == 1 or SETTINGS["doubled"]:
            y = y * 2
        return x + y * torch.sigmoid(y)


SETTINGS = {"doubled": False}


def test_a_rewritten_forward_says_that_a_setting_has_changed() -> None:
    x = noise(2, 4, 6, 6, dtype=torch.float64)
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), Summing())).double().eval()
    converted = normfree.convert(model, init="preserve", inputs=x)
    assert [alpha.place for alpha in plan_of(converted).alphas] == ["sum"]
    torch.testing.assert_close(converted(x), model(x))
    converted[1].mode = 1
    with pytest.raises(UsageError, match="mode is 1, but this forward was rewritten for 0"):
        converted(x)
    converted[1].mode = 0
    torch.testing.assert_close(copy.deepcopy(converted)(x), model(x))
    SETTINGS["doubled"] = True
    try:
        with pytest.raises(UsageError, match="SETTINGS is"):
            converted(x)
    finally:
        SETTINGS["doubled"] = False


class GoingByGradients(Summing):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.b(self.c(x)))
        if torch.is_grad_enabled():
            y = y * 2
        return x + y * torch.sigmoid(y)


def test_a_forward_that_asks_the_process_is_not_rewritten() -> None:
    x = noise(2, 4, 6, 6, dtype=torch.float64)
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), GoingByGradients())).double().eval()
    converted = hold(model, lambda m, x: m(x))
    torch.testing.assert_close(converted(x), model(x))
    (total,) = plan_of(converted).sums
    assert not total.alphas
    assert "it goes by what is_grad_enabled() says" in total.declined[0]


def test_the_forward_of_a_norm_that_something_holds_is_refused() -> None:
    model = made(Net.plain)
    model.held = model.b.forward
    with pytest.raises(UnsupportedModelError, match="something holds its method forward"):
        normfree.convert(model, init="preserve", inputs=noise(2, 4, 6, 6, dtype=torch.float64))
