"""Modules that are called twice, registered twice, or feed more than the norm behind them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import assert_close, assert_preserved, both, noise, prove, randomise
from readings import actions, norms, plan_of
from torch import Tensor, nn

import normfree
from normfree.layers import ChannelAffine, scaled_weight_class


class SharedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.conv(torch.relu(self.one(self.conv(x)))))


class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.two(torch.relu(self.bn(self.one(x)))))


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.alias = self.bn
        self.inner = nn.Sequential(nn.ReLU(), self.bn)  # a third name, in another parent

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.conv(x))


class Tapped(nn.Module):
    """The convolution's raw output also goes elsewhere: folding into its weight would change the tap."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.cat([torch.relu(self.bn(y)), torch.tanh(y)], 1)


@both
def test_conv_called_twice_is_not_folded_into(init: str) -> None:
    model = randomise(SharedConv())
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    expected = "affine" if init == "preserve" else "delete"
    assert actions(converted) == {"one": expected, "two": expected}
    assert [norm.producer for norm in plan_of(converted).norms] == [None, None]
    assert_preserved(model, noise(2, 3, 6, 6))


def test_conv_called_twice_gets_one_bias_from_scratch() -> None:
    converted = normfree.convert(SharedConv(), init="skipinit")
    assert converted.conv.bias.shape == (3,)
    x = noise(2, 3, 6, 6)
    assert_close(converted(x), converted.conv(torch.relu(converted.conv(x))), 0)


@both
def test_norm_called_twice_is_not_folded(init: str) -> None:
    model = randomise(SharedNorm())
    converted = prove(model, noise(2, 3, 8, 8), init=init)
    assert actions(converted) == {"bn": "affine" if init == "preserve" else "delete"}
    assert plan_of(converted).norms[0].reason.startswith("the norm is called")
    assert plan_of(converted).carried == () or init == "preserve"
    assert_preserved(model, noise(2, 3, 8, 8))


@both
def test_norm_under_three_names_is_replaced_under_all_of_them(init: str) -> None:
    model = randomise(TwoNames())
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert norms(converted) == []
    assert converted.bn is converted.alias is converted.inner[1]
    (edit,) = plan_of(converted).norms
    assert (edit.name, edit.aliases, edit.action) == ("bn", ("alias", "inner.1"), "fold")
    assert_preserved(model, noise(2, 3, 6, 6))


@both
def test_conv_that_also_feeds_something_else_keeps_its_output(init: str) -> None:
    model = randomise(Tapped()).eval()
    x = noise(2, 3, 6, 6)
    converted = prove(model, x, init=init)
    assert actions(converted) == {"bn": "affine" if init == "preserve" else "delete"}
    assert "conv also feeds tanh" in plan_of(converted).norms[0].reason
    assert_preserved(model, x)
    if init == "preserve":
        assert_close(converted(x)[:, 4:], torch.tanh(model.conv(x)), 1e-6)


def test_conv_reached_by_two_names_is_one_producer() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
            self.layers = nn.ModuleList([self.conv])

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.layers[0](x))

    model = randomise(Aliased())
    converted = prove(model, noise(2, 3, 6, 6), init="preserve")
    assert converted.conv is converted.layers[0]
    assert type(converted.conv) is scaled_weight_class(nn.Conv2d)
    assert_preserved(model, noise(2, 3, 6, 6))


@both
def test_weight_shared_by_two_convs_stays_shared_and_each_gets_its_own_gain(init: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
            self.two.weight = self.one.weight
            self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn2(self.two(torch.relu(self.bn1(self.one(x)))))

    model = randomise(Tied())
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert converted.one.weight is converted.two.weight
    assert_preserved(model, noise(2, 3, 6, 6))
    if init == "preserve":
        assert not torch.equal(converted.bn1.gain, converted.bn2.gain)
    else:
        assert converted.one.bias is not converted.two.bias


@both
@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_norm_in_a_training_model_keeps_every_training_flag(init: str, frozen: bool) -> None:
    model = randomise(SharedNorm())
    model.train()
    model.one.eval()
    model.bn.train(not frozen)
    flags = {name: module.training for name, module in model.named_modules()}
    converted = normfree.convert(model, init=init)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name: module.training for name, module in converted.named_modules()} == flags
    assert flags["bn"] is not frozen
    if init == "preserve":
        assert isinstance(converted.bn, ChannelAffine)


class Alias(nn.Module):
    """Registers the parameters of its convolution as its own, as wrappers for padding do."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class TiedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.two.bias = self.one.bias
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.bn(self.one(x))))


class ReadBias(TiedBias):
    """Adds the bias a second time, by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.one(x)) + self.one.bias.reshape(-1, 1, 1)


BIASES: dict[str, Callable[[], nn.Module]] = {
    "alias": lambda: nn.Sequential(Alias(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)),
    "tied": TiedBias,
    "read": ReadBias,
}


@both
@pytest.mark.parametrize("how", BIASES)
def test_bias_that_is_used_elsewhere_too_stays(how: str, init: str) -> None:
    model = randomise(BIASES[how]())
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert list(actions(converted).values()) == ["fold"]
    assert plan_of(converted).keeping_bias == ({converted_layer(converted)} if init == "preserve" else set())
    assert_preserved(model, noise(2, 3, 6, 6))


def converted_layer(model: nn.Module) -> str | None:
    """Return the layer in front of the only norm that a model had."""
    (edit,) = plan_of(model).norms
    return edit.producer


def test_weight_that_two_layers_share_is_drawn_for_the_first_of_them() -> None:
    layers = [nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)]
    layers[3].weight = layers[0].weight
    torch.nn.init.ones_(layers[3].bias)
    converted = normfree.convert(nn.Sequential(*layers), init="skipinit")
    assert plan_of(converted).weights == (("0", pytest.approx(2**0.5, abs=1e-4)), ("3", 1.0))
    assert converted[0].weight is converted[3].weight
    assert float(converted[0].weight.detach().square().mean()) == pytest.approx(2 / 64, rel=0.1)
    assert not converted[3].bias.any()
