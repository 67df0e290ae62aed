"""What is a residual sum and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import assert_preserved, both, noise, prove, randomise, set_alphas
from readings import alphas, kinds, norms, plan_of
from torch import Tensor, nn


def conv_bn(i: int, o: int, k: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, bias=False), nn.BatchNorm2d(o))


class ZeroPad(nn.Module):
    """Option A of the ResNet paper: subsample and pad the channels with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))


class Post(nn.Module):
    """Post-activation block; ``skip`` is the shortcut."""

    def __init__(self, skip: nn.Module, o: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(4, o, stride=stride), nn.ReLU(inplace=True), conv_bn(o, o))
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class InlinePad(Post):
    def __init__(self) -> None:
        super().__init__(ZeroPad(), 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))


class Pre(nn.Module):
    """Pre-activation block; a projection takes the activated input, as in He et al. (2016b)."""

    def __init__(self, skip: nn.Module | None = None, o: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, o, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), nn.Conv2d(o, o, 3, padding=1, bias=False)
        self.relu, self.skip = nn.ReLU(inplace=True), skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(x))
        shortcut = x if self.skip is None else self.skip(y)
        return self.conv2(self.relu(self.bn2(self.conv1(y)))) + shortcut


RESIDUAL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "post_identity": (lambda: Post(nn.Identity()), "body.2.0"),
    "post_projection": (lambda: Post(conv_bn(4, 6, 1, 2), 6, 2), "body.2.0"),
    "post_pool_projection": (lambda: Post(nn.Sequential(nn.AvgPool2d(2), *conv_bn(4, 6, 1)), 6, 2), "body.2.0"),
    "post_zero_pad": (lambda: Post(ZeroPad(), 6, 2), "body.2.0"),
    "post_zero_pad_inline": (InlinePad, "body.2.0"),
    "post_max_pool": (lambda: Post(nn.MaxPool2d(2), 4, 2), "body.2.0"),
    "pre_identity": (lambda: Pre(), "conv2"),
    "pre_projection": (lambda: Pre(nn.Conv2d(4, 6, 1, 2, bias=False), 6, 2), "conv2"),
}


@both
@pytest.mark.parametrize("kind", RESIDUAL)
def test_residual_block_gets_one_alpha_at_the_end_of_its_branch(kind: str, init: str) -> None:
    make, tail = RESIDUAL[kind]
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), make()))
    x = noise(2, 3, 8, 8)
    converted = prove(model, x, init=init)
    assert norms(converted) == []
    assert kinds(converted) == ["residual"]
    assert alphas(converted) == [f"1.{tail}"]
    assert_preserved(model, x)
    set_alphas(converted, 0.0)
    stem = converted[0](x)
    block = converted[1]
    if kind.startswith("post"):
        expected = torch.relu(block.skip(stem))
    else:
        expected = stem if block.skip is None else block.skip(torch.relu(block.bn1(stem)))
    assert torch.equal(converted(x), expected)


class RepVGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.three, self.one, self.identity = conv_bn(4, 4), conv_bn(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.three(x) + self.one(x) + self.identity(x))


class MobileOne(nn.Module):
    """The same in a loop, summed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(conv_bn(4, 4) for _ in range(3))
        self.scale = conv_bn(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.scale(x)
        for branch in self.branches:
            out += branch(x)
        return torch.relu(out)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.MaxPool2d(2), conv_bn(4, 4), nn.ReLU(), nn.Upsample(scale_factor=2))
        self.out = conv_bn(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.inner(x))


class TransposedUNet(UNet):
    def __init__(self) -> None:
        super().__init__()
        up = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.BatchNorm2d(4))
        self.inner = nn.Sequential(conv_bn(4, 4, stride=2), nn.ReLU(), up)


class FPN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(conv_bn(4, 4), nn.ReLU())
        self.high = nn.Sequential(conv_bn(4, 4, stride=2), nn.ReLU())
        self.lateral, self.top = conv_bn(4, 4, 1), conv_bn(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        high = self.top(self.high(low))
        return self.lateral(low) + F.interpolate(high, size=low.shape[-2:], mode="nearest")


class GatedUp(FPN):
    """A pyramid attention network's way up: what is pooled of the coarse level gates the fine one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_bn(4, 4, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        high = self.high(low)
        return F.interpolate(high, size=low.shape[-2:], mode="nearest") + self.lateral(low) * self.gate(high)


class TwoSquared(nn.Module):
    """A branch that multiplies two of its own features, of which one is pooled, stays a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.pool = conv_bn(4, 4), conv_bn(4, 4, 1), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x) * torch.sigmoid(self.b(self.pool(x)))


@both
@pytest.mark.parametrize(
    ("block", "kind"),
    [
        (RepVGG, "parallel"),
        (MobileOne, "parallel"),
        (UNet, "merge"),
        (TransposedUNet, "merge"),
        (FPN, "merge"),
        (GatedUp, "merge"),
    ],
)
def test_sum_that_is_no_residual_gets_no_alpha(block: type[nn.Module], kind: str, init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), block()))
    x = noise(2, 3, 8, 8)
    converted = prove(model, x, init=init)
    assert set(kinds(converted)) == {kind}
    assert alphas(converted) == []
    assert plan_of(converted).declined == ()
    assert_preserved(model, x)


@both
def test_gate_on_the_branch_itself_makes_no_merge(init: str) -> None:
    converted = prove(randomise(nn.Sequential(nn.Conv2d(3, 4, 1), TwoSquared())), noise(2, 3, 8, 8), init=init)
    assert kinds(converted) == ["residual"]
    assert len(alphas(converted)) == 1


class Res2Net(nn.Module):
    """Groups of channels are summed inside the branch; only the outer sum is residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv_bn(4, 6, 1), conv_bn(6, 4, 1)
        self.convs = nn.ModuleList(conv_bn(2, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(torch.relu(self.first(x)), 2, 1)
        y = torch.relu(self.convs[0](parts[0]))
        z = torch.relu(self.convs[1](y + parts[1]))
        return torch.relu(x + self.last(torch.cat([y, z, parts[2]], 1)))


@both
def test_inner_sums_of_res2net_get_no_alpha(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), Res2Net()))
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert kinds(converted) == ["merge", "residual"]
    assert alphas(converted) == ["1.last.0"]
    assert_preserved(model, noise(2, 3, 6, 6))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.conv1(self.relu(self.bn1(x)))], 1)
        return torch.cat([x, self.conv2(self.relu(self.bn2(x)))], 1)


@both
def test_dense_concatenation_keeps_every_feature(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), Dense()))
    x = noise(2, 3, 6, 6)
    converted = prove(model, x, init=init)
    assert (kinds(converted), alphas(converted)) == ([], [])
    assert torch.equal(converted(x)[:, :4], converted[0](x))
    assert_preserved(model, x)
    biased = [converted[1].conv1.bias is not None, converted[1].conv2.bias is not None]
    assert biased == [init == "skipinit"] * 2


class Outer(nn.Module):
    """A residual block around residual blocks: the inner ones get the scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Post(nn.Identity()), Post(nn.Identity()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@both
def test_sum_around_whole_blocks_is_a_merge(init: str) -> None:
    converted = prove(randomise(nn.Sequential(nn.Conv2d(3, 4, 1), Outer())), noise(2, 3, 6, 6), init=init)
    assert sorted(kinds(converted)) == ["merge", "residual", "residual"]
    assert alphas(converted) == ["1.inner.0.body.2.0", "1.inner.1.body.2.0"]
