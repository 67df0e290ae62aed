"""Which layers can carry alpha and gain on their weight: those whose output is linear in the weight that they hold.

torch's own are, and many more: convolutions that pad by themselves, that only bring defaults along. Others are not, as
they standardise the weight, quantise it, or apply an activation. Names do not tell them apart, but what a forward does
with the weight does: it is run once without memory, and watched.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from normfree.layers.carriers import Seen, scaled_weight_class
from normfree.layers.held import CONSTANTS
from normfree.layers.passing import Moves
from normfree.tracing.copying import meta_copy

__all__ = ["is_carrier", "takes_affine"]

_FUNCTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: F.linear,
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}


def is_carrier(module: nn.Module) -> bool:
    """Whether gain and alpha can live on the weight of ``module``, and a bias be given to it.

    The weight must be a plain parameter, which old-style ``weight_norm``, pruning and parametrisations replace. Then
    they can on torch's own layers and on subclasses that inherit what these compute. On a subclass with a forward of
    its own they can if that hands weight and bias on as they are, and returns the result as it is, in both modes.
    """
    base = next((kind for kind in _FUNCTIONS if isinstance(module, kind)), None)
    if base is None or not module.__dict__.keys().isdisjoint(_USED) or any(hasattr(module, name) for name in _TAKEN):
        return False
    cls = type(module)
    plain = "bias" in module._parameters and isinstance(module._parameters.get("weight"), nn.Parameter)
    if not plain or hasattr(cls, "weight") or hasattr(cls, "bias") or not _may_be_derived_from(cls):
        return False
    return _inherits(cls, base) or (cls.__call__ is nn.Module.__call__ and _hands_on(module, _FUNCTIONS[base]))


def takes_affine(layer: nn.Module) -> Moves | None:
    """Return what a carrier can take of what is multiplied and added to each channel of its input.

    Zero padding is something else than what is added, and a transposed convolution meets fewer positions at its edges.
    """
    if isinstance(layer, nn.Linear):
        return "affine"
    base = next((kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, kind)), None)
    if base is None or not _inherits(type(layer), base):  # another forward may pad by itself
        return None
    unpadded = layer.padding == "valid" or not any(cast(Any, layer.padding))
    return "affine" if unpadded or layer.padding_mode != "zeros" else "gain"


_TAKEN = (*CONSTANTS, "alpha", "alpha_channels", "alpha_unit", "combined", "coordinates", "raw_alpha")


def _may_be_derived_from(cls: type[nn.Module]) -> bool:
    try:
        scaled_weight_class(cls)
    except TypeError:
        return False
    return True


def _inherits(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    return all(getattr(cls, name, None) is getattr(base, name, None) for name in _USED)


_USED = ("forward", "_conv_forward", "_output_padding", "__call__", "__getattr__", "__getattribute__")
"""What decides what a layer computes, whether its class or somebody else overrides it."""


def _hands_on(layer: nn.Module, function: Callable[..., Tensor]) -> bool:
    """Whether a forward does nothing with weight and bias but call ``function`` on them, and returns its result."""
    try:
        if len(inspect.signature(layer.forward).parameters) != 1:
            return False  # what a further argument changes is not known
        probe = meta_copy(layer)
        return all(
            _is_linear(probe.train(mode), function, bias) for mode, bias in itertools.product((False, True), repeat=2)
        )
    except Exception:  # whatever a forward raises that does not take such an input, or such a self
        return False


@torch.inference_mode(False)
@torch.no_grad()
def _is_linear(layer: Any, function: Callable[..., Tensor], biased: bool) -> bool:
    weight = torch.empty_like(layer.weight)
    bias = weight.new_empty(getattr(layer, "out_channels", 0) or layer.out_features) if biased else None
    seen = Seen(layer, weight, bias)
    with _Watch(function, weight, bias) as watch:
        result = type(layer).forward(seen, _example(layer))
    kept = len(vars(seen)) == 3 and seen.weight is weight and seen.bias is bias
    returned = len(watch.results) == 1 and watch.results[0] is result
    return kept and returned and weight._version == result._version == 0


def _example(layer: Any) -> Tensor:
    """Return an input without memory, ``(2, C_in, *)``, larger than the kernel."""
    if isinstance(layer, nn.Linear):
        return layer.weight.new_empty(2, layer.in_features)
    extents = zip(layer.weight.shape[2:], layer.dilation, layer.stride, strict=True)
    size = (2 * kernel * step + jump for kernel, step, jump in extents)
    return cast(Tensor, layer.weight.new_empty(2, layer.in_channels, *size))


class _Watch(TorchFunctionMode):
    """Keeps the tensors that are made with weight, bias, or a tensor so made; asking for a shape makes none.

    A use that is not ``function(input, weight, bias)`` is kept as ``None``.
    """

    def __init__(self, function: Callable[..., Tensor], weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.function = function
        self.weight = weight
        self.bias = bias
        self.results: list[Tensor | None] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        own = [x for x in (self.weight, self.bias, *self.results) if x is not None]
        used = [leaf for leaf in tree_leaves((args, kwargs)) if any(leaf is x for x in own)]
        if used and isinstance(result, Tensor):
            right = func is self.function and given["weight"] is self.weight and given.get("bias") is self.bias
            self.results.append(result if right and len(used) == len(own) else None)
        return result
