"""A norm that only a layer behind it reads goes into that layer when the model is fused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import timm
import torch
from harness import assert_close, noise, randomise, set_alphas
from marks import broad
from readings import plan_of
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normfree
from normfree.deployment.fuse import FuseWarning
from normfree.layers import ChannelAffine

pytestmark = pytest.mark.filterwarnings("ignore::normfree.checkpoint.saving.SaveWarning")
M = TypeVar("M", bound=nn.Module)
leaves = pytest.mark.filterwarnings("ignore::normfree.deployment.fuse.FuseWarning")


class Before(nn.Module):
    """A sum, its norm, and a layer that alone reads what the norm returns."""

    flag = False

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        flat = isinstance(layer, nn.Linear)
        kinds: dict[int, type[_BatchNorm]] = {
            2: nn.BatchNorm1d,
            3: nn.BatchNorm1d,
            4: nn.BatchNorm2d,
            5: nn.BatchNorm3d,
        }
        self.norm, self.layer = kinds[2 if flat else layer.weight.dim()](4), layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x + x.tanh()))


def made(kind: Callable[[nn.Module], M], layer: nn.Module) -> tuple[M, Tensor]:
    model = randomise(kind(layer)).double().eval()
    dims = 0 if isinstance(layer, nn.Linear) else layer.weight.dim() - 2
    return model, noise(2, 4, *(7,) * dims, dtype=torch.float64)


def left_in(model: nn.Module, x: Tensor) -> tuple[nn.Module, bool]:
    """Fuse what was converted; return it, and whether something is left in the slot of the norm."""
    fused = normfree.fuse(normfree.convert(model, init="preserve", inputs=x, check=False))
    return fused, type(fused.norm) is not nn.Identity


TAKING: dict[str, nn.Module] = {
    "linear": nn.Linear(4, 3),
    "linear without a bias": nn.Linear(4, 3, bias=False),
    "one position": nn.Conv2d(4, 6, 1, bias=False),
    "unpadded": nn.Conv2d(4, 6, 3, stride=2),
    "groups": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv1d(4, 4, 3, groups=4),
    "three dimensions": nn.Conv3d(4, 2, (1, 2, 3)),
    "valid": nn.Conv2d(4, 6, 3, padding="valid"),
    "reflected": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "repeated": nn.Conv2d(4, 6, 3, padding="same", padding_mode="replicate"),
}
LEAVING: dict[str, nn.Module] = {
    "zero padding": nn.Conv2d(4, 6, 3, padding=1),
    "same": nn.Conv2d(4, 6, 3, padding="same"),
    "transposed": nn.ConvTranspose2d(4, 6, 3),
}


@pytest.mark.parametrize("kind", TAKING)
def test_a_layer_that_sees_nothing_else_takes_the_norm(kind: str) -> None:
    model, x = made(Before, TAKING[kind])
    fused, left = left_in(model, x)
    assert not left
    assert not any("Affine" in type(module).__name__ for module in fused.modules())
    assert_close(fused(x), model(x))
    assert plan_of(fused).norms[0].into == "layer"
    report = normfree.verify(fused, model, x)
    assert report.ok, str(report)


@pytest.mark.parametrize("kind", LEAVING)
def test_a_layer_that_sees_more_leaves_it(kind: str) -> None:
    model, x = made(Before, LEAVING[kind])
    with pytest.warns(FuseWarning, match="gain and bias stay an operation at norm: no layer beside it takes them"):
        fused, left = left_in(model, x)
    assert left
    assert_close(fused(x), model(x))


class Early(Before):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + x.tanh())
        return x if self.flag else self.layer(x)


class Read(Before):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x + x.tanh())
        return self.layer(y) + (y.mean() if self.flag else 0)


class Other(Before):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if self.flag else self.norm(x + x.tanh()))


class Weight(Before):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.norm(x + x.tanh()))
        return y * self.layer.weight.sum() if self.flag else y


class Activated(Before):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x + x.tanh()).relu())


@leaves
@pytest.mark.parametrize("kind", [Weight, Activated])
def test_what_is_used_apart_stays(kind: type[Before]) -> None:
    model, x = made(kind, nn.Conv2d(4, 6, 1))
    fused, left = left_in(model, x)
    assert left
    for flag in (False, True):
        model.flag = fused.flag = flag
        assert_close(fused(x), model(x))


@pytest.mark.parametrize("kind", [Early, Read, Other])
def test_a_fused_model_does_what_was_seen_and_a_converted_one_goes_other_ways_too(kind: type[Before]) -> None:
    model, x = made(kind, nn.Conv2d(4, 6, 1))
    fused, left = left_in(model, x)
    assert not left
    assert_close(fused(x), model(x))
    converted = normfree.convert(model, init="preserve", inputs=x)
    model.flag = converted.flag = True
    assert_close(converted(x), model(x))


@leaves
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["norm", "layer"])
def test_what_a_hook_sees_stays_what_it_is(where: str, when: str) -> None:
    model, x = made(Before, nn.Conv2d(4, 6, 1))
    seen = list[Tensor]()

    def hook(module: nn.Module, given: tuple[Tensor, ...], *returned: Tensor) -> None:
        seen.append(returned[0].clone() if where == "norm" else given[0].clone())

    def hang(on: nn.Module) -> None:
        part = on.get_submodule(where)
        _ = part.register_forward_hook(hook) if where == "norm" else part.register_forward_pre_hook(hook)

    hang(model)
    expected = model(x)
    if when == "after":
        model.norm._forward_hooks.clear()
        model.layer._forward_pre_hooks.clear()
    converted = normfree.convert(model, init="preserve", inputs=x, check=False)
    if when == "after":
        hang(converted)
    fused, first = normfree.fuse(converted), seen[0]
    seen.clear()
    assert_close(fused(x), expected)
    assert_close(seen[0], first)
    assert plan_of(fused).norms[0].into is None


class Through(nn.Module):
    """Identities between the two, and a block around each."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.front, self.gap, self.rest = nn.Sequential(nn.BatchNorm2d(4)), nn.Identity(), nn.Sequential(layer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x + x.tanh())
        x = self.gap(x)
        return self.rest(x)


def test_an_identity_between_the_two_lets_everything_pass() -> None:
    model, x = made(Through, nn.Conv2d(4, 6, 1))
    fused = normfree.fuse(normfree.convert(model, init="preserve", inputs=x, check=False))
    assert plan_of(fused).norms[0].into == "rest.0"
    assert_close(fused(x), model(x))


@leaves
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["gap", "front"])
def test_what_a_hook_between_the_two_sees_stays_what_it_is(where: str, when: str) -> None:
    model, x = made(Through, nn.Conv2d(4, 6, 1))
    seen = list[Tensor]()

    def hang(on: nn.Module) -> None:
        on.get_submodule(where).register_forward_hook(lambda _, given, returned: seen.append(returned.clone()))

    hang(model)
    expected = model(x)
    if when == "after":
        model.get_submodule(where)._forward_hooks.clear()
    converted = normfree.convert(model, init="preserve", inputs=x, check=False)
    if when == "after":
        hang(converted)
    seen[1:] = []
    fused = normfree.fuse(converted)
    assert_close(fused(x), expected)
    assert_close(seen[-1], seen[0])
    assert plan_of(fused).norms[0].into is None


@leaves
def test_what_has_taken_the_place_of_an_identity_is_left_alone() -> None:
    model, x = made(Through, nn.Conv2d(4, 6, 1))
    converted = normfree.convert(model, init="preserve", inputs=x, check=False)
    converted.gap = nn.Tanh()
    fused = normfree.fuse(converted)
    assert_close(fused(x), converted(x))


@leaves
@pytest.mark.parametrize("other", [nn.Sequential(nn.Conv2d(4, 2, 1)), nn.Conv2d(4, 2, 3, padding=1), nn.Identity()])
def test_another_layer_that_was_put_there_is_left_alone(other: nn.Module) -> None:
    model, x = made(Before, nn.Conv2d(4, 6, 1))
    converted = normfree.convert(model, init="preserve", inputs=x, check=False)
    converted.layer = other.double()
    fused = normfree.fuse(converted)
    assert_close(fused(x), converted(x))
    assert plan_of(fused).norms[0].into is None


def test_a_file_is_loaded_as_it_was_fused(tmp_path: Path) -> None:
    model, x = made(Before, nn.Conv2d(4, 6, 1, bias=False))
    fused, _ = left_in(model, x)
    normfree.save(fused, tmp_path / "fused.safetensors")
    loaded = normfree.load(tmp_path / "fused.safetensors", model=Before(nn.Conv2d(4, 6, 1, bias=False)).double()).eval()
    assert torch.equal(loaded(x), fused(x))
    assert type(loaded.norm) is nn.Identity


@leaves
@pytest.mark.parametrize("name", broad("maxvit_rmlp_pico_rw_256", "coatnet_nano_rw_224"))
def test_norms_in_front_of_a_pointwise_layer_are_gone(name: str) -> None:
    model = set_alphas(normfree.convert(randomise(timm.create_model(name)).double(), init="preserve"), 0.7).eval()
    fused, x = normfree.fuse(model), noise(1, 3, *timm.data.resolve_model_data_config(model)["input_size"][1:]).double()
    with torch.no_grad():
        assert_close(fused(x), model(x))
    before = sum(isinstance(module, ChannelAffine) for module in model.modules())
    after = sum(type(module).__name__ == "ChannelAffine" for module in fused.modules())
    assert after < before
