"""A layer that a method takes as a value, by whatever way it then calls it, and loops that hand out what is between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import noise, randomise
from readings import watched_pairs
from test_second_paths import hold
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normfree


class Net(nn.Module):
    """A convolution with its norm, and a last layer; ``features`` is given."""

    flag = False

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.d = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.b(self.c(x)))


def of_a_choice(self: Any, x: Tensor) -> Tensor:
    layer = self.c if not self.flag else self.d
    return layer(x)


def of_a_choice_at_once(self: Any, x: Tensor) -> Tensor:
    return (self.c if not self.flag else self.d)(x)


def by_forward_of_a_choice(self: Any, x: Tensor) -> Tensor:
    return (self.c if not self.flag else self.d).forward(x)


def unpacked(self: Any, x: Tensor) -> Tensor:
    (layer,) = [self.c]
    return layer(x)


def two_at_once(self: Any, x: Tensor) -> Tensor:
    layer, other = self.c, self.d
    return layer(x) if other is not None else x


def two_names(self: Any, x: Tensor) -> Tensor:
    first = second = self.c
    return second(x) if first is not None else x


def of_a_dictionary(self: Any, x: Tensor) -> Tensor:
    return {"a": self.c}["a"](x)


def of_a_kept_dictionary(self: Any, x: Tensor) -> Tensor:
    kept = {"a": self.c}
    return kept["a"](x)


def by_default(self: Any, x: Tensor) -> Tensor:
    def run(layer: nn.Module = self.c) -> Tensor:
        return layer(x)

    return run()


def of_a_lambda(self: Any, x: Tensor) -> Tensor:
    return (lambda: self.c)()(x)


def of_a_function_inside(self: Any, x: Tensor) -> Tensor:
    def get() -> nn.Module:
        return self.c

    return get()(x)


def of_a_comprehension(self: Any, x: Tensor) -> Tensor:
    return [self.c for _ in range(1)][0](x)  # noqa: RUF015  # what is tested


def _chosen(net: Any, x: Tensor) -> Tensor:
    part = net.c if not net.flag else net.d
    return part(x)


def by_a_helper_that_chooses(self: Any, x: Tensor) -> Tensor:
    return _chosen(self, x)


class _Box:
    layer: Any


def of_another_object(self: Any, x: Tensor) -> Tensor:
    box = _Box()
    box.layer = self.c
    return box.layer(x)


def by_what_runs_it(self: Any, x: Tensor) -> Tensor:
    return self.c._call_impl(x)


def by_its_own_method(self: Any, x: Tensor) -> Tensor:
    return self.c._conv_forward(x, self.c.weight, self.c.bias)


def by_its_parameters(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, *self.c.parameters(), padding=1)


def by_checkpointing(self: Any, x: Tensor) -> Tensor:
    return checkpoint(self.c, x, use_reentrant=False)


def norm_by_checkpointing(self: Any, x: Tensor) -> Tensor:
    return checkpoint(self.b, x, use_reentrant=False)


def weight_of_the_last(self: Any, x: Tensor) -> Tensor:
    layer = self.d
    return F.conv2d(x, layer.weight, layer.bias, padding=1)


def _convolved(layer: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=1)


def weight_of_the_last_by_a_helper(self: Any, x: Tensor) -> Tensor:
    return _convolved(self.d, x)


def by_a_name_in_a_variable(self: Any, x: Tensor) -> Tensor:
    name = "c"
    return getattr(self, name)(x)


def by_a_name_put_together(self: Any, x: Tensor) -> Tensor:
    return getattr(self, f"c{''}")(x)


def _attribute(net: Any, name: str, x: Tensor) -> Tensor:
    return getattr(net, name)(x)


def by_one_of_some_names(self: Any, x: Tensor) -> Tensor:
    names = ("c", "d")
    for name in names[:1]:
        x = getattr(self, name)(x)
    return x


def by_names_of_its_own(self: Any, x: Tensor) -> Tensor:
    for name in ("c",):
        layer = getattr(self, name)
        x = layer(x)
    return x


def by_a_helper_with_a_name(self: Any, x: Tensor) -> Tensor:
    return _attribute(self, "c", x)


def of_a_list_that_took_it_in(self: Any, x: Tensor) -> Tensor:
    layers: list[nn.Module] = []
    layers.append(self.c)
    return layers[0](x)


def of_a_sequence_made_there(self: Any, x: Tensor) -> Tensor:
    return nn.Sequential(self.c, self.b)[:1](x)


WAYS = (of_a_choice, of_a_choice_at_once, by_forward_of_a_choice, unpacked, two_at_once, two_names, of_a_dictionary)
WAYS += (of_a_kept_dictionary, by_default, of_a_lambda, of_a_function_inside, of_a_comprehension)
WAYS += (by_a_helper_that_chooses, of_another_object, by_what_runs_it, by_its_own_method, by_its_parameters)
WAYS += (by_checkpointing, norm_by_checkpointing, weight_of_the_last, weight_of_the_last_by_a_helper)
WAYS += (by_a_name_in_a_variable, by_a_name_put_together, by_a_helper_with_a_name, of_a_list_that_took_it_in)
WAYS += (of_a_sequence_made_there, by_one_of_some_names, by_names_of_its_own)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_layer_that_a_method_comes_to_is_preserved(way: Callable[..., Tensor]) -> None:
    model = randomise(type("Made", (Net,), {"features": way})()).double().eval()
    hold(model, lambda m, x: m(x), lambda m, x: m.features(x))


def asks_for_its_kind(self: Any) -> bool:
    layer = self.d if self.flag else self.c
    return isinstance(layer, nn.Conv2d) and layer.in_channels == 4


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def asks_a_helper(self: Any) -> torch.device:
    return _device_of(self.c)


def puts_all_into_a_sequence(self: Any) -> nn.Sequential:
    layers = [self.c]
    layers.extend([self.b, self.d])
    return nn.Sequential(*layers)


def decides_in_a_call(self: Any, size: int | None = None) -> list[int]:
    modes = [(m, m.training) for m in self.modules()]
    for module, training in modes:
        module.training = training
    return [any(m.training for m in self.modules()), max(size or 1, 2)]


def goes_through_others(self: Any, x: Tensor) -> Tensor:
    names = ("d", "e")
    names = names[:1]
    for name in names:
        x = getattr(self, name)(x)
    return getattr(self, f"d{''}")(x)


@pytest.mark.parametrize(
    "method",
    [goes_through_others, asks_for_its_kind, asks_a_helper, puts_all_into_a_sequence, decides_in_a_call],
    ids=lambda m: m.__name__,
)
def test_a_layer_that_is_only_asked_or_handed_out_folds(method: Callable[..., Any]) -> None:
    model = type("Made", (Net,), {"about": method})().eval()
    plan = normfree.plan(model, init="preserve", inputs=noise(2, 4, 6, 6))
    assert [edit.action for edit in plan.norms] == ["fold"]


class Taps(nn.Module):
    """Two convolutions with their norms in a sequence; ``intermediates`` is given."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.ends, self.taps = [2, 5], [0, 2]

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


def at_the_ends(self: Any, x: Tensor, last: int = 1) -> list[Tensor]:
    found, k = [], 0
    if last:  # noqa: SIM108  # as timm writes it
        layers = self.features
    else:
        layers = self.features[: self.ends[last] + 1]
    for i, layer in enumerate(layers):
        x = layer(x)
        if i == self.ends[k]:
            found.append(x)
            k = min(k + 1, 1)
    return [*found, x]


def among_the_ends(self: Any, x: Tensor) -> list[Tensor]:
    found = []
    for i, layer in enumerate(self.features):
        x = layer(x)
        if i in self.ends:
            found.append(x)
    return found


def up_to_an_end(self: Any, x: Tensor) -> list[Tensor]:
    for i, layer in enumerate(self.features):
        x = layer(x)
        if i == self.ends[0]:
            break
    return [x]


def every_layer(self: Any, x: Tensor) -> list[Tensor]:
    for layer in self.features:
        x = layer(x)
    return [x]


def cut_at_an_end(self: Any, x: Tensor) -> list[Tensor]:
    self.features = self.features[: self.ends[0] + 1]
    return [self(x)]


def at_the_taps(self: Any, x: Tensor) -> list[Tensor]:
    found = []
    for i, layer in enumerate(self.features):
        x = layer(x)
        if i in self.taps:
            found.append(x)
    return found


def where_it_is_told(self: Any, x: Tensor, taps: tuple[int, ...] = (0, 2)) -> list[Tensor]:
    found = []
    for i, layer in enumerate(self.features):
        x = layer(x)
        if i in taps:
            found.append(x)
    return found


def not_at_the_ends(self: Any, x: Tensor) -> list[Tensor]:
    found = []
    for i, layer in enumerate(self.features):
        x = layer(x)
        if i not in self.ends:
            found.append(x)
    return found


def counted_from_one(self: Any, x: Tensor) -> list[Tensor]:
    found = []
    for i, layer in enumerate(self.features, 1):
        x = layer(x)
        if i in self.ends:
            found.append(x)
    return found


def before_an_end(self: Any, x: Tensor) -> list[Tensor]:
    for i, layer in enumerate(self.features):
        if i == self.taps[1] - 1:
            break
        x = layer(x)
    return [x]


def with_all_that_was(self: Any, x: Tensor) -> list[Tensor]:
    found = []
    for i, layer in enumerate(self.features):
        x = layer(x)
        found.append(x)
        if i in self.ends:
            found.append(x)
    return found


def called_twice(self: Any, x: Tensor) -> list[Tensor]:
    found = []
    for i, layer in enumerate(self.features):
        x = layer(x)
        if i in self.ends:
            found.append(self.features[1](x))
    return found


def or_something_else(self: Any, x: Tensor) -> list[Tensor]:
    found = []
    for i, layer in enumerate(self.features):
        x = layer(x)
        if i in self.ends or x.mean() != 0:
            found.append(x)
    return found


def from_the_second_on(self: Any, x: Tensor) -> list[Tensor]:
    found = []
    layers = self.features[1:] if self.ends else self.features
    for i, layer in enumerate(layers):
        x = layer(x)
        if i in self.ends:
            found.append(x)
    return found


def ends_that_move(self: Any, x: Tensor) -> list[Tensor]:
    self.ends.append(0)
    return among_the_ends(self, x)


def cut_before_an_end(self: Any, x: Tensor) -> list[Tensor]:
    self.features = self.features[: self.ends[0] - 1]
    return [self(x)]


LOOKS = (
    at_the_ends,
    among_the_ends,
    up_to_an_end,
    every_layer,
    cut_at_an_end,
    at_the_taps,
    where_it_is_told,
    not_at_the_ends,
    counted_from_one,
    before_an_end,
    with_all_that_was,
    called_twice,
)
LOOKS += (or_something_else, from_the_second_on, ends_that_move, cut_before_an_end)


@pytest.mark.parametrize("method", LOOKS, ids=lambda m: m.__name__)
def test_what_a_loop_hands_out_is_preserved(method: Callable[..., list[Tensor]]) -> None:
    made = type("Made", (Taps,), {"intermediates": method, "among_the_ends": among_the_ends})
    model: Any = randomise(made()).double().eval()
    x = noise(2, 4, 6, 6, dtype=torch.float64)
    converted = normfree.convert(model, init="preserve", inputs=x, check=False)
    with torch.no_grad():
        for found, expected in zip(
            copy.deepcopy(converted).intermediates(x), copy.deepcopy(model).intermediates(x), strict=True
        ):
            torch.testing.assert_close(found, expected)
    with watched_pairs(converted) as together:
        converted(x)
    assert together == {"features.0": "features.1", "features.3": "features.4"}


class Taken(Taps):
    """Norms in front of their layers, one of them alone in a sequence: what is left of them may go forward."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 1, bias=False))]
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.filterwarnings("ignore::normfree.deployment.fuse.FuseWarning")
@pytest.mark.parametrize("ends", [[0, 3], [1, 4], [2, 5], [0, 5], [6, 7]], ids=str)
@pytest.mark.parametrize("method", [at_the_ends, among_the_ends, up_to_an_end], ids=lambda m: m.__name__)
def test_what_a_loop_hands_out_between_norms_is_preserved(method: Callable[..., list[Tensor]], ends: list[int]) -> None:
    model: Any = randomise(type("Made", (Taken,), {"intermediates": method})()).double().eval()
    model.ends, x = ends, noise(2, 4, 6, 6, dtype=torch.float64)
    converted = normfree.convert(model, init="preserve", inputs=x, check=False)
    with torch.no_grad():
        for found, expected in zip(converted.intermediates(x), copy.deepcopy(model).intermediates(x), strict=True):
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(normfree.fuse(converted)(x), model(x))
