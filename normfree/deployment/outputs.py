"""Modules whose output alpha multiplies: some hold a parameter that can take it, as a layer scale does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, fx, nn

from normfree.layers import ScaledOutput, alpha_of, scaled_output_class
from normfree.planning.hooks import hooks_on
from normfree.rewriting.changing import become, set_class
from normfree.tracing.copying import deep_copy

__all__ = ["absorb_output_", "output_in_torch_alone_", "scaled_like", "unscaled_output_"]


def unscaled_output_(module: nn.Module) -> Tensor:
    """Give a :class:`ScaledOutput` its old class back, and return alpha, ``(1,)``."""
    raw, unit = module._parameters.pop("raw_alpha"), module.__dict__.pop("alpha_unit")
    set_class(module, cast(ScaledOutput, module)._normfree_original)
    return cast(Tensor, alpha_of(raw, unit))


def scaled_like(module: nn.Module, like: nn.Module) -> nn.Module:
    """Return ``module`` with the alpha of ``like`` on its output."""
    mixin = next(base for base in type(like).__bases__ if issubclass(base, ScaledOutput))
    set_class(module, scaled_output_class(type(module), mixin))
    module.register_parameter("raw_alpha", like._parameters["raw_alpha"])
    module.__dict__["alpha_unit"] = like.__dict__["alpha_unit"]
    return module


def output_in_torch_alone_(module: nn.Module) -> None:
    """Multiply what a :class:`ScaledOutput` returns by a program of torch.fx, for which torch is enough.

    What holds nothing becomes the program, which can be scripted; anything else gets it as a hook.
    """
    raw, unit, alone = module._parameters["raw_alpha"], module.__dict__["alpha_unit"], _holds_nothing(module)
    inner, graph, held = deep_copy(module) if alone else module, fx.Graph(), nn.Module()
    unscaled_output_(inner)
    given = graph.placeholder("input")
    if alone:
        held.add_module("inner", inner)
        held.register_parameter("raw_alpha", raw)
        output, alpha = graph.call_module("inner", (given,)), fx.Proxy(graph.get_attr("raw_alpha"))
    else:
        module.register_parameter("raw_alpha", raw)
        _, output = graph.placeholder("given"), graph.placeholder("output")
        alpha = fx.Proxy(given).raw_alpha
    graph.output((fx.Proxy(output) * (alpha.reshape(()) / unit)).node)
    made = fx.GraphModule(held, graph, class_name="ScaledOutput").train(module.training)
    if alone:
        become(module, made)
    else:
        module.register_forward_hook(made)


def _holds_nothing(module: nn.Module) -> bool:
    """Whether a module has nothing but alpha, is not watched, and is given one tensor."""
    more = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name != "raw_alpha"]
    original = cast(ScaledOutput, module)._normfree_original
    single = len(inspect.signature(original.forward).parameters) == 2
    return single and not (more or hooks_on(module) or any(True for _ in module.children()))


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
