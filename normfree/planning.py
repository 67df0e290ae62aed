"""Findings -> Plan: every decision of a conversion is made here, and nothing is touched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from normfree.activations import gain_of
from normfree.analysis import Findings, Site, analyse
from normfree.copying import meta_copy
from normfree.errors import NoNormError, UnsupportedModelError
from normfree.guards import check_arguments, check_model, is_lazy, module_problems
from normfree.leaves import calls_batch_norm
from normfree.norms import Norm, describe, find_norms, looks_like_norm
from normfree.placing import place_alphas
from normfree.plans import Action, Init, NormEdit, Plan
from normfree.selecting import Patterns, as_patterns, kept_norms
from normfree.traces import Trace
from normfree.tracing import trace

__all__ = ["plan"]

Modules = Mapping[str, nn.Module]


def plan(
    model: nn.Module,
    *,
    init: Literal["auto", "skipinit", "preserve"] = "auto",
    alpha: float | Literal["rsqrt_depth"] | None = None,
    include: Patterns = (),
    exclude: Patterns = (),
    scope: Literal["all", "residual"] = "all",
) -> Plan:
    """Say what :func:`normfree.convert` would do, without doing it.

    Args:
        model: Any module with batch normalisation in it. It is not changed.
        init: ``"skipinit"`` to train from scratch (alpha 0, weights drawn anew), ``"preserve"`` to keep the function
            (alpha 1), ``"auto"`` for ``"preserve"`` if any norm has been trained or is frozen, else ``"skipinit"``.
        alpha: Start of every scalar instead of 0 or 1; ``"rsqrt_depth"`` is ``1 / sqrt(number of scalars)``.
        include: Shell patterns (``"layer1.*"``) of norm names; only these are converted. Default: all.
        exclude: Shell patterns of norm names that stay, or of sum names whose branches get no scalar.
        scope: ``"residual"`` converts only the norms inside residual branches.

    Raises:
        NoNormError: There is nothing to convert, or the patterns leave nothing.
        AlreadyConvertedError: The model was converted before.
        WrappedModelError: The model is wrapped in DDP, FSDP, ``torch.compile`` or is a ScriptModule.
        UnsupportedModelError: Something in the model has no exact conversion; all of it is listed.
        UsageError: An argument makes no sense.

    Example:
        >>> import normfree, torchvision
        >>> print(normfree.plan(torchvision.models.resnet18()))
        init: skipinit (no norm has been trained), alpha starts at 0
        norms: 20 (20 fold)
        sums: 8, 8 residual
        alphas: 8 placed, 0 declined
    """
    check_arguments(init, alpha, scope)
    check_model(model)
    norms = find_norms(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    described = {name: describe(modules[name]) for name in norms}
    chosen, why = _choose_init(init, described.values())
    problems = module_problems(model, described, chosen, as_patterns(exclude))
    if is_lazy(model):
        raise UnsupportedModelError(tuple(problems.values()))
    traced, findings = _look(model, norms)
    for path in traced.opaque:
        if calls_batch_norm(modules[path]):
            problems[path] = (
                f"{path or 'the root'}: cannot be traced and calls F.batch_norm; use an nn.BatchNorm module"
            )
    for place in findings.functional:
        problems[place] = f"{place}: calls F.batch_norm on an activation; use an nn.BatchNorm module there"
    if problems:
        raise UnsupportedModelError(tuple(problems.values()))
    if not norms:
        raise NoNormError(f"this {type(model).__name__} holds no batch normalisation: there is nothing to convert")
    unknown = [name for name, module in modules.items() if looks_like_norm(module)]
    kept = kept_norms(described, findings, as_patterns(include), as_patterns(exclude), scope, unknown)
    problems = {
        name: f"{name}: {tensor} is read outside of the norm, and goes with it; exclude the norm, or compute without it"
        for name, tensor in findings.read.items()
        if name not in kept
    }
    if problems:
        raise UnsupportedModelError(tuple(problems.values()))
    edits = tuple(
        _norm_edit(name, aliases, modules, findings.sites.get(name), chosen, kept.get(name), traced)
        for name, aliases in norms.items()
    )
    sums = place_alphas(findings.sums, {edit.name: edit for edit in edits}, as_patterns(exclude), modules)
    count = sum(len(total.alphas) for total in sums)
    skipinit = chosen == "skipinit"
    start = alpha if alpha is not None else (0.0 if skipinit else 1.0)
    return Plan(
        init=chosen,
        init_reason=why,
        alpha=1 / math.sqrt(max(count, 1)) if start == "rsqrt_depth" else float(start),
        norms=edits,
        sums=sums,
        biases=tuple(_biases(edits, findings, modules)) if skipinit else (),
        weights=tuple(_weights(edits, findings)) if skipinit else (),
        out_of_place=tuple(dict.fromkeys(_out_of_place(edits, findings, described))),
        opaque=tuple(traced.opaque.items()),
    )


def _look(model: nn.Module, norms: Mapping[str, tuple[str, ...]]) -> tuple[Trace, Findings]:
    """Trace and analyse a copy; the user's generator and modules stay as they are."""
    with torch.random.fork_rng(devices=[]):
        copied = meta_copy(model)
        traced = trace(copied, frozenset(name for first, more in norms.items() for name in (first, *more)))
        return traced, analyse(copied, traced, norms)


def _choose_init(init: str, norms: Iterable[Norm]) -> tuple[Init, str]:
    if init == "skipinit" or init == "preserve":
        return init, "asked for"  # type: ignore[return-value]  # narrowed by the comparison
    if any(norm.trained() for norm in norms):
        return "preserve", "norms have been trained or are frozen"
    return "skipinit", "no norm has been trained"


def _norm_edit(
    name: str,
    aliases: tuple[str, ...],
    modules: Modules,
    site: Site | None,
    init: Init,
    kept: str | None,
    traced: Trace,
) -> NormEdit:
    module = modules[name]
    edit = NormEdit(name, aliases, type(module).__name__, site.feed if site else "unknown", "keep", None, kept or "")
    if kept is not None:
        return edit
    if site is None:
        action: Action = "affine" if init == "preserve" else "bias"
        return replace(edit, action=action, reason=_why_unseen(name, traced))
    hook = _hook_between(modules, edit.name, site.producer)
    if site.producer is not None and hook is None:
        what = "gain and bias move" if init == "preserve" else "the bias moves"
        return replace(edit, action="fold", producer=site.producer, reason=f"{what} onto {site.producer}")
    action = "affine" if init == "preserve" else ("bias" if site.biasless else "delete")
    has_act = describe(module).act is not None
    copy = site.input_written or (not site.fresh and site.unsafe_write and not has_act)
    copy = copy and action == "delete"
    return replace(edit, action=action, reason=hook or site.why, copy=copy)


def _hook_between(modules: Modules, norm: str, producer: str | None) -> str | None:
    """Name the layer whose hook sees, and may change, what passes from producer to norm."""
    if producer is not None and modules[producer]._forward_hooks:
        return f"a forward hook on {producer} sees its output"
    return f"a forward pre-hook on {norm} sees its input" if modules[norm]._forward_pre_hooks else None


def _why_unseen(name: str, traced: Trace) -> str:
    around = [path for path in traced.opaque if name.startswith(f"{path}." if path else "")]
    if not around:
        return "never called"
    path = max(around, key=len)
    return f"no trace reaches it: {path or 'the root'} cannot be traced ({traced.opaque[path]})"


def _biases(edits: tuple[NormEdit, ...], findings: Findings, modules: Modules) -> Iterable[str]:
    wanted: dict[str, None] = {}
    for edit in edits:
        if edit.producer is not None:
            wanted[edit.producer] = None
        elif edit.action == "delete":
            wanted.update(dict.fromkeys(findings.sites[edit.name].feeds))
    return [path for path in wanted if getattr(modules[path], "bias", None) is None]


def _weights(edits: tuple[NormEdit, ...], findings: Findings) -> Iterable[tuple[str, float]]:
    """Layers that a norm rescaled and no norm rescales any more.

    Only where every norm goes is that known for a layer from which several norms can be reached.
    """
    kept = [edit for edit in edits if edit.action == "keep"]
    produced = {edit.producer for edit in edits if edit.producer is not None}
    for path, activation in findings.rescaled.items():
        if not kept or path in produced:
            yield path, gain_of(activation)


def _out_of_place(edits: tuple[NormEdit, ...], findings: Findings, norms: dict[str, Norm]) -> Iterable[str]:
    """Activations that would write into the input of a norm that is no longer there to copy it."""
    for edit in edits:
        site = findings.sites.get(edit.name)
        if edit.action != "delete" or site is None or site.fresh or edit.copy:
            continue  # nothing to protect, or the slot copies
        act = norms[edit.name].act
        if act is not None:
            if getattr(act, "inplace", False):
                yield f"{edit.name}.act"
        else:
            yield from site.writers
