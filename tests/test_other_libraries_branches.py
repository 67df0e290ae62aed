"""Branches and activations of other libraries that are easily taken for something else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from harness import alphas, both, kinds, noise, prove, randomise
from torch import Tensor, nn

import normfree


class Block(nn.Module):
    """A residual block whose last layer can carry the scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Siamese(nn.Module):
    """One encoder, called once for each of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 1), Block()

    def forward(self, a: Tensor, b: Tensor) -> Any:
        return self.block(self.stem(a)) - self.block(self.stem(b))


@both
def test_block_called_for_each_of_two_inputs_has_one_scalar_for_both(init: str) -> None:
    model = randomise(Siamese())
    converted = prove(model, (noise(2, 3, 6, 6), noise(2, 3, 6, 6).flip(0)), init=init)
    assert len(alphas(converted)) == 1


class Gate(nn.Module):
    """Adds fine features, gated by coarse ones, to the coarse ones: two places meet here."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Sigmoid())

    def forward(self, x: Tensor) -> Any:
        coarse = self.coarse(x)
        return coarse + self.fine(x) * self.gate(coarse)


@both
def test_branch_that_the_skip_path_only_gates_comes_from_elsewhere(init: str) -> None:
    converted = prove(randomise(Gate()), noise(2, 3, 6, 6), init=init)
    assert kinds(converted) == ["merge"]


class Optioned(nn.Module):
    """The branch ends in a product, and the forward has an option: only its default is ever traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.gate = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        if state is not None:
            y = y + state
        return x + torch.relu(y) * torch.sigmoid(y)


@both
def test_block_whose_forward_has_an_option_gets_its_scalar(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), Optioned(), Optioned()))
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert len(alphas(converted)) == 2


class Resize(nn.Module):
    """Brings features to one size; on features of that size it does nothing, and its ``repr`` does not tell it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(self.size, self.size))


@both
def test_resampling_to_the_size_of_a_probe_is_no_activation(init: str) -> None:
    layers = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), Resize(4), nn.Conv2d(4, 4, 1)
    prove(randomise(nn.Sequential(*layers)), noise(2, 3, 8, 8), init=init)


class Chosen(nn.Module):
    """An activation or something else, and its ``repr`` does not say which."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 2) if self.name == "scan" else torch.relu(x)


def test_what_one_activation_does_is_not_taken_for_another_of_its_type() -> None:
    def gain(*before: nn.Module) -> float:
        model = nn.Sequential(*before, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Chosen("scan"))
        return normfree.plan(model, init="skipinit").weights[-1][1]

    assert gain(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Chosen("relu")) == gain() == 1
