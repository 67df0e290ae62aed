"""`convert` hands out no network that computes something else than its original."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from harness import assert_close, noise, randomise
from torch import Tensor, nn

import normfree
from normfree.errors import InexactError
from normfree.rewriting import comparing, units


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants that are wrong by a thousandth."""
    right = units.shift
    monkeypatch.setattr(units, "shift", lambda *args: 1.001 * right(*args))


def original() -> nn.Module:
    return randomise(timm.create_model("test_resnet", num_classes=3)).eval()


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0"])
def test_a_fresh_network_whose_signal_fades_is_compared_exactly(name: str) -> None:
    """At its end a hundred millionth of the signal is left: what layers make of means must cancel to the last bit."""
    model = getattr(torchvision.models, name)().double().eval()
    converted = normfree.convert(model, init="preserve")
    assert converted.features[1] is not model.features[1]
    x = noise(2, 3, 64, 64, dtype=torch.float64)
    assert_close(converted(x), model(x), 1e-9)


@pytest.mark.usefixtures("wrong")
def test_a_copy_that_differs_is_not_handed_out() -> None:
    with pytest.raises(InexactError, match=r"computes something else: .* the first that differs is conv1\.4"):
        normfree.convert(original(), init="preserve")
    made = normfree.convert(original(), init="preserve", check=False)
    assert made._normfree_plan.init == "preserve"
    assert normfree.convert(original(), init="skipinit")._normfree_plan.init == "skipinit", "another function anyway"


@pytest.mark.usefixtures("wrong")
def test_in_place_the_model_is_what_it_was() -> None:
    model = original()
    x, classes = noise(2, 3, 64, 64), [type(module) for module in model.modules()]
    before = model(x)
    with pytest.raises(InexactError):
        normfree.convert_(model, init="preserve")
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(x), before)


def test_more_rounding_than_usual_gets_a_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[bool] = []
    exactly = comparing._compare_exactly

    def look(*args: Any) -> None:
        looked.append(True)
        exactly(*args)

    monkeypatch.setattr(comparing, "_compare_exactly", look)
    normfree.convert(original().bfloat16(), init="preserve")
    assert looked == [True]
    normfree.convert(original(), init="preserve")
    assert looked == [True]


def test_the_comparison_leaves_no_trace() -> None:
    class Counting(nn.Sequential):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x + torch.rand(1))

    model = randomise(Counting(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).train()
    model[1].register_forward_hook(lambda *_: pytest.fail("a hook of the user's ran"))
    torch.manual_seed(0)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    converted = normfree.convert(model, init="preserve")
    assert torch.equal(torch.rand(1), drawn)
    assert model.calls == converted.calls == 0
    assert model.training


def test_where_no_input_is_known_nothing_is_compared() -> None:
    class Odd(nn.Sequential):
        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return super().forward(x["image"])

    model = randomise(nn.Sequential(Odd(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))).eval()
    with pytest.warns(normfree.errors.UnseenWarning):
        made = normfree.convert(model, init="preserve")
    x = {"image": noise(1, 3, 8, 8)}
    assert torch.allclose(made(x), model(x), atol=1e-5)
