"""A norm of tokens goes into the linear layer in front, behind what only moves its features into dimension 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import assert_close, both, noise, randomise
from readings import plan_of
from torch import Tensor, nn

import normfree
from normfree.layers import ChannelAffine


class Tokens(nn.Module):
    """A linear layer and a norm of its features, ``(N, L, C)``; what ``forward`` does is given."""

    flag = False

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.fc, self.bn, self.out = nn.Linear(4, 6), nn.BatchNorm1d(width), nn.Linear(6, 2)

    def flatten(self, x: Tensor) -> Tensor:
        if self.flag:
            self.kept = x
        return x.flatten(0, 1)


def transposed(self: Any, x: Tensor) -> Tensor:
    return self.out(self.bn(self.fc(x).transpose(1, 2)).transpose(1, 2).relu())


def permuted(self: Any, x: Tensor) -> Tensor:
    x = self.fc(x)
    x = self.bn(x.permute(0, 2, 1).contiguous()).permute(0, 2, 1)
    return self.out(x.relu())


def flattened(self: Any, x: Tensor) -> Tensor:
    x = self.fc(x)
    return self.out(self.bn(x.flatten(0, 1)).reshape_as(x).relu())


def reshaped(self: Any, x: Tensor) -> Tensor:
    n, length, _ = x.shape
    x = self.bn(self.fc(x).reshape(-1, 6))
    return self.out(x.reshape(n, length, 6).relu())


def read_before(self: Any, x: Tensor) -> Tensor:
    h = self.fc(x)
    y = self.bn(h.transpose(1, 2)).transpose(1, 2)
    return self.out((y + h if self.flag else y).relu())


def read_between(self: Any, x: Tensor) -> Tensor:
    h = self.fc(x).transpose(1, 2)
    y = self.bn(h)
    return self.out((y + h if self.flag else y).transpose(1, 2).relu())


def by_its_own(self: Any, x: Tensor) -> Tensor:
    y = self.out(self.bn(self.flatten(self.fc(x))).relu())
    return y + self.kept.sum() if self.flag else y


def of_places(self: Any, x: Tensor) -> Tensor:
    return self.out(self.bn(self.fc(x)).relu())


def of_places_again(self: Any, x: Tensor) -> Tensor:
    return self.out(self.bn(self.fc(x).transpose(1, 2).transpose(1, 2)).relu())


def written(forward: Callable[..., Tensor], width: int = 6) -> Any:
    kind: Any = type("Written", (Tokens,), {"forward": forward})
    return randomise(kind(width)).double().eval()


@both
@pytest.mark.parametrize("forward", [transposed, permuted, flattened, reshaped])
def test_norm_of_tokens_folds(forward: Callable[..., Tensor], init: str) -> None:
    model, x = written(forward), noise(2, 5, 4, dtype=torch.float64)
    converted = normfree.convert(model, init=init, inputs=x)
    edit = plan_of(converted).norms[0]
    assert (edit.action, edit.producer, edit.feed) == ("fold", "fc", "fc (Linear)")
    report = normfree.verify(converted, model, x)
    assert report.ok, str(report)
    if init == "preserve":
        assert_close(converted(x), model(x))
        assert_close(normfree.fuse(converted)(x), model(x))
        assert torch.equal(normfree.restore(converted)(x), model(x))


@pytest.mark.parametrize("length", [5, 6])
@pytest.mark.parametrize("forward", [read_before, read_between, by_its_own, of_places, of_places_again])
def test_other_norms_stay(forward: Callable[..., Tensor], length: int) -> None:
    model, x = written(forward, length if "places" in forward.__name__ else 6), noise(2, length, 4, dtype=torch.float64)
    converted: Any = normfree.convert(model, init="preserve", inputs=x)
    assert isinstance(converted.bn, ChannelAffine)
    for flag in (False, True):
        model.flag = converted.flag = flag
        assert_close(converted(x), model(x))


def test_norm_of_flattened_places_folds_into_a_convolution() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x).flatten(2)).relu()

    model, x = randomise(Places()).double().eval(), noise(2, 3, 8, 8, dtype=torch.float64)
    converted = normfree.convert(model, init="preserve", inputs=x)
    assert plan_of(converted).norms[0].producer == "conv"
    assert_close(converted(x), model(x))
