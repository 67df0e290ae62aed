"""Which norms a caller asks for: include, exclude and scope."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from normfree.analysis.findings import Findings
from normfree.errors import NoNormError, UsageError
from normfree.norms import Norm
from normfree.options import Patterns

__all__ = ["as_patterns", "kept_norms", "matches"]


def as_patterns(patterns: Patterns) -> tuple[str, ...]:
    """Return one or several patterns as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether ``name`` matches one of the shell patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def kept_norms(
    norms: dict[str, Norm],
    findings: Findings,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    scope: str,
    unknown: Iterable[str] = (),
) -> dict[str, str]:
    """Return the norms that stay, each with the reason; ``unknown`` are modules that only look like norms."""
    names = [*norms, *(total.name for total in findings.sums), *unknown]
    unused = [p for p in (*include, *exclude) if not any(fnmatchcase(name, p) for name in names)]
    if unused:
        raise UsageError(f"no norm and no sum matches {', '.join(map(repr, unused))}; norms: {_some(list(norms))}")
    inside = {name for total in findings.sums for branch in total.branches for name in branch.norms}
    kept = {}
    for name in norms:
        if include and not matches(name, include):
            kept[name] = "not in include"
        elif matches(name, exclude):
            kept[name] = "in exclude"
        elif scope == "residual" and name not in inside:
            kept[name] = "outside the residual branches"
    if len(kept) == len(norms):
        raise NoNormError(
            f"include, exclude and scope leave none of {len(norms)} norms to convert: {_some(list(norms))}"
        )
    return kept


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
