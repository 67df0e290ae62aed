"""New parameters take the dtype and the requires_grad of what they belong to."""

from __future__ import annotations

import pytest
import torch
from harness import assert_close, both, noise, prove, randomise
from readings import actions, alphas
from torch import Tensor, nn

import normfree
from normfree.conversion import FrozenWarning
from normfree.errors import UnsupportedModelError

frozen = pytest.mark.filterwarnings("ignore::normfree.conversion.FrozenWarning")


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


@frozen
@both
@pytest.mark.parametrize("tail", TAILS)
def test_frozen_model_gets_no_trainable_parameter(tail: str, init: str) -> None:
    model = randomise(Block(tail)).requires_grad_(False)
    converted = prove(model, noise(2, 4, 6, 6), init=init)
    assert [name for name, p in converted.named_parameters() if p.requires_grad] == []


@frozen
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
    assert not converted[1].gain.requires_grad, "a constant"
    assert converted[1].bias.requires_grad
    assert not converted[0].weight.requires_grad


def test_frozen_norm_on_a_trainable_conv_stays_frozen() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    model[1].requires_grad_(False)
    converted = prove(model, noise(2, 3, 6, 6), init="preserve")
    assert not converted[1].gain.requires_grad
    assert not converted[1].bias.requires_grad
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


@pytest.mark.parametrize("place", ["layer", "slot"])
def test_what_overflows_in_float16_is_refused_by_name(place: str) -> None:
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *([nn.ReLU()] if place == "slot" else []), norm)
    with torch.no_grad():
        norm.running_mean[1], norm.running_var[1] = 6e4, 1e-4
    before = {key: value.clone() for key, value in model.half().state_dict().items()}
    name = f"{1 if place == 'layer' else 2} .BatchNorm2d"
    with pytest.raises(UnsupportedModelError, match=rf"{name}.: what the norm amounts to overflows float16; .*float32"):
        normfree.convert_(model, init="preserve")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.isfinite().all() for p in normfree.convert(model.float(), init="preserve").parameters())


def test_fusing_that_overflows_in_float16_is_refused_by_name() -> None:
    model = normfree.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), init="preserve")
    with torch.no_grad():
        model[0].weight[2] = 6e4
        model[1].gain[2] = 6e4
    model.half()
    kept = model[0].weight
    with pytest.raises(UnsupportedModelError, match=r"0 \(ScaledConv2d\): its weight and bias overflow float16"):
        normfree.deployment.fuse.fuse_(model)
    assert model[0].weight is kept


def test_a_frozen_layer_that_would_stay_closed_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Block("weight"), Block("output"))
    model[2].tail.weight.requires_grad_(False)
    model[0].weight.requires_grad_(False)
    with pytest.warns(
        FrozenWarning, match=r"alpha is 0 at 2\.tail; drawn anew: 0, 2\.tail\. Unfreeze.*init='preserve'"
    ):
        converted = normfree.convert(model, init="skipinit")
    assert converted[2].tail.raw_alpha.requires_grad is False
    normfree.convert(randomise(model), init="preserve")
    normfree.convert(model, init="skipinit", exclude=["2.add", "1"])
