"""Branches that do not end in a convolution and its norm: alpha = 0 must still make them exactly zero."""

from __future__ import annotations

import pytest
import torch
from harness import assert_close, assert_preserved, both, noise, prove, randomise, set_alphas
from readings import alphas, kinds, plan_of
from timm.layers import SEModule
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from normfree.layers import scaled_weight_class


class Branch(nn.Module):
    """``conv-bn-relu-conv-bn`` with room for an ending."""

    def __init__(self, end: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.end = nn.Identity() if end is None else end

    def body(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.end(self.body(x))


class InlineGate(Branch):
    """Squeeze-excite written inline: the branch is used twice, by the gate and by the product."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y * torch.sigmoid(self.end(y.mean((2, 3), keepdim=True)))


class InlineGateModule(InlineGate):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.gate(self.end(y.mean((2, 3), keepdim=True))) * y + x


class ValueAndGate(Branch):
    """A gated product of two convolutions of the same input (as in gated linear units)."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.end(x)) * self.body(x)


class ChannelSlice(nn.Module):
    """RexNet: more channels come out than the skip path has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.cat([y[:, : x.shape[1]] + x, y[:, x.shape[1] :]], 1)


class ConstantSlice(ChannelSlice):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.cat([y[:, 0:4] + x, y[:, 4:]], dim=1)


class OpenSlice(ChannelSlice):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        added, rest = y[:, :4], y[:, 4:]
        added += x
        return torch.cat((added, rest), 1)


class Ghost(nn.Module):
    """A child module that returns a concatenation of two normalised halves."""

    def __init__(self) -> None:
        super().__init__()
        self.primary = nn.Sequential(nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(2))
        self.cheap = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> Tensor:
        one = self.primary(x)
        return torch.cat([one, self.cheap(one)], dim=1)


class InlineGhost(Ghost):
    """The same without a child module: nothing but the block's own forward concatenates."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


ENDS = {
    "torchvision_se": lambda: Branch(SqueezeExcitation(4, 2)),
    "timm_se": lambda: Branch(SEModule(4, rd_ratio=0.5)),
    "activation": lambda: Branch(nn.Sigmoid()),
    "elu": lambda: Branch(nn.ELU()),
    "pool": lambda: Branch(nn.AvgPool2d(3, 1, 1)),
    "ghost": lambda: Branch(Ghost()),
    "two_convs": lambda: Branch(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))),
    "inline_gate_module": InlineGateModule,
    "value_and_gate": ValueAndGate,
}


@both
@pytest.mark.parametrize("kind", ENDS)
def test_alpha_zero_leaves_exactly_the_skip_path(kind: str, init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), ENDS[kind]()))
    x = noise(2, 3, 6, 6)
    converted = prove(model, x, init=init)
    assert plan_of(converted).declined == ()
    assert kinds(converted) == ["residual"]
    assert len(alphas(converted)) == 1
    set_alphas(converted, 0.0)
    for training in (True, False):
        converted.train(training)
        assert torch.equal(converted(x), converted[0](x))


@pytest.mark.parametrize("kind", ENDS)
def test_preserve_keeps_the_function_whatever_ends_the_branch(kind: str) -> None:
    assert_preserved(randomise(nn.Sequential(nn.Conv2d(3, 4, 1), ENDS[kind]())), noise(2, 3, 6, 6))


@both
@pytest.mark.parametrize("kind", [InlineGate, InlineGhost])
def test_branch_whose_end_only_the_blocks_forward_computes_gets_its_alpha(kind: type[nn.Module], init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), kind()))
    x = noise(2, 3, 6, 6)
    converted = prove(model, x, init=init)
    assert plan_of(converted).declined == ()
    assert isinstance(converted[1], kind)
    set_alphas(converted, 0.0)
    assert torch.equal(converted(x), converted[0](x))


@both
@pytest.mark.parametrize("kind", [ConstantSlice, OpenSlice, ChannelSlice])
def test_alpha_scales_only_the_slice_that_is_added(kind: type[nn.Module], init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), kind()))
    x = noise(2, 3, 6, 6)
    converted = prove(model, x, init=init)
    assert plan_of(converted).declined == ()
    (alpha,) = plan_of(converted).alphas
    assert (alpha.path, alpha.channels) == ("1.bn2" if init == "preserve" else "1.conv2", (0, 4))
    assert isinstance(converted[1].conv2, scaled_weight_class(nn.Conv2d))
    assert_preserved(model, x)
    half, full, zero = (set_alphas(converted, value)(x) for value in (0.5, 1.0, 0.0))
    skip = converted[0](x)
    assert torch.equal(zero[:, :4], skip)
    assert torch.equal(zero[:, 4:], full[:, 4:])
    assert_close(half[:, :4] - skip, (full[:, :4] - skip) / 2, 1e-5)


@both
def test_squeeze_excite_that_carries_alpha_is_still_one(init: str) -> None:
    converted = prove(randomise(nn.Sequential(ENDS["torchvision_se"]())), noise(2, 4, 6, 6), init=init)
    (name,) = alphas(converted)
    assert name.startswith("0.end")
    assert isinstance(converted[0].end, SqueezeExcitation)
    assert isinstance(converted[0].end.scale_activation, nn.Sigmoid)
    assert converted.get_submodule(name).raw_alpha.shape == (1,)


@both
def test_alpha_scales_the_branch_linearly(init: str) -> None:
    for kind in ("torchvision_se", "activation", "pool", "ghost", "value_and_gate"):
        model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), ENDS[kind]()))
        converted = prove(model, noise(2, 3, 6, 6), init=init)
        x = noise(2, 3, 6, 6)
        half, full = (set_alphas(converted, value)(x) - converted[0](x) for value in (0.5, 1.0))
        assert_close(half, full / 2, 1e-5)
