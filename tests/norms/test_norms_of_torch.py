"""Every kind of convolution and linear that a norm can follow, and every kind of norm torch has."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close, assert_preserved, both, noise, prove, randomise
from readings import actions, plan_of, watched_pairs
from torch import Tensor, nn
from torch.nn.utils import prune

import normfree
from normfree.layers import ChannelAffine, scaled_weight_class

PRODUCERS: dict[str, tuple[Callable[[], nn.Module], type[nn.Module], tuple[int, ...]]] = {
    "bias": (lambda: nn.Conv2d(4, 6, 3, bias=True), nn.BatchNorm2d, (6, 6)),
    "no_bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d, (6, 6)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d, (6, 6)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), nn.BatchNorm2d, (6, 6)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d, (6, 6)),
    "strided_dilated": (lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2), nn.BatchNorm2d, (9, 9)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d, (6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d, (6, 6)),
    "one_d": (lambda: nn.Conv1d(4, 6, 3), nn.BatchNorm1d, (8,)),
    "three_d": (lambda: nn.Conv3d(4, 6, 3), nn.BatchNorm3d, (6, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d, (6, 6)),
    "transposed_no_bias": (lambda: nn.ConvTranspose2d(4, 6, 3, bias=False), nn.BatchNorm2d, (6, 6)),
    "transposed_grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d, (6, 6)),
    "transposed_square_grouped": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d, (6, 6)),
    "transposed_one_d": (lambda: nn.ConvTranspose1d(4, 6, 4, 2, 1, groups=2), nn.BatchNorm1d, (6,)),
    "transposed_three_d": (lambda: nn.ConvTranspose3d(4, 6, 2, 2, output_padding=1), nn.BatchNorm3d, (6, 6, 6)),
}


@both
@pytest.mark.parametrize("kind", PRODUCERS)
def test_norm_folds_into_every_kind_of_convolution(kind: str, init: str) -> None:
    make, norm, size = PRODUCERS[kind]
    conv = make()
    model = randomise(nn.Sequential(conv, norm(conv.out_channels), nn.ReLU()))
    x = noise(2, 4, *size)
    converted = prove(model, x, init=init)
    assert actions(converted) == {"1": "fold"}
    assert isinstance(converted[1], ChannelAffine if init == "preserve" else nn.Identity)
    assert isinstance(converted[0], type(conv))
    assert converted[1 if init == "preserve" else 0].bias.shape == (conv.out_channels,)
    assert_preserved(model, x)
    if init == "preserve":  # but for the root, which keeps its class, both compute as one
        inner = prove(nn.Sequential(copy.deepcopy(model)), x, init=init)
        with watched_pairs(inner) as together:
            assert_close(inner(x), converted(x), 1e-5)
        assert together == {"0.0": "0.1"}


class Upsampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.up(x, output_size=(x.shape[2] * 2, x.shape[3] * 2)))


@both
def test_output_size_of_a_transposed_convolution_still_counts(init: str) -> None:
    model = randomise(Upsampling())
    x = noise(2, 4, 6, 6)
    converted = prove(model, x, init=init)
    assert actions(converted) == {"bn": "fold"}
    assert converted(x).shape == (2, 6, 12, 12)
    assert_preserved(model, x)
    if init == "preserve":
        assert type(converted.up) is scaled_weight_class(nn.ConvTranspose2d)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "affine": lambda: nn.BatchNorm2d(6),
    "no_affine": lambda: nn.BatchNorm2d(6, affine=False),
    "no_bias": lambda: nn.BatchNorm2d(6, bias=False),
    "momentum_none": lambda: nn.BatchNorm2d(6, momentum=None),
    "large_eps": lambda: nn.BatchNorm2d(6, eps=0.5),
}


@both
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("conv_bias", [True, False])
def test_every_form_of_norm_folds(kind: str, conv_bias: bool, init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 6, 3, bias=conv_bias), NORMS[kind](), nn.ReLU(), nn.Conv2d(6, 2, 1)))
    converted = prove(model, noise(2, 4, 6, 6), init=init)
    assert actions(converted) == {"1": "fold"}
    assert_preserved(model, noise(2, 4, 6, 6))
    if init == "skipinit":
        assert torch.equal(converted[0].bias, torch.zeros(6))


@both
@pytest.mark.parametrize("kind", NORMS)
def test_every_form_of_norm_stays_in_its_slot(kind: str, init: str) -> None:
    model = randomise(nn.Sequential(nn.AvgPool2d(2), NORMS[kind](), nn.ReLU(), nn.Conv2d(6, 2, 1, bias=False)))
    converted = prove(model, noise(2, 6, 6, 6), init=init)
    assert_preserved(model, noise(2, 6, 6, 6))
    if init == "preserve":
        assert isinstance(converted[1], ChannelAffine)
    else:
        assert isinstance(converted[1], nn.Identity)
        assert torch.equal(converted[3].bias, torch.zeros(2))


def test_gain_is_gamma_over_the_deviation() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).double())
    conv, bn = model
    converted = normfree.convert(model, init="preserve")
    gain = bn.weight / (bn.running_var + bn.eps).sqrt()
    assert_close(converted[1].gain, gain)
    assert_close(converted[1].bias, 2 * (bn.bias - gain * bn.running_mean))
    assert torch.equal(converted[0].fixed_bias, conv.bias)
    assert torch.equal(converted[0].weight, conv.weight)


@both
def test_linear_behind_flatten_folds(init: str) -> None:
    model = randomise(nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)))
    converted = prove(model, noise(4, 3, 2, 2), init=init)
    assert actions(converted) == {"2": "fold"}
    assert_preserved(model, noise(4, 3, 2, 2))
    if init == "preserve":
        assert type(converted[1]) is scaled_weight_class(nn.Linear)


@both
def test_linear_chain_behind_flatten_folds_everywhere(init: str) -> None:
    layers = [nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5)]
    model = randomise(nn.Sequential(*layers, nn.Linear(5, 4), nn.BatchNorm1d(4)))
    converted = prove(model, noise(4, 3, 2, 2), init=init)
    assert actions(converted) == {"2": "fold", "6": "fold"}
    assert_preserved(model, noise(4, 3, 2, 2))


@both
def test_linear_whose_output_is_a_matrix_in_the_run_folds(init: str) -> None:
    model = randomise(nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU()))
    converted = prove(model, noise(4, 7), init=init)
    assert actions(converted) == {"1": "fold"}
    assert_preserved(model, noise(4, 7))


@both
def test_norm_over_tokens_scales_tokens_and_not_features(init: str) -> None:
    model = randomise(nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)))  # (N, L, C) with L == C == 5
    x = noise(4, 5, 7)
    converted = prove(model, x, init=init)
    assert_preserved(model, x)
    if init == "preserve":
        assert isinstance(converted[1], ChannelAffine)
        y = converted[0](x)
        assert_close(converted(x), y * converted[1].gain[:, None] + converted[1].bias[:, None], 1e-6)


class Views(nn.Module):
    """``(N, V, L, C)`` merged to ``(N * V, L, C)``: flattened, and still no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(5, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x.flatten(end_dim=1)))


def test_flatten_that_leaves_tokens_proves_no_matrix() -> None:
    model = randomise(Views())
    assert_preserved(model, noise(2, 3, 5, 5))


@both
def test_norm_before_a_zero_padded_conv_is_exact_at_the_border(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)))
    x = noise(2, 3, 6, 6)
    converted = prove(model, x, init=init)
    assert actions(converted) == {"2": "affine" if init == "preserve" else "delete"}
    assert [carried.path for carried in plan_of(converted).carried] == (["3"] if init == "preserve" else [])
    assert_preserved(model, x)


@both
@pytest.mark.parametrize(
    "wrap",
    [
        lambda conv: nn.utils.parametrizations.weight_norm(conv),
        lambda conv: nn.utils.parametrizations.spectral_norm(conv),
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "pruned"],
)
def test_conv_whose_weight_is_computed_is_not_folded_into(wrap: Callable[[nn.Module], nn.Module], init: str) -> None:
    model = randomise(nn.Sequential(wrap(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU())).eval()
    with torch.no_grad():
        expected = model(noise(2, 3, 6, 6))
        converted = normfree.convert_(model, init=init).eval()
        found = converted(noise(2, 3, 6, 6))
    assert actions(converted) == {"1": "affine" if init == "preserve" else "delete"}
    if init == "preserve":
        assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("init", ["preserve"])
def test_scaled_layers_say_what_they_carry(init: str) -> None:
    converted = normfree.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), init=init)
    assert type(converted[0]) is scaled_weight_class(nn.Conv2d)
    assert repr(converted[0]).endswith("gain)")


class Resize(nn.Module):
    """At 4 x 4 it is the identity, and at no other size is it an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(4, 4))


@both
def test_resize_to_one_size_is_no_activation(init: str) -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Resize(), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    converted = prove(randomise(nn.Sequential(*layers)), noise(2, 3, 8, 8), init=init)
    # The ReLU behind it decides; taken for an activation itself, it would halve the moments by averaging.
    assert plan_of(converted).weights == (() if init == "preserve" else (("0", pytest.approx(2**0.5)),))
