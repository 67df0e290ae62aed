"""What stays on the activation: SkipInit and the channel affine."""

from __future__ import annotations

import pytest
import torch
from harness import assert_close, noise
from torch import nn

import normfree
from normfree.layers import ChannelAffine


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
    assert normfree.SkipInit().raw_alpha.shape == (1,)  # FSDP refuses 0-dim parameters


@pytest.mark.parametrize("act", [None, nn.ReLU()])
def test_channel_affine_scales_last(act: nn.Module | None) -> None:
    gain, bias = nn.Parameter(noise(3)), nn.Parameter(noise(3).flip(0))
    x = noise(2, 3, 4)
    found = ChannelAffine(gain, bias, nn.Parameter(torch.tensor([-0.5])), act=act)(x)
    inner = x * gain[:, None] + bias[:, None]
    assert_close(found, -0.5 * (inner if act is None else act(inner)), 1e-6)
