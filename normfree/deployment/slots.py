"""What stays in the slots of a fused model, in torch alone: a program whose source is pickled with it.

A model that is pickled whole can then be read where this package is not installed.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from normfree.layers import ChannelAffine, CopiedAffine, CopiedSkipInit, Copy, SkipInit

__all__ = ["in_torch_alone"]


def in_torch_alone(slot: nn.Module) -> nn.Module:
    """Return a program that does what ``slot`` does, with its parameters under the same names.

    Args:
        slot: A :class:`ChannelAffine`, :class:`SkipInit` or :class:`Copy`.
    """
    held, graph = nn.Module(), fx.Graph()
    x = given = fx.Proxy(graph.placeholder("input"))
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
