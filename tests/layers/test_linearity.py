"""Which layers carry on their weight: those that hand it on as it is, told by watching them; no other."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm.layers as tl
import torch
import torch.nn.functional as F
from harness import assert_close, assert_preserved, both, noise, prove, randomise, set_alphas
from odd_layers import LINEAR, OTHERS, Halved
from readings import actions, alphas
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import normfree
from normfree.layers import ScaledWeight, is_carrier
from normfree.layers.carriers import ScaledOutput


def model_with(layer: nn.Module) -> tuple[nn.Module, Tensor]:
    """Return a network in which a norm follows ``layer``, and an input."""
    if isinstance(layer, nn.Linear):
        model = nn.Sequential(nn.Flatten(), layer, nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
        return randomise(model), noise(3, 4)
    dims = layer.weight.dim() - 2
    norm, last = getattr(nn, f"BatchNorm{dims}d"), getattr(nn, f"Conv{dims}d")
    return randomise(nn.Sequential(layer, norm(6), nn.ReLU(), last(6, 2, 1))), noise(2, 4, *(7, 6, 5)[:dims])


@both
@pytest.mark.parametrize("name", LINEAR)
def test_norm_folds_into_a_layer_that_hands_its_weight_on(name: str, init: str) -> None:
    assert is_carrier(LINEAR[name]())
    model, x = model_with(LINEAR[name]())
    converted = prove(model, x, init=init)
    assert set(actions(converted).values()) == {"fold"}
    assert_preserved(model, x)


@both
@pytest.mark.parametrize("name", OTHERS)
def test_norm_does_not_fold_into_any_other(name: str, init: str) -> None:
    layer = OTHERS[name]()
    assert not is_carrier(layer)
    model, x = model_with(layer)
    assert [edit.action for edit in normfree.plan(model, init=init).norms] != ["fold"]
    if init == "preserve":
        assert_preserved(model, x)


class Residual(nn.Module):
    """A branch that ends in ``tail``, with a norm of its own in front."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.norm, self.tail = nn.BatchNorm2d(4), tail

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tail(torch.relu(self.norm(x)))


TAILS = {
    "hands its weight on": lambda: tl.Conv2dSame(4, 4, 3),
    "standardises its weight": lambda: tl.StdConv2dSame(4, 4, 3),
    "has a pruned weight": lambda: prune.l1_unstructured(nn.Conv2d(4, 4, 3, padding=1), "weight", 0.5),
}


def residual(tail: str, init: str) -> nn.Module:
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), Residual(TAILS[tail]())))
    return set_alphas(prove(model, noise(2, 4, 6, 6), init=init), 0.7).eval()


@both
@pytest.mark.parametrize("tail", TAILS)
def test_alpha_of_a_tail_is_on_its_weight_or_on_its_output(tail: str, init: str) -> None:
    model = residual(tail, init)
    assert alphas(model) == ["1.tail"]
    assert isinstance(model[1].tail, ScaledWeight if "hands" in tail else ScaledOutput)


@both
@pytest.mark.parametrize("tail", ["hands its weight on", "standardises its weight"])
def test_layers_of_other_libraries_survive_what_users_do(tail: str, init: str) -> None:
    model, x = residual(tail, init), noise(2, 4, 6, 6)
    expected = model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  # our own bytes
        assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(again(x), expected)
        set_alphas(again, 0.0)
        assert not torch.equal(again(x), expected)
    torch.compiler.reset()  # other tests have compiled the same containers
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(x), expected, 1e-6)
    torch._dynamo.reset()
    exported = torch.export.export(model, (x,)).module()
    assert_close(exported(x), expected, 1e-6)


def test_a_parametrisation_of_a_layer_that_carries_is_respected() -> None:
    model = normfree.convert(randomise(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))), init="preserve").eval()
    bias = model[0].combined()[1].detach()[:, None, None]
    expected = (model[0](noise(2, 4, 6, 6)) - bias) / 2 + bias
    parametrize.register_parametrization(model[0], "weight", Halved())
    assert_close(model[0](noise(2, 4, 6, 6)), expected, 1e-6)
    assert_close(model(noise(2, 4, 6, 6)), model[1](expected), 1e-6)
    assert_close(copy.deepcopy(model)(noise(2, 4, 6, 6)), model[1](expected), 1e-6)


class Branching(nn.Conv2d):
    """Does what one of its flags says."""

    exact = False

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight if self.exact else self.weight.round(), self.bias)


def test_each_instance_is_watched_for_itself() -> None:
    one, other = Branching(4, 6, 3), Branching(4, 6, 3)
    one.exact = True
    assert is_carrier(one)
    assert not is_carrier(other)


class Swapped(nn.Linear):
    """Multiplies its weight by what comes, as if that were a weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.weight, x, self.bias)


def test_weight_in_the_place_of_the_input_is_no_weight() -> None:
    layer = Swapped(4, 2)
    assert layer(noise(2, 4)).shape == (2, 2)
    assert not is_carrier(layer)


def test_watching_draws_nothing_and_leaves_the_layer_as_it_is() -> None:
    layer = tl.Conv2dSame(4, 6, 3, stride=2).eval()
    layer.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    state, drawn, held = copy.deepcopy(layer.state_dict()), torch.get_rng_state(), dict(layer.__dict__)
    with torch.inference_mode():
        assert is_carrier(layer)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert layer.__dict__ == held
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
