"""Kinds that are seen through, and errors that say what is wrong and what to do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Block, both, noise, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import normfree
from normfree.errors import UnsupportedModelError, UsageError


class Twice(nn.BatchNorm2d):
    """Overrides what calls the forward."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class Writes(nn.BatchNorm2d):
    """Overrides what looks like a check."""

    def _check_input_dim(self, input: Tensor) -> None:
        input.mul_(2)


class OtherEps(nn.BatchNorm2d):
    """Answers for its weight with another."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return value * 2 if name == "weight" else value


@both
@pytest.mark.parametrize("cls", [Twice, Writes])
def test_norm_that_computes_something_else_is_refused(cls: type[nn.Module], init: Any) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), cls(4)))
    with pytest.raises(UnsupportedModelError, match="computes something else than its description says"):
        normfree.convert(model, init=init)


def test_norm_that_answers_with_another_weight_is_described_by_what_it_says() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), OtherEps(4))).eval()
    nn.init.uniform_(model[1]._parameters["weight"], 0.5, 1.5)  # nobody else reaches it
    converted, x = normfree.convert(model, init="preserve"), noise(2, 3, 8, 8)
    assert torch.allclose(converted(x), model(x), rtol=1e-4, atol=1e-4)


def test_convolution_with_another_function_patched_in_is_no_carrier() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    old = model[0]._conv_forward
    model[0]._conv_forward = lambda x, w, b: torch.tanh(old(x, w, b))
    assert normfree.plan(model, init="preserve").norms[0].action == "affine"


PRUNED: dict[str, Callable[[nn.Module], Any]] = {
    r"is pruned: torch.nn.utils.prune.remove\(layer, 'weight'\)": lambda m: prune.l1_unstructured(m, "weight", 1),
    "is parametrized": lambda m: parametrize.register_parametrization(m, "weight", nn.Softplus()),
}


@both
@pytest.mark.parametrize("text", PRUNED)
def test_norm_whose_weight_is_computed_is_refused_with_the_way_out(text: str, init: Any) -> None:
    model = randomise(Block())
    PRUNED[text](model.bn1)
    with pytest.raises(UnsupportedModelError, match=f"bn1 .*{text}"):
        normfree.convert(model, init=init)


@both
def test_model_that_holds_what_cannot_be_copied_is_refused_by_its_name(init: Any) -> None:
    model = randomise(Block())
    model.conv1.held = [threading.Lock()]
    with pytest.raises(UsageError, match=r"conv1\.held \(list\) cannot be copied .* set it aside"):
        normfree.convert(model, init=init)


@both
def test_under_a_device_without_memory_the_conversion_is_the_same(init: Any) -> None:
    model = randomise(Block())
    torch.manual_seed(0)
    expected = normfree.convert(model, init=init).state_dict()
    torch.manual_seed(0)
    with torch.device("meta"):
        found = normfree.convert(model, init=init).state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


class Refuses(nn.Module):
    """Takes what the network gives it, and nothing that is made up."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != 4 or x.shape[0] != 2 or x.numel() == 4001:
            raise KeyError("another shape")
        return x.tanh()


def test_activation_that_refuses_every_trial_has_no_gain_of_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), Refuses(), Block())
    assert dict(normfree.plan(model, init="skipinit").weights)["0"] > 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_converted_model_that_is_not_fused_cannot_be_scripted_and_says_so() -> None:
    converted = normfree.convert(randomise(Block()), init="preserve")
    with pytest.raises(UsageError, match=r"ScaledConv2d cannot be scripted: .*normfree\.fuse"):
        torch.jit.script(converted)


class DropsToANumber(Block):
    """AlphaDropout puts a number in the place of what it drops."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.drop, self.written = nn.AlphaDropout(0.5), written

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return x + (nn.functional.alpha_dropout(y, 0.5, self.training) if self.written else self.drop(y))


class Square(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return x + y * y


class AddedTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        r = x + y
        return r + y


@pytest.mark.parametrize("block", [lambda: DropsToANumber(False), lambda: DropsToANumber(True), Square, AddedTwice])
def test_alpha_scales_the_whole_branch_once_or_is_not_given(block: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), block())
    converted = normfree.convert(model, init="skipinit", inputs=noise(2, 4, 8, 8)).train()
    x = noise(2, 4, 8, 8)
    if [name for name, _ in converted.named_parameters() if name.endswith("raw_alpha")]:
        assert torch.equal(converted(x), converted[0](x))
