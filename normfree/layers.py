"""Layers that remain where a norm was, and the convolutions that carry alpha and gain.

``alpha * (gain * conv(x; W) + bias) == conv(x; alpha * gain * W) + alpha * bias``: on the weight the scalar costs
nothing per image, on the activation it costs one saved activation per block. So a convolution or linear layer
that ends a residual branch, or that fed a norm, becomes the ``Scaled`` class of its own type (its ``weight`` keeps
its key and its values) and only what no weight can absorb becomes a module on activations.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

__all__ = ["ChannelAffine", "Channels", "Copy", "SkipInit", "is_carrier", "is_normfree", "scaled_class"]

Channels = tuple[int, int] | None
"""Range ``[start, stop)`` of output channels that alpha scales; ``None`` scales all of them."""


def alpha_scale(alpha: Tensor, channels: Channels, features: int) -> Tensor:
    """Return alpha as a 0-dim scalar, or as a ``(C,)`` vector that is one outside ``channels``.

    A 0-dim tensor does not take part in type promotion, a ``(1,)`` one does: fp32 alpha times a bf16 activation
    would come out in fp32.
    """
    scalar = alpha.reshape(())
    if channels is None:
        return scalar
    start, stop = channels
    one = torch.ones_like(alpha)
    return torch.cat([one.expand(start), alpha.expand(stop - start), one.expand(features - stop)])


def _per_channel(scale: Tensor, dims: int) -> Tensor:
    return scale if scale.dim() == 0 else scale.reshape(-1, *(1,) * (dims - 2))


class SkipInit(nn.Module):
    """Multiply by one learnable scalar: the SkipInit multiplier of De & Smith (NeurIPS 2020, section 4).

    Args:
        alpha: Starting value. 0 makes the branch vanish; ``1 / sqrt(d)`` for ``d`` branches also trains.
        channels: Scale only this range of channels (dimension 1), or all of them.

    Shape:
        ``(N, C, *)`` to the same.

    Example:
        >>> import torch, normfree
        >>> normfree.SkipInit(0.5)(torch.ones(1, 2))
        tensor([[0.5000, 0.5000]], grad_fn=<MulBackward0>)
    """

    def __init__(
        self,
        alpha: float = 0.0,
        channels: Channels = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        # (1,) and not 0-dim: FSDP refuses 0-dim parameters.
        self.alpha = nn.Parameter(torch.full((1,), alpha, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.channels is None:
            return x * self.alpha.reshape(())
        scale = alpha_scale(self.alpha, self.channels, x.shape[1])
        return x * _per_channel(scale, x.dim()).to(x.dtype)

    def extra_repr(self) -> str:
        return "" if self.channels is None else f"channels={self.channels}"


class ChannelAffine(nn.Module):
    """What is left of a norm that no weight could absorb: ``alpha * act(drop(gain * x + bias))``.

    Every part may be missing. ``drop`` and ``act`` are the ones a fused norm-and-activation brought along and keep
    their keys. Without an activation alpha is folded into gain and bias, which costs nothing per image.

    Args:
        gain: Per-channel scale, shape ``(C,)``.
        bias: Per-channel shift, shape ``(C,)``.
        alpha: SkipInit scalar, shape ``(1,)``.
        channels: Range of channels that alpha scales, or all of them.
        drop: Dropout that followed the norm.
        act: Activation that followed the norm.

    Shape:
        ``(N, C, *)`` to the same.
    """

    gain: nn.Parameter | None
    bias: nn.Parameter | None
    alpha: nn.Parameter | None

    def __init__(
        self,
        gain: nn.Parameter | None = None,
        bias: nn.Parameter | None = None,
        alpha: nn.Parameter | None = None,
        channels: Channels = None,
        drop: nn.Module | None = None,
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.register_parameter("gain", gain)
        self.register_parameter("bias", bias)
        self.register_parameter("alpha", alpha)
        self.drop = drop
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.gain, self.bias
        alpha = None if self.alpha is None else alpha_scale(self.alpha, self.channels, x.shape[1])
        if alpha is not None and self.drop is None and self.act is None:
            scale = alpha if scale is None else scale * alpha
            shift = None if shift is None else shift * alpha
            alpha = None
        if scale is not None:
            x = x * _per_channel(scale, x.dim()).to(x.dtype)
        if shift is not None:
            x = x + _per_channel(shift, x.dim()).to(x.dtype)
        if self.drop is not None:
            x = self.drop(x)
        if self.act is not None:
            x = self.act(x)
        return x if alpha is None else x * _per_channel(alpha, x.dim()).to(x.dtype)

    def extra_repr(self) -> str:
        parts = [name for name in ("gain", "bias", "alpha") if getattr(self, name) is not None]
        return ", ".join(parts)


class Copy(nn.Module):
    """Return a copy: a deleted norm whose output is written to in place, where the input must survive."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class _ScaledWeight(_Module):
    """Mixin for a layer whose weight is multiplied by gain and alpha on the fly.

    ``gain``: per output channel, ``(C,)``, or ``None``. ``alpha``: ``(1,)``, or ``None``.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    gain: nn.Parameter | None
    alpha: nn.Parameter | None
    alpha_channels: Channels

    def combined(self) -> tuple[Tensor, Tensor | None]:
        """Return ``(alpha * gain * weight, alpha * bias)``, differentiably."""
        weight, bias = self.weight, self.bias
        scale = self.gain
        alpha = None
        if self.alpha is not None:
            alpha = alpha_scale(self.alpha, self.alpha_channels, self._out_features())
            scale = alpha if scale is None else scale * alpha
        if bias is not None and alpha is not None:
            return self._scale(weight, cast(Tensor, scale)), bias * alpha
        return (weight if scale is None else self._scale(weight, scale)), bias

    def _out_features(self) -> int:
        return int(self.weight.shape[0])

    def _scale(self, weight: Tensor, scale: Tensor) -> Tensor:
        return weight * (scale if scale.dim() == 0 else scale.reshape(-1, *(1,) * (weight.dim() - 1)))

    def extra_repr(self) -> str:
        carried = [name for name in ("gain", "alpha") if getattr(self, name) is not None]
        return ", ".join([super().extra_repr(), *carried])


class ScaledLinear(_ScaledWeight, nn.Linear):
    """``nn.Linear`` that carries gain and alpha; ``(*, H_in)`` to ``(*, H_out)``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.combined())


class _ScaledConv(_ScaledWeight):
    def forward(self, x: Tensor) -> Tensor:
        # _conv_forward applies the padding mode as the parent class does.
        return cast(Tensor, self._conv_forward(x, *self.combined()))  # type: ignore[operator]  # from the conv


class ScaledConv1d(_ScaledConv, nn.Conv1d):
    """``nn.Conv1d`` that carries gain and alpha; ``(N, C, L)``."""


class ScaledConv2d(_ScaledConv, nn.Conv2d):
    """``nn.Conv2d`` that carries gain and alpha; ``(N, C, H, W)``."""


class ScaledConv3d(_ScaledConv, nn.Conv3d):
    """``nn.Conv3d`` that carries gain and alpha; ``(N, C, D, H, W)``."""


class _ScaledConvTranspose(_ScaledWeight):
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
        weight, bias = self.combined()
        conv: Any = self
        dims = weight.dim() - 2
        padding = conv._output_padding(
            x, output_size, conv.stride, conv.padding, conv.kernel_size, dims, conv.dilation
        )
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


class _ScaledOutput(_Module):
    """Mixin for any other module that ends a branch: alpha times its output."""

    alpha: nn.Parameter

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return cast(Tensor, super().forward(*args, **kwargs) * self.alpha.reshape(()))  # type: ignore[safe-super]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time: pickle and deepcopy rebuild it from the original class.
        return _new_scaled, (type(self).__mro__[2],), self.__dict__


def _new_scaled(original: type[nn.Module]) -> nn.Module:
    cls = scaled_class(original)
    return cls.__new__(cls)


@functools.cache
def scaled_class(original: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``original`` that carries alpha (and, for a conv or linear, gain) on its weight.

    An instance becomes one by assignment to ``__class__``: same object, same keys, same hooks, and still an
    ``isinstance`` of ``original``.
    """
    if original in _CARRIERS:
        return _CARRIERS[original]
    return type(f"Scaled{original.__name__}", (_ScaledOutput, original), {"__module__": original.__module__})


def is_carrier(module: nn.Module) -> bool:
    """Whether gain and alpha can live on the weight: an exact torch type whose weight is a plain parameter.

    A subclass may compute its weight (weight standardisation), old-style ``weight_norm`` replaces the parameter, and
    a parametrised layer has a class of its own: in none of them is the output linear in a stored weight.
    """
    plain = type(module) in _CARRIERS and "forward" not in module.__dict__
    return plain and isinstance(module._parameters.get("weight"), nn.Parameter)


def is_normfree(module: nn.Module) -> bool:
    """Whether ``module`` is one of this package's own layers: how a second conversion is recognised."""
    return isinstance(module, (SkipInit, ChannelAffine, _ScaledWeight, _ScaledOutput))
