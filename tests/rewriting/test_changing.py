"""A norm changes where it stands, so that nobody is left with the old one; and a failure takes every change back."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from harness import assert_close, noise, randomise
from torch import Tensor, nn

import normfree
from normfree.deployment.restore import restore_
from normfree.rewriting import applying


class Pair(NamedTuple):
    norm: nn.Module


@dataclasses.dataclass
class Record:
    norm: nn.Module


class Slotted:
    __slots__ = ("norm",)

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm


class Plain:
    def __init__(self, norm: nn.Module) -> None:
        self.kept = norm


HOLDERS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any], Callable[[Tensor], Tensor]]]] = {
    "partial": (lambda norm: functools.partial(_call, norm), lambda held: held),
    "call": (lambda norm: norm.__call__, lambda held: held),
    "deque": (lambda norm: collections.deque([norm]), lambda held: held[0]),
    "set": (lambda norm: {norm}, lambda held: next(iter(held))),
    "namedtuple": (Pair, lambda held: held.norm),
    "dataclass": (Record, lambda held: held.norm),
    "namespace": (lambda norm: types.SimpleNamespace(norm=norm), lambda held: held.norm),
    "slots": (Slotted, lambda held: held.norm),
    "object": (Plain, lambda held: held.kept),
    "nested": (lambda norm: {"a": [(Pair(norm),)]}, lambda held: held["a"][0][0].norm),
}


def _call(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x)


class Held(nn.Module):
    """Calls its norm by what something else holds of it."""

    def __init__(self, holder: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        hold, self.take = HOLDERS[holder]
        self.kept = hold(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.take(self.kept)(self.conv(x)))


@pytest.mark.parametrize("init", ["preserve", "skipinit"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_whoever_holds_a_norm_holds_what_it_has_become(holder: str, init: str) -> None:
    model = randomise(nn.Sequential(Held(holder), nn.Conv2d(4, 2, 1))).double().eval()
    norm, x = model[0].norm, noise(2, 3, 8, 8, dtype=torch.float64)
    before = model(x)
    seen: list[object] = []
    handle = norm.register_forward_hook(lambda *_: seen.append(1))
    normfree.convert_(model, init=init)
    assert model[0].norm is norm, "the same object"
    assert not isinstance(norm, nn.BatchNorm2d)
    after = model(x)
    assert seen
    handle.remove()
    if init == "preserve":
        assert_close(after, before, 1e-12)
        restore_(model)
        assert type(norm) is nn.BatchNorm2d
        assert torch.equal(model(x), before)
    else:
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_a_closure_is_followed_by_a_copy() -> None:
    model = Held("object")
    norm, x = model.norm, noise(2, 3, 8, 8)
    model.take = lambda _: lambda x: norm(x)
    whole = randomise(nn.Sequential(model)).eval()
    converted = normfree.convert(whole, init="preserve")
    assert type(norm) is nn.BatchNorm2d
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    assert_close(converted(x), whole(x), 1e-5)


def test_a_closure_which_no_copy_follows_is_refused() -> None:
    model = Held("object")
    norm = model.norm
    model.kept = Plain(lambda x: norm(x))
    with pytest.raises(normfree.errors.UnsupportedModelError, match="let the object hold the module"):
        normfree.convert(nn.Sequential(model), init="preserve")
    assert type(norm) is nn.BatchNorm2d


def state(model: nn.Module) -> list[Any]:
    """Everything that a conversion may write to, values as copies."""
    found: list[Any] = []
    for module in model.modules():
        plain = {k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers", "_modules")}
        held = {k: dict(module.__dict__[k]) for k in ("_parameters", "_buffers", "_modules")}
        found.append((module, type(module), plain, held))
    return found


class Interrupt(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("error", [Interrupt, torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("init", ["preserve", "skipinit"])
@pytest.mark.parametrize("at", [1, 4, 12, "end"])
def test_a_failure_takes_every_write_back(
    monkeypatch: pytest.MonkeyPatch, at: int | str, init: str, error: type[BaseException]
) -> None:
    import timm

    model = randomise(timm.create_model("resnetv2_18", num_classes=3))
    values, before = {k: v.clone() for k, v in model.state_dict().items()}, state(model)
    if at == "end":
        original = applying.draw_

        def interrupted(layers: Any) -> None:
            original(layers)
            raise error("too late")

        monkeypatch.setattr(applying, "draw_", interrupted)
    else:
        writes = iter(range(1, 1000))
        become = applying.become

        def sometimes(module: nn.Module, other: nn.Module) -> None:
            become(module, other)
            if next(writes) == at:
                raise error("in between")

        monkeypatch.setattr(applying, "become", sometimes)
    with pytest.raises(error):
        normfree.convert_(model, init=init)
    after = state(model)
    assert [entry[:2] for entry in after] == [entry[:2] for entry in before]
    for (*_, plain, held), (*_, plain_before, held_before) in zip(after, before, strict=True):
        assert plain.keys() == plain_before.keys()
        assert all(plain[key] is plain_before[key] for key in plain)
        assert held == held_before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    monkeypatch.undo()
    normfree.convert_(model, init=init)
    assert normfree.plan(timm.create_model("resnetv2_18", num_classes=3), init=init).norms == model._normfree_plan.norms


def test_an_activation_that_refuses_assignments_is_set_all_the_same() -> None:
    class Stubborn(nn.ReLU):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "inplace" and "inplace" in self.__dict__:
                raise AttributeError("read only")
            super().__setattr__(name, value)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act, self.conv = nn.BatchNorm2d(3), Stubborn(inplace=True), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(self.act(self.norm(x)))

    model = randomise(nn.Sequential(nn.Conv2d(3, 3, 1), Block(), Block())).double().eval()
    x = noise(2, 3, 8, 8, dtype=torch.float64)
    before = model(x)
    normfree.convert_(model, init="skipinit")
    assert model[1].act.inplace is False
    assert before.shape == model(x).shape
