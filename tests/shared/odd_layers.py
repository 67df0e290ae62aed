"""Layers that derive from torch's: those that are linear in their weight, and others."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import timm.layers as tl
import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSameExport
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torchvision.models.video.resnet import Conv3DNoTemporal, Conv3DSimple


class SamePadding(nn.Conv2d):
    """Pads by itself, by the size of what comes."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = (-size % step for size, step in zip(x.shape[2:], self.stride, strict=True))
        return F.conv2d(F.pad(x, (0, width + 2, 0, height + 2)), self.weight, self.bias, self.stride)


class ByKeyword(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(bias=self.bias, weight=self.weight, input=x * self.weight.shape[-1])


class Defaults(nn.Conv2d):
    def __init__(self, channels_in: int, channels_out: int, *_: Any) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1, padding_mode="circular", bias=False)


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(input, weight, bias, self.stride, 1)


class OwnTransposed(nn.ConvTranspose2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, self.stride, groups=self.groups)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight, self.bias)


LINEAR: dict[str, Callable[[], nn.Module]] = {
    "Conv2dSame": lambda: tl.Conv2dSame(4, 6, 3, stride=2, bias=False),
    "Conv2dSame grouped": lambda: tl.Conv2dSame(4, 6, 3, stride=2, groups=2),
    "timm Linear": lambda: tl.Linear(4, 6),
    "Conv3DSimple": lambda: Conv3DSimple(4, 6),
    "Conv3DNoTemporal": lambda: Conv3DNoTemporal(4, 6),
    "SamePadding": lambda: SamePadding(4, 6, 3, stride=2),
    "ByKeyword": lambda: ByKeyword(4, 6, 3),
    "Defaults": lambda: Defaults(4, 6),
    "OwnConvForward": lambda: OwnConvForward(4, 6, 3),
    "OwnTransposed": lambda: OwnTransposed(4, 6, 3, stride=2, groups=2),
    "OwnLinear": lambda: OwnLinear(4, 6, bias=False),
}


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class Standardising(nn.Conv2d):
    """Inherits its forward, which calls another one."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / weight.norm(), bias)


class InTraining(nn.Conv2d):
    """Rounds its weight, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.round() if self.training else self.weight
        return F.conv2d(x, weight, self.bias)


class InEvaluation(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight if self.training else self.weight.round(), self.bias)


class WithoutBias(nn.Conv2d):
    """Rounds its weight as long as it has no bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.round() if self.bias is None else self.weight, self.bias)


class WithActivation(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias).relu()


class WithActivationInPlace(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias)
        torch.relu_(y)
        return y


class WithActivationOnData(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias)
        y.data.relu_()
        return y


class WithActivationUnseen(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias)
        with torch._C.DisableTorchFunction():  # as inside a compiled extension
            y.relu_()
        return y


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        F.conv2d(x, self.weight, self.bias)
        return F.conv2d(x, self.weight, self.bias)


class BiasFirst(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x + self.bias[: x.shape[1], None, None], self.weight, self.bias)


class Biasless(nn.Conv2d):
    """Has no use for a bias that it would be given."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class Clipped(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.1, 0.1)
        return F.conv2d(x, self.weight, self.bias)


class ByValue(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x if self.weight.sum() > 0 else -x, self.weight, self.bias)


class OtherWeight(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.detach().clone(), self.bias)


class Optional(nn.Conv2d):
    """Rounds its weight if asked to."""

    def forward(self, x: Tensor, rounded: bool = False) -> Tensor:
        return F.conv2d(x, self.weight.round() if rounded else self.weight, self.bias)


class Final(nn.Conv2d):
    def __init_subclass__(cls) -> None:
        raise TypeError("this class is final")


class OwnGain(nn.Conv2d):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


class WeightProperty(nn.Conv2d):
    @property
    def weight(self) -> Tensor:
        return self._parameters["weight"].tanh()


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def became(conv: nn.Module, kind: type[nn.Module]) -> nn.Module:
    conv.__class__ = kind
    return conv


def patched(conv: nn.Module) -> nn.Module:
    conv.forward = MethodType(lambda self, x: nn.Conv2d.forward(self, x).relu(), conv)
    return conv


OTHERS: dict[str, Callable[[], nn.Module]] = {
    **{
        kind.__name__: lambda kind=kind: kind(4, 6, 3)
        for kind in (
            *(tl.StdConv2d, tl.StdConv2dSame, tl.ScaledStdConv2d, tl.ScaledStdConv2dSame, Conv2dSameExport),
            *(Standardised, Standardising, InTraining, InEvaluation, WithoutBias, WithActivation),
            *(WithActivationInPlace, WithActivationOnData, WithActivationUnseen, Twice, BiasFirst),
            *(Biasless, Clipped, ByValue, OtherWeight, Optional, OwnGain, Final),
        )
    },
    "patched forward": lambda: patched(nn.Conv2d(4, 6, 3)),
    "weight property": lambda: became(nn.Conv2d(4, 6, 3), WeightProperty),
    "pruned weight": lambda: prune.l1_unstructured(nn.Conv2d(4, 6, 3), "weight", 0.5),
    "pruned bias": lambda: prune.identity(nn.Conv2d(4, 6, 3), "bias"),
    "parametrised weight": lambda: parametrize.register_parametrization(nn.Conv2d(4, 6, 3), "weight", Halved()),
    "parametrised bias": lambda: parametrize.register_parametrization(nn.Conv2d(4, 6, 3), "bias", Halved()),
}
