"""Layers that carry alpha, and the constants of the coordinates in which they learn.

``alpha * (gain * conv(x; V) + bias) == conv(x; alpha * gain * V) + alpha * bias``: on the weight the scalar costs
nothing per image, on the activation it costs one saved activation per block. So a convolution or linear layer
that ends a residual branch, or that fed a norm, becomes the :class:`ScaledWeight` of its own class (its ``weight``
keeps its key); any other module that ends a branch becomes a :class:`ScaledOutput`. An instance becomes one by
assignment to ``__class__``: same object, same keys, same hooks, and still an ``isinstance`` of what it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from normfree.errors import UsageError
from normfree.layers.combining import Affine, Constants, apart, combine
from normfree.layers.held import HasAlpha, HasConstants, alpha_of
from normfree.layers.reparametrized import settled
from normfree.layers.slots import Channels, alpha_scale

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

__all__ = ["ScaledOutput", "ScaledSum", "ScaledWeight", "Seen", "scaled_output_class", "scaled_weight_class"]
__all__ += ["skipinit_name"]


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
    _normfree_class: ClassVar[type[nn.Module]]  # which was made: nobody has derived from it and does something else

    def __new__(cls, *args: Any, **_: Any) -> Any:
        """Refuse ``type(layer)(...)``, with which adapters make layers beside one that they wrap."""
        if args and "_normfree_original" in vars(cls):
            raise UsageError(_no_adapter(cls))
        return super().__new__(cls)

    @property
    def base_layer(self) -> nn.Module:
        """Refuse adapters: PEFT asks every layer that it wraps for this, and nobody else does."""
        raise UsageError(_no_adapter(type(self)))

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse TorchScript, which knows no class that is made at run time."""
        raise UsageError(f"{type(self).__name__} cannot be scripted: torch.jit.script(normfree.fuse(model).eval())")

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        if "_normfree_original" not in vars(type(self)):  # somebody derived from the class that was made
            return reduced
        mixin, original = type(self).__bases__
        return _empty, (mixin, original), *reduced[2:]


class ScaledWeight(_Scaled, HasConstants, HasAlpha):
    """Mixin for a layer that computes with another weight than the one that it learns; see :mod:`.combining`.

    It runs the forward of its original class, which sees the combined weight and bias in place of its own.

    Attributes:
        raw_alpha: What is learnt of alpha, ``(1,)``: alpha times :attr:`alpha_unit`; or ``None``.
        gain, center, at_center, filter_mean, bias_unit, mean_unit: See :class:`normfree.layers.Constants`.
        alpha_channels: Range of output channels that alpha scales, or all of them.
        unit: How many times what it stands for the weight is, and the gain in the slot behind it less.
        feeds_slot: Whether a bias that learns is in the slot behind the layer, and none here.
        fixed_bias: ``(C,)``: the bias that such a layer had, or ``None``.
    """

    gain: Tensor | None
    center: Tensor | None
    at_center: Tensor | None
    filter_mean: Tensor | None
    fixed_bias: Tensor | None = None
    bias_unit: float
    mean_unit: float
    alpha_channels: Channels
    unit: float = 1.0
    feeds_slot: bool = False
    weight: Any
    bias: Any

    @property
    def coordinates(self) -> Constants:
        """The constants of the layer, where its weight is: they have memory on the meta device too."""
        if self.mean_unit != 1.0 and self._parameters.get("weight") is None:
            self.mean_unit = settled(cast(nn.Module, self), self._constants())
        return self._constants()

    def _constants(self) -> Constants:
        held = (self.gain, self.center, self.at_center, self.filter_mean)
        if self.weight.is_meta:
            held = tuple(None if value is None else value.to("meta") for value in held)  # type: ignore[assignment]
        return Constants(*held, self.bias_unit, self.mean_unit)

    def own(self) -> Affine:
        """Return what the layer does to what its weight makes, by itself."""
        constants = self.coordinates
        bias = self.bias if self.fixed_bias is None else self.fixed_bias.to(self.weight.device)
        if bias is None and self.feeds_slot and constants.at_center is not None:
            bias = torch.zeros_like(constants.at_center)  # what it makes of its mean is no bias of its own
        return Affine(bias, alpha_of(self.raw_alpha, self.alpha_unit), constants, self.alpha_channels)

    def combined(self, given: Affine | None = None, exactly: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias that the layer computes with, differentiably; see :class:`Constants`.

        Args:
            given: What is done to what the weight makes, if not what is the layer's own.
            exactly: Whether a weight that was not trained comes out bit for bit.
        """
        bias, alpha, constants, channels = given or self.own()
        weight: Tensor = self.weight
        if exactly:
            weight, constants = constants.steadied(weight), constants._replace(filter_mean=None)
        groups = cast(Any, self).groups if getattr(self, "transposed", False) else None
        return combine(weight, bias, alpha, constants, channels, groups)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the original class does with the combined weight and bias."""
        return self.computed(None, *args, **kwargs)

    def computed(self, given: Affine | None, *args: Any, **kwargs: Any) -> Tensor:
        """Return what :meth:`forward` does, or what it would with another affine."""
        layer, forward = cast(nn.Module, self), cast(Any, self._normfree_original).forward
        if kwargs or not self._narrow(*args):
            return cast(Tensor, forward(Seen(layer, *self.combined(given)), *args, **kwargs))
        # As combined, in another order: alpha and gain come last.
        own, alpha, constants, channels = given or self.own()
        weight, bias = apart(self.weight, own, constants)
        places = (-1, *(1,) * (weight.dim() - 2))  # channels come before the places of one image
        if constants.gain is None:
            out = forward(Seen(layer, weight, bias), *args)
        else:
            out = forward(Seen(layer, weight, None), *args) * constants.gain.reshape(places)
            out = out if bias is None else out + bias.reshape(places)
        if alpha is None:
            return cast(Tensor, out)
        factor = alpha_scale(alpha, channels, len(weight))
        return cast(Tensor, out * (factor if channels is None else factor.reshape(places)))

    def _narrow(self, *args: Any) -> bool:
        """Whether an input has fewer places than a filter has entries, where that says what is cheaper.

        On a processor. Elsewhere an operation costs more than the numbers that it passes over, compilers fold factors
        into the weight by themselves, and autocast would round what comes out twice.
        """
        if len(args) != 1 or not isinstance(args[0], Tensor) or args[0].device.type != "cpu":
            return False
        if getattr(self, "transposed", False):
            return False
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        weight = self.weight
        entries = weight.numel() // len(weight)
        return bool(args[0].numel() < entries * weight.shape[1] * getattr(self, "groups", 1))

    def extra_repr(self) -> str:
        """Say what is carried."""
        carried = [name for name in ("gain", "center", "alpha") if getattr(self, name) is not None]
        return ", ".join([super().extra_repr(), *carried])


def _no_adapter(cls: type[nn.Module]) -> str:
    return (
        f"{cls.__name__} computes with another weight than its own: an adapter would be merged into the wrong one. "
        "Adapt plain layers: model = normfree.fuse(model) first. Adapters learn on it as they would here"
    )


class ScaledOutput(_Scaled, HasAlpha):
    """Mixin for any other module that ends a branch: alpha times its output."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return alpha times what the original class returns."""
        alpha = alpha_of(cast(Tensor, self.raw_alpha), self.alpha_unit)
        return cast(Tensor, super().forward(*args, **kwargs) * alpha.reshape(()))


class ScaledSum(_Module):
    """Mixin for a block whose own forward passes a branch through a SkipInit that it holds, before it adds."""


def skipinit_name(addition: int) -> str:
    """Return the name under which a block holds the SkipInit of one of the additions in its own forward."""
    return f"skipinit_{addition}"


def scaled_weight_class(original: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a layer's class that carries alpha and constants; see :func:`is_carrier`.

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
    made: Any = type(f"Scaled{original.__name__}", (mixin, original), members)
    made._normfree_class = made
    return _MADE.setdefault((mixin, original), made)  # one class for each, whichever thread comes first


_MADE: dict[tuple[type, type[nn.Module]], type[nn.Module]] = {}


def _empty(mixin: type, original: type[nn.Module]) -> nn.Module:
    cls = _made(mixin, original)
    return cls.__new__(cls)
