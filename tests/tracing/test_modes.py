"""Paths that only some calls take: training or evaluation, one argument or another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import assert_preserved, both, noise, prove, randomise
from readings import actions, norms
from torch import Tensor, nn

import normfree
from normfree.tracing.running import record


class OneNormPerMode(nn.Module):
    """Split batch norm: one norm for training, another for evaluation, behind the same convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.clean, self.noisy = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.noisy(y) if self.training else self.clean(y)


class OnlyInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.training:
            y = self.bn(y)
        return self.head(y)


class TapInEval(OnlyInTraining):
    """In eval mode the convolution's raw output is returned too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out = self.head(self.bn(y))
        return out if self.training else torch.cat([out, y], 1)


class PerDomain(nn.Module):
    """A norm for each domain: only one of them is seen where the domain has a default."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bns = nn.Conv2d(3, 4, 3), nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return torch.relu(self.bns[domain](self.conv(x)))


@pytest.mark.parametrize("model", [OneNormPerMode, OnlyInTraining, TapInEval])
def test_modes_that_differ_are_both_preserved(model: type[nn.Module]) -> None:
    assert_preserved(randomise(model()), noise(2, 3, 6, 6))


@both
@pytest.mark.parametrize("model", [OneNormPerMode, TapInEval])
def test_modes_that_differ_are_proved(model: type[nn.Module], init: str) -> None:
    assert norms(prove(randomise(model()), noise(2, 3, 6, 6), init=init)) == []


@pytest.mark.parametrize("model", [OneNormPerMode, OnlyInTraining])
def test_norms_of_either_mode_are_seen(model: type[nn.Module]) -> None:
    plan = normfree.plan(randomise(model()), init="preserve")
    assert [norm.name for norm in plan.norms if norm.reason == "never called"] == []


@pytest.mark.parametrize("domain", [0, 1, 2])
def test_norm_that_only_another_argument_reaches_is_preserved(domain: int) -> None:
    assert_preserved(randomise(PerDomain()), noise(2, 3, 6, 6), domain=domain)


class Auxiliary(nn.Module):
    """Deep supervision: a head that exists only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.aux = nn.Sequential(nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(2))
        self.head = nn.Sequential(nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> object:
        x = self.stem(x)
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


@both
def test_auxiliary_head_of_training_folds_too(init: str) -> None:
    model = randomise(Auxiliary())
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert set(actions(converted).values()) == {"fold"}
    assert len(converted.train()(noise(2, 3, 6, 6))) == 2
    assert_preserved(model, noise(2, 3, 6, 6))


RUNS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "one graph": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), 2),
    "dropout in place": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(inplace=True)), 2),
    "another head": (Auxiliary, 4),
}


@pytest.mark.parametrize("network", RUNS)
def test_a_model_runs_no_more_often_than_it_must(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, expected = RUNS[network]
    runs: list[bool] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(kwargs["training"])
        return record(*args, **kwargs)

    monkeypatch.setattr("normfree.tracing.trace.record", counted)
    normfree.plan(make(), init="preserve")
    assert len(runs) == expected
