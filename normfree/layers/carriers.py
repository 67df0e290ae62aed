"""Layers that carry alpha and gain.

``alpha * (gain * conv(x; W) + bias) == conv(x; alpha * gain * W) + alpha * bias``: on the weight the scalar costs
nothing per image, on the activation it costs one saved activation per block. So a convolution or linear layer
that ends a residual branch, or that fed a norm, becomes the :class:`ScaledWeight` of its own class (its ``weight``
keeps its key and its values); any other module that ends a branch becomes a :class:`ScaledOutput`. An instance
becomes one by assignment to ``__class__``: same object, same keys, same hooks, and still an ``isinstance`` of what
it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.fx
from torch import Tensor, nn

from normfree.layers.slots import Channels, alpha_scale

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

__all__ = ["ScaledOutput", "ScaledSum", "ScaledWeight", "Seen", "scaled_output_class", "scaled_weight_class"]
__all__ += ["skipinit_name"]


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


class Seen:
    """A layer as its forward is to see it: with another weight and another bias, and all else its own."""

    def __init__(self, layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        self._normfree_layer = layer  # a name that no layer has for something else
        self.weight = weight
        self.bias = bias

    def __getattr__(self, name: str) -> Any:
        return getattr(self._normfree_layer, name)


class _Scaled(_Module):
    """Part of both mixins: their classes are made at run time, one for each original class."""

    _normfree_original: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        if "_normfree_original" not in vars(type(self)):  # somebody derived from the class that was made
            return reduced
        mixin, original = type(self).__bases__
        return _empty, (mixin, original), *reduced[2:]


class ScaledWeight(_Scaled):
    """Mixin for a layer whose weight is multiplied by gain and alpha on the fly.

    It runs the forward of its original class, which sees the product in place of the weight.
    ``gain``: per output channel, ``(C,)``, or ``None``. ``alpha``: ``(1,)``, or ``None``.
    """

    gain: nn.Parameter | None
    alpha: nn.Parameter | None
    alpha_channels: Channels
    weight: Any
    bias: Any

    def combined(self) -> tuple[Tensor, Tensor | None]:
        """Return ``(alpha * gain * weight, alpha * bias)``, differentiably."""
        groups = cast(Any, self).groups if getattr(self, "transposed", False) else None
        weight = scaled_weight(self.weight, self.gain, self.alpha, self.alpha_channels, groups)
        return weight, scaled_bias(self.bias, self.alpha, self.alpha_channels)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the original class does with the combined weight and bias."""
        seen = Seen(cast(nn.Module, self), *self.combined())
        return cast(Tensor, cast(Any, self._normfree_original).forward(seen, *args, **kwargs))

    def extra_repr(self) -> str:
        """Say what is carried."""
        carried = [name for name in ("gain", "alpha") if getattr(self, name) is not None]
        return ", ".join([super().extra_repr(), *carried])


class ScaledOutput(_Scaled):
    """Mixin for any other module that ends a branch: alpha times its output."""

    alpha: nn.Parameter

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return alpha times what the original class returns."""
        return cast(Tensor, super().forward(*args, **kwargs) * self.alpha.reshape(()))


class ScaledSum(_Module):
    """Mixin for a block whose own forward passes a branch through a SkipInit that it holds, before it adds."""


def skipinit_name(addition: int) -> str:
    """Return the name under which a block holds the SkipInit of one of the additions in its own forward."""
    return f"skipinit_{addition}"


def scaled_weight_class(original: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a layer's class that carries gain and alpha on the weight; see :func:`is_carrier`.

    Raises:
        TypeError: No class may be derived from ``original``.
    """
    return _made(ScaledWeight, original)


def scaled_output_class(original: type[nn.Module], mixin: type[ScaledOutput] = ScaledOutput) -> type[nn.Module]:
    """Return the subclass of ``original`` that scales its output.

    Raises:
        TypeError: No class may be derived from ``original``.
    """
    return _made(mixin, original)


def _made(mixin: type, original: type[nn.Module]) -> type[nn.Module]:
    known = _MADE.get((mixin, original))
    if known is not None:
        return known
    members = {"__module__": original.__module__, "_normfree_original": original}
    made = type(f"Scaled{original.__name__}", (mixin, original), members)
    return _MADE.setdefault((mixin, original), made)  # one class for each, whichever thread comes first


_MADE: dict[tuple[type, type[nn.Module]], type[nn.Module]] = {}


def _empty(mixin: type, original: type[nn.Module]) -> nn.Module:
    cls = _made(mixin, original)
    return cls.__new__(cls)
