"""Layers that carry alpha and gain.

``alpha * (gain * conv(x; W) + bias) == conv(x; alpha * gain * W) + alpha * bias``: on the weight the scalar costs
nothing per image, on the activation it costs one saved activation per block. So a convolution or linear layer
that ends a residual branch, or that fed a norm, becomes the ``Scaled`` class of its own type (its ``weight`` keeps
its key and its values); any other module that ends a branch scales its output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.layers.slots import Channels, alpha_scale

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

__all__ = ["ScaledOutput", "ScaledSum", "ScaledWeight", "is_carrier", "scaled_class", "skipinit_name"]


@torch.fx.wrap
def scaled_weight(
    weight: Tensor, gain: Tensor | None, alpha: Tensor | None, channels: Channels, groups: int | None
) -> Tensor:
    """Return ``alpha * gain * weight``; ``groups`` is given for a transposed convolution."""
    factor = gain
    if alpha is not None:
        features = weight.shape[0] if groups is None else weight.shape[1] * groups
        factor = alpha_scale(alpha, channels, features)
        factor = factor if gain is None else gain * factor
    if factor is None:
        return weight
    if factor.dim() == 0:
        return weight * factor
    if groups is None:
        return weight * factor.reshape(-1, *(1,) * (weight.dim() - 1))
    # Transposed: weight is (C_in, C_out / groups, *), and output channel g * C_out / groups + j lives in group g.
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return (grouped * factor.reshape(groups, 1, -1, *(1,) * (weight.dim() - 2))).reshape(weight.shape)


@torch.fx.wrap
def scaled_bias(bias: Tensor | None, alpha: Tensor | None, channels: Channels) -> Tensor | None:
    """Return ``alpha * bias``."""
    if bias is None or alpha is None:
        return bias
    return bias * alpha_scale(alpha, channels, bias.shape[0])


class ScaledWeight(_Module):
    """Mixin for a layer whose weight is multiplied by gain and alpha on the fly.

    ``gain``: per output channel, ``(C,)``, or ``None``. ``alpha``: ``(1,)``, or ``None``.
    """

    gain: nn.Parameter | None
    alpha: nn.Parameter | None
    alpha_channels: Channels
    weight: Any
    bias: Any

    def combined(self, groups: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Return ``(alpha * gain * weight, alpha * bias)``, differentiably."""
        weight = scaled_weight(self.weight, self.gain, self.alpha, self.alpha_channels, groups)
        return weight, scaled_bias(self.bias, self.alpha, self.alpha_channels)

    def extra_repr(self) -> str:
        """Say what is carried."""
        carried = [name for name in ("gain", "alpha") if getattr(self, name) is not None]
        return ", ".join([super().extra_repr(), *carried])


class ScaledLinear(ScaledWeight, nn.Linear):
    """``nn.Linear`` that carries gain and alpha; ``(*, H_in)`` to ``(*, H_out)``."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(*, H_out)`` for ``(*, H_in)``."""
        return F.linear(input, *self.combined())


class _ScaledConv(ScaledWeight):
    def forward(self, input: Tensor) -> Tensor:
        """Return ``(N, C_out, *)`` for ``(N, C_in, *)``."""
        # _conv_forward applies the padding mode as the parent class does.
        return cast(Tensor, cast(Any, self)._conv_forward(input, *self.combined()))


class ScaledConv1d(_ScaledConv, nn.Conv1d):
    """``nn.Conv1d`` that carries gain and alpha; ``(N, C, L)``."""


class ScaledConv2d(_ScaledConv, nn.Conv2d):
    """``nn.Conv2d`` that carries gain and alpha; ``(N, C, H, W)``."""


class ScaledConv3d(_ScaledConv, nn.Conv3d):
    """``nn.Conv3d`` that carries gain and alpha; ``(N, C, D, H, W)``."""


class _ScaledConvTranspose(ScaledWeight):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return ``(N, C_out, *)`` for ``(N, C_in, *)``, of ``output_size`` where it is given."""
        conv: Any = self
        weight, bias = self.combined(conv.groups)
        dims = len(conv.kernel_size)
        padding = conv._output_padding(
            input, output_size, conv.stride, conv.padding, conv.kernel_size, dims, conv.dilation
        )
        function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
        return function(input, weight, bias, conv.stride, conv.padding, padding, conv.groups, conv.dilation)


class ScaledConvTranspose1d(_ScaledConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` that carries gain and alpha; ``(N, C, L)``."""


class ScaledConvTranspose2d(_ScaledConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` that carries gain and alpha; ``(N, C, H, W)``."""


class ScaledConvTranspose3d(_ScaledConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` that carries gain and alpha; ``(N, C, D, H, W)``."""


_CARRIERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: ScaledLinear,
    nn.Conv1d: ScaledConv1d,
    nn.Conv2d: ScaledConv2d,
    nn.Conv3d: ScaledConv3d,
    nn.ConvTranspose1d: ScaledConvTranspose1d,
    nn.ConvTranspose2d: ScaledConvTranspose2d,
    nn.ConvTranspose3d: ScaledConvTranspose3d,
}


class ScaledOutput(_Module):
    """Mixin for any other module that ends a branch: alpha times its output."""

    alpha: nn.Parameter

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return alpha times what the original class returns."""
        return cast(Tensor, super().forward(*args, **kwargs) * self.alpha.reshape(()))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time: pickle and deepcopy rebuild it from the original class.
        return _new_scaled, (type(self).__mro__[2],), self.__dict__


def _new_scaled(original: type[nn.Module]) -> nn.Module:
    cls = scaled_class(original)
    return cls.__new__(cls)


class ScaledSum(_Module):
    """Mixin for a block whose own forward passes a branch through a SkipInit that it holds, before it adds."""


def skipinit_name(addition: int) -> str:
    """Return the name under which a block holds the SkipInit of one of the additions in its own forward."""
    return f"skipinit_{addition}"


def scaled_class(original: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``original`` that carries alpha (and, for a conv or linear, gain) on its weight.

    An instance becomes one by assignment to ``__class__``: same object, same keys, same hooks, and still an
    ``isinstance`` of ``original``.
    """
    known = _CARRIERS.get(original) or _MADE.get(original)
    if known is not None:
        return known
    made = type(f"Scaled{original.__name__}", (ScaledOutput, original), {"__module__": original.__module__})
    return _MADE.setdefault(original, made)  # one class for each, whichever thread comes first


_MADE: dict[type[nn.Module], type[nn.Module]] = {}


def is_carrier(module: nn.Module) -> bool:
    """Whether gain and alpha can live on the weight: an exact torch type whose weight is a plain parameter.

    A subclass may compute its weight (weight standardisation), old-style ``weight_norm`` replaces the parameter, and
    a parametrised layer has a class of its own: in none of them is the output linear in a stored weight.
    """
    plain = type(module) in _CARRIERS and "forward" not in module.__dict__
    return plain and isinstance(module._parameters.get("weight"), nn.Parameter)
