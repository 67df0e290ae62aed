"""Alpha and gain on the weight are the same function as on the activation, with the same gradients, for every layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from harness import assert_close, noise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normfree.layers import ScaledWeight, is_carrier, scaled_weight_class
from normfree.layers.carriers import Seen

FEATURES = 6
RANGE = (1, 4)


@dataclass(frozen=True)
class Layer:
    """A layer with six output features or channels, what it eats, and what else it is called with."""

    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

    def build(self, bias: bool) -> Any:
        width = self.shape[-1] if self.make is nn.Linear else self.shape[1]
        return self.make(width, FEATURES, bias=bias, **self.options).double()

    def input(self) -> Tensor:
        return noise(*self.shape, dtype=torch.float64).requires_grad_()


def conv(dims: int, shape: tuple[int, ...], **options: Any) -> Layer:
    return Layer(getattr(nn, f"Conv{dims}d"), shape, {"kernel_size": 3} | options)


def transposed(dims: int, shape: tuple[int, ...], output_size: list[int] | None = None, **options: Any) -> Layer:
    call = {} if output_size is None else {"output_size": output_size}
    return Layer(getattr(nn, f"ConvTranspose{dims}d"), shape, {"kernel_size": 3} | options, call)


LINE, PLANE, SPACE = (2, 4, 7), (2, 4, 6, 7), (2, 4, 4, 5, 3)
LAYERS = {
    "linear": Layer(nn.Linear, (3, 4)),
    "linear on tokens": Layer(nn.Linear, (2, 5, 4)),
    "linear on one sample": Layer(nn.Linear, (4,)),
    "conv1d": conv(1, LINE),
    "conv1d strided, grouped": conv(1, LINE, stride=2, groups=2),
    "conv1d circular, dilated": conv(1, LINE, padding=2, dilation=2, padding_mode="circular"),
    "conv2d": conv(2, PLANE),
    "conv2d strided, padded": conv(2, PLANE, stride=(2, 1), padding=(1, 2)),
    "conv2d oblong, dilated": conv(2, PLANE, kernel_size=(1, 3), dilation=(1, 2)),
    "conv2d same": conv(2, PLANE, padding="same", dilation=2),
    "conv2d valid": conv(2, PLANE, padding="valid"),
    "conv2d grouped": conv(2, PLANE, groups=2),
    "conv2d depthwise": conv(2, (2, 6, 5, 5), groups=6),
    "conv2d depthwise, multiplied": conv(2, (2, 3, 5, 5), groups=3),
    "conv2d reflected": conv(2, PLANE, padding=2, padding_mode="reflect"),
    "conv2d replicated, same": conv(2, PLANE, padding="same", padding_mode="replicate"),
    "conv2d circular, grouped": conv(2, PLANE, padding=1, padding_mode="circular", groups=2),
    "conv3d": conv(3, SPACE),
    "conv3d strided, grouped, dilated": conv(3, SPACE, kernel_size=2, stride=2, groups=2, dilation=(2, 1, 1)),
    "conv3d replicated": conv(3, SPACE, padding=1, padding_mode="replicate"),
    "transposed 1d": transposed(1, LINE),
    "transposed 1d strided, grouped": transposed(1, LINE, stride=2, groups=2, output_padding=1),
    "transposed 1d sized": transposed(1, LINE, [16], stride=2),
    "transposed 2d": transposed(2, PLANE),
    "transposed 2d strided, dilated": transposed(2, PLANE, stride=(2, 1), padding=1, dilation=2),
    "transposed 2d grouped, padded": transposed(2, PLANE, stride=2, groups=2, output_padding=(1, 0)),
    "transposed 2d depthwise": transposed(2, (2, 6, 3, 3), groups=6),
    "transposed 2d sized": transposed(2, PLANE, [14, 15], stride=2, groups=2),
    "transposed 3d": transposed(3, SPACE),
    "transposed 3d strided, grouped": transposed(3, SPACE, kernel_size=2, stride=(1, 2, 1), groups=2),
    "transposed 3d sized": transposed(3, SPACE, [9, 12, 8], stride=2),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
CARRIED = {
    "gain": (True, False, None),
    "alpha": (False, True, None),
    "both": (True, True, None),
    "alpha on a range": (False, True, RANGE),
    "both, alpha on a range": (True, True, RANGE),
}


def carrying(layer: nn.Module, gain: bool, alpha: bool, channels: tuple[int, int] | None) -> Any:
    """Return a copy that carries gain and alpha, as the rewriting makes it."""
    carried = copy.deepcopy(layer)
    carried.__class__ = scaled_weight_class(type(layer))
    carried.gain = noise(FEATURES, dtype=torch.float64) if gain else None
    centred = gain and not getattr(layer, "transposed", False)
    shape = getattr(layer, "groups", 1), layer.weight[0].numel()
    carried.center = noise(*shape, dtype=torch.float64) / 2 + 0.1 if centred else None
    carried.at_center = noise(FEATURES, dtype=torch.float64) if centred else None
    positions = tuple(range(2, carried.weight.dim()))
    mean = carried.weight.detach().mean(positions, keepdim=True)
    carried.filter_mean = mean + noise(*mean.shape, dtype=torch.float64) if centred and positions else None
    carried.register_parameter("raw_alpha", None)
    if alpha:
        carried.raw_alpha = nn.Parameter(torch.tensor([2.8], dtype=torch.float64))
    carried.alpha_channels, carried.alpha_unit, carried.bias_unit, carried.mean_unit = channels, 4.0, 2.0, 4.0
    return carried


def on_activation(plain: Any, carried: Any, x: Tensor, **call: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ``alpha * (gain * (layer(x) - layer(mean) + at_center) + bias / 2)``, step by step, with its leaves.

    Without a bias the layer sees ``x`` without what is along ``mean``, and makes of that what it did.
    """
    leaves = {name: p.detach().clone().requires_grad_() for name, p in carried.named_parameters()}
    plain.weight, plain.bias = nn.Parameter(leaves["weight"]), None
    leaves["weight"] = plain.weight
    if carried.filter_mean is not None:
        mean = plain.weight.mean(tuple(range(2, plain.weight.dim())), keepdim=True)
        del plain.weight
        plain.weight = leaves["weight"] - 3 / 4 * (mean - carried.filter_mean)
    dim = -1 if isinstance(plain, nn.Linear) else 1
    y = plain(x, **call).movedim(dim, -1)
    along: Tensor | float = 1.0
    if carried.center is not None:
        groups = carried.center.shape[0]
        if "bias" not in leaves:
            unit = carried.center / carried.center.square().sum(1, keepdim=True)
            filters = unit.repeat_interleave(FEATURES // groups, 0).reshape(plain.weight.shape)
            along = type(plain).forward(Seen(plain, filters, None), x, **call).movedim(dim, -1)
        met = torch.einsum("god,gd->go", plain.weight.reshape(groups, FEATURES // groups, -1), carried.center)
        y = y + (carried.at_center - met.flatten()) * along
    if carried.gain is not None:
        y = y * carried.gain
    if "bias" in leaves:
        y = y + leaves["bias"] / 2
    if "raw_alpha" in leaves:
        start, stop = carried.alpha_channels or (0, FEATURES)
        inside = (torch.arange(FEATURES) >= start) & (torch.arange(FEATURES) < stop)
        y = torch.where(inside, y * leaves["raw_alpha"] / 4, y)
    return y.movedim(-1, dim), leaves


@every_layer
@pytest.mark.parametrize("carried", CARRIED)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("narrow", [True, False], ids=["last", "first"])
def test_on_the_weight_as_on_the_activation(
    name: str, carried: str, bias: bool, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = LAYERS[name]
    if CARRIED[carried][2] is None and not name.startswith("transposed"):
        monkeypatch.setattr(ScaledWeight, "_narrow", lambda *_: narrow)
    plain = layer.build(bias)
    assert is_carrier(plain)
    scaled = carrying(plain, *CARRIED[carried])
    mine, theirs = layer.input(), layer.input()
    found = scaled(mine, **layer.call)
    expected, leaves = on_activation(plain, scaled, theirs, **layer.call)
    assert_close(found, expected, 1e-13)
    direction = torch.randn(found.shape, dtype=torch.float64)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    assert_close(mine.grad, theirs.grad, 1e-12)
    parameters = dict(scaled.named_parameters())
    assert parameters.keys() == leaves.keys()
    for key, parameter in parameters.items():
        assert_close(parameter.grad, leaves[key].grad, 1e-12)


def copies(layer: nn.Module, x: Tensor) -> int:
    """Return how many tensors of the size of its weight a layer makes, forward and backward, beside the gradient."""
    made = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal made
            result = func(*args, **(kwargs or {}))
            given = {id(it) for it in tree_leaves(args)}
            tensors = [it for it in tree_leaves(result) if isinstance(it, Tensor) and id(it) not in given]
            made += 0 if func.is_view else sum(it.numel() == layer.weight.numel() for it in tensors)
            return result

    layer.zero_grad()
    with Count():
        layer(x).sum().backward()
    return made - 1


@pytest.mark.parametrize("alpha", [True, False])
def test_a_layer_with_few_places_makes_fewer_copies_of_its_weight(alpha: bool) -> None:
    plain = nn.Conv2d(40, FEATURES, 1, bias=True).double()
    assert copies(plain, noise(1, 40, 3, 13, dtype=torch.float64)) == 0
    layer = carrying(plain, True, alpha, None)
    layer.filter_mean = None
    assert copies(layer, noise(1, 40, 3, 13, dtype=torch.float64)) == 1, "its gradient without the mean"
    assert copies(layer, noise(1, 40, 5, 10, dtype=torch.float64)) == 2, "the weight, and its gradient"
    assert copies(carrying(plain, False, True, None), noise(1, 40, 3, 13, dtype=torch.float64)) == 0


FIRST = {layer.make: name for name, layer in reversed(LAYERS.items())}


@pytest.mark.parametrize("name", FIRST.values())
@pytest.mark.parametrize("channels", [None, RANGE])
@pytest.mark.parametrize("narrow", [True, False], ids=["last", "first"])
def test_first_and_second_gradients_are_those_of_finite_differences(
    name: str, channels: tuple[int, int] | None, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = LAYERS[name]
    if not name.startswith("transposed"):
        monkeypatch.setattr(ScaledWeight, "_narrow", lambda *_: narrow)
    scaled = carrying(layer.build(bias=True), True, True, channels)
    names, values = zip(*scaled.named_parameters(), strict=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(scaled, dict(zip(names, parameters, strict=True)), (x,))

    assert set(names) == {"weight", "bias", "raw_alpha"}
    size = (3,) * (len(layer.shape) - 2)  # every entry of the input is moved, so that a small one will do
    x = noise(*((1, layer.shape[1], *size) if size else layer.shape), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *values))
    assert torch.autograd.gradgradcheck(function, (x, *values), fast_mode=True)


@pytest.mark.parametrize("name", [name for name in LAYERS if LAYERS[name].call])
def test_transposed_convolutions_still_take_an_output_size(name: str) -> None:
    layer = LAYERS[name]
    plain = layer.build(bias=True)
    wanted = layer.call["output_size"]
    assert list(plain(layer.input()).shape[2:]) != wanted
    assert list(carrying(plain, True, True, None)(layer.input(), **layer.call).shape[2:]) == wanted


@pytest.mark.parametrize("name", FIRST.values())
def test_the_pretrained_weight_keeps_its_key_and_its_values(name: str) -> None:
    layer = LAYERS[name]
    plain = layer.build(bias=True)
    scaled = carrying(plain, True, True, None)
    scaled(layer.input()).sum().backward()
    assert isinstance(scaled, type(plain))
    constants = {"gain"} if getattr(plain, "transposed", False) else {"gain", "center", "at_center"}
    constants |= {"filter_mean"} if len(constants) > 1 and layer.shape[2:] else set()
    assert set(scaled.state_dict()) == {"weight", "bias", "raw_alpha", *constants}
    assert torch.equal(scaled.state_dict()["weight"], plain.weight)
    assert torch.equal(scaled.state_dict()["bias"], plain.bias)
