"""What stays of a norm is moved behind pooling, flattening and dropout; behind a ReLU a gain above zero moves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from harness import assert_close, noise, randomise
from readings import plan_of
from torch import Tensor, nn

import normfree
from normfree.deployment.fuse import FuseWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore::normfree.checkpoint.saving.SaveWarning"),
    pytest.mark.filterwarnings("ignore::normfree.deployment.fuse.FuseWarning"),
]
WHOLE = {"affine": (True, True), "positive": (True, False), "gain": (False, False), "nothing": (False, False)}
"""Whether nothing is left in the slot: with gains above zero, and with others."""


class Parts(nn.Module):
    """A norm, what may stand behind it, and a layer; what ``forward`` does is given."""

    flag = False

    def __init__(self, layer: nn.Module, *between: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4) if norm is None else norm
        self.between = nn.Sequential(*between)
        self.act, self.pool, self.drop = nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Dropout(0.3)
        self.flat, self.layer, self.kept = nn.Flatten(), layer, list[Tensor]()


class Before(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.between(self.norm(x + x.tanh())))


def made(model: nn.Module, positive: bool) -> tuple[Any, Any, Tensor]:
    """Return a model with such gains in float64, what its conversion is fused to, and an input for both."""
    model, x = randomise(model).double().eval(), noise(2, 4, 8, 8, dtype=torch.float64)
    gamma = model.get_submodule("norm").weight
    with torch.no_grad():
        gamma.copy_(gamma.abs() + 0.1 if positive else gamma.abs() * torch.tensor([1, -1, 0, 1]))  # type: ignore[union-attr, operator]
    return model, normfree.fuse(normfree.convert(model, init="preserve", inputs=x, check=False)), x


def conv(padding: int = 0) -> nn.Module:
    return nn.Conv2d(4, 6, 3, padding=padding, groups=2)


CASES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "average": ("affine", lambda: Before(conv(), nn.AvgPool2d(2))),
    "average to the edge": ("affine", lambda: Before(conv(), nn.AvgPool2d(2, 2, ceil_mode=True))),
    "average without zeros": ("affine", lambda: Before(conv(), nn.AvgPool2d(3, padding=1, count_include_pad=False))),
    "average of zeros too": ("gain", lambda: Before(conv(), nn.AvgPool2d(3, padding=1))),
    "sum": ("gain", lambda: Before(conv(), nn.AvgPool2d(2, divisor_override=1))),
    "largest": ("positive", lambda: Before(conv(), nn.MaxPool2d(3, 2, padding=1, ceil_mode=True))),
    "head": ("affine", lambda: Before(nn.Linear(4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0))),
    "dropout, which drops a bias too": ("gain", lambda: Before(nn.Linear(256, 3), nn.Flatten(), nn.Dropout())),
    "every place": ("affine", lambda: Before(nn.Linear(256, 3), nn.Identity(), nn.Flatten())),
    "relu": ("gain", lambda: Before(conv(1), nn.ReLU(inplace=True))),
    "leaky": ("gain", lambda: Before(conv(1), nn.LeakyReLU(0.1), nn.MaxPool2d(2))),
    "learnt slopes": ("gain", lambda: Before(conv(), nn.PReLU(4))),
    "zero padding": ("gain", lambda: Before(conv(1), nn.Identity())),
    "activation of its own": ("gain", lambda: Before(conv(1), nn.Identity(), norm=timm.layers.BatchNormAct2d(4))),
    "relu6": ("nothing", lambda: Before(conv(), nn.ReLU6())),
    "smooth": ("nothing", lambda: Before(conv(), nn.SiLU())),
    "smooth of its own": (
        "nothing",
        lambda: Before(conv(1), nn.Identity(), norm=timm.layers.BatchNormAct2d(4, act_layer="silu")),
    ),
    "squares": ("nothing", lambda: Before(conv(), nn.LPPool2d(2, 2))),
    "subclass": ("nothing", lambda: Before(conv(), type("Own", (nn.ReLU,), {})())),
    "other axis": ("nothing", lambda: Before(nn.Linear(8, 3), nn.MaxPool2d(1))),
}


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_passes_is_moved(name: str, positive: bool) -> None:
    moves, build = CASES[name]
    model, fused, x = made(build(), positive)
    assert_close(fused(x), model(x))
    edit = plan_of(fused).norms[0]
    assert (type(fused.norm) is nn.Identity) is WHOLE[moves][not positive]
    assert (edit.into == "layer") is (moves == "affine" or (positive and moves != "nothing"))
    assert edit.into is None or edit.moves == moves
    names = dict(fused.norm.named_parameters())
    assert ("gain" in names) is (edit.into is None)
    assert ("bias" in names) is (edit.into is None or moves == "gain")
    report = normfree.verify(fused, model, x)
    assert report.ok, str(report)


def functions(self: Any, x: Tensor) -> Tensor:
    y = self.norm(x + x.tanh())
    y = F.relu(y, inplace=True)
    y = F.adaptive_avg_pool2d(y, (1, 1))
    y = torch.flatten(y, 1)
    return self.layer(y)


def modules(self: Any, x: Tensor) -> Tensor:
    y = self.pool(self.act(self.norm(x + x.tanh())))
    y = self.drop(y.view(y.size(0), -1))
    return self.layer(y)


def mean(self: Any, x: Tensor) -> Tensor:
    return self.layer(self.norm(x + x.tanh()).mean([2, 3]))


def tokens(self: Any, x: Tensor) -> Tensor:
    return self.layer(self.norm(x + x.tanh()).flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("forward", "moves"), [(functions, "gain"), (modules, "gain"), (mean, "affine"), (tokens, "affine")]
)
@torch.no_grad()
def test_what_a_forward_calls_between_is_read(forward: Callable[..., Tensor], moves: str) -> None:
    kind = type("Written", (Parts,), {"forward": forward})
    model, fused, x = made(kind(nn.Linear(4, 3)), True)
    assert_close(fused(x), model(x))
    edit = plan_of(fused).norms[0]
    assert (edit.into, edit.moves) == ("layer", moves)


def activated_and_read(self: Any, x: Tensor) -> Tensor:
    y = self.norm(x + x.tanh())
    z = self.layer(self.flat(self.pool(y)))
    return z + y.mean((2, 3))[:, :3] if self.flag else z


def pooled_and_read(self: Any, x: Tensor) -> Tensor:
    y = self.pool(self.norm(x + x.tanh()))
    z = self.flat(y)
    return self.layer(z) + (y.mean() if self.flag else 0)


def decided_between(self: Any, x: Tensor) -> Tensor:
    y = self.pool(self.norm(x + x.tanh()))
    if self.flag:
        y = y.tanh()
    return self.layer(self.flat(y))


def other_pool(self: Any, x: Tensor) -> Tensor:
    y = self.norm(x + x.tanh())
    return self.layer(self.flat(y.amax((2, 3), keepdim=True).square() if self.flag else self.pool(y)))


def kept_in_a_list(self: Any, x: Tensor) -> Tensor:
    y = self.pool(self.norm(x + x.tanh()))
    self.kept = [y]
    z = self.layer(self.flat(y))
    return z + self.kept[0].mean() if self.flag else z


def appended(self: Any, x: Tensor) -> Tensor:
    y = self.pool(self.norm(x + x.tanh()))
    self.kept.append(y)
    z = self.layer(self.flat(y))
    return z + self.kept.pop().mean() if self.flag else z


def own_relu(self: Any, x: Tensor) -> Tensor:
    return self.layer(self.flat(self.pool(self.relu(self.norm(x + x.tanh())))))


def method(self: Any, x: Tensor) -> Tensor:
    return F.relu(x) + 1 if self.flag else F.relu(x)


PATHS = (activated_and_read, pooled_and_read, decided_between, other_pool, kept_in_a_list, appended, own_relu)


@pytest.mark.parametrize("forward", PATHS)
@torch.no_grad()
def test_a_fused_model_does_what_was_seen_and_a_converted_one_goes_other_ways_too(
    forward: Callable[..., Tensor],
) -> None:
    kind: Any = type("Other", (Parts,), {"forward": forward, "relu": method})
    model, fused, x = made(kind(nn.Linear(4, 3)), True)
    assert_close(fused(x), model(x))
    converted = normfree.convert(model, init="preserve", inputs=x)
    for flag in (False, True):
        model.flag = converted.flag = flag
        assert_close(converted(x), model(x))


@pytest.mark.parametrize("name", ["between.0", "layer"])
@torch.no_grad()
def test_what_has_come_in_its_place_is_seen(name: str) -> None:
    model, _, x = made(CASES["average"][1](), True)
    converted: Any = normfree.convert(model, init="preserve", inputs=x, check=False)
    converted.set_submodule(name, nn.MaxPool2d(2) if name != "layer" else conv(1).double())
    fused = normfree.fuse(converted)
    assert_close(fused(x), converted(x))
    assert plan_of(fused).norms[0].into is None


def test_a_gain_that_overflows_stays() -> None:
    model, _, x = made(CASES["relu"][1](), True)
    with torch.no_grad():
        model.norm.weight.fill_(1e-300)
        model.norm.bias.fill_(1e10)
    fused = normfree.fuse(normfree.convert(model, init="preserve", inputs=x, check=False))
    assert_close(fused(x), model(x))
    assert plan_of(fused).norms[0].into is None


@pytest.mark.parametrize("name", ["relu", "head", "largest", "activation of its own"])
@torch.no_grad()
def test_a_file_brings_it_back(name: str, tmp_path: Path) -> None:
    _, build = CASES[name]
    _, fused, x = made(build(), True)
    normfree.save(fused, tmp_path / "fused.safetensors")
    loaded = normfree.load(tmp_path / "fused.safetensors", model=build().double()).eval()
    assert torch.equal(loaded(x), fused(x))


def test_a_bias_that_stays_is_named() -> None:
    model, _, x = made(CASES["relu"][1](), True)
    converted = normfree.convert(model, init="preserve", inputs=x, check=False)
    with pytest.warns(FuseWarning, match="a bias stays an operation at norm: the layer behind it takes the gain alone"):
        normfree.fuse(converted)
