"""Sums -> where each scalar goes: the cheapest place that every edit of a norm leaves free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from normfree.analysis.findings import Branch, Sum
from normfree.analysis.tails import Candidate
from normfree.edits import Alpha, NormEdit, SumEdit
from normfree.layers import skipinit_name
from normfree.options import Patterns, matches

__all__ = ["place_alphas"]

Modules = Mapping[str, nn.Module]


def place_alphas(
    sums: tuple[Sum, ...], norms: dict[str, NormEdit], exclude: Patterns, modules: Modules, vanish: bool
) -> tuple[SumEdit, ...]:
    """Decide for every sum where the scalars of its branches live, or why they have none.

    Args:
        sums: What the analysis found.
        norms: What becomes of each norm; a branch that keeps all of its norms needs no scalar.
        exclude: Patterns of sum names that get none.
        modules: The modules of the model by name.
        vanish: Whether nothing stays where a norm is folded, so that a weight in front of it may take the scalar.
    """
    scaled = [
        branch
        for total in sums
        if not matches(total.name, exclude)
        for branch in total.branches
        if _loses_a_norm(branch, norms)
    ]
    ends = Counter(candidate for branch in scaled for candidate in set(branch.candidates))
    taken: dict[str, Alpha] = {}
    edits = []
    for total in sums:
        alphas, declined, reason = [], [], total.reason
        for branch in total.branches:
            if not _loses_a_norm(branch, norms):
                reason = f"{total.reason}; no norm was removed from its branch or behind it, so it needs no scalar"
                continue
            if matches(total.name, exclude):
                reason = f"{total.reason}; its scalar is excluded by name"
                continue
            whole = [candidate for candidate in branch.candidates if ends[candidate] >= candidate.calls]
            alpha = _place(whole, norms, modules, taken, ("fold", "delete") if vanish else ("delete",))
            if alpha is None:
                serves = "no place takes the scalar: what ends the branch serves something else too"
                declined.append(branch.why or serves)
            else:
                taken[alpha.holder] = alpha
                alphas.append(alpha)
        edits.append(SumEdit(total.name, total.kind, reason, tuple(alphas), tuple(declined)))
    return tuple(edits)


def _loses_a_norm(branch: Branch, norms: Mapping[str, NormEdit]) -> bool:
    return any(norms[name].action != "keep" for name in branch.norms + branch.behind)


def _place(
    candidates: Iterable[Candidate],
    norms: Mapping[str, NormEdit],
    modules: Modules,
    taken: Mapping[str, Alpha],
    passed: tuple[str, ...],
) -> Alpha | None:
    """Take the cheapest candidate: a weight, then the slot of a norm, an identity, and any module's output last.

    A module that is called several times ends as many branches, and has one scalar for all of them. A scalar passes
    norms that become one of ``passed``.
    """
    options = []
    for candidate in candidates:
        vanish = all(norms[name].action in passed for name in candidate.through)
        if candidate.place == "norm" and norms[candidate.path].action == "keep":
            candidate = replace(candidate, place="output")
        hooked = any(modules[path]._forward_hooks for path in (candidate.path, *candidate.through))
        alpha = Alpha(candidate.path, candidate.place, candidate.channels, candidate.addition, candidate.operand)
        shared = candidate.calls > 1 and taken.get(alpha.holder) == alpha
        if vanish and not hooked and (shared or _is_free(candidate, taken)):
            options.append(alpha)
    return min(options, key=lambda a: ("weight", "norm", "slot", "output", "sum").index(a.place), default=None)


def _is_free(candidate: Candidate, taken: Mapping[str, Alpha]) -> bool:
    """One scalar a place; a block's own class can change once, for its output or for the sums in its forward."""
    if candidate.place == "sum":
        return candidate.path not in taken and f"{candidate.path}.{skipinit_name(candidate.addition)}" not in taken
    return not any(path == candidate.path or path.startswith(f"{candidate.path}.skipinit_") for path in taken)
