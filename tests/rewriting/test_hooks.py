"""Whatever changes what a layer computes from outside: hooks, patched forwards, hidden references."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from harness import Block, assert_close, assert_preserved, both, noise, prove, randomise, set_alphas
from readings import actions, alphas, norms, plan_of
from torch import Tensor, nn

import normfree


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def shift_output(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out + 1


def shift_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] + 1,)


@pytest.mark.parametrize("name", ["conv", "bn"])
@pytest.mark.parametrize("where", ["input", "output"])
def test_hook_that_changes_what_a_layer_computes_is_preserved(name: str, where: str) -> None:
    model = randomise(Net())
    if where == "output":
        model.get_submodule(name).register_forward_hook(shift_output)
    else:
        model.get_submodule(name).register_forward_pre_hook(shift_input)
    assert_preserved(model, noise(2, 3, 6, 6))


def test_forward_patched_on_the_root_is_what_counts() -> None:
    def tapped(self: Net, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.cat([self.bn(y), torch.tanh(y)], 1)

    model = randomise(Net())
    model.forward = types.MethodType(tapped, model)
    assert_preserved(model, noise(2, 3, 6, 6))


def test_forward_patched_on_a_child_is_what_counts() -> None:
    def tapped(self: Net, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.cat([self.bn(y), torch.tanh(y)], 1)

    model = randomise(nn.Sequential(Net(), nn.Conv2d(8, 2, 1)))
    model[0].forward = types.MethodType(tapped, model[0])
    assert_preserved(model, noise(2, 3, 6, 6))


class PlainList(nn.Module):
    """Keeps its layers in a list that torch does not know, beside their registered names."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        holders = {"list": [self.conv, self.bn], "tuple": (self.conv, self.bn), "dict": {0: self.conv, 1: self.bn}}
        self.layers = holders[kind]

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layers[1](self.layers[0](x)))


@both
@pytest.mark.parametrize("kind", ["list", "tuple", "dict"])
def test_norm_reached_through_a_plain_container_is_gone_there_too(kind: str, init: str) -> None:
    model = randomise(PlainList(kind))
    converted = normfree.convert(model, init=init)
    assert converted.layers[1] is converted.bn
    assert_preserved(model, noise(2, 3, 6, 6))
    prove(model, noise(2, 3, 6, 6), init=init)


class Conv2dWithNorm(nn.Conv2d):
    """A convolution that holds its own norm, as detectron2's does."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(o)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


@both
def test_norm_inside_a_convolution_is_converted_in_its_slot(init: str) -> None:
    model = randomise(nn.Sequential(Conv2dWithNorm(3, 4), nn.ReLU(), Conv2dWithNorm(4, 4)))
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert norms(converted) == []
    assert "never called" not in [edit.reason for edit in converted._normfree_plan.norms]
    assert_preserved(model, noise(2, 3, 6, 6))
    if init == "skipinit":
        assert [converted[i].norm.bias is not None for i in (0, 2)] == [True, True]


class KeepsActivation(nn.Module):
    """Stores what it computed, for a plot or a loss: a tensor with a history, which deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        return self.bn(self.last)


@both
def test_model_that_kept_an_activation_converts(init: str) -> None:
    model = randomise(KeepsActivation())
    model(noise(2, 3, 6, 6))
    assert model.last.grad_fn is not None
    assert norms(normfree.convert_(model, init=init)) == []
    model = randomise(KeepsActivation())
    model(noise(2, 3, 6, 6))
    assert norms(normfree.convert(model, init=init)) == []


class OverwritesItsSkip(nn.Module):
    """The original itself writes into its skip path: not ours to repair, and no fault of the conversion."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(x)
        return x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(out)))))


@both
def test_skip_path_that_the_original_overwrites_is_left_so(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), OverwritesItsSkip()))
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert_preserved(model, noise(2, 3, 6, 6))
    assert converted[1].relu.inplace
    set_alphas(converted, 0.0)
    assert torch.equal(converted(noise(2, 3, 6, 6)), torch.relu(converted[0](noise(2, 3, 6, 6))))


@both
def test_layers_called_by_keyword_fold(init: str) -> None:
    class Keyword(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.bn(input=self.conv(input=x)))

    model = randomise(Keyword())
    assert actions(prove(model, noise(2, 3, 6, 6), init=init)) == {"bn": "fold"}
    assert_preserved(model, noise(2, 3, 6, 6))


def test_weight_that_is_also_used_as_a_tensor_keeps_its_values() -> None:
    class Tied(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            return torch.nn.functional.conv_transpose2d(y, self.conv.weight)

    model = randomise(Tied())
    converted = normfree.convert(model, init="preserve")
    assert_close(converted.conv.weight, model.conv.weight, 0)
    assert_preserved(model, noise(2, 3, 6, 6))


class Asks(nn.Module):
    """An attribute of its own whose name ends as torch's do, as timm's EfficientNetFeatures has it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.feature_hooks = None

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if self.feature_hooks is None else self.feature_hooks.get_output(x)


@both
def test_an_attribute_that_is_called_like_hooks_is_none(init: str) -> None:
    converted = prove(randomise(Asks()), noise(2, 4, 6, 6), init=init)
    assert plan_of(converted).opaque == ()
    assert alphas(converted) == ["block.conv2"]


class Collects(nn.Module):
    """Returns what a hook of its own has collected, and keeps the handle."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.seen = Block(), {}
        self.handles = [module.register_forward_hook(self.collect) for module in (self.block.conv1, self.block)]

    def collect(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.seen[type(module).__name__] = output

    def forward(self, x: Tensor) -> list[Tensor]:
        self.block(x)
        found = list(self.seen.values())
        self.seen.clear()
        return found


@both
def test_hooks_of_the_model_itself_run_in_copies_of_copies_and_in_proofs(init: str) -> None:
    original = randomise(Collects())
    converted = copy.deepcopy(prove(original, noise(2, 4, 6, 6), init=init))
    assert len(converted(noise(2, 4, 6, 6))) == 2
    for handle in converted.handles:
        handle.remove()
    assert converted(noise(2, 4, 6, 6)) == []
    assert len(original(noise(2, 4, 6, 6))) == 2
