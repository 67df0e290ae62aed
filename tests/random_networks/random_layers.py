"""Descriptions of single layers, and what they build.

A description is a frozen dataclass that does not know shapes: what does not fit where it stands is bent until it does
(strides end, groups divide). So every description builds, and shrinking one gives another that builds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from random_functions import IN_PLACE, LAYERS, METHODS, Call
from random_modules import Gate, Piece, SqueezeExcite
from timm.layers.blur_pool import BlurPool2d
from timm.layers.drop import DropPath
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth


class Description:
    """Shows only what differs from the defaults, so that a failure fits on a screen and can be pasted back."""

    def __repr__(self) -> str:
        all_fields: Any = fields(self)  # type: ignore[arg-type]  # every subclass is a dataclass
        told = [f"{f.name}={getattr(self, f.name)!r}" for f in all_fields if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(told)})"


@dataclass(frozen=True, repr=False)
class Conv(Description):
    out: int = 4
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    bias: bool = False
    kind: str = "plain"
    frozen: bool = False
    hooked: bool = False

    def build(self, x: Tensor, p: float) -> list[Piece]:
        channels, dims = x.shape[1], x.dim() - 2
        groups = math.gcd(self.groups, channels)
        out = math.ceil(self.out / groups) * groups
        made = self._build(x, channels, out, groups, dims)
        made.requires_grad_(not self.frozen)
        if self.hooked:
            made.register_forward_hook(look)
        return [made]

    def _build(self, x: Tensor, channels: int, out: int, groups: int, dims: int) -> nn.Module:
        if self.kind == "transposed":
            stride = self.stride if max(x.shape[2:]) <= 6 else 1
            kernel, padding = (2, 0) if stride == 2 else (3, 1)
            made = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
            return made(channels, out, kernel, stride, padding, groups=groups, bias=self.bias)
        stride = self.stride if min(x.shape[2:]) >= 4 else 1
        padding = self.dilation * (self.kernel // 2)
        if self.kind == "standardised" and dims == 2 and channels // groups * self.kernel > 1:
            return StdConv2d(channels, out, self.kernel, stride, padding, self.dilation, groups, self.bias)
        kinds = _OWN if self.kind == "own_forward" else _SUBCLASSES if self.kind == "subclass" else _CONVS
        mode = self.kind if self.kind in ("circular", "replicate") and min(x.shape[2:]) > padding else "zeros"
        layer: nn.Module = kinds[dims - 1](
            channels, out, self.kernel, stride, padding, self.dilation, groups, self.bias, mode
        )
        if self.kind == "weight_norm":
            parametrizations.weight_norm(layer)
        if self.kind == "parametrised":
            parametrize.register_parametrization(layer, "weight", Halved())
        return layer


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def _doubled(self: Any, x: Tensor) -> Tensor:
    return 2 * self._conv_forward(x, self.weight, self.bias)  # type: ignore[no-any-return]  # torch's own


_CONVS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SUBCLASSES = tuple(type(f"My{cls.__name__}", (cls,), {}) for cls in _CONVS)
_OWN = tuple(type(f"Doubled{cls.__name__}", (cls,), {"forward": _doubled}) for cls in _CONVS)


def look(*_: object) -> None:
    """Do nothing, as a hook."""


@dataclass(frozen=True, repr=False)
class Norm(Description):
    kind: str = "plain"
    frozen: bool = False
    evaluating: bool = False
    hooked: bool = False

    def build(self, x: Tensor, p: float) -> list[Piece]:
        made = self._build(x.shape[1], max(x.dim() - 2, 1), p)
        if self.frozen:
            made.requires_grad_(False)
        if self.hooked:
            made.register_forward_pre_hook(look)
        made.__dict__["keep_evaluating"] = self.evaluating  # read and removed by the builder
        return [made]

    def _build(self, c: int, dims: int, p: float) -> nn.Module:
        norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        fused: Any = BatchNormAct2d
        special: dict[str, Any] = {
            "torchvision": FrozenBatchNorm2d,
            "timm": fused,
            "timm_silu": partial(fused, act_layer=nn.SiLU, inplace=False),
            "timm_plain": partial(fused, apply_act=False),
            "timm_drop": partial(fused, drop_layer=partial(nn.Dropout, p)),
            "timm_frozen": FrozenBatchNormAct2d,
        }
        if self.kind in special and dims == 2:
            return special[self.kind](c)  # type: ignore[no-any-return]  # every entry makes a module
        options: dict[str, dict[str, Any]] = {
            "no_affine": {"affine": False},
            "no_bias": {"bias": False},
            "cumulative": {"momentum": None},
            "large_eps": {"eps": 0.5},
            "stateless": {"track_running_stats": False},
        }
        return norm(c, **options.get(self.kind, {}))  # type: ignore[no-any-return]


@dataclass(frozen=True, repr=False)
class Act(Description):
    what: str = "relu"
    how: str = "module"

    def build(self, x: Tensor, p: float) -> list[Piece]:
        if self.what == "prelu" or self.how in ("module", "module_in_place"):
            flag = {"inplace": True} if self.how == "module_in_place" and self.what in IN_PLACE else {}
            return [LAYERS[self.what](**flag)]
        fits = self.what in (IN_PLACE if self.how == "in_place" else METHODS if self.how == "method" else ())
        return [Call(self.what, self.how if fits else "function")]


@dataclass(frozen=True, repr=False)
class Drop(Description):
    """Dropout or stochastic depth."""

    how: str = "Dropout"

    def build(self, x: Tensor, p: float) -> list[Piece]:
        dims = max(x.dim() - 2, 1)
        modules: dict[str, Any] = {
            "Dropout": nn.Dropout,
            "Dropout_in_place": partial(nn.Dropout, inplace=True),
            "DropoutNd": (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[dims - 1] if x.dim() > 2 else nn.Dropout,
            "StochasticDepth": partial(StochasticDepth, mode="row"),
            "DropPath": DropPath,
        }
        if self.how in modules:
            return [modules[self.how](p)]
        return [Call("drop_path", "any", p) if self.how == "drop_path_any" else Call(self.how, str(x.dim()), p)]


@dataclass(frozen=True, repr=False)
class Pool(Description):
    """Everything that moves pixels and has no weight."""

    how: str = "avg"

    def build(self, x: Tensor, p: float) -> list[Piece]:
        dims, size = x.dim() - 2, min(x.shape[2:])
        i = dims - 1
        if self.how == "up":
            return [nn.Upsample(scale_factor=2)] if max(x.shape[2:]) <= 4 else []
        if self.how == "avg_same":
            return [(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[i](3, 1, 1)]
        if self.how == "identity":
            return [nn.Identity()]
        if size < 4:
            return []
        if self.how == "blur" and dims == 2:
            return [BlurPool2d(x.shape[1], stride=2)]
        if self.how == "max":
            return [(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[i](2)]
        return [(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[i](2, ceil_mode=True)]


@dataclass(frozen=True, repr=False)
class Mix(Description):
    """A linear layer over the last dimension: behind it, a norm's channels are not the layer's features."""

    bias: bool = True

    def build(self, x: Tensor, p: float) -> list[Piece]:
        return [nn.Linear(x.shape[-1], x.shape[-1], bias=self.bias)]


@dataclass(frozen=True, repr=False)
class Excite(Description):
    """A squeeze-excite gate, inline or as a module."""

    inline: bool = False
    normed: bool = False

    def build(self, x: Tensor, p: float) -> list[Piece]:
        one, two = Conv(3, bias=not self.normed), Conv(x.shape[1], bias=True)
        small = x.mean(tuple(range(2, x.dim())), keepdim=True)
        children: list[Any] = one.build(small, p)
        small = torch.zeros(x.shape[0], 3, *small.shape[2:])
        children += Norm().build(small, p) if self.normed else []
        children += [nn.ReLU(), *two.build(small, p)]
        return [Gate(x.dim(), tuple(children))] if self.inline else [SqueezeExcite(x.dim(), children)]


Leaf = Conv | Norm | Act | Drop | Pool | Mix | Excite
