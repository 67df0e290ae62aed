"""Parameter groups and adaptive clipping."""

from __future__ import annotations

import pytest
import timm
import torch
from harness import Block, noise, randomise
from timm.optim import create_optimizer_v2
from torch import nn

import normfree
from normfree.errors import UsageError
from normfree.training.optim import SCALAR_RATE, clipped_parameters


def by_name(model: nn.Module, **options: float) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = normfree.param_groups(model, **options)
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


@pytest.mark.parametrize("init", ["skipinit", "preserve"])
def test_every_parameter_is_in_one_group(init: str) -> None:
    model = normfree.convert(randomise(timm.create_model("mobilenetv3_small_050", num_classes=3)), init=init)
    groups = by_name(model, lr=0.1, weight_decay=1e-4)
    every = [name for names in groups.values() for name in names]
    assert sorted(every) == sorted(name for name, _ in model.named_parameters())
    assert groups["scalars"] == {name for name in every if name.endswith(".raw_alpha")}
    leaves = {name.rpartition(".")[2] for name in groups["vectors"]}
    assert leaves == {"bias"}
    assert {name.rpartition(".")[2] for name in groups["weights"]} == {"weight"}


def test_rates_of_the_groups() -> None:
    model = normfree.convert(nn.Sequential(Block(), nn.Flatten(), nn.Linear(4, 2)), inputs=torch.randn(2, 4, 1, 1))
    groups = {g["name"]: g for g in normfree.param_groups(model, lr=0.5, weight_decay=0.25)}
    assert [(g["lr"], g["weight_decay"]) for g in groups.values()] == [
        (0.5, 0.25),
        (0.5, 0.0),
        (0.5 * SCALAR_RATE, 0.0),
    ]
    (scalars,) = (g for g in normfree.param_groups(model, lr=0.5, scalar_lr=0.25) if g["name"] == "scalars")
    assert scalars["lr"] == 0.25


def test_an_alpha_of_somebody_elses_is_no_scalar() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.alpha

    model = normfree.convert(nn.Sequential(Block(), Own()))
    groups = by_name(model, lr=0.1)
    assert groups["scalars"] == {"0.conv2.raw_alpha"}
    assert "1.alpha" in groups["vectors"]


def test_frozen_parameters_are_left_out_and_tied_ones_appear_once() -> None:
    model = normfree.convert(nn.Sequential(Block(), Block()))
    model[1].conv1.weight = model[0].conv1.weight
    model[0].conv2.weight.requires_grad_(False)
    weights = by_name(model, lr=0.1)["weights"]
    assert weights == {"0.conv1.weight", "1.conv2.weight"}


def test_model_without_scalars_works_too() -> None:
    assert set(by_name(timm.create_model("test_resnet"), lr=0.1)) == {"weights", "vectors"}


@pytest.mark.parametrize("rates", [{"lr": -1.0}, {"lr": 1.0, "weight_decay": -1.0}, {"lr": 1.0, "scalar_lr": -1.0}])
def test_negative_rates_are_refused(rates: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="rates cannot be negative"):
        normfree.param_groups(normfree.convert(Block()), **rates)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing in this Block requires a gradient"):
        normfree.param_groups(Block().requires_grad_(False), lr=0.1)


OPTIMIZERS = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD", "Rprop"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_torch_optimizer_takes_the_groups(name: str) -> None:
    model = normfree.convert(Block())
    optimizer = getattr(torch.optim, name)(normfree.param_groups(model, lr=0.01))
    before = model.conv2.alpha
    model(noise(2, 4, 8, 8)).square().sum().backward()
    optimizer.step()
    assert model.conv2.alpha != before


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lion", "nadamw"])
def test_timms_factory_takes_the_groups(name: str) -> None:
    model = normfree.convert(Block())
    optimizer = create_optimizer_v2(normfree.param_groups(model, lr=0.01, weight_decay=0.1), opt=name, lr=0.01)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("weights", 0.01, 0.1),
        ("vectors", 0.01, 0.0),
        ("scalars", 0.01 * SCALAR_RATE, 0.0),
    ]
    before = model.conv2.alpha
    model(noise(2, 4, 8, 8)).square().sum().backward()
    optimizer.step()
    assert model.conv2.alpha != before


def test_clipping_leaves_scalars_vectors_and_the_classifier_alone() -> None:
    model = normfree.convert(nn.Sequential(Block(), nn.Flatten(), nn.Linear(256, 2)))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    normfree.clip_grad(model, clip_factor=0.01)
    grads = {name: p.grad for name, p in model.named_parameters()}
    clipped = {
        name for name, grad in grads.items() if grad is not None and not torch.equal(grad, torch.ones_like(grad))
    }
    assert clipped == {"0.conv1.weight", "0.conv2.weight"}
    weight, grad = model[0].conv1.weight.detach(), grads["0.conv1.weight"]
    assert grad is not None
    bound = 0.01 * weight.flatten(1).norm(dim=1).clamp_min(1e-3)
    assert torch.allclose(grad.flatten(1).norm(dim=1), bound, rtol=1e-4)


def test_clipping_takes_alphas_and_the_classifier_where_they_start_at_one() -> None:
    model = normfree.convert(randomise(nn.Sequential(Block(), nn.Flatten(), nn.Linear(256, 2))), init="preserve")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    normfree.clip_grad(model)
    left = {name for name, p in model.named_parameters() if torch.equal(p.grad, torch.ones_like(p))}
    assert left == {name for name, _ in model.named_parameters() if name.endswith("bias")}
    alpha = model[0].bn2.raw_alpha
    assert float(alpha.grad) == pytest.approx(0.01 * float(alpha.detach()), rel=1e-4)


def test_classifier_is_the_one_that_timm_names() -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=2)
    clipped = {id(p) for p in clipped_parameters(normfree.convert(model))}
    assert len(clipped) == sum(p.dim() > 1 for p in model.parameters()) - 1
    headless = timm.create_model("test_resnet", num_classes=0)
    assert len(list(clipped_parameters(headless))) == sum(p.dim() > 1 for p in headless.parameters())
