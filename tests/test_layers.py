"""Alpha and gain on the weight are the same function as on the activation, with the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from harness import assert_close, noise
from torch import Tensor, nn

import normfree
from normfree.layers import ChannelAffine, scaled_weight_class

LAYERS = {
    "linear": (nn.Linear(4, 6), (3, 4)),
    "linear without bias on tokens": (nn.Linear(4, 6, bias=False), (3, 5, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, bias=False), (2, 4, 9, 9)),
    "conv2d grouped, reflected border": (nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="reflect"), (2, 4, 9, 9)),
    "conv2d depthwise": (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 9, 9)),
    "conv3d": (nn.Conv3d(4, 6, 3, dilation=2), (2, 4, 6, 6, 6)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 9)),
    "transposed 2d grouped": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), (2, 4, 5, 5)),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 2, bias=False), (2, 4, 3, 3, 3)),
}
CHANNELS = (None, (1, 4))


def _scaled(layer: nn.Module, channels: tuple[int, int] | None) -> nn.Module:
    """Return a float64 copy that carries gain and alpha, as the rewriting makes it."""
    carried = copy.deepcopy(layer).double()
    carried.__class__ = scaled_weight_class(type(layer))
    carried.gain = nn.Parameter(noise(6, dtype=torch.float64))
    carried.alpha = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    carried.alpha_channels = channels
    return carried


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("name", LAYERS)
def test_on_the_weight_as_on_the_activation(name: str, channels: tuple[int, int] | None) -> None:
    layer, shape = LAYERS[name]
    carried = _scaled(layer, channels)
    plain = copy.deepcopy(layer).double()
    bias = plain.bias.detach().clone().requires_grad_() if plain.bias is not None else None
    plain.bias = None
    gain, alpha = carried.gain.detach().clone().requires_grad_(), carried.alpha.detach().clone().requires_grad_()
    one, other = (
        noise(*shape, dtype=torch.float64).requires_grad_(),
        noise(*shape, dtype=torch.float64).requires_grad_(),
    )

    def on_activation(x: Tensor) -> Tensor:
        y = plain(x)
        tail = (1,) * (y.dim() - 2)
        along = (lambda v: v) if isinstance(layer, nn.Linear) else (lambda v: v.reshape(-1, *tail))
        mask = torch.ones(6, dtype=torch.float64)
        start, stop = channels or (0, 6)
        scale = torch.cat([mask[:start], alpha.expand(stop - start), mask[stop:]])
        y = y * along(gain)
        y = y if bias is None else y + along(bias)
        return y * along(scale)

    found, expected = carried(one), on_activation(other)
    assert_close(found, expected, 1e-13)
    weights = noise(*found.shape, dtype=torch.float64).roll(1, 0)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = [(one, other), (carried.weight, plain.weight), (carried.gain, gain), (carried.alpha, alpha)]
    pairs += [] if bias is None else [(carried.bias, bias)]
    for mine, theirs in pairs:
        assert_close(mine.grad, theirs.grad, 1e-12)


@pytest.mark.parametrize("size", [0, 2])
def test_transposed_convolutions_still_take_an_output_size(size: int) -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, stride=3)
    carried = _scaled(layer, None)
    wanted = [18 + size, 18 + size]
    assert carried(noise(1, 4, 6, 6, dtype=torch.float64), output_size=wanted).shape[2:] == tuple(wanted)


def test_the_pretrained_weight_keeps_its_key_and_its_values() -> None:
    layer = nn.Conv2d(4, 6, 3)
    carried = _scaled(layer, None)
    assert isinstance(carried, nn.Conv2d)
    assert torch.equal(carried.state_dict()["weight"], layer.weight.double())
    assert set(carried.state_dict()) == {"weight", "bias", "gain", "alpha"}


def test_skipinit_scales_everything_or_a_range_of_channels() -> None:
    x = torch.ones(2, 4, 3, 3)
    assert torch.equal(normfree.SkipInit(0.5)(x), x * 0.5)
    ranged = normfree.SkipInit(0.5, channels=(1, 3))(x)
    assert ranged[0, :, 0, 0].tolist() == [1.0, 0.5, 0.5, 1.0]


def test_a_scalar_does_not_promote_half_precision() -> None:
    x = torch.ones(1, 2, 3, 3, dtype=torch.bfloat16)
    assert normfree.SkipInit(0.5)(x).dtype == torch.bfloat16
    affine = ChannelAffine(nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1)))
    assert affine(x).dtype == torch.bfloat16


def test_alpha_has_one_entry_and_one_dimension() -> None:
    assert normfree.SkipInit().alpha.shape == (1,)  # FSDP refuses 0-dim parameters


@pytest.mark.parametrize("act", [None, nn.ReLU()])
def test_channel_affine_scales_last(act: nn.Module | None) -> None:
    gain, bias = nn.Parameter(noise(3)), nn.Parameter(noise(3).flip(0))
    x = noise(2, 3, 4)
    found = ChannelAffine(gain, bias, nn.Parameter(torch.tensor([-0.5])), act=act)(x)
    inner = x * gain[:, None] + bias[:, None]
    assert_close(found, -0.5 * (inner if act is None else act(inner)), 1e-6)
