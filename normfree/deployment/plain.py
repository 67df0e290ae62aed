"""What carries alpha becomes plain again. Some modules can take it in, as a layer scale does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from normfree.layers import CONSTANTS, ScaledOutput, ScaledWeight, alpha_of, scaled_output_class, shift
from normfree.rewriting.changing import set_class
from normfree.tracing.copying import deep_copy

__all__ = ["absorb_output_", "moved", "plain_", "scaled_like", "trial_inputs", "unscaled_", "unscaled_output_"]
__all__ += ["without_norm_"]


def plain_(module: nn.Module) -> None:
    """Give a carrier its old class back, and take away what it held besides weight and bias."""
    module.__class__ = cast(ScaledWeight, module)._normfree_original
    del module._parameters["raw_alpha"]
    for name in (*CONSTANTS, "alpha_channels", "alpha_unit", "bias_unit", "feeds_slot", "mean_unit", "unit"):
        module.__dict__.pop(name, None)


def moved(layer: ScaledWeight, unit: float) -> Tensor | float:
    """Return what a layer adds, besides its bias, to what a weight makes that is ``unit`` times smaller; in float64."""
    if layer.center is None or layer.at_center is None:
        return 0.0
    met = shift(layer.coordinates.steadied(layer.weight), layer.center)
    return (layer.at_center.double() - met.double()) / unit


def without_norm_(module: nn.Module, bias: nn.Parameter | None, unit: float) -> None:
    """Make a layer plain whose norm takes back gain, bias and alpha: with its old bias, and its weight in old units."""
    weight = cast(nn.Parameter, module._parameters["weight"])
    weight.data = cast(ScaledWeight, module).coordinates.steadied(weight.data) / unit
    module._parameters["bias"] = bias
    if bias is not None:
        bias.data = bias.to(weight)
    plain_(module)


def unscaled_(layer: ScaledWeight) -> None:
    """Make any other carrier plain. One that has moved may need a bias that it had not."""
    module, weight, old = cast(nn.Module, layer), layer.weight, layer.bias
    combined, bias = layer.combined(exactly=True)
    if bias is not None and layer.alpha in (None, 1.0):  # what was not trained comes back without a rounding
        plain = torch.zeros_like(bias).double() if old is None else old.double() / layer.bias_unit
        bias = (plain + (1.0 if layer.gain is None else layer.gain.double()) * moved(layer, 1.0)).to(weight)
    weight.data = combined.contiguous()
    if bias is not None and (old is not None or bool(bias.any())):
        old = nn.Parameter(torch.empty_like(bias), weight.requires_grad) if old is None else old
        old.data = bias
    plain_(module)
    module._parameters["bias"] = old


def unscaled_output_(module: nn.Module) -> Tensor:
    """Give a :class:`ScaledOutput` its old class back, and return alpha, ``(1,)``."""
    raw, unit = module._parameters.pop("raw_alpha"), module.__dict__.pop("alpha_unit")
    set_class(module, cast(ScaledOutput, module)._normfree_original)
    return cast(Tensor, alpha_of(raw, unit))


def scaled_like(module: nn.Module, like: nn.Module) -> nn.Module:
    """Return ``module`` with the alpha of ``like`` on its output."""
    mixin = next((base for base in type(like).__bases__ if issubclass(base, ScaledOutput)), ScaledOutput)
    set_class(module, scaled_output_class(type(module), mixin))
    module.register_parameter("raw_alpha", like._parameters["raw_alpha"])
    module.__dict__["alpha_unit"] = like.__dict__["alpha_unit"]
    return module


def absorb_output_(module: nn.Module) -> None:
    """Multiply the one parameter of a :class:`ScaledOutput` by alpha, if that is the same."""
    name = _factor(module)
    if name is not None:
        alpha, parameter = unscaled_output_(module), cast(nn.Parameter, module._parameters[name])
        module._parameters[name] = nn.Parameter(parameter * alpha.reshape(()).to(parameter), parameter.requires_grad)


def _factor(module: nn.Module) -> str | None:
    """Return the parameter by which a module multiplies, told by what it computes; values do not matter."""
    own = [name for name, held in module.named_parameters() if name != "raw_alpha" and held.is_floating_point()]
    alone = not any(True for _ in module.children()) and not any(True for _ in module.buffers())
    if len(own) != 1 or not alone or not module._parameters[own[0]].numel():  # type: ignore[union-attr]
        return None
    probe = deep_copy(module).eval()
    unscaled_output_(probe)
    shape = probe._parameters[own[0]].shape  # type: ignore[union-attr]
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tried = 0
    for x in trial_inputs(drawn.numel()):
        found = []
        with contextlib.suppress(Exception):  # whatever a module raises that takes no such input
            for factor in (1.0, -3.0, 0.5):
                probe._parameters[own[0]] = nn.Parameter(drawn * factor, requires_grad=False)
                found.append(probe.forward(x.clone()) / factor)  # no hook of the user is called
        if len(found) == 3:
            tried += 1
            if not all(torch.allclose(other, found[0], rtol=1e-12, atol=1e-12) for other in found):
                return None
    return own[0] if tried else None


def trial_inputs(width: int) -> Iterator[Tensor]:
    """Yield what a module may take that knows how many channels there are: images, vectors, and tokens."""
    generator = torch.Generator().manual_seed(1)
    for shape in ((2, width, 14, 14), (4, width), (2, 5, width), (2, 5, 5, width)):
        yield torch.randn(shape, generator=generator, dtype=torch.float64)
