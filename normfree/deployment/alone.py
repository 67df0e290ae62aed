"""What stays of a conversion in a fused model, in torch alone: programs whose source is pickled with them.

A model that is pickled whole can then be read where this package is not installed.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any, cast

import torch
from torch import fx, nn

from normfree.deployment.plain import unscaled_output_
from normfree.layers import ChannelAffine, CopiedAffine, CopiedSkipInit, Copy, ScaledOutput, SkipInit, Vacant
from normfree.planning.hooks import hooks_on
from normfree.rewriting.changing import become
from normfree.tracing.copying import deep_copy

__all__ = ["in_torch_alone_"]


def in_torch_alone_(model: nn.Module) -> None:
    """Let torch be enough for whatever is left in a model."""
    for module in list(model.modules()):
        if isinstance(module, (ChannelAffine, SkipInit, Copy)):
            become(module, _slot(module))
        elif isinstance(module, ScaledOutput):
            _output_(module)
        elif isinstance(module, Vacant):
            become(module, nn.Identity().train(module.training))


def _slot(slot: nn.Module) -> nn.Module:
    """Return a program that does what ``slot`` does, with its parameters under the same names."""
    held, graph = nn.Module(), fx.Graph()
    x: Any = fx.Proxy(graph.placeholder("input"))
    given = x
    if isinstance(slot, Copy) or getattr(slot, "copy", False):
        x = x.clone()
    for name, combine in (("gain", operator.mul), ("bias", operator.add)):
        value = getattr(slot, name, None)
        if value is not None:
            kept = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
            held.register_parameter(name, kept)
            per_channel = fx.Proxy(graph.get_attr(name)).reshape([-1] + [1] * (given.dim() - 2))
            x = combine(x, per_channel.to(given.dtype))
    for name in ("drop", "act"):
        module = slot._modules.get(name)
        if module is not None:
            held.add_module(name, module)
            x = fx.Proxy(graph.call_module(name, (x.node,)))
    raw = slot._parameters.get("raw_alpha")
    if raw is not None and isinstance(slot, (SkipInit, ChannelAffine)):
        held.register_parameter("raw_alpha", nn.Parameter(raw.detach() / slot.alpha_unit, raw.requires_grad))
        alpha = fx.Proxy(graph.get_attr("raw_alpha")).reshape(())
        start, stop = slot.channels or (None, None)
        x = x * alpha if slot.channels is None else torch.cat([x[:, :start], x[:, start:stop] * alpha, x[:, stop:]], 1)
    if isinstance(slot, (CopiedAffine, CopiedSkipInit)):
        x = x.clone()
    graph.output(x.node)
    return fx.GraphModule(held, graph, class_name=type(slot).__name__).train(slot.training)


def _output_(module: nn.Module) -> None:
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
