"""What `skipinit` draws: He, fan-in, with the gain of the activation that follows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import normfree
from normfree.analysis.activations import gain_of
from normfree.training.initialization import fan_in


class Mish2(nn.Module):
    """An activation nobody has heard of."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * x * torch.tanh(torch.nn.functional.softplus(x))


@pytest.mark.parametrize(
    ("activation", "gain"),
    [
        (None, 1.0),
        (nn.ReLU(inplace=True), math.sqrt(2)),
        (nn.LeakyReLU(0.2), math.sqrt(2 / 1.04)),
        (nn.Hardtanh(-1e9, 1e9), 1.0),
        (torch.abs, 1.0),
    ],
)
def test_gain_keeps_the_second_moment_at_one(activation: nn.Module | None, gain: float) -> None:
    assert gain_of(activation) == pytest.approx(gain, rel=1e-4)


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.Tanh(), nn.Softplus()])
def test_gain_agrees_with_another_rule_of_integration(activation: nn.Module) -> None:
    points, weights = np.polynomial.hermite_e.hermegauss(120)
    moment = weights @ activation(torch.from_numpy(points)).numpy() ** 2 / math.sqrt(2 * math.pi)
    assert gain_of(activation) == pytest.approx(1 / math.sqrt(moment), rel=1e-5)


def test_gain_of_an_unknown_activation_agrees_with_sampling() -> None:
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    sampled = 1 / Mish2()(z).square().mean().sqrt().item()
    assert gain_of(Mish2()) == pytest.approx(sampled, rel=0.01)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(7, 3), 7),
        (nn.Conv2d(8, 4, 3), 72),
        (nn.Conv2d(8, 4, 3, groups=4), 18),
        (nn.Conv2d(8, 8, 5, groups=8), 25),
        (nn.Conv1d(8, 4, 3), 24),
        (nn.Conv3d(2, 4, 3), 54),
        (nn.ConvTranspose2d(8, 4, 4, stride=2), 32),
        (nn.ConvTranspose2d(8, 4, 4, stride=2, groups=2), 16),
    ],
)
def test_fan_in_counts_what_one_output_sums_over(layer: nn.Module, expected: float) -> None:
    assert fan_in(layer) == expected


def test_white_noise_keeps_its_second_moment_through_a_transposed_convolution() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU())
    converted = normfree.convert(model, init="skipinit")
    out = converted(torch.randn(4, 64, 32, 32))
    assert out.square().mean().item() == pytest.approx(1, rel=0.1)


def test_layers_that_a_norm_rescaled_are_drawn_and_the_others_are_left() -> None:
    model = torchvision.models.resnet18()
    converted = normfree.convert(model)
    drawn = dict(converted._normfree_plan.weights)
    assert drawn.keys() == {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert drawn["layer1.0.conv1"] == pytest.approx(math.sqrt(2), rel=1e-5)
    assert drawn["layer1.0.conv2"] == pytest.approx(math.sqrt(2), rel=1e-5)  # the ReLU behind the sum
    assert drawn["layer2.0.downsample.0"] == pytest.approx(math.sqrt(2), rel=1e-5)
    for name, gain in drawn.items():
        layer = converted.get_submodule(name)
        expected = gain / math.sqrt(fan_in(layer))
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.05), name
        assert torch.count_nonzero(layer.bias) == 0
    assert torch.equal(converted.fc.weight, model.fc.weight)


def test_the_signal_of_resnet50_neither_dies_nor_explodes() -> None:
    """With torchvision's own fan-out weights and no norm it starts at 0.2 and ends at 477."""
    model, x = torchvision.models.resnet50(), torch.randn(2, 3, 96, 96)
    for alpha, growth in ((0.0, 1.2), (1 / 4, 4.0)):
        totals = [row.total.second for row in normfree.signals(normfree.convert(model, alpha=alpha), x).rows]
        assert len(totals) == 16
        assert 0.5 < totals[-1] / totals[2] < growth


def test_draws_depend_on_the_seed_alone() -> None:
    def drawn(seed: int, threads: int) -> Tensor:
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        return normfree.convert(model, init="skipinit").layer4[0].conv2.weight

    model = timm.create_model("test_resnet")
    assert torch.equal(drawn(3, 1), drawn(3, 2))
    assert not torch.equal(drawn(3, 1), drawn(4, 1))
