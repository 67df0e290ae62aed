"""Differentially private training: Opacus takes a converted model, and its per-sample gradients are those of a loop.

Opacus hooks every layer that holds parameters. It has samplers of its own for exact types of torch; for all else, and
so for layers that carry gain and alpha, it runs the layer's own forward under ``torch.func``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from harness import Block, assert_close, both, noise, prove, randomise, set_alphas
from marks import broad
from readings import plan_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normfree

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it imports is deprecated in torch
    from opacus import PrivacyEngine
    from opacus.grad_sample import GradSampleModule
    from opacus.validators import ModuleValidator

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),  # the first layer's input needs no gradient
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha"),  # one epoch spends little
]
Y = torch.tensor([0, 1])


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class AddsInPlace(Block):
    """Adds in place to what ends a branch, where no weight can take alpha."""

    def __init__(self, *end: nn.Module) -> None:
        super().__init__()
        self.end = end[0] if len(end) == 1 else nn.Sequential(*end)

    def forward(self, x: Tensor) -> Tensor:
        y = self.end(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        y += x
        return F.relu_(y)


class EndsInPlace(nn.Module):
    """DenseNet's end: a norm on a concatenation, and an activation in place that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(torch.cat([x[:, :, 1:-1, 1:-1], self.conv(x)], 1))
        return self.fc(F.relu(y, inplace=True).mean((2, 3)))


class PreActivated(nn.Module):
    """A norm that no layer feeds, between a sum and an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu_(self.bn(x)))


def stem(*blocks: nn.Module) -> nn.Module:
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), *blocks, *head)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: timm.create_model("test_resnet", num_classes=3),
    "regnety_002": lambda: timm.create_model("regnety_002", num_classes=3),
    "gate": lambda: stem(AddsInPlace(Gate())),
    "activation": lambda: stem(AddsInPlace(nn.ELU(inplace=True))),
    "identity": lambda: stem(AddsInPlace(Gate(), nn.Identity())),
    "norm": lambda: stem(AddsInPlace(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(4))),
    "concatenation": EndsInPlace,
    "pre-activation": lambda: stem(PreActivated(), PreActivated()),
}
SMALL = ["gate", "activation", "identity", "norm", "concatenation", "pre-activation"]


def private(name: str, init: str) -> nn.Module:
    return normfree.convert(randomise(NETWORKS[name]()), init=init, alpha=0.5, inplace_activations=False)


@both
@pytest.mark.parametrize("name", ["resnet", *SMALL, *broad("regnety_002")])
def test_gradients_of_every_sample_are_those_of_a_loop(name: str, init: str) -> None:
    model = private(name, init).double().train()
    loop, x = copy.deepcopy(model), noise(2, 3, 32, 32, dtype=torch.float64)
    F.cross_entropy(GradSampleModule(model)(x), Y).backward()
    for i in range(2):
        loop.zero_grad()
        F.cross_entropy(loop(x[i : i + 1]), Y[i : i + 1]).backward()
        for (key, found), expected in zip(model.named_parameters(), loop.parameters(), strict=True):
            assert expected.grad is not None, key
            assert_close(found.grad_sample[i], expected.grad, 1e-6)


@both
@pytest.mark.parametrize("name", SMALL)
def test_proofs_hold_without_anything_in_place(name: str, init: str) -> None:
    original = randomise(NETWORKS[name]())
    converted = prove(original, noise(2, 3, 8, 8), init=init, inplace_activations=False)
    assert not any(getattr(module, "inplace", False) for module in converted.modules())
    x, usual = noise(2, 3, 8, 8), normfree.convert(original, init=init)
    usual.load_state_dict(converted.state_dict())  # the option changes no key
    assert_close(set_alphas(usual, 0.5)(x), set_alphas(converted, 0.5)(x), 1e-6)


@both
def test_without_the_option_opacus_cannot_hook_what_is_written_to_in_place(init: str) -> None:
    model = GradSampleModule(normfree.convert(NETWORKS["resnet"](), init=init).train())
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        model(noise(2, 3, 32, 32))


@both
@pytest.mark.parametrize("name", ["resnet", *broad("regnety_002")])
def test_an_epoch_of_private_training(name: str, init: str) -> None:
    model = private(name, init)
    assert ModuleValidator.validate(model) == []
    before = copy.deepcopy(model.state_dict())
    engine, data = PrivacyEngine(), TensorDataset(noise(8, 3, 32, 32), torch.arange(8) % 3)
    module, optimizer, loader = engine.make_private(
        module=model.train(),
        optimizer=torch.optim.SGD(normfree.param_groups(model, lr=0.1)),
        data_loader=DataLoader(data, batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    assert 0 < engine.get_epsilon(delta=1e-5) < float("inf")
    for key, value in model.named_parameters():
        assert bool(value.isfinite().all()), key
        assert not torch.equal(value, before[key]), key


@both
@pytest.mark.filterwarnings("ignore::normfree.checkpoint.saving.SaveWarning")  # no zoo knows these
@pytest.mark.parametrize("name", SMALL)
def test_a_saved_model_comes_back_as_it_was_converted(name: str, init: str, tmp_path: Path) -> None:
    converted = private(name, init)
    normfree.save(converted, tmp_path / "model.safetensors")
    loaded = normfree.load(tmp_path / "model.safetensors", NETWORKS[name]())
    assert plan_of(loaded) == plan_of(converted)
    assert [type(module).__name__ for module in loaded.modules()] == [
        type(module).__name__ for module in converted.modules()
    ]
    F.cross_entropy(GradSampleModule(loaded.train())(noise(2, 3, 8, 8)), Y).backward()
    assert all(p.grad_sample.shape == (2, *p.shape) for p in loaded.parameters())


@both
def test_by_default_nothing_changes(init: str) -> None:
    plan = normfree.plan(NETWORKS["resnet"](), init=init)
    assert plan.inplace_activations
    assert plan.out_of_place == ()
    assert not any(edit.copy for edit in plan.norms)
    assert "inplace_activations" in plan.to_json()


@both
def test_every_kind_of_copy_is_tried_here(init: str) -> None:
    modules = [module for name in SMALL for module in private(name, init).modules()]
    found = {cls.__name__ for module in modules for cls in type(module).__mro__}
    nothing_left = set() if init == "preserve" else {"Copy"}
    assert {"CopiedAffine", "CopiedOutput", "CopiedSkipInit"} | nothing_left <= found


def test_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    model, x = private("gate", "preserve").eval(), noise(2, 3, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), model(x), 1e-6)
