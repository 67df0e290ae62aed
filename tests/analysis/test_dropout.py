"""Dropout and stochastic depth, as modules and as functions: random in training, off in eval, before and after."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import Block, assert_close, assert_preserved, both, noise, prove, randomise, set_alphas
from readings import alphas, kinds
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.ops import StochasticDepth, stochastic_depth


class RandomBlock(Block):
    """``x + random(conv-bn-relu-conv-bn(x))``."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.random(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))

    def random(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class FunctionalDropout(RandomBlock):
    def random(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class FunctionalDropout2d(RandomBlock):
    def random(self, x: Tensor) -> Tensor:
        return F.dropout2d(x, p=0.5, training=self.training)


class TorchDropout(RandomBlock):
    def random(self, x: Tensor) -> Tensor:
        return torch.dropout(x, 0.5, self.training)


class FunctionalDepth(RandomBlock):
    def random(self, x: Tensor) -> Tensor:
        return stochastic_depth(x, 0.5, "row", self.training)


class ModuleBlock(RandomBlock):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.drop = layer

    def random(self, x: Tensor) -> Tensor:
        return self.drop(x)


class HandWritten(RandomBlock):
    """Drop path as many repositories write it, with the mask drawn inline and the scaling in place."""

    def random(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.5)
        return x.div(0.5) * mask


class DropConnect(RandomBlock):
    """Drop path as in EfficientNet-PyTorch: ``torch.rand`` of a shape read from the input."""

    def random(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 0.5 + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device)
        return x / 0.5 * torch.floor(keep)


BLOCKS = {
    "F.dropout": FunctionalDropout,
    "F.dropout2d": FunctionalDropout2d,
    "torch.dropout": TorchDropout,
    "F.stochastic_depth": FunctionalDepth,
    "Dropout": lambda: ModuleBlock(nn.Dropout(0.5)),
    "StochasticDepth": lambda: ModuleBlock(StochasticDepth(0.5, "row")),
    "DropPath": lambda: ModuleBlock(DropPath(0.5)),
    "by_hand": HandWritten,
    "drop_connect": DropConnect,
}


@both
@pytest.mark.parametrize("kind", BLOCKS)
def test_randomness_behind_a_branch_survives(kind: str, init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), BLOCKS[kind]()))
    x = noise(8, 3, 6, 6)
    converted = prove(model, x, init=init)
    assert kinds(converted) == ["residual"]
    assert alphas(converted) == ["1.conv2"]
    assert_preserved(model, x)
    set_alphas(converted, 1.0).train()
    assert not torch.equal(converted(x), converted(x))
    converted.eval()
    assert torch.equal(converted(x), converted(x))


@both
def test_dropped_path_returns_exactly_the_skip_path(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), ModuleBlock(StochasticDepth(1.0, "batch"))))
    converted = set_alphas(prove(model, noise(2, 3, 6, 6), init=init), 1.0).train()
    x = noise(2, 3, 6, 6)
    assert_close(converted(x), converted[0](x), 0)


@both
def test_dropout_between_norm_and_activation_survives(init: str) -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Conv2d(8, 2, 1)]
    model = randomise(nn.Sequential(*layers))
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert type(converted[2]) is nn.Dropout
    assert_preserved(model, noise(2, 3, 6, 6))


def test_gain_of_the_initialisation_is_seen_through_dropout() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(8, 2, 1)]
    converted = prove(nn.Sequential(*layers), noise(2, 3, 6, 6), init="skipinit")
    (drawn,) = converted._normfree_plan.weights
    assert drawn == ("0", pytest.approx(2**0.5, abs=1e-4))
