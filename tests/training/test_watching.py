"""A learning rate that is too high is told in the first steps, with the layer that leaves its range."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from harness import noise, randomise
from torch import nn
from torch.nn import functional as F

import normfree
from normfree.errors import UsageError
from normfree.training.watching import FACTOR, SignalWarning

X, Y = noise(4, 3, 64, 64), torch.tensor([0, 1, 0, 1])


@pytest.fixture
def converted() -> nn.Module:
    model = randomise(timm.create_model("test_resnet", num_classes=2))
    return normfree.convert(model, init="preserve").train()


def train(model: nn.Module, lr: float, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_a_hopeless_rate_is_told_once_and_the_hooks_go(converted: nn.Module) -> None:
    watched = normfree.watch(converted)
    assert hooks(converted) > 1
    with pytest.warns(SignalWarning, match=r"at step \d+ the root mean square of its output is .* too high") as caught:
        train(converted, 3.0, 12)
    assert len(caught) == 1
    named = str(caught[0].message).split(":")[0]
    assert named == watched.layer
    assert isinstance(converted.get_submodule(named), nn.Module)
    assert watched.growth > FACTOR
    assert hooks(converted) == 0


def test_the_first_layer_that_grew_is_named(converted: nn.Module) -> None:
    watched = normfree.watch(converted, factor=20)
    converted(X)
    with torch.no_grad():
        converted.get_submodule("layer2.0.conv1").weight.mul_(100)
    with pytest.warns(SignalWarning, match=r"^layer2.0.conv1: at step 2 .* is [2-9]\d"):
        converted(X)
    assert watched.layer == "layer2.0.conv1"


def test_what_is_not_finite_is_told(converted: nn.Module) -> None:
    normfree.watch(converted)
    converted(X)
    with torch.no_grad():
        converted.get_submodule("layer1.0.conv1").weight.fill_(float("nan"))
    with pytest.warns(SignalWarning, match="^layer1.0.conv1: at step 2 .* is not finite"):
        converted(X)


def test_a_good_rate_is_left_alone_and_the_watch_ends(converted: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watched = normfree.watch(converted, steps=3)
        train(converted, 1e-3, 3)
    assert 1 <= watched.growth < 2
    assert hooks(converted) == 0


def test_branches_that_start_at_zero_and_passes_in_eval_mode_count_nothing() -> None:
    model = normfree.convert(timm.create_model("test_resnet", num_classes=2))
    with normfree.watch(model) as watched:
        model.eval()(100 * X)
        model.train()(X)
        for module in model.modules():
            if getattr(module, "alpha", None) is not None:
                module.alpha = 1e-3
        model(X)
    assert watched.growth < 2
    assert hooks(model) == 0


def test_what_is_not_converted_or_fused_is_refused(converted: nn.Module) -> None:
    for model in (timm.create_model("test_resnet"), normfree.fuse(converted)):
        with pytest.raises(UsageError, match="was not converted by normfree, or is fused: nothing to watch"):
            normfree.watch(model)
