"""What a layer meets, told by the norms alone, is what it meets where the norms' inputs are normal."""

from __future__ import annotations

import pytest
import torch
from harness import randomise
from readings import plan_of
from torch import Tensor, nn
from torch.nn import functional as F

import normfree


class Paths(nn.Module):
    """Every way by which a mean reaches a layer: activations, sums, pools, concatenation, flattening, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n1 = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.after_act, self.n2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.after_sum, self.n3 = nn.Conv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8)
        self.after_cat, self.n4 = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)
        self.pool = nn.AvgPool2d(2)
        self.after_pool, self.n5 = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.n1(self.stem(x)))
        b = F.silu(self.n2(self.after_act(a)))
        c = F.relu(self.n3(self.after_sum(a + b)))
        d = torch.tanh(self.n4(self.after_cat(torch.cat([b, c], 1))))
        e = F.relu(self.n5(self.after_pool(self.pool(d))))
        return self.head(e.flatten(1))


def met(model: nn.Module, x: Tensor, names: list[str]) -> dict[str, Tensor]:
    """The mean of every layer's input in train mode, where each norm hands on what its affine says."""
    seen: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, a, name=name: seen.update({name: a[0]}))
    with torch.no_grad():
        model.train()(x)
    return {name: value.mean(0) if value.dim() == 2 else value.mean((0, 2, 3)) for name, value in seen.items()}


def test_means_are_those_of_a_run_with_batch_statistics() -> None:
    model = randomise(Paths())
    converted = normfree.convert(model, init="preserve")
    carried = {layer.path: layer for layer in plan_of(converted).carried}
    assert not carried["stem"].centred, "nobody knows the mean of an image"
    names = [path for path, layer in carried.items() if layer.centred]
    assert names == ["after_act", "after_sum", "after_cat", "after_pool", "head"]
    torch.manual_seed(0)
    means = met(model, torch.randn(64, 3, 8, 8), names)
    for name in names:
        found = converted.get_submodule(name).center.flatten()
        distance = float((found - means[name]).norm() / means[name].norm())
        assert distance < 0.3, f"{name}: {distance}"  # sums are not normal, nor are their parts independent


def test_a_head_is_what_no_norm_follows_and_its_unit_is_a_power_of_two() -> None:
    model = randomise(Paths())
    converted = normfree.convert(model, init="preserve")
    assert [layer.path for layer in plan_of(converted).carried if layer.head] == ["head"]
    gain = converted.head.gain
    assert torch.equal(gain, gain[:1].expand(3))
    assert float(gain[0].log2()) % 1 == 0
    assert torch.equal(converted.head.weight * gain[0], model.head.weight)


class Unknown(nn.Module):
    """A layer behind an operation of which nothing is known, one behind two different inputs, and one that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.b, self.n2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.c, self.n3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n1(self.a(x)))
        x = torch.relu(self.n2(self.b(x.cumsum(2))))
        return self.n3(self.c(self.c(x) - x)) + self.b.weight.sum()


def test_where_nothing_is_known_a_layer_is_not_centred_and_a_weight_that_is_read_keeps_its_value() -> None:
    model = randomise(Unknown())
    converted = normfree.convert(model, init="preserve")
    carried = {layer.path: (layer.unit, layer.centred) for layer in plan_of(converted).carried}
    assert carried == {"a": (2.0, False), "b": (1.0, False), "c": (2.0, False)}
    assert torch.equal(converted.b.weight, model.b.weight)
    x = torch.randn(2, 3, 5, 5)
    assert normfree.verify(converted, model, x).ok


@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(0.1)])
def test_the_mean_behind_an_activation_is_an_integral(act: nn.Module) -> None:
    layers = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), act, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    model = randomise(nn.Sequential(*layers))
    converted = normfree.convert(model, init="preserve")
    z = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
    bn = model[1]
    values = act(bn.bias.double()[:, None] + bn.weight.double()[:, None] * z)
    expected = torch.trapezoid(values * density, z)
    assert converted[3].center.flatten().double().tolist() == pytest.approx(expected.tolist(), abs=2e-3)
