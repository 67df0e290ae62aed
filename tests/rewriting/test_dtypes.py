"""New parameters take the dtype and the requires_grad of what they belong to."""

from __future__ import annotations

import pytest
import torch
from harness import assert_close, both, noise, prove, randomise
from readings import actions, alphas
from torch import Tensor, nn

import normfree


class Block(nn.Module):
    """A residual block that holds a fold, a norm of its own slot and, as its tail, what ``tail`` says."""

    def __init__(self, tail: str) -> None:
        super().__init__()
        self.pre = nn.BatchNorm2d(4)
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        tails = {"weight": nn.Conv2d(4, 4, 1), "output": nn.Sigmoid(), "norm": nn.BatchNorm2d(4)}
        self.tail = tails[tail]
        self.between = nn.Tanh() if tail == "norm" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tail(self.between(torch.relu(self.bn(self.conv(torch.relu(self.pre(x)))))))


TAILS = ["weight", "output", "norm"]


@both
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_new_parameter_has_the_models_dtype(dtype: torch.dtype, tail: str, init: str) -> None:
    model = randomise(Block(tail)).to(dtype)
    converted = prove(model, noise(2, 4, 6, 6, dtype=dtype), init=init)
    assert alphas(converted) == ["tail"]
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert {t.dtype for t in converted.state_dict().values()} == {dtype}
    assert {b.dtype for b in converted.buffers()} == set()
    assert converted(noise(2, 4, 6, 6, dtype=dtype)).dtype == dtype


@both
def test_norm_in_float32_inside_a_bfloat16_model_does_not_promote_activations(init: str) -> None:
    model = randomise(Block("norm")).to(torch.bfloat16)
    for module in (model.pre, model.bn, model.tail):
        module.float()
    x = noise(2, 4, 6, 6, dtype=torch.bfloat16)
    model.eval()
    assert model(x).dtype == torch.bfloat16
    converted = normfree.convert(model, init=init)
    assert converted(x).dtype == torch.bfloat16
    assert {p.dtype for p in converted.conv.parameters()} == {torch.bfloat16}
    if init == "preserve":
        assert_close(converted(x), model(x), 0.03)


@both
@pytest.mark.parametrize("tail", TAILS)
def test_frozen_model_gets_no_trainable_parameter(tail: str, init: str) -> None:
    model = randomise(Block(tail)).requires_grad_(False)
    converted = prove(model, noise(2, 4, 6, 6), init=init)
    assert [name for name, p in converted.named_parameters() if p.requires_grad] == []


@both
def test_requires_grad_of_every_kept_parameter_survives(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    model[0].requires_grad_(False)
    model[3].weight.requires_grad_(False)
    converted = normfree.convert(model, init=init)
    assert not converted[0].weight.requires_grad
    assert not converted[3].weight.requires_grad
    assert converted[3].bias.requires_grad


def test_gain_and_bias_follow_the_norm_they_came_from() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    model[0].requires_grad_(False)  # a frozen backbone with trainable norms
    converted = prove(model, noise(2, 3, 6, 6), init="preserve")
    assert not converted[0].gain.requires_grad, "a constant"
    assert converted[0].bias.requires_grad
    assert not converted[0].weight.requires_grad


def test_frozen_norm_on_a_trainable_conv_stays_frozen() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    model[1].requires_grad_(False)
    converted = prove(model, noise(2, 3, 6, 6), init="preserve")
    assert not converted[0].gain.requires_grad
    assert not converted[0].bias.requires_grad
    assert converted[0].weight.requires_grad


@both
def test_complex_buffers_and_integer_parameters_survive(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model.register_buffer("phase", torch.tensor([1j, 2 + 1j]))
    model.register_parameter("codes", nn.Parameter(torch.arange(3), requires_grad=False))
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert actions(converted) == {"1": "fold"}
    assert torch.equal(converted.phase, model.phase)
    assert torch.equal(converted.codes, model.codes)
