"""What a layer meets on average, told by the norms of a model and not by data.

A norm hands on mean ``beta`` and variance ``gamma ** 2`` whatever comes in: a mean behind an activation is an integral
over a normal distribution, and sums, pools and concatenations pass means on (the idea of Arpit et al., ICML 2016).
The result is a choice of coordinates. Where it is a guess the function stays what it was; where nothing is known, a
layer is not centred.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from normfree.analysis.activations import Activation, as_activation
from normfree.analysis.flow import Flow, Role
from normfree.norms import Norm
from normfree.tracing.roles import name_of

__all__ = ["Moments", "input_moments", "known_inputs", "norm_of"]


@dataclass(frozen=True)
class Moments:
    """Mean and variance of every channel of an activation, each ``(C,)`` in float64."""

    mean: Tensor
    variance: Tensor


def input_moments(flow: Flow, norms: Mapping[str, Norm], paths: Iterable[str]) -> dict[str, Moments | None]:
    """Return what each of these layers meets, by its path; ``None`` where several calls differ.

    Args:
        flow: The graph.
        norms: The norms of the model by name.
        paths: Layers whose input :func:`known_inputs` knows.
    """
    wanted, memo = set(paths), dict[fx.Node, Moments | None]()
    found: dict[str, Moments | None] = {}
    for node in flow.nodes:
        if node.op == "call_module" and str(node.target) in wanted:
            path = str(node.target)
            found[path] = None if path in found else _moments(flow, norms, flow.inputs[node][0], memo)
    return found


def known_inputs(flow: Flow) -> dict[str, bool]:
    """Return the layers whose input norms tell, each with whether any norm follows it: a head has none behind it."""
    known: dict[fx.Node, bool] = {}
    norms = sum(flow.bit(node) for node in flow.nodes if flow.roles[node] is Role.NORM)
    found: dict[str, bool] = {}
    for node in flow.nodes:
        sources = [known.get(source, False) for source in flow.inputs[node]]
        rule = _rule(flow, node)
        known[node] = rule is _norm or (
            rule is not None and bool(sources) and (any if rule is _gated else all)(sources)
        )
        if flow.carries(node) and flow.called_once(node) and sources and sources[0]:
            found[str(node.target)] = found.get(str(node.target), False) or bool(flow.descendants[node] & norms)
    return found


Rule = Callable[[Flow, Mapping[str, Norm], fx.Node, list[Moments | None]], Moments | None]


def _moments(
    flow: Flow, norms: Mapping[str, Norm], end: fx.Node, memo: dict[fx.Node, Moments | None]
) -> Moments | None:
    """Return the moments of what a node returns; without recursion, since networks are deep."""
    stack = [end]
    while stack:
        node = stack[-1]
        rule = _rule(flow, node)
        missing = [s for s in flow.inputs[node] if s not in memo] if rule not in (None, _norm) else []
        if missing:
            stack += missing
            continue
        memo[stack.pop()] = None if rule is None else rule(flow, norms, node, [memo.get(s) for s in flow.inputs[node]])
    return memo[end]


def _rule(flow: Flow, node: fx.Node) -> Rule | None:
    """Return how the moments of a node follow from those of its inputs."""
    rule = _RULES.get(flow.roles[node])
    if rule is not None:
        constant = flow.roles[node] is Role.PASS and name_of(node) in ("mul", "div", "neg")
        return None if constant or "lerp" in name_of(node) else rule  # a factor that the graph does not tell
    if name_of(node) == "mean":
        return _same
    return _activated if as_activation(flow, node) is not None else None


def _norm(_flow: Flow, norms: Mapping[str, Norm], node: fx.Node, _: list[Moments | None]) -> Moments | None:
    norm = norms.get(str(node.target))
    if norm is None or norm.mean is None or norm.mean.is_meta:
        return None
    ones = torch.ones(norm.features, dtype=torch.float64)
    mean = torch.zeros_like(ones) if norm.bias is None else norm.bias.detach().double().cpu()
    scale = ones if norm.weight is None else norm.weight.detach().double().cpu()
    handed = Moments(mean, scale.square())
    return handed if norm.act is None else _through(norm.act, handed)


def _same(_: Flow, __: Mapping[str, Norm], ___: fx.Node, inputs: list[Moments | None]) -> Moments | None:
    return inputs[0]


def _padded(flow: Flow, _: Mapping[str, Norm], node: fx.Node, inputs: list[Moments | None]) -> Moments | None:
    """What adds channels says nothing of them."""
    shape = flow.shape(node)
    wide = len(shape) > 1 and shape[1] if shape else None
    return inputs[0] if inputs[0] is not None and wide in (None, len(inputs[0].mean)) else None


def _added(_: Flow, __: Mapping[str, Norm], node: fx.Node, inputs: list[Moments | None]) -> Moments | None:
    known = [m for m in inputs if m is not None]
    if len(known) != len(inputs) or len({len(m.mean) for m in known}) != 1:
        return None
    factor = 2.0 if len(known) == 1 else 1.0  # x + x
    factor /= len(known) if name_of(node) == "mean" else 1
    mean, variance = sum(m.mean for m in known), sum(m.variance for m in known)
    return Moments(torch.as_tensor(mean) * factor, torch.as_tensor(variance) * factor**2)


def _joined(_: Flow, __: Mapping[str, Norm], ___: fx.Node, inputs: list[Moments | None]) -> Moments | None:
    known = [m for m in inputs if m is not None]
    if len(known) != len(inputs):
        return None
    return Moments(torch.cat([m.mean for m in known]), torch.cat([m.variance for m in known]))


def _gated(_: Flow, __: Mapping[str, Norm], ___: fx.Node, inputs: list[Moments | None]) -> Moments | None:
    """A gate is half open: what squeeze-and-excitation multiplies by is a sigmoid."""
    known = [m for m in inputs if m is not None]
    return Moments(known[0].mean / 2, known[0].variance / 4) if len(known) == 1 else None


def _activated(flow: Flow, _: Mapping[str, Norm], node: fx.Node, inputs: list[Moments | None]) -> Moments | None:
    function = as_activation(flow, node)
    return None if function is None or inputs[0] is None else _through(function, inputs[0])


_RULES: dict[Role, Rule] = {
    Role.NORM: _norm,
    Role.PASS: _same,
    Role.RESHAPE: _same,
    Role.POOL: _same,
    Role.PAD: _padded,
    Role.UPSAMPLE: _same,
    Role.ADD: _added,
    Role.CAT: _joined,
    Role.MUL: _gated,
}


def _through(function: Activation, given: Moments) -> Moments | None:
    """Return the moments of ``function`` of a normal variable, by the midpoint rule on 129 points of [-5, 5]."""
    z = torch.linspace(-5, 5, 129, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    density /= density.sum()
    points = given.mean[:, None] + given.variance.sqrt()[:, None] * z
    if isinstance(function, nn.Module):
        training = function.training
        function.eval()
    try:
        with torch.no_grad():
            values = function(points.reshape(1, len(points), 1, -1).float()).double().reshape(points.shape)
    except Exception:  # whatever an activation of the user's own raises: then nothing is known
        return None
    finally:
        if isinstance(function, nn.Module):
            function.train(training)
    mean = (values * density).sum(1)
    variance = (values.square() * density).sum(1) - mean.square()
    known = bool(torch.isfinite(mean).all() and torch.isfinite(variance).all())
    return Moments(mean, variance.clamp_min(0)) if known else None


def norm_of(variance: Tensor, times: int) -> float:
    """Return the norm of what has this variance in each of its channels, at so many places each."""
    return math.sqrt(float(variance.sum()) * times)
