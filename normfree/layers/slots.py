"""Modules on activations, for what no weight can absorb."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.fx
from torch import Tensor, nn

from normfree.layers.held import HasAlpha, HasConstants
from normfree.layers.vacant import OfNorm

__all__ = [
    "ChannelAffine",
    "Channels",
    "Copy",
    "HasAlpha",
    "HasConstants",
    "SkipInit",
    "affine",
    "alpha_scale",
    "scale",
    "shifted",
]

Channels = tuple[int, int] | None
"""Range ``[start, stop)`` of output channels that alpha scales; ``None`` scales all of them."""


def alpha_scale(alpha: Tensor, channels: Channels, features: int) -> Tensor:
    """Return alpha as a 0-dim scalar, or as a ``(C,)`` vector that is one outside ``channels``.

    A 0-dim tensor does not take part in type promotion, a ``(1,)`` one does: fp32 alpha times a bf16 activation
    would come out in fp32.
    """
    if channels is None:
        return alpha.reshape(())
    start, stop = channels
    one = torch.ones_like(alpha)
    return torch.cat([one.expand(start), alpha.expand(stop - start), one.expand(features - stop)])


@torch.fx.wrap
def scale(x: Tensor, alpha: Tensor, channels: Channels) -> Tensor:
    """Return ``alpha * x``, on a range of channels or on all; one operation to whoever traces with torch.fx."""
    if channels is None:
        return x * alpha.reshape(())
    return x * _per_channel(alpha_scale(alpha, channels, x.shape[1]), x)


@torch.fx.wrap
def affine(x: Tensor, gain: Tensor | None, bias: Tensor | None, alpha: Tensor | None, channels: Channels) -> Tensor:
    """Return ``alpha * (gain * x + bias)``, with alpha combined into the others before it meets the activation."""
    if alpha is not None:
        factor = alpha_scale(alpha, channels, x.shape[1])
        gain = factor if gain is None else gain * factor
        bias = None if bias is None else bias * factor
    if gain is not None:
        x = x * _per_channel(gain, x)
    return x if bias is None else x + _per_channel(bias, x)


@torch.fx.wrap
def shifted(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Return ``gain * x + bias``, in one pass over the activation."""
    return torch.addcmul(_per_channel(bias, x), x, _per_channel(gain, x))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    shaped = values if values.dim() == 0 else values.reshape([-1] + [1] * (x.dim() - 2))  # TorchScript unpacks no list
    return shaped.to(x.dtype)


class SkipInit(HasAlpha, nn.Module):
    """Multiply by one learnable scalar: the SkipInit multiplier of De & Smith (NeurIPS 2020, section 4).

    Args:
        alpha: Starting value. 0 makes the branch vanish; ``1 / sqrt(d)`` for ``d`` branches also trains.
        channels: Scale only this range of channels (dimension 1), or all of them.
        unit: What is learnt is ``unit`` times alpha: with SGD alpha then takes steps that are ``unit ** 2`` times
            smaller, with Adam ``unit`` times.

    Shape:
        ``(N, C, *)`` to the same.

    Example:
        >>> import torch, normfree
        >>> normfree.SkipInit(0.5)(torch.ones(1, 2))
        tensor([[0.5000, 0.5000]], grad_fn=<MulBackward0>)
    """

    if TYPE_CHECKING:
        raw_alpha: nn.Parameter

    def __init__(
        self,
        alpha: float = 0.0,
        channels: Channels = None,
        *,
        unit: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.alpha_unit = unit
        # (1,) and not 0-dim: FSDP refuses 0-dim parameters.
        self.raw_alpha = nn.Parameter(torch.full((1,), alpha * unit, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Return ``alpha * input``."""
        alpha: Tensor = self.raw_alpha
        if self.alpha_unit != 1.0:
            alpha = alpha / self.alpha_unit
        return scale(input, alpha, self.channels)

    def extra_repr(self) -> str:
        """Say which channels are scaled."""
        return "" if self.channels is None else f"channels={self.channels}"


class ChannelAffine(OfNorm, HasConstants, HasAlpha, nn.Module):
    """What is left of a norm: ``alpha * act(drop(gain_unit * gain * x + bias / bias_unit))``.

    Every part may be missing. ``drop`` and ``act`` are the ones a fused norm-and-activation brought along and keep
    their keys. Where the layer in front is called directly before it, that takes gain, bias and alpha into its weight
    (:func:`normfree.layers.pairs.together`); elsewhere they are applied here.

    Args:
        gain: Per-channel scale, shape ``(C,)``: a parameter, or a constant, for which no activation is kept.
        bias: Per-channel shift, shape ``(C,)``.
        raw_alpha: What is learnt of the SkipInit scalar, shape ``(1,)``: alpha times ``unit``.
        channels: Range of channels that alpha scales, or all of them.
        drop: Dropout that followed the norm.
        act: Activation that followed the norm.
        copy: Whether what comes in must be kept as it is from whatever works in place, as a norm did by itself.
        unit: See :class:`SkipInit`.
        bias_unit: ``bias`` is that many times what it stands for.
        gain_unit: ``gain`` is that many times less than what it stands for: as many times as the weight of the layer in
            front is more.

    Shape:
        ``(N, C, *)`` to the same.
    """

    if TYPE_CHECKING:
        gain: Tensor | None
        bias: nn.Parameter | None

    def __init__(
        self,
        gain: Tensor | None = None,
        bias: nn.Parameter | None = None,
        raw_alpha: nn.Parameter | None = None,
        channels: Channels = None,
        drop: nn.Module | None = None,
        act: nn.Module | None = None,
        copy: bool = False,
        unit: float = 1.0,
        bias_unit: float = 1.0,
        gain_unit: float = 1.0,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.copy = copy
        self.alpha_unit = unit
        self.bias_unit = bias_unit
        self.gain_unit = gain_unit
        self.constant = gain is not None and not isinstance(gain, nn.Parameter)
        self.gain = gain
        self.register_parameter("bias", bias)
        self.register_parameter("raw_alpha", raw_alpha)
        self.drop = drop
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        """Return ``alpha * act(drop(gain_unit * gain * input + bias / bias_unit))``."""
        x = input.clone() if self.copy else input
        alpha: Tensor | None = self.raw_alpha
        if alpha is not None and self.alpha_unit != 1.0:
            alpha = alpha / self.alpha_unit
        bias: Tensor | None = self.bias
        if bias is not None and self.bias_unit != 1.0:
            bias = bias / self.bias_unit
        gain = None if self.gain is None else self.gain.to(input.device)  # a constant has memory on meta too
        if gain is not None and self.gain_unit != 1.0:
            gain = gain * self.gain_unit
        last = self.drop is None and self.act is None
        if self.constant and gain is not None and bias is not None and (alpha is None or not last):
            return self.rest(shifted(x, gain, bias))
        return self.rest(affine(x, gain, bias, alpha if last else None, self.channels))

    def rest(self, x: Tensor) -> Tensor:
        """Return what is made of ``gain * input + bias``, which alpha has scaled if nothing comes behind it."""
        last = self.drop is None and self.act is None
        alpha: Tensor | None = None if last else self.raw_alpha
        if alpha is not None and self.alpha_unit != 1.0:
            alpha = alpha / self.alpha_unit
        if self.drop is not None:
            x = self.drop(x)
        if self.act is not None:
            x = self.act(x)
        if alpha is not None:
            x = scale(x, alpha, self.channels)
        return x

    def extra_repr(self) -> str:
        """Say which parts are there."""
        parts = [name for name in ("gain", "bias", "alpha") if getattr(self, name) is not None]
        return ", ".join(parts)


class Copy(nn.Module):
    """Return a copy: a deleted norm whose output is written to in place, where the input must survive."""

    def forward(self, input: Tensor) -> Tensor:
        """Return a copy of ``input``."""
        return input.clone()
