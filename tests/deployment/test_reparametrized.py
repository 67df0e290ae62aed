"""What is put on a converted layer trains with it; ``fuse`` and ``restore`` say what must go first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import Block, assert_close, noise, randomise
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import normfree
from normfree.errors import UsageError
from normfree.tracing.copying import deep_copy

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


class Halved(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


ADDITIONS: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object], str]] = {
    "pruned": (
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        lambda layer: prune.remove(layer, "weight"),
        r"pruned: torch\.nn\.utils\.prune\.remove\(layer, 'weight'\)",
    ),
    "old weight norm": (utils.weight_norm, utils.remove_weight_norm, r"torch\.nn\.utils\.remove_weight_norm\("),
    "old spectral norm": (utils.spectral_norm, utils.remove_spectral_norm, r"remove_spectral_norm\(layer, 'weight'\)"),
    "weight norm": (
        parametrizations.weight_norm,
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
        r"parametrized: torch\.nn\.utils\.parametrize\.remove_parametrizations\(layer, 'weight'\)",
    ),
    "spectral norm": (
        parametrizations.spectral_norm,
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
        r"remove_parametrizations\(layer, 'weight'\)",
    ),
}


@pytest.mark.parametrize("kind", ADDITIONS)
def test_an_addition_trains_and_is_named_before_it_is_baked_in(kind: str) -> None:
    add, remove, message = ADDITIONS[kind]
    model = normfree.convert(randomise(nn.Sequential(nn.Conv2d(3, 4, 1), Block())).double(), init="preserve")
    layer = model[1].conv2
    add(layer)
    x = noise(2, 3, 8, 8, dtype=torch.float64)
    model(x).sum().backward()
    assert model[1].bn2.raw_alpha.grad is not None
    model.eval()
    expected, before = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    assert_close(deep_copy(model)(x), expected)
    for action in (normfree.fuse, normfree.restore):
        with pytest.raises(UsageError, match=rf"takes plain weights only(.|\n)*  - 1\.conv2 \(.*{message}"):
            action(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    remove(layer)
    assert_close(model(x), expected)
    assert_close(normfree.fuse(model)(x), expected)
    assert_close(normfree.restore(model).eval()(x), expected)
