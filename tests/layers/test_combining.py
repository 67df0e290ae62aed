"""The mean of a filter over its positions moves less than the rest of it, unless somebody else computes the weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from harness import assert_close, noise, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import normfree
from normfree.errors import UsageError

X = noise(2, 3, 8, 8)


@pytest.fixture
def model() -> Any:
    """A converted network: 3x3 behind a stem, and 1x1."""
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    return normfree.convert(randomise(nn.Sequential(*layers)), init="preserve").eval()


def effective(layer: Any) -> Tensor:
    """Return what a layer computes with, over its gain."""
    return (layer.unit * layer.combined()[0]).detach()


def test_units_of_filters_of_their_means_and_of_what_meets_one_position(model: Any) -> None:
    spatial, pointwise = normfree.Plan.of(model).carried
    assert (spatial.unit, spatial.mean_unit, pointwise.unit, pointwise.mean_unit) == (1.0, 4.0, 2.0, 1.0)
    assert pointwise.path == "3"
    assert model[3].filter_mean is None


def test_a_step_moves_the_mean_of_a_filter_sixteen_times_less(model: Any) -> None:
    layer = model[0]
    before = effective(layer)
    assert_close(before, layer.weight.detach(), 1e-6)
    direction = noise(*layer.weight.shape)
    (layer.combined()[0] * direction * layer.unit).sum().backward()
    torch.optim.SGD([layer.weight], lr=0.1).step()
    moved = (before - effective(layer)) / 0.1
    mean, expected = moved.mean((2, 3), keepdim=True), direction.mean((2, 3), keepdim=True)
    assert_close(mean, expected / 16, 1e-4)
    assert_close(moved - mean, direction - expected, 1e-4)


def moved(model: Any) -> Any:
    """Return a model whose filters have other means than at the start, as after training."""
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained[0].weight += noise(*trained[0].weight.shape)
    return trained


@pytest.mark.parametrize("trained", [False, True])
def test_what_is_pruned_is_zero(model: Any, trained: bool) -> None:
    layer = (moved(model) if trained else model)[0]
    before = effective(layer)
    prune.l1_unstructured(layer, "weight", 0.5)
    kept = layer.weight_mask
    assert int((kept == 0).sum()) == 54
    assert_close(effective(layer), before * kept, 1e-6)
    assert layer.weight.requires_grad, "the first step after pruning learns already"
    prune.remove(layer, "weight")
    assert torch.equal(effective(layer) == 0, kept == 0)
    assert_close(normfree.fuse(nn.Sequential(layer))[0].weight.detach(), before * kept * (1 / layer.unit), 1e-6)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("trained", [False, True])
def test_a_parametrization_acts_on_the_weight(model: Any, trained: bool) -> None:
    layer = (moved(model) if trained else model)[0]
    before = effective(layer)
    parametrize.register_parametrization(layer, "weight", Doubled())
    assert_close(effective(layer), 2 * before, 1e-6)


def test_what_keeps_no_weight_is_put_on_before_training_or_after_fusing(model: Any) -> None:
    trained = moved(model)
    before = effective(model[0])
    parametrizations.weight_norm(model[0])
    assert_close(effective(model[0]), before, 1e-6)
    parametrizations.weight_norm(trained[0])
    with pytest.raises(UsageError, match=r"(?s)fuse first.*parametrized: .*remove_parametrizations"):
        trained(X)
