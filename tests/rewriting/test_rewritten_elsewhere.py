"""A forward that was rewritten, and that asks whether its settings still hold, is compiled and exported whole."""

from __future__ import annotations

import torch
from harness import assert_close, noise, randomise
from torch import Tensor, nn

import normfree
from normfree.layers import ScaledSum


class Gated(nn.Module):
    """Ends its branch in a function, and goes by a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.twice = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), True

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        if self.twice:
            y = y * 2
        return x + torch.sigmoid(y.mean((2, 3), keepdim=True) * y)


def test_a_rewritten_forward_is_compiled_and_exported() -> None:
    model = normfree.convert(randomise(nn.Sequential(nn.Conv2d(3, 8, 1), Gated(), Gated())), init="preserve").eval()
    assert [isinstance(block, ScaledSum) for block in model] == [False, True, True]
    x = noise(2, 3, 8, 8)
    torch._dynamo.reset()
    assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x), 1e-5)
    assert_close(torch.export.export(model, (x,)).module()(x), model(x), 1e-5)
