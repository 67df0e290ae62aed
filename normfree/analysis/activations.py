"""Activations, told by what they do to a tensor and not by their name.

An operation is an activation if it is elementwise; its gain is an integral over a standard normal. So an activation
nobody here has heard of gets the right initialisation too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from normfree.analysis.flow import Flow, Role
from normfree.analysis.joining import call
from normfree.tracing.roles import elementwise

__all__ = ["Activation", "as_activation", "following", "gain_of"]

Activation = Callable[[Tensor], Tensor]
# What hands a signal on without weights: a product is one with a gate.
_TRANSPARENT = {Role.NORM, Role.PASS, Role.RESHAPE, Role.POOL, Role.PAD, Role.UPSAMPLE, Role.SLICE, Role.SPLIT}
_TRANSPARENT |= {Role.ADD, Role.MUL, Role.CAT}


def as_activation(flow: Flow, node: fx.Node) -> Activation | None:
    """Return an elementwise operation of one tensor as a function, or ``None`` if ``node`` is something else."""
    if flow.roles[node] is not Role.OTHER or len(flow.inputs[node]) != 1:
        return None
    module = flow.module(node)
    if module is not None:
        if any(True for _ in module.children()) or any(True for _ in module.parameters()):
            return None
        function: Activation = module
        told: tuple[object, ...] = type(module), repr(module)
    elif len(node.args) != 1 or any(isinstance(v, fx.Node) for v in node.kwargs.values()):
        return None
    else:
        function, told = (lambda x: call(node, {flow.inputs[node][0]: x})), (node.target, repr(node.kwargs))
    return function if flow.once(("elementwise", *told), lambda: elementwise(function)) else None


def following(flow: Flow, node: fx.Node) -> Activation | None:
    """Return the nearest activation behind ``node``, seen through norms, sums and whatever else computes no weights.

    The last convolution of a residual branch is followed by what follows the sum, at once or in the next block.
    """
    reached, seen = deque([node]), {node}
    while reached:
        for user in flow.users[reached.popleft()]:
            function = flow.activation_in(user) if flow.roles[user] is Role.NORM else as_activation(flow, user)
            if function is not None:
                return function
            if user not in seen and flow.roles[user] in _TRANSPARENT:
                seen.add(user)
                reached.append(user)
    return None


@functools.cache
def _normal() -> tuple[Tensor, Tensor]:
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64).reshape(1, 1, -1, 1)
    return z, torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


def gain_of(activation: Activation | None) -> float:
    """Return ``1 / sqrt(E[f(z)^2])`` for a standard normal ``z``: the factor that keeps the second moment at one.

    He et al. (2015, section 2.2) derive it for ReLU: ``E[relu(z)^2] = 1/2``, so the gain is ``sqrt(2)``. Here the
    integral is taken numerically (trapezoid rule on [-8, 8], error below 1e-5), so that it holds for any ``f``:
    1.4142 for ReLU, 1.6765 for SiLU, 1.5335 for GELU, 1 for none.
    """
    if activation is None:
        return 1.0
    z, density = _normal()
    if isinstance(activation, nn.Module):
        activation = copy.copy(activation).eval()  # RReLU draws its slopes in train mode, and a plan draws nothing
    with torch.no_grad():
        value = z
        for given in (z.clone(), z.float()):  # some custom activations take float32 only, some none of such a shape
            with contextlib.suppress(Exception):
                value = activation(given).double()
                break
    moment = float(torch.trapezoid((value.square() * density).flatten(), z.flatten()))
    return 1 / math.sqrt(moment) if math.isfinite(moment) and moment > 0 else 1.0
