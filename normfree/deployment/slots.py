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
    held = nn.Module()
    graph = fx.Graph()
    x = given = graph.placeholder("input")
    if isinstance(slot, Copy) or getattr(slot, "copy", False):
        x = graph.call_method("clone", (x,))
    for name, combine in (("gain", operator.mul), ("bias", operator.add)):
        value = getattr(slot, name, None)
        if value is not None:
            kept = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
            held.register_parameter(name, kept)
            x = graph.call_function(combine, (x, _per_channel(graph, name, given)))
    for name in ("drop", "act"):
        module = slot._modules.get(name)
        if module is not None:
            held.add_module(name, module)
            x = graph.call_module(name, (x,))
    raw = slot._parameters.get("raw_alpha")
    if raw is not None and isinstance(slot, (SkipInit, ChannelAffine)):
        held.register_parameter("raw_alpha", nn.Parameter(raw.detach() / slot.alpha_unit, raw.requires_grad))
        x = _scaled(graph, x, slot.channels)
    if isinstance(slot, (CopiedAffine, CopiedSkipInit)):
        x = graph.call_method("clone", (x,))
    graph.output(x)
    made = fx.GraphModule(held, graph, class_name=type(slot).__name__)
    return made.train(slot.training)


def _per_channel(graph: fx.Graph, name: str, x: fx.Node) -> fx.Node:
    """Shape a vector ``(C,)`` so that it meets dimension 1 of ``x``, in the type of ``x``."""
    more = graph.call_function(operator.sub, (graph.call_method("dim", (x,)), 2))
    shape = graph.call_function(operator.add, ([-1], graph.call_function(operator.mul, ([1], more))))
    shaped = graph.call_method("reshape", (graph.get_attr(name), shape))
    return graph.call_method("to", (shaped, graph.call_function(getattr, (x, "dtype"))))


def _scaled(graph: fx.Graph, x: fx.Node, channels: tuple[int, int] | None) -> fx.Node:
    """Multiply by alpha, or only a range of channels."""
    alpha = graph.call_method("reshape", (graph.get_attr("raw_alpha"), ()))
    if channels is None:
        return graph.call_function(operator.mul, (x, alpha))
    start, stop = channels
    every = slice(None)
    before, middle, behind = (
        graph.call_function(operator.getitem, (x, (every, part)))
        for part in (slice(None, start), slice(start, stop), slice(stop, None))
    )
    middle = graph.call_function(operator.mul, (middle, alpha))
    return graph.call_function(torch.cat, ([before, middle, behind], 1))
