"""Networks written in the manner of libraries other than torchvision and timm: what a conversion makes of them.

None of these is copied; each is the smallest network that has one habit of some library: layers made in the forward,
slices of containers, optional inputs, attributes hung on layers, branches that no trace can look into.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from harness import Block, assert_preserved, both, noise, prove, randomise
from readings import actions, alphas, kinds, norms, plan_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import normfree
from normfree.errors import UnsupportedModelError


class MadeInForward(nn.Module):
    """Makes layers without parameters where it needs them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.block = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Block()

    def forward(self, x: Tensor) -> Any:
        return self.block(nn.ReLU(inplace=True)(self.bn(self.stem(nn.ZeroPad2d(1)(x)))))


class Sliced(nn.Module):
    """Runs slices of one container and returns what lies between them, as encoders of segmentation networks do."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.features = nn.Sequential(*stem, Block(), nn.BatchNorm2d(4), nn.ReLU(inplace=True), Block())

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.features[:1](x)
        second = self.features[1:4](first)
        return [first, second, self.features[4:](second)]


@both
@pytest.mark.parametrize("make", [MadeInForward, Sliced])
def test_module_made_in_the_forward_is_looked_through(make: Callable[[], nn.Module], init: str) -> None:
    converted = prove(randomise(make()), noise(2, 3, 6, 6), init=init)
    assert plan_of(converted).opaque == ()
    assert norms(converted) == []
    assert len(alphas(converted)) == kinds(converted).count("residual") > 0


class Optional(nn.Module):
    """Every input is optional, so that one forward serves tokens and embeddings; the rest comes by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.block = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), Block()

    def forward(self, pixels: Tensor | None = None, embedded: Tensor | None = None, scale: float = 1.0) -> Any:
        if pixels is None and embedded is None:
            raise ValueError("pixels or embedded must be given")
        x = embedded if embedded is not None else self.bn(self.stem(pixels))
        return self.block(scale * x)


class Unchecked(Optional):
    """The same without a check: with the defaults alone its trace holds no data at all."""

    def forward(self, pixels: Any = None, embedded: Tensor | None = None, scale: float = 1.0) -> Any:
        return self.block(self.bn(self.stem(pixels)) * scale)


@both
@pytest.mark.parametrize("make", [Optional, Unchecked])
def test_input_that_is_optional_is_still_an_input(make: Callable[[], nn.Module], init: str) -> None:
    model = randomise(make())
    converted = prove(model, {"pixels": noise(2, 3, 6, 6)}, init=init)
    assert actions(converted) == dict.fromkeys(("bn", "block.bn1", "block.bn2"), "fold")
    assert alphas(converted) == ["block.conv2"]
    assert_preserved(model, pixels=noise(2, 3, 6, 6))


class ShapeChecking(nn.Module):
    """A convolution with its norm behind a check that no trace passes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        if x.shape[1] != 4:
            raise ValueError("expected four channels")
        return self.bn(self.conv(torch.relu(x)))


class Chunked(nn.Module):
    """Ghost batch norm: the norm sees a few samples at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.bn(part) for part in self.conv(x).chunk(max(x.shape[0] // 2, 1))])


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Any:
        return x + self.branch(x)


@both
@pytest.mark.parametrize("make", [ShapeChecking, Chunked])
def test_branch_that_no_trace_looks_into_gets_its_scalar(make: Callable[[], nn.Module], init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), Residual(make()), Residual(make())))
    converted = prove(model, noise(4, 3, 6, 6), init=init)
    assert len(alphas(converted)) == 2
    assert_preserved(model, noise(4, 3, 6, 6))


class Activated(nn.Module):
    """The branch ends in a function, so that only the block itself can hold the scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.bn(self.conv(x)))


class Pyramid(nn.Module):
    """Checks its input, and keeps its blocks in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 1), nn.ModuleList([Activated(), Activated()])

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.shape[2] % 2:
            raise ValueError("the size must be even")
        x = self.stem(x)
        return [x := block(x) for block in self.blocks]


@both
def test_block_right_below_what_cannot_be_traced_is_rewritten_like_any_other(init: str) -> None:
    converted = prove(randomise(Pyramid()), noise(2, 3, 6, 6), init=init)
    assert alphas(converted) == ["blocks.0.skipinit_0", "blocks.1.skipinit_0"]


def _normalised(conv: nn.Module) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), Block())


REPARAMETRISED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": lambda conv: parametrizations.weight_norm(conv),
    "spectral norm": lambda conv: parametrizations.spectral_norm(conv),
    "pruned": lambda conv: cast(Any, prune).l1_unstructured(conv, "weight", amount=0.5),
}


@both
@pytest.mark.parametrize("how", REPARAMETRISED)
def test_layer_with_a_computed_weight_keeps_it_inside_plain_containers(how: str, init: str) -> None:
    model = randomise(_normalised(REPARAMETRISED[how](nn.Conv2d(3, 4, 1, bias=False))))
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert actions(converted)["1"] == ("affine" if init == "preserve" else "bias")
    assert_preserved(model, noise(2, 3, 6, 6))


@both
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_weight_norm_keeps_its_weight_inside_plain_containers(init: str) -> None:
    model = randomise(_normalised(torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 1, bias=False))))
    prove(model, noise(2, 3, 6, 6), init=init)
    assert_preserved(model, noise(2, 3, 6, 6))


def test_frozen_norm_of_another_library_is_refused_by_name_and_may_stay() -> None:
    class Frozen(nn.Module):
        """Statistics and affine are buffers, and the forward is the one everybody writes."""

        def __init__(self, features: int) -> None:
            super().__init__()
            for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                self.register_buffer(name, torch.full((features,), value))

        def forward(self, x: Tensor) -> Tensor:
            weight, bias, mean, var = (buffer.reshape(1, -1, 1, 1) for buffer in self.buffers())
            scale = weight * (var + 1e-5).rsqrt()
            return x * scale + (bias - mean * scale)

    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), Frozen(4), nn.ReLU()))
    with pytest.raises(UnsupportedModelError, match=r"1 \(.*Frozen\).*register_norm"):
        normfree.plan(model)
    converted = normfree.convert(nn.Sequential(model, Block()), init="preserve", exclude=["0.1"])
    assert isinstance(converted.get_submodule("0.1"), Frozen)
    assert norms(converted) == []
