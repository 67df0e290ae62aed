"""Forwards that look at what they are given, and models that take or return more than a tensor."""

from __future__ import annotations

import pytest
import torch
from harness import Block, assert_close, assert_preserved, both, noise, prove, randomise
from readings import actions, alphas, kinds, norms, plan_of
from torch import Tensor, nn

import normfree


class Branching(nn.Module):
    """Branches on the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)), Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.shape[2] > 4:
            x = self.block(x)
        return x


class OwnNorm(nn.Module):
    """Looks at values: without memory that cannot be answered."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if y.mean() > 100:
            return y
        return self.bn(y)


class Looping(nn.Module):
    """Iterates over the layers of a Sequential and keeps what some of them return, as perceptual losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.taps = (0, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        kept = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.taps and x.shape[2] > 2:
                kept.append(x)
        return kept


class Reaching(nn.Module):
    """Calls a child's convolution behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        if y.shape[2] > 4:
            y = y + self.stem[0](x)
        return y


class SharedAcross(nn.Module):
    """Two children share a norm, or a convolution."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Tanh())
        index = 0 if what == "conv" else 1
        self.two[index] = self.one[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)) if x.shape[2] > 4 else self.one(x)


@both
def test_children_of_a_branching_root_are_converted_as_well_as_ever(init: str) -> None:
    model = randomise(Branching())
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert plan_of(converted).opaque == ()
    assert (actions(converted)["block.bn1"], actions(converted)["block.bn2"]) == ("fold", "fold")
    assert norms(converted) == []
    assert kinds(converted) == ["residual"]
    assert alphas(converted) == ["block.conv2"]
    assert_preserved(model, noise(2, 3, 6, 6))
    assert_preserved(model, noise(2, 3, 4, 4))


@both
def test_forward_that_looks_at_values_is_run_on_a_real_copy(init: str) -> None:
    model = randomise(OwnNorm())
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert actions(converted) == {"bn": "affine" if init == "preserve" else "delete"}
    assert plan_of(converted).norms[0].reason == "conv also feeds mean"
    assert_preserved(model, noise(2, 3, 6, 6))


@both
def test_what_lies_behind_a_look_at_values_is_seen_too(init: str) -> None:
    model = randomise(nn.Sequential(OwnNorm(), Block(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert plan_of(converted).opaque == ()
    assert actions(converted)["3"] == "fold"
    assert alphas(converted) == ["1.conv2"]
    assert_preserved(model, noise(2, 3, 6, 6))


def test_layers_whose_raw_outputs_a_loop_keeps_are_preserved() -> None:
    model = randomise(Looping()).double().eval()
    converted = normfree.convert(model, init="preserve")
    x = noise(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for found, expected in zip(converted(x), model(x), strict=True):
            assert_close(found, expected)


def test_conv_that_a_root_calls_behind_a_childs_back_is_preserved() -> None:
    assert_preserved(randomise(Reaching()), noise(2, 3, 6, 6))


@pytest.mark.parametrize("what", ["conv", "norm"])
def test_module_shared_by_two_children_is_preserved(what: str) -> None:
    model = randomise(SharedAcross(what))
    assert_preserved(model, noise(2, 3, 6, 6))


@both
@pytest.mark.parametrize("what", ["conv", "norm"])
def test_module_shared_by_two_children_leaves_no_norm(what: str, init: str) -> None:
    converted = prove(randomise(SharedAcross(what)), noise(2, 3, 6, 6), init=init)
    assert norms(converted) == []


class ManyInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.block = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 4, 1), Block()
        self.na, self.nb = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> dict[str, object]:
        out = self.na(self.a(x)) + scale * self.nb(self.b(y))
        if mask is not None:
            out = out * mask
        features = self.block(out)
        return {"features": features, "pooled": [features.mean((2, 3)), (out,)], "name": "many"}


def flat(out: dict[str, object]) -> Tensor:
    return torch.cat([out["features"].flatten(), out["pooled"][0].flatten(), out["pooled"][1][0].flatten()])


A, B, MASK = noise(2, 3, 6, 6), noise(2, 2, 6, 6), noise(2, 1, 6, 6)
INPUTS: dict[str, tuple[object, ...] | dict[str, object]] = {
    "tuple": (A, B),
    "tuple_with_another_value_than_the_default": (A, B, 0.5),
    "kwargs": {"x": A, "y": B},
    "kwargs_in_another_order": {"y": B, "x": A},
    "kwargs_with_mask": {"x": A, "y": B, "mask": MASK},
}


@both
@pytest.mark.parametrize("how", INPUTS)
def test_many_inputs_and_a_dict_of_outputs(how: str, init: str) -> None:
    model = randomise(ManyInputs())
    inputs = INPUTS[how]
    converted = prove(model, inputs, init=init)
    assert alphas(converted) == ["block.conv2"]
    assert set(actions(converted).values()) == {"fold"}
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    out = converted.eval()(*args, **kwargs)
    assert (list(out), out["name"]) == (["features", "pooled", "name"], "many")
    if init == "preserve":
        assert_close(flat(out), flat(model.eval()(*args, **kwargs)), 1e-5)


@both
def test_block_called_with_a_keyword_argument_is_proved(init: str) -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 4, 1), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x=self.stem(x)) if x.shape[2] > 4 else x

    converted = prove(randomise(Keyword()), noise(2, 3, 6, 6), init=init)
    assert alphas(converted) == ["block.conv2"]


@both
def test_norm_that_is_never_called_goes_too(init: str) -> None:
    model = randomise(Branching())
    model.unused = nn.BatchNorm2d(4)
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert norms(converted) == []


class Asking(nn.Module):
    """Holds a layer under a second name, and asks the data before it calls it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.shape[0] > 0 else x


@both
@pytest.mark.parametrize("which", ["conv", "norm"])
def test_layer_that_another_module_calls_by_another_name_is_not_folded(which: str, init: str) -> None:
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    model = randomise(nn.Sequential(conv, norm, nn.ReLU(), Asking(conv if which == "conv" else norm)))
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert actions(converted)["1"] != "fold"
    assert_preserved(model, noise(2, 3, 6, 6))


class Sharing(nn.Module):
    """A container that the root calls behind the back of the block that holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 1))
        self.block = PreActivated(self.stem)

    def forward(self, x: Tensor) -> Tensor:
        return x if x.mean() > 1e6 else self.block(self.stem(x))


class PreActivated(nn.Module):
    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.bn, self.tail = nn.BatchNorm2d(4), tail

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tail(torch.relu(self.bn(x)))


@both
def test_container_that_somebody_else_calls_carries_no_alpha(init: str) -> None:
    model = randomise(Sharing())
    converted = prove(model, noise(2, 4, 6, 6), init=init)
    assert not any(path.startswith(("stem", "block.tail")) for path in alphas(converted))
    assert_preserved(model, noise(2, 4, 6, 6))


class Named(nn.Module):
    """`batch_norm` is a module that it holds, and no function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch_norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.batch_norm(self.conv(x)) if x.shape[0] > 0 else x


@both
def test_norm_that_is_held_as_batch_norm_is_no_function(init: str) -> None:
    converted = prove(randomise(nn.Sequential(Named(), nn.ReLU())), noise(2, 3, 6, 6), init=init)
    assert norms(converted) == []


class Optional(nn.Module):
    """Nothing but optional inputs, and options that nobody gives."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 1), Block()

    def forward(self, pixels: Tensor | None = None, hidden: Tensor | None = None, **options: object) -> Tensor:
        return self.block(self.stem(pixels) if hidden is None else hidden)


@both
def test_first_of_nothing_but_optional_inputs_is_the_input(init: str) -> None:
    converted = prove(randomise(Optional()), noise(2, 3, 6, 6), init=init)
    assert alphas(converted) == ["block.conv2"]
