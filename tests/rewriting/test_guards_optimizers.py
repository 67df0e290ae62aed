"""An optimizer that was built before ``convert_`` is named, with the parameters it would go on moving for nothing."""

from __future__ import annotations

import warnings

import pytest
import torch
from harness import both
from torch import nn

import normfree
from normfree.rewriting.optimizers import OptimizerWarning


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


@both
def test_optimizer_that_holds_what_goes_is_named(init: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gone = {"skipinit": r"1\.weight, 1\.bias", "preserve": r"0\.bias, 1\.weight, 1\.bias"}[init]
    text = rf"^SGD holds parameters .* \({gone}\) and none .*build it after the conversion$"
    with pytest.warns(OptimizerWarning, match=text):
        normfree.convert_(model, init=init)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert len(held - {id(p) for p in model.parameters()}) == {"skipinit": 2, "preserve": 3}[init]


@both
def test_long_lists_are_cut(init: str) -> None:
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(OptimizerWarning, match=r"AdamW .*5\.weight and 3 more\)"):
        normfree.convert_(model, init=init)
    assert len(optimizer.param_groups[0]["params"]) == 12


@both
def test_optimizer_of_something_else_is_not_named(init: str) -> None:
    model, other = net(), net()
    mine = model[1].weight  # somebody holds it, but no optimizer
    optimizer = torch.optim.SGD([*other.parameters(), model[0].weight], 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = normfree.convert(model, init=init)
        normfree.convert_(model, init=init)
    assert mine not in set(model.parameters())
    assert optimizer.param_groups[0]["params"][-1] is model[0].weight
    assert not {id(p) for p in converted.parameters()} & {id(p) for p in model.parameters()}


def test_optimizer_built_after_the_conversion_is_fine() -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normfree.convert_(model, init="preserve")
    optimizer = torch.optim.SGD(normfree.param_groups(model, lr=0.1))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_nobody_looks_for_optimizers_where_only_the_model_holds_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("looking through all objects takes a fraction of a second")

    monkeypatch.setattr("normfree.rewriting.optimizers.gc.get_objects", fail)
    model = net()
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    assert normfree.convert_(model) is model
