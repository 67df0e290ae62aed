"""Models of which no input is known, or whose forward fails: nothing is hidden, and what can be exact is."""

from __future__ import annotations

import warnings

import pytest
import torch
from harness import Block, assert_close, both, noise, prove, randomise
from readings import actions, alphas, norms, plan_of
from torch import Tensor, nn

import normfree
from normfree.errors import UnseenWarning, UnsupportedModelError
from normfree.layers import ChannelAffine


class Picky(nn.Module):
    """Takes two tensors of its own kind, and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.block = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), Block()

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        if weights.shape != (7,):
            raise ValueError("seven weights, please")
        return self.block(self.bn(self.stem(x))) * weights.mean()


GIVEN = (noise(2, 3, 6, 6), noise(7))


@both
def test_nothing_is_hidden_where_no_input_is_known(init: str) -> None:
    plan = normfree.plan(randomise(Picky()), init=init)
    first, *rest = str(plan).splitlines()
    assert first.startswith("not seen: 3 of 3 norms went unseen, and residual branches around them have no scalar: ")
    assert "ValueError: seven weights, please" in first
    assert 'test_unseen.py:27: raise ValueError("seven weights, please")' in first
    assert first.endswith("Pass inputs= (--size) with which it runs")
    assert "alphas: 0 placed, an unknown number missing" in rest
    assert "declined" not in str(plan)
    assert plan.unseen == ("bn", "block.bn1", "block.bn2")
    assert normfree.Plan.from_json(plan.to_json()) == plan


@both
def test_conversion_warns_once_and_leaves_no_norm(init: str) -> None:
    with pytest.warns(UnseenWarning, match="3 of 3 norms went unseen.*Pass inputs=") as caught:
        converted = normfree.convert(randomise(Picky()), init=init)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert norms(converted) == []
    assert isinstance(converted.bn, ChannelAffine)
    assert set(actions(converted).values()) == {"affine" if init == "preserve" else "bias"}
    with pytest.warns(UnseenWarning):
        normfree.convert_(randomise(Picky()), init=init)


def test_preserve_is_exact_all_the_same() -> None:
    model = randomise(Picky()).double().eval()
    with pytest.warns(UnseenWarning):
        converted = normfree.convert(model, init="preserve").eval()
    x, weights = (t.double() for t in GIVEN)
    assert_close(converted(x, weights), model(x, weights))


@both
def test_fourth_proof_says_that_unseen_sums_are_not_proven(init: str) -> None:
    model = randomise(Picky())
    with pytest.warns(UnseenWarning):
        converted = normfree.convert(model, init=init)
    proof = normfree.verify(converted, model, GIVEN).proofs[3]
    assert proof.passed is None
    assert proof.detail.endswith("not proven for what is around 3 norms that went unseen")


@both
@pytest.mark.parametrize("inputs", [GIVEN, dict(zip(("x", "weights"), GIVEN, strict=True))], ids=["tuple", "dict"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_inputs_are_the_way_out(inputs: object, device: str, init: str) -> None:
    model = randomise(Picky())
    moved = torch.utils._pytree.tree_map(lambda x: x.to(device), inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = normfree.plan(model, init=init, inputs=moved)
        assert normfree.convert_(randomise(Picky()), init=init, inputs=moved) is not None
    assert (plan.unseen, plan.declined, len(plan.alphas)) == ((), (), 1)
    assert "looked at: (2, 3, 6, 6) and (7,), as given" in str(plan)
    assert alphas(prove(model, GIVEN, init=init)) == ["block.conv2"]


@both
def test_input_on_which_the_forward_fails_hides_nothing_either(init: str) -> None:
    plan = normfree.plan(randomise(Picky()), init=init, inputs=(noise(2, 5, 6, 6), noise(7)))
    assert len(plan.unseen) == 3
    assert "to have 3 channels, but got 5" in str(plan).splitlines()[0]


class Mapped(nn.Module):
    """Calls a block sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 1), Block()

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda sample: self.block(sample[None])[0])(self.stem(x))


@both
def test_what_runs_in_a_transform_is_unseen_and_no_input_is_asked_for(init: str) -> None:
    first = str(normfree.plan(randomise(Mapped()), init=init)).splitlines()[0]
    assert first.startswith("not seen: 2 of 2 norms went unseen")
    assert "torch.vmap or another transform of torch.func cannot be written down: call these layers on" in first
    assert "torch.vmap(lambda sample" in first
    assert "inputs=" not in first


class Halves(nn.Module):
    """Calls one of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other = nn.Conv2d(3, 4, 1), Block(), Block()

    def forward(self, x: Tensor, other: bool = False) -> Tensor:
        return (self.other if other else self.one)(self.stem(x))


@both
def test_norms_that_an_input_does_not_reach_are_counted(init: str) -> None:
    converted = prove_quietly(Halves(), init)
    text = str(plan_of(converted))
    assert text.startswith("not seen: 2 of 4 norms went unseen")
    assert "does not reach other.bn1, other.bn2" in text
    assert alphas(converted) == ["one.conv2"]
    assert norms(converted) == []
    x = noise(2, 3, 6, 6, dtype=torch.float64)
    if init == "preserve":
        model = randomise(Halves()).double().eval()
        assert_close(normfree.convert(model, init="preserve").eval()(x, other=True), model(x, other=True))


def prove_quietly(model: nn.Module, init: str) -> nn.Module:
    model = randomise(model)
    converted = normfree.convert(model, init=init)
    passed = [proof.passed for proof in normfree.verify(converted, model, noise(2, 3, 6, 6)).proofs]
    assert passed == [True, True, True if init == "preserve" else None, None, True, True]
    return converted


class OnlyInTraining(nn.Module):
    """Wants targets in order to train, and nobody has any."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 1), Block()

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.block(self.stem(x))
        if self.training and targets is None:
            raise ValueError("no targets")
        return x if targets is None else (x - targets).square().mean()


@both
def test_mode_that_cannot_run_is_named_and_the_other_decides(init: str) -> None:
    plan = normfree.plan(randomise(OnlyInTraining()), init=init)
    assert plan.unseen == ()
    assert len(plan.alphas) == 1
    assert "not seen: in train mode: ValueError: no targets" in str(plan)


class Naming(Picky):
    """Asks of a norm what it is."""

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        y = super().forward(x, weights)
        return y if isinstance(self.bn, nn.BatchNorm2d) else 2 * y


@both
def test_norm_of_whose_class_an_unseen_forward_may_ask_is_refused(init: str) -> None:
    with pytest.raises(UnsupportedModelError, match="bn: a forward asks for its class"):
        normfree.plan(randomise(Naming()), init=init)
