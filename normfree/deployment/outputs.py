"""Modules whose output alpha multiplies: some hold a parameter that can take it, as a layer scale does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from normfree.layers import ScaledOutput, alpha_of, scaled_output_class
from normfree.rewriting.changing import set_class
from normfree.tracing.copying import deep_copy

__all__ = ["absorb_output_", "scaled_like", "unscaled_output_"]


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


def absorb_output_(module: nn.Module) -> bool:
    """Multiply the one parameter of a :class:`ScaledOutput` by alpha, if that is the same; say whether it is."""
    name = _factor(module)
    if name is None:
        return False
    alpha, parameter = unscaled_output_(module), cast(nn.Parameter, module._parameters[name])
    module._parameters[name] = nn.Parameter(parameter * alpha.reshape(()).to(parameter), parameter.requires_grad)
    return True


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
    for x in _inputs(drawn.numel()):
        found = []
        for factor in (1.0, -3.0, 0.5):
            probe._parameters[own[0]] = nn.Parameter(drawn * factor, requires_grad=False)
            try:
                found.append(probe.forward(x.clone()) / factor)  # no hook of the user is called
            except Exception:  # whatever a module raises that takes no such input
                break
        if len(found) == 3:
            tried += 1
            if not all(torch.allclose(other, found[0], rtol=1e-12, atol=1e-12) for other in found):
                return None
    return own[0] if tried else None


def _inputs(width: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for shape in ((2, width, 4, 4), (2, 3, width), (3, width), (2, 3, 3, width)):
        yield torch.randn(shape, generator=generator, dtype=torch.float64)
