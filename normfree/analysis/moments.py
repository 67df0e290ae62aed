"""What a layer meets on average, told by the norms of a model and not by data.

A norm hands on mean ``beta`` and variance ``gamma ** 2`` whatever comes in: a mean behind an activation is an integral
over a normal distribution, and sums, pools and concatenations pass means on (the idea of Arpit et al., ICML 2016).
The result is a choice of coordinates. Where it is a guess the function stays what it was; where nothing is known, a
layer is not centred.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from normfree.analysis.activations import Activation, as_activation
from normfree.analysis.flow import Flow, Role
from normfree.norms import Norm
from normfree.tracing.randomness import in_mode
from normfree.tracing.roles import name_of

__all__ = ["Moments", "input_moments", "known_inputs"]


@dataclass(frozen=True)
class Moments:
    """Mean and variance of every channel of an activation, each ``(C,)`` in float64."""

    mean: Tensor
    variance: Tensor


def input_moments(flow: Flow, norms: Mapping[str, Norm], paths: Iterable[str]) -> dict[str, Moments | None]:
    """Return what each of some layers whose input :func:`known_inputs` knows meets; ``None`` if it is called often.

    ``norms`` are those of the model, and ``paths`` the layers.
    """
    wanted, known = set(paths), dict[fx.Node, Moments | None]()
    found: dict[str, Moments | None] = {}
    for node in flow.nodes:
        inputs = [known[source] for source in flow.inputs[node]]
        known[node] = _moments(flow, norms, node, inputs)
        if node.op == "call_module" and str(node.target) in wanted:
            found[str(node.target)] = None if str(node.target) in found else inputs[0]
    return found


def known_inputs(flow: Flow) -> dict[str, bool]:
    """Return the layers whose input norms tell, each with whether any norm follows it: a head has none behind it."""
    known: dict[fx.Node, bool] = {}
    norms = sum(flow.bit(node) for node in flow.nodes if flow.roles[node] is Role.NORM)
    found: dict[str, bool] = {}
    for node in flow.nodes:
        sources = [known[source] for source in flow.inputs[node]]
        enough = any if flow.roles[node] is Role.MUL else all
        known[node] = flow.roles[node] is Role.NORM or (_hands_on(flow, node) and enough(sources))
        if flow.carries(node) and flow.called_once(node) and sources and sources[0]:
            found[str(node.target)] = found.get(str(node.target), False) or bool(flow.descendants[node] & norms)
    return found


_HANDING_ON = {Role.PASS, Role.RESHAPE, Role.POOL, Role.PAD, Role.UPSAMPLE, Role.ADD, Role.CAT, Role.MUL}


def _hands_on(flow: Flow, node: fx.Node) -> bool:
    """Whether the moments of what a node returns follow from those of what it is given."""
    name, role = name_of(node), flow.roles[node]
    if role in _HANDING_ON:  # but for a factor that the graph does not tell
        return "lerp" not in name and not (role is Role.PASS and name in ("mul", "div", "neg"))
    return name == "mean" or as_activation(flow, node) is not None


def _moments(flow: Flow, norms: Mapping[str, Norm], node: fx.Node, inputs: list[Moments | None]) -> Moments | None:
    role, known = flow.roles[node], [moments for moments in inputs if moments is not None]
    if role is Role.NORM:
        return _normed(norms.get(str(node.target)))
    if not known or not _hands_on(flow, node):
        return None
    if role is Role.MUL:  # a gate is half open: what squeeze-and-excitation multiplies by is a sigmoid
        return Moments(known[0].mean / 2, known[0].variance / 4) if len(known) == 1 else None
    if len(known) < len(inputs):
        return None
    if role is Role.ADD:
        return _added(known, mean=name_of(node) == "mean")
    if role is Role.CAT:
        return Moments(torch.cat([m.mean for m in known]), torch.cat([m.variance for m in known]))
    if role is Role.PAD:  # what adds channels says nothing of them
        shape = flow.shape(node)
        return known[0] if not shape or shape[1:2] in ((), (len(known[0].mean),)) else None
    function = as_activation(flow, node)
    return known[0] if function is None else _through(function, known[0])


def _normed(norm: Norm | None) -> Moments | None:
    if norm is None or norm.mean is None or norm.mean.is_meta:
        return None
    ones = torch.ones(norm.features, dtype=torch.float64)
    mean = torch.zeros_like(ones) if norm.bias is None else norm.bias.detach().double().cpu()
    scale = ones if norm.weight is None else norm.weight.detach().double().cpu()
    handed = Moments(mean, scale.square())
    return handed if norm.act is None else _through(norm.act, handed)


def _added(known: list[Moments], *, mean: bool) -> Moments | None:
    if len({len(m.mean) for m in known}) != 1:
        return None
    factor = (2.0 if len(known) == 1 else 1.0) / (len(known) if mean else 1)  # one alone is x + x
    total = sum(m.mean for m in known), sum(m.variance for m in known)
    return Moments(torch.as_tensor(total[0]) * factor, torch.as_tensor(total[1]) * factor**2)


def _through(function: Activation, given: Moments) -> Moments | None:
    """Return the moments of ``function`` of a normal variable, by the midpoint rule on 129 points of [-5, 5]."""
    z = torch.linspace(-5, 5, 129, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    density /= density.sum()
    points = given.mean[:, None] + given.variance.sqrt()[:, None] * z
    still = in_mode(function, training=False) if isinstance(function, nn.Module) else contextlib.nullcontext()
    try:
        with torch.no_grad(), still:
            values = function(points.reshape(1, len(points), 1, -1).float()).double().reshape(points.shape)
    except Exception:  # whatever an activation of the user's own raises: then nothing is known
        return None
    mean = (values * density).sum(1)
    variance = (values.square() * density).sum(1) - mean.square()
    known = bool(torch.isfinite(mean).all() and torch.isfinite(variance).all())
    return Moments(mean, variance.clamp_min(0)) if known else None
