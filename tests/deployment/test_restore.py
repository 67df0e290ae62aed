"""The way back: batch norms again, bit for bit or equivalent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from harness import Block, assert_close, noise, randomise, set_alphas
from marks import broad
from readings import norms
from small import dense, preactivated
from torch import Tensor, nn

import normfree
from normfree import zoo
from normfree.deployment.fuse import FuseWarning
from normfree.errors import UnsupportedModelError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::normfree.checkpoint.saving.SaveWarning")

SMALL: dict[str, Callable[[], nn.Module]] = {"preactivated": lambda: preactivated(2, 2), "dense": dense}
NAMES = [
    *SMALL,
    "timm:test_resnet",
    "timm:test_efficientnet",
    "timm:repvgg_a0",
    *broad(
        "torchvision:resnet18",
        "timm:resnetv2_50",
        "timm:efficientnet_b0",
        "timm:densenet121",
        "timm:regnety_002",
        "timm:ghostnet_100",
    ),
]
X = noise(2, 3, 64, 64, dtype=torch.float64)


def build(name: str) -> nn.Module:
    return randomise(SMALL[name]() if name in SMALL else zoo.build(zoo.find(name), num_classes=5))


@pytest.fixture(scope="module", params=NAMES)
def original(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    """Hold keys, their order, and every bit."""
    state, wanted = found.state_dict(), expected.state_dict()
    assert list(state) == list(wanted)
    assert all(state[key].dtype == wanted[key].dtype and torch.equal(state[key], wanted[key]) for key in wanted)
    assert [type(module) for module in found.modules()] == [type(module) for module in expected.modules()]


def moved(model: nn.Module) -> nn.Module:
    """Change every parameter but the scalars, as training does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("alpha"):
                step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
                parameter.mul_(1 + 0.1 * step).add_(0.01 * step)
    return model


def test_what_was_not_trained_comes_back_bit_for_bit(original: nn.Module) -> None:
    before = copy.deepcopy(original.state_dict())
    converted = normfree.convert(original, init="preserve")
    for parameter in original.parameters():  # the copy is one: whatever becomes of the original
        parameter.data.zero_()
    restored = normfree.restore(converted)
    original.load_state_dict(before)
    assert_same_state(restored, original)
    assert norms(converted) == []
    assert [p.requires_grad for p in restored.parameters()] == [p.requires_grad for p in original.parameters()]


def test_after_training_it_is_equivalent(original: nn.Module) -> None:
    converted = moved(normfree.convert(original, init="preserve").double()).eval()
    restored = normfree.restore(converted)
    assert norms(restored) == norms(original)
    fresh = copy.deepcopy(original).double().eval()
    fresh.load_state_dict(restored.state_dict())
    with torch.no_grad():
        assert_close(fresh(X), converted(X))


@pytest.mark.parametrize("name", ["timm:test_resnet", "preactivated"])
def test_trained_scalars_are_absorbed(name: str) -> None:
    original = build(name)
    converted = set_alphas(normfree.convert(original, init="preserve").double(), 0.3).eval()
    restored = normfree.restore(converted)
    assert list(restored.state_dict()) == list(original.state_dict())
    with torch.no_grad():
        assert_close(restored(X), converted(X))


def test_a_scalar_that_nothing_absorbs_stays_and_is_named() -> None:
    converted = set_alphas(
        normfree.convert(randomise(timm.create_model("ghostnet_100")), init="preserve").double(), 0.5
    )
    with pytest.warns(FuseWarning, match=r"alpha is not 1 and stays a multiplication at blocks\.0"):
        restored = normfree.restore(converted.eval())
    with torch.no_grad():
        assert_close(restored(X), converted(X))


def test_from_a_file_bit_for_bit_and_after_training_in_another_process(tmp_path: Path) -> None:
    original = randomise(timm.create_model("resnetv2_18", num_classes=5))
    about = {"source": "timm:resnetv2_18", "num_classes": 5}
    normfree.save(normfree.convert(original, init="preserve"), tmp_path / "a.safetensors", **about)
    loaded = normfree.load(tmp_path / "a.safetensors")
    assert_same_state(normfree.restore(loaded), original)
    moved(loaded)
    normfree.save(loaded, tmp_path / "b.safetensors", **about)
    again = normfree.load(tmp_path / "b.safetensors")
    assert_same_state(normfree.restore(again), normfree.restore(loaded))
    means = "stages.0.blocks.0.norm1.running_mean"
    assert torch.equal(normfree.restore(again).state_dict()[means], original.state_dict()[means])


def test_norms_without_an_affine_get_one_once_it_is_needed() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x))

    original = randomise(Bare())
    converted = normfree.convert(original, init="preserve").double().eval()
    assert_same_state(normfree.restore(normfree.convert(original, init="preserve")), original)
    restored = normfree.restore(moved(converted))
    assert restored.bn.weight is not None
    with torch.no_grad():
        assert_close(restored(X), converted(X))


def test_a_norm_type_of_ones_own_comes_back() -> None:
    class Tripled(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    @normfree.register_norm(Tripled)
    def describe(norm: Tripled) -> normfree.Norm:
        mean, var = norm.running_mean, norm.running_var
        return normfree.Norm(norm.num_features, mean, var, 3 * norm.weight, 3 * norm.bias, norm.eps)

    original = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), Tripled(4)))
    assert_same_state(normfree.restore(normfree.convert(original, init="preserve")), original)  # the old bias too
    converted = moved(normfree.convert(original, init="preserve").double())
    restored = normfree.restore(converted.eval())
    assert type(restored[1]) is Tripled
    with torch.no_grad():
        assert_close(restored(X), converted(X))


def test_what_cannot_be_restored_says_why() -> None:
    def make() -> nn.Module:
        return randomise(nn.Sequential(nn.Conv2d(3, 4, 3), Block()))

    with pytest.raises(UsageError, match="carries no plan"):
        normfree.restore(make())
    with pytest.raises(UsageError, match="init='skipinit', which keeps nothing of the norms"):
        normfree.restore(normfree.convert(make(), init="skipinit"))
    with pytest.raises(UsageError, match="is fused: its gains are gone"):
        normfree.restore(normfree.fuse(normfree.convert(make(), init="preserve")))
    replaced = normfree.convert(make(), init="preserve")
    replaced[1].conv1 = nn.Conv2d(4, 4, 3, padding=1)
    with pytest.raises(UnsupportedModelError, match=r"1\.bn1 \(BatchNorm2d\): .* is gone from 1\.conv1"):
        normfree.restore(replaced)


def test_hooks_and_modes_stay() -> None:
    original = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), Block()))
    original[1].bn1.eval()
    calls = []
    handle = original[1].bn2.register_forward_hook(lambda *_: calls.append(1))
    restored = normfree.restore(normfree.convert(original, init="preserve"))
    assert [module.training for module in restored.modules()] == [module.training for module in original.modules()]
    restored(noise(2, 3, 8, 8))
    assert calls == [1]
    handle.remove()
