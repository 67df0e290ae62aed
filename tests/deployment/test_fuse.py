"""Fusing: the same function, in plain layers."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from endings import X, converted, ends
from harness import Gated, assert_close, noise, randomise, set_alphas
from marks import broad
from readings import norms, plan_of
from small import dense, preactivated
from torch import nn

import normfree
from normfree import zoo
from normfree.deployment.fuse import FuseWarning
from normfree.layers import is_normfree
from normfree.tracing.copying import deep_copy

pytestmark = pytest.mark.filterwarnings("ignore::normfree.checkpoint.saving.SaveWarning")


def trained(model: nn.Module, init: str = "preserve") -> nn.Module:
    """A converted model whose scalars have moved."""
    return set_alphas(normfree.convert(randomise(model).double(), init=init), 0.7).eval()


SMALL: dict[str, Callable[[], nn.Module]] = {
    "preactivated": lambda: preactivated(2, 2, classes=7),
    "dense": lambda: dense(classes=7),
}
NETWORKS = [
    *SMALL,
    "timm:test_resnet",
    "timm:test_efficientnet",
    "timm:test_byobnet",
    "torchvision:shufflenet_v2_x0_5",
    *broad(
        "torchvision:resnet18",
        "torchvision:resnext50_32x4d",
        "torchvision:mobilenet_v2",
        "torchvision:regnet_y_400mf",
        "torchvision:vgg11_bn",
        "torchvision:googlenet",
        "timm:resnetv2_50",
        "timm:efficientnet_b0",
        "timm:densenet121",
        "timm:repvgg_a0",
        "timm:rexnet_100",
        "timm:mobilenetv3_small_050",
    ),
]


@pytest.fixture(scope="module", params=NETWORKS)
def named(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """A network that has seen data, and its name."""
    name = request.param
    return name, randomise(SMALL[name]() if name in SMALL else zoo.build(zoo.find(name), num_classes=7)).eval()


def test_fused_model_computes_the_same(named: tuple[str, nn.Module]) -> None:
    model = set_alphas(normfree.convert(deep_copy(named[1]).double(), init="preserve"), 0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FuseWarning)
        fused = normfree.fuse(model)
    x = noise(2, 3, 64, 64, dtype=torch.float64)
    assert_close(fused(x), model(x))
    assert plan_of(fused).fused
    assert not plan_of(model).fused


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, groups=2),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False),
        nn.Conv3d(4, 6, 3),
        nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
        nn.ConvTranspose3d(4, 6, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_every_layer_type_comes_back_as_its_own(layer: nn.Module) -> None:
    dims = layer.weight.dim() - 2
    model = trained(nn.Sequential(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](6)))
    fused = normfree.fuse(model)
    x = noise(2, 4, *[9] * dims, dtype=torch.float64)
    assert_close(fused(x), model(x))
    assert type(fused[0]) is type(layer)
    assert sorted(name for name, _ in fused[0].named_parameters()) == ["bias", "weight"]
    assert not any(map(is_normfree, fused.modules()))


@ends
def test_alpha_at_every_kind_of_end_is_fused(end: str) -> None:
    model, x = converted(end, "preserve").double(), noise(*X, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FuseWarning)
        fused = normfree.fuse(model)
    assert_close(fused(x), model(x))


def test_bias_free_layer_that_only_carries_alpha_stays_bias_free() -> None:
    model = set_alphas(normfree.convert(preactivated(2).double(), init="skipinit"), 0.5).eval()
    fused = normfree.fuse(model)
    x = noise(2, 3, 32, 32, dtype=torch.float64)
    assert_close(fused(x), model(x))
    assert model.stages[0].blocks[1].conv3.bias is None
    assert fused.stages[0].blocks[1].conv3.bias is None


def test_alpha_on_a_channel_range_and_behind_gates() -> None:
    x = noise(2, 3, 64, 64, dtype=torch.float64)
    for name in ("rexnet_100", "seresnet18"):
        model = trained(timm.create_model(name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FuseWarning)
            fused = normfree.fuse(model)
        assert_close(fused(x), model(x))


class Times(nn.Module):
    """Multiplies by what ``of`` makes of its parameter."""

    def __init__(self, of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gamma, self.of = nn.Parameter(torch.rand(4) + 0.5), of

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.of(self.gamma)[:, None, None]


class EndsIn(nn.Module):
    """A residual branch that ends in a layer scale, as that of FastViT's mixer."""

    def __init__(self, of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Times(of)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale(self.norm(self.conv(x)) - x)


OF: dict[str, Callable[[torch.Tensor], torch.Tensor]]
OF = {"itself": torch.clone, "abs": torch.abs, "exp": torch.exp, "more": lambda t: t + 1}


@pytest.mark.parametrize("of", OF)
def test_a_layer_scale_takes_alpha_if_it_only_multiplies(of: str) -> None:
    called = list[int]()
    model = randomise(EndsIn(OF[of])).double()
    x = noise(2, 4, 6, 6, dtype=torch.float64)
    converted = set_alphas(normfree.convert(model, init="preserve", inputs=x), -0.7).eval()
    expected = converted(x)
    converted.scale.register_forward_hook(lambda *_: called.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FuseWarning)
        fused = normfree.fuse(converted)
    assert called == []
    assert_close(fused(x), expected)
    left = [name for name, _ in fused.named_parameters() if name.endswith("raw_alpha")]
    assert left == ([] if of == "itself" else ["scale.raw_alpha"])


def test_what_stays_a_multiplication_is_named_and_computes_the_same() -> None:
    model, x = trained(timm.create_model("ghostnet_100")), noise(2, 3, 64, 64, dtype=torch.float64)
    with pytest.warns(FuseWarning, match=r"alpha stays a multiplication at blocks\.0"):
        fused = normfree.fuse(model)
    assert_close(fused(x), model(x))


def test_tied_weight_stays_what_it_was_elsewhere() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.bn(self.a(x)))

    model = trained(Tied())
    fused = normfree.fuse(model)
    x = noise(2, 3, 4, 4, dtype=torch.float64)
    assert_close(fused(x), model(x))


def test_training_mode_dtype_and_frozen_parameters_survive() -> None:
    model = normfree.convert(randomise(timm.create_model("test_resnet")), init="preserve").bfloat16().train()
    model.fc.weight.requires_grad_(False)
    fused = normfree.fuse(model)
    assert fused.training
    assert {p.dtype for p in fused.parameters()} == {torch.bfloat16}
    assert not fused.fc.weight.requires_grad
    assert fused.layer1[0].conv1.weight.requires_grad


def test_a_converted_network_without_scalars_is_fused_too() -> None:
    model = normfree.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), init="skipinit")
    fused, x = normfree.fuse(model), noise(2, 3, 8, 8)
    assert torch.equal(fused(x), model(x))
    assert type(fused[1]) is nn.Identity
    with pytest.raises(normfree.errors.UsageError, match="this Sequential is fused already"):
        normfree.fuse(fused)


def test_nothing_to_fuse_is_an_error() -> None:
    model = timm.create_model("test_resnet")
    with pytest.raises(normfree.errors.UsageError, match="this ResNet carries no gain and no alpha: convert it first"):
        normfree.fuse(model)
    fused = normfree.fuse(normfree.convert(model))
    assert norms(fused) == []
    with pytest.raises(normfree.errors.UsageError, match="this ResNet is fused already"):
        normfree.fuse(fused)


def test_fused_model_computes_the_same_in_float32_and_from_its_file(
    named: tuple[str, nn.Module], tmp_path: Path
) -> None:
    name, original = named
    model = set_alphas(normfree.convert(original, init="preserve"), 0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FuseWarning)
        fused = normfree.fuse(model)
    x = noise(2, 3, 64, 64)
    with torch.no_grad():
        before, after, exact = model(x), fused(x), deep_copy(model).double()(x.double())
        # Rounding of another order of operations; the bound is the larger of 1e-6 and what float32 itself loses here.
        own = float((before - exact).abs().max() / exact.abs().max())
        assert_close(after, before, max(1e-6, 2 * own))
        about = {} if name in SMALL else {"source": name, "num_classes": 7}
        normfree.save(fused, tmp_path / "fused.safetensors", **about)
        like = SMALL[name]() if name in SMALL else None  # all others are found by their name
        loaded = normfree.load(tmp_path / "fused.safetensors", model=like).eval()
        assert torch.equal(loaded(x), after)
    assert [type(m).__name__ for m in loaded.modules()] == [type(m).__name__ for m in fused.modules()]


@pytest.mark.parametrize("init", ["skipinit", "preserve"])
def test_a_fused_model_is_verified_but_for_its_scalars(init: str) -> None:
    original = randomise(timm.create_model("test_resnet"))
    fused = normfree.fuse(normfree.convert(original, init=init))
    report = normfree.verify(fused, original, noise(2, 3, 32, 32))
    assert report.ok, str(report)
    assert [proof.passed for proof in report.proofs] == [
        True,
        True,
        True if init == "preserve" else None,
        None,
        True,
        True,
    ]
    with torch.no_grad():
        fused.layer1[0].conv1.weight.mul_(1.01)
    assert normfree.verify(fused, original, noise(2, 3, 32, 32)).ok is (init == "skipinit")


def test_channels_last_survives() -> None:
    model = normfree.convert(randomise(timm.create_model("test_resnet")).double(), init="preserve").eval()
    model = model.to(memory_format=torch.channels_last)
    fused = normfree.fuse(model)
    weights = [module.weight for module in fused.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    x = noise(2, 3, 32, 32, dtype=torch.float64)
    assert_close(fused(x), model(x))


class Alone(pickle.Unpickler):
    """Reads what needs nothing of this package."""

    def find_class(self, module: str, name: str) -> object:
        assert not module.startswith("normfree"), f"{module}.{name}"
        return super().find_class(module, name)


@pytest.mark.parametrize("kind", ["layers", "pre-activation", "gates", "copies", "squeeze", "ghost", "rewritten"])
def test_a_fused_model_is_unpickled_without_this_package(kind: str) -> None:
    """Gains and biases in slots (with activations, of any dimension), scalars on activations, in forwards, copies."""
    build: dict[str, Callable[[], nn.Module]] = {
        "layers": lambda: timm.create_model("test_resnet"),
        "pre-activation": lambda: preactivated(1, 1),
        "gates": lambda: timm.create_model("rexnet_100", depth_mult=0.5, width_mult=0.25),
        "squeeze": lambda: timm.create_model("seresnet18"),
        "ghost": lambda: timm.create_model("ghostnet_050"),
        "rewritten": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Gated(), Gated()),
        "copies": lambda: nn.Sequential(
            nn.Linear(3, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.ReLU(), nn.Unflatten(1, (6, 1))
        ),
    }
    x = noise(*((2, 3, 64, 64) if kind != "copies" else (2, 3)), dtype=torch.float64)
    options = {"inplace_activations": False} if kind == "copies" else {}
    model = set_alphas(normfree.convert(randomise(build[kind]()).double(), init="preserve", **options), 0.7).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FuseWarning)
        fused = normfree.fuse(model)
    read = Alone(io.BytesIO(pickle.dumps(fused))).load()
    assert_close(read(x), model(x))
    assert {name for name, _ in read.named_parameters()} == {name for name, _ in fused.named_parameters()}
    assert not any(map(is_normfree, read.modules()))
    assert plan_of(read) == plan_of(fused)
