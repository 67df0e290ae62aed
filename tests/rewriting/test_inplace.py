"""A norm was also a copy: once it is gone, nothing may write into its input while somebody else still needs that."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import Block, assert_close, assert_preserved, both, noise, prove, randomise, set_alphas
from readings import alphas, norms, plan_of
from timm.layers import BatchNormAct2d
from torch import Tensor, nn


class PreAct(nn.Module):
    """``x + conv(tanh(act(bn(x))))``, where ``act`` writes in place; the skip path must survive."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def act(self, y: Tensor) -> Tensor:
        return self.relu(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.act(self.bn(x)))) + x


class Functional(PreAct):
    def act(self, y: Tensor) -> Tensor:
        return F.relu(y, inplace=True)


class FunctionalPositional(PreAct):
    def act(self, y: Tensor) -> Tensor:
        return F.leaky_relu(y, 0.1, True)


class Method(PreAct):
    def act(self, y: Tensor) -> Tensor:
        return y.relu_()


class Underscore(PreAct):
    def act(self, y: Tensor) -> Tensor:
        return torch.relu_(y)


class Augmented(PreAct):
    def act(self, y: Tensor) -> Tensor:
        y += 1
        return y


class AugmentedLater(PreAct):
    def act(self, y: Tensor) -> Tensor:
        z = y.view(y.shape)
        z *= 2
        return y


class Narrowed(PreAct):
    """Half of the channels, through a view that is no slice."""

    def act(self, y: Tensor) -> Tensor:
        y.narrow(1, 0, 2).relu_()
        return y


class Assigned(PreAct):
    def act(self, y: Tensor) -> Tensor:
        y[:, :2] = 0
        return y


class Copied(PreAct):
    def act(self, y: Tensor) -> Tensor:
        return y.copy_(torch.relu(y))


class InPlaceUnannounced(nn.Module):
    """A user's own activation: it writes in place and no attribute says so."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(torch.sigmoid(x))


class OwnModule(PreAct):
    def __init__(self) -> None:
        super().__init__()
        self.relu = InPlaceUnannounced()


class Nested(PreAct):
    """The writer sits behind an identity and a dropout that does nothing in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.Sequential(nn.Identity(), nn.Dropout(0.0), nn.ELU(inplace=True))


class InPlaceDropout(PreAct):
    def act(self, y: Tensor) -> Tensor:
        return F.dropout(y, 0.5, self.training, inplace=True)


class TwoNorms(PreAct):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.BatchNorm2d(4)

    def act(self, y: Tensor) -> Tensor:
        return self.second(y).relu_()


class FusedWithoutActivation(PreAct):
    """timm's norm with a dropout that is off, so that its output is its input once the norm is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = BatchNormAct2d(4, apply_act=False, drop_layer=partial(nn.Dropout, 0.0))

    def act(self, y: Tensor) -> Tensor:
        return y.relu_()


class AliasedActivation(PreAct):
    """One in-place module serves both before and behind the sum."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(self.relu(self.bn(x))) + x)


BLOCKS = [PreAct, Functional, FunctionalPositional, Method, Underscore, Augmented, AugmentedLater, Narrowed]
BLOCKS += [Copied, OwnModule, Nested, InPlaceDropout, TwoNorms, FusedWithoutActivation]


@both
@pytest.mark.parametrize("block", BLOCKS)
def test_in_place_write_behind_a_deleted_norm_leaves_the_skip_path(block: type[nn.Module], init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(1), block()))
    x = noise(2, 3, 6, 6)
    converted = prove(model, x, init=init)
    assert norms(converted) == []
    assert alphas(converted) == ["2.conv"]
    assert_preserved(model, x)
    for training in (True, False):
        set_alphas(converted, 0.0).train(training)
        assert torch.equal(converted(x), converted[1](converted[0](x)))


@both
def test_assignment_into_a_norms_output_leaves_the_skip_path(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), Assigned()))
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert plan_of(converted).opaque == ()
    assert_preserved(model, noise(2, 3, 6, 6))
    stem = converted[1](converted[0](noise(2, 3, 6, 6)))
    y = converted[2].bn(stem).clone()
    y[:, :2] = 0
    assert_close(converted(noise(2, 3, 6, 6)), converted[2].conv(torch.tanh(y)) + stem, 1e-6)


@both
def test_activation_used_before_and_behind_the_sum_leaves_the_skip_path(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), AliasedActivation()))
    x = noise(2, 3, 6, 6)
    converted = prove(model, x, init=init)
    assert_preserved(model, x)
    set_alphas(converted, 0.0)
    assert torch.equal(converted(x), torch.relu(converted[1](converted[0](x))))


class PostAct(Block):
    """The usual block: the activation behind the sum writes in place, into what nobody else needs."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


@both
def test_in_place_activation_right_behind_the_sum_stays_in_place(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), PostAct()))
    x = noise(2, 3, 6, 6)
    converted = prove(model, x, init=init)
    assert converted[1].relu.inplace
    assert_preserved(model, x)
    set_alphas(converted, 0.0)
    assert torch.equal(converted(x), torch.relu(converted[0](x)))
