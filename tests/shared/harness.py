"""What the tests share: models that have seen data, and the proof of a conversion."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from readings import plan_of
from support_table import randomise as randomise
from torch import Tensor, nn

import normfree
from normfree.layers import HasAlpha
from normfree.tracing.copying import deep_copy

ROOT = Path(__file__).parents[2]
"""The repository: what is in it is found from here, however deep the test that asks."""


class Stem(nn.Module):
    """A norm that goes; what comes behind is nobody's business."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def stem(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """A residual block whose last layer can carry the scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Gated(nn.Module):
    """Ends in a product that nothing but its own forward computes; drops by hand, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        y = y * torch.sigmoid(self.fc(y.mean((2, 3), keepdim=True)))
        if self.training:
            y = nn.functional.dropout(y, 0.5)
        y += x
        return y

    def describe(self) -> str:
        return "gated"


both = pytest.mark.parametrize("init", ["skipinit", "preserve"])
"""Every starting point."""


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return white noise that is the same in every test."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def prove(model: nn.Module, inputs: Any, *, init: str, **options: Any) -> Any:
    """Convert, hold all six proofs of :func:`normfree.verify`, and return the converted model."""
    converted = normfree.convert(model, init=init, **{"inputs": inputs} | options)
    report = normfree.verify(converted, model, inputs)
    assert report.ok, f"\n{report}\n{plan_of(converted)}"
    return converted


def assert_preserved(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Hold ``preserve`` to the original in float64, without the package's own verification."""
    original = deep_copy(model).double()
    inputs = {**dict(zip(inspect.signature(model.forward).parameters, map(_double, args), strict=False)), **kwargs}
    converted = normfree.convert(original, init="preserve", inputs=inputs).eval()
    original.eval()
    with torch.no_grad():
        expected = original(*map(_double, args), **{k: _double(v) for k, v in kwargs.items()})
        found = converted(*map(_double, args), **{k: _double(v) for k, v in kwargs.items()})
    assert_close(found, expected)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Hold the largest difference to ``tolerance`` of the largest value."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    found, expected = found.detach(), expected.detach()
    size = float(expected.abs().max()) or 1.0  # of what is dead, nothing
    error = float((found - expected).abs().max()) / size
    assert error <= tolerance, f"relative error {error:.1e}"


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else copy.deepcopy(x)


def set_alphas(model: nn.Module, value: float) -> nn.Module:
    """Fill every alpha and return ``model``."""
    for module in model.modules():
        if isinstance(module, HasAlpha) and module.raw_alpha is not None:
            module.alpha = value
    return model
