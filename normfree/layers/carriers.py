"""Layers that carry alpha and gain.

``alpha * (gain * conv(x; W) + bias) == conv(x; alpha * gain * W) + alpha * bias``: on the weight the scalar costs
nothing per image, on the activation it costs one saved activation per block. So a convolution or linear layer
that ends a residual branch, or that fed a norm, becomes the ``Scaled`` class of its own type (its ``weight`` keeps
its key and its values); any other module that ends a branch scales its output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from normfree.layers.slots import Channels, alpha_scale

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

__all__ = ["ScaledOutput", "ScaledWeight", "is_carrier", "scaled_class"]


class ScaledWeight(_Module):
    """Mixin for a layer whose weight is multiplied by gain and alpha on the fly.

    ``gain``: per output channel, ``(C,)``, or ``None``. ``alpha``: ``(1,)``, or ``None``.
    """

    gain: nn.Parameter | None
    alpha: nn.Parameter | None
    alpha_channels: Channels

    def combined(self) -> tuple[Tensor, Tensor | None]:
        """Return ``(alpha * gain * weight, alpha * bias)``, differentiably."""
        weight, bias = cast(Tensor, self.weight), cast("Tensor | None", self.bias)
        scale: Tensor | None = self.gain
        alpha = None
        if self.alpha is not None:
            alpha = alpha_scale(self.alpha, self.alpha_channels, self._out_features())
            scale = alpha if scale is None else scale * alpha
        if bias is not None and alpha is not None:
            return self._scale(weight, cast(Tensor, scale)), bias * alpha
        return (weight if scale is None else self._scale(weight, scale)), bias

    def _out_features(self) -> int:
        return int(cast(Tensor, self.weight).shape[0])

    def _scale(self, weight: Tensor, scale: Tensor) -> Tensor:
        return weight * (scale if scale.dim() == 0 else scale.reshape(-1, *(1,) * (weight.dim() - 1)))

    def extra_repr(self) -> str:
        """Say what is carried."""
        carried = [name for name in ("gain", "alpha") if getattr(self, name) is not None]
        return ", ".join([super().extra_repr(), *carried])


class ScaledLinear(ScaledWeight, nn.Linear):
    """``nn.Linear`` that carries gain and alpha; ``(*, H_in)`` to ``(*, H_out)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(*, H_out)`` for ``(*, H_in)``."""
        return F.linear(x, *self.combined())


class _ScaledConv(ScaledWeight):
    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, C_out, *)`` for ``(N, C_in, *)``."""
        # _conv_forward applies the padding mode as the parent class does.
        return cast(Tensor, cast(Any, self)._conv_forward(x, *self.combined()))


class ScaledConv1d(_ScaledConv, nn.Conv1d):
    """``nn.Conv1d`` that carries gain and alpha; ``(N, C, L)``."""


class ScaledConv2d(_ScaledConv, nn.Conv2d):
    """``nn.Conv2d`` that carries gain and alpha; ``(N, C, H, W)``."""


class ScaledConv3d(_ScaledConv, nn.Conv3d):
    """``nn.Conv3d`` that carries gain and alpha; ``(N, C, D, H, W)``."""


class _ScaledConvTranspose(ScaledWeight):
    def _out_features(self) -> int:
        return int(self.out_channels)  # type: ignore[arg-type]  # an int on every transposed convolution

    def _scale(self, weight: Tensor, scale: Tensor) -> Tensor:
        # Weight is (C_in, C_out / groups, *): output channel g * C_out / groups + j lives in rows of group g.
        if scale.dim() == 0:
            return weight * scale
        groups = cast(int, self.groups)
        tail = (1,) * (weight.dim() - 2)
        grouped = weight.reshape(groups, -1, *weight.shape[1:])
        return (grouped * scale.reshape(groups, 1, -1, *tail)).reshape(weight.shape)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return ``(N, C_out, *)`` for ``(N, C_in, *)``, of ``output_size`` where it is given."""
        weight, bias = self.combined()
        conv: Any = self
        dims = weight.dim() - 2
        padding = conv._output_padding(x, output_size, conv.stride, conv.padding, conv.kernel_size, dims, conv.dilation)
        function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
        return function(x, weight, bias, conv.stride, conv.padding, padding, conv.groups, conv.dilation)


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
        return cast(Tensor, super().forward(*args, **kwargs) * self.alpha.reshape(()))  # type: ignore[safe-super]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time: pickle and deepcopy rebuild it from the original class.
        return _new_scaled, (type(self).__mro__[2],), self.__dict__


def _new_scaled(original: type[nn.Module]) -> nn.Module:
    cls = scaled_class(original)
    return cls.__new__(cls)


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
