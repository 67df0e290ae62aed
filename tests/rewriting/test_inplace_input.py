"""The input of a deleted norm: who else writes into it or keeps it, and what stays in place."""

from __future__ import annotations

import pytest
import torch
from harness import assert_close, assert_preserved, both, noise, prove, randomise, set_alphas
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import normfree


class InputWrittenLater(nn.Module):
    """The other way round: the norm's input is written in place while the norm's output is still needed."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        x = self.relu(x)
        return self.conv(y) + x


class InputWrittenByMethod(InputWrittenLater):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        x.clamp_(min=0)
        return self.conv(y) + x


@pytest.mark.parametrize("block", [InputWrittenLater, InputWrittenByMethod])
def test_output_of_a_deleted_norm_survives_a_write_into_its_input(block: type[nn.Module]) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), block()))
    assert_preserved(model, noise(2, 3, 6, 6))
    x = noise(2, 3, 6, 6)
    converted = set_alphas(normfree.convert(model, init="skipinit"), 1.0)
    stem = converted[0](x)
    expected = converted[1].conv(stem) + torch.relu(stem)
    assert_close(converted(x), expected, 1e-6)


class InputAugmentedBefore(nn.Module):
    """``x += 0.5`` is no new tensor: the skip path, the norm's input and what is written to are all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        skip = x
        x += 0.5
        return self.conv(torch.tanh(self.relu(self.bn(x)))) + skip


@both
def test_augmented_assignment_before_the_norm_is_no_new_tensor(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), InputAugmentedBefore()))
    assert_preserved(model, noise(2, 3, 6, 6))
    x = noise(2, 3, 6, 6)
    converted = normfree.convert(model, init=init, alpha=0.0)
    with torch.no_grad():
        found, stem = converted(x), converted[0](x) + 0.5
        y = converted[1].conv(torch.tanh(torch.relu(converted[1].bn(stem.clone()))))
        assert_close(found, stem + y, 1e-6)


@both
def test_in_place_activation_trains_where_the_norms_input_is_kept_for_backward(init: str) -> None:
    layers = [nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)]
    converted = prove(randomise(nn.Sequential(*layers)), noise(2, 3, 6, 6), init=init)
    converted(noise(2, 3, 6, 6)).sum().backward()
    assert converted[0].weight.grad.abs().sum() > 0


def test_activation_behind_a_folded_norm_stays_in_place() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    converted = prove(randomise(nn.Sequential(*layers)), noise(2, 3, 6, 6), init="skipinit")
    assert converted[2].inplace


@both
def test_input_of_the_model_is_not_written_to(init: str) -> None:
    model = randomise(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1)))
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    x = noise(2, 3, 6, 6)
    converted(x)
    assert torch.equal(x, noise(2, 3, 6, 6))


class WrittenLater(nn.Module):
    """A timm norm with an in-place activation of its own, whose input is written once it has been read."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = BatchNormAct2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        x.mul_(2)
        return self.conv(y) + x


@both
def test_slot_with_an_activation_copies_what_is_written_later(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(1), WrittenLater()))
    x = noise(2, 3, 6, 6)
    converted = prove(model, x, init=init)
    assert_preserved(model, x)
    if init == "skipinit":
        converted.train()(x).sum().backward()  # the original's own backward fails: the norm keeps its input for it
        assert torch.equal(converted(x), 2 * converted[1](converted[0](x)))
