"""Findings -> Plan: every decision of a conversion is made here, and nothing is touched."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from normfree.analysis.activations import gain_of
from normfree.analysis.findings import Findings, Site
from normfree.code.weights import read_elsewhere
from normfree.edits import UNSEEN, Action, Carried, Init, NormEdit, Units
from normfree.errors import NoNormError, UnsupportedModelError, UsageError, some
from normfree.layers import is_carrier
from normfree.norms import describe, looks_like_norm
from normfree.options import Options, matches
from normfree.planning.hooks import may_be_absorbed
from normfree.planning.placing import place_alphas
from normfree.plans import Plan
from normfree.tracing.traces import Trace

__all__ = ["UNITS", "Request", "decide"]

Modules = Mapping[str, nn.Module]
_Apart = Mapping[str, set[int]]
UNITS: Mapping[Init, Units] = {
    "skipinit": Units(),
    "preserve": Units(weight=2.0, filter=1.0, mean=4.0, bias=2.0, alpha=4.0, head=4.0),
}
"""The coordinates of each starting point."""


@dataclass(frozen=True)
class Request:
    """What is asked for, of which model.

    Attributes:
        modules: The modules of the model, under every name.
        norms: The first name of every norm with its further names.
        init: The starting point.
        init_reason: Why it is that one.
        options: What else the caller says.
    """

    modules: Modules
    norms: Mapping[str, tuple[str, ...]]
    init: Init
    init_reason: str
    options: Options


def decide(asked: Request, traced: Trace, findings: Findings) -> Plan:
    """Return the plan.

    Raises:
        NoNormError: The patterns leave nothing.
        UnsupportedModelError: A forward reads a tensor of a norm that goes.
    """
    modules, skipinit, options = asked.modules, asked.init == "skipinit", asked.options
    kept = _kept(asked, findings)
    problems = tuple(
        f"{name}: {tensor} is read outside of the norm, and goes with it; exclude the norm, or compute without it"
        for name, tensor in findings.read.items()
        if name not in kept
    )
    if problems:
        raise UnsupportedModelError(problems)
    apart = {} if skipinit else read_elsewhere(modules[""], findings.parameters)
    edits = tuple(
        _norm_edit(name, asked, findings.sites.get(name), kept.get(name), traced, apart) for name in asked.norms
    )
    produced = dict.fromkeys(edit.producer for edit in edits if edit.producer is not None)
    sums = place_alphas(findings.sums, {edit.name: edit for edit in edits}, options.exclude, modules, skipinit)
    count = sum(len(total.alphas) for total in sums)
    start = options.alpha if options.alpha is not None else (0.0 if skipinit else 1.0)
    return Plan(
        init=asked.init,
        init_reason=asked.init_reason,
        alpha=1 / math.sqrt(max(count, 1)) if start == "rsqrt_depth" else float(start),
        norms=edits,
        sums=sums,
        biases=tuple(_biases(edits, findings, modules)) if skipinit else (),
        weights=tuple(_weights(produced, findings, whole=not kept)) if skipinit else (),
        carried=() if skipinit else tuple(_carried(produced, findings, modules, apart, whole=not kept)),
        units=UNITS[asked.init],
        out_of_place=tuple(dict.fromkeys(_out_of_place(edits, findings, asked))),
        opaque=(("", traced.unseen),) if traced.unseen else (),
        looked=traced.looked if traced.graphs else "",
        reset=options.reset,
        inplace_activations=options.inplace_activations,
    )


def _kept(asked: Request, findings: Findings) -> dict[str, str]:
    """Return the norms that stay, each with the reason."""
    norms, options = list(asked.norms), asked.options
    unknown = (name for name, module in asked.modules.items() if looks_like_norm(module))
    names = [*norms, *(total.name for total in findings.sums), *unknown]
    unused = [p for p in (*options.include, *options.exclude) if not any(matches(name, (p,)) for name in names)]
    if unused:
        raise UsageError(f"no norm and no sum matches {', '.join(map(repr, unused))}; norms: {some(norms)}")
    inside = {name for total in findings.sums for branch in total.branches for name in branch.norms}
    kept = {}
    for name in norms:
        if options.include and not matches(name, options.include):
            kept[name] = "not in include"
        elif matches(name, options.exclude):
            kept[name] = "in exclude"
        elif options.scope == "residual" and name not in inside:
            kept[name] = "outside the residual branches"
    if len(kept) == len(norms):
        raise NoNormError(f"include, exclude and scope leave none of {len(norms)} norms to convert: {some(norms)}")
    return kept


def _norm_edit(
    name: str, asked: Request, site: Site | None, kept: str | None, traced: Trace, apart: _Apart
) -> NormEdit:
    preserve, inplace, kind = asked.init == "preserve", asked.options.inplace_activations, type(asked.modules[name])
    feed = UNSEEN if site is None else site.feed
    edit = NormEdit(name, asked.norms[name], kind.__name__, feed, "keep", None, kept or "")
    if kept is not None:
        return edit
    if site is None:
        why = "never called" if traced.graphs else f"the model was not seen running: {traced.unseen}"
        return replace(edit, action="affine" if preserve else "bias", reason=why, copy=not inplace)
    if site.producer is not None:
        what = f"{site.producer} takes gain and bias" if preserve else f"the bias moves onto {site.producer}"
        edit = replace(edit, action="fold", producer=site.producer, reason=what, through=site.between)
        weight = describe(asked.modules[name]).weight  # the last norm of a branch often starts at zero
        closed = preserve and weight is not None and not weight.is_meta and bool((weight == 0).any())
        return replace(edit, copy=site.unsafe_write and not inplace, gain_learns=closed)
    action: Action = "affine" if preserve or site.scaleless else ("bias" if site.biasless else "delete")
    written = site.unsafe_write and not inplace
    if action == "delete":
        has_act = describe(asked.modules[name]).act is not None
        written = site.input_written or ((written or (not site.fresh and site.unsafe_write)) and not has_act)
    taker = site.taker if preserve and not written else None
    if taker is not None and may_be_absorbed(asked.modules, name, taker, apart["weight"] | apart["bias"]):
        edit = replace(edit, into=taker.path, through=taker.behind + taker.through, moves=taker.moves)
    return replace(edit, action=action, reason=site.why, copy=written)


def _biases(edits: tuple[NormEdit, ...], findings: Findings, modules: Modules) -> Iterable[str]:
    wanted: dict[str, None] = {}
    for edit in edits:
        if edit.producer is not None:
            wanted[edit.producer] = None
        elif edit.action == "delete":
            wanted.update(dict.fromkeys(findings.sites[edit.name].feeds))
    return [path for path in wanted if getattr(modules[path], "bias", None) is None]


def _weights(produced: Collection[str], findings: Findings, *, whole: bool) -> Iterable[tuple[str, float]]:
    """Layers that a norm rescaled and no norm rescales any more.

    Only where every norm goes (``whole``) is that known for a layer from which several norms can be reached.
    """
    for path, activation in findings.rescaled.items():
        if whole or path in produced:
            yield path, gain_of(activation)


def _carried(
    produced: Collection[str], findings: Findings, modules: Modules, apart: _Apart, *, whole: bool
) -> Iterable[Carried]:
    """Layers that learn in units: those behind which a norm was, at once or further down, and those the last feed.

    A weight, or a bias, that somebody else uses too stays what it is.
    """
    rescaled = findings.rescaled if whole else {}
    heads = [path for path, followed in findings.known.items() if whole and not followed]
    for path in dict.fromkeys([*produced, *rescaled, *heads]):
        layer = modules[path]
        if path not in produced and (path in findings.fixed or not is_carrier(layer)):
            continue
        own = id(layer) not in apart["weight"]
        head = path not in produced and path not in rescaled
        centred = own and path in findings.known and not getattr(layer, "transposed", False)
        if own or path in produced:
            unit, mean_unit = _units(layer) if own and not head else (1.0, 1.0)
            keeps = path in produced and layer.bias is not None and id(layer) in apart["bias"]
            yield Carried(path, unit, centred, head, mean_unit, keeps)


def _units(layer: Any) -> tuple[float, float]:
    """Return the unit of a layer's weight, and that of its filters' means over that."""
    units = UNITS["preserve"]
    if layer.weight[0, 0].numel() == 1 or getattr(layer, "transposed", False):
        return units.weight, 1.0
    return units.filter, units.mean / units.filter


def _out_of_place(edits: tuple[NormEdit, ...], findings: Findings, asked: Request) -> Iterable[str]:
    """Activations that would write into the input of a norm that is no longer there to copy it, or all of them."""
    if not asked.options.inplace_activations:
        own = ((m, name) for name, m in asked.modules.items() if not isinstance(m, torch.jit.ScriptModule))
        yield from {m: name for m, name in own if getattr(m, "inplace", False) is True}.values()
        return
    for edit in edits:
        site = findings.sites.get(edit.name)
        if edit.action != "delete" or site is None or site.fresh or edit.copy:
            continue  # nothing to protect, or the slot copies
        act = describe(asked.modules[edit.name]).act
        if act is not None:
            if getattr(act, "inplace", False):
                yield f"{edit.name}.act"
        else:
            yield from site.writers
